"""The CUDA sources without a GPU: csrc/ops_cuda.cu, kernels and host code, compiled for the CPU by
tests/emulator/, so that what they compute and what they touch is tested on every machine.

A test whose device is one of GPU runs once so ("emulated") and once on a GPU where there is one ("cuda");
it finds the operators as ever in torch.ops.tg (`place`). The emulator sees what a GPU hides: races,
uninitialised and outside accesses, missing barriers, wrong streams (emulator.cpp). It does not see speed,
cuBLAS, or a GPU's rounding of what the kernels leave to a library.
"""

import ctypes
import functools
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from transport_geometry import ROOT, kernels

import pytest
import torch

CSRC = ROOT / "csrc"
EMULATOR = pathlib.Path(__file__).resolve().parent / "emulator"
INCLUDE, LIB = (pathlib.Path(torch.__file__).parent / name for name in ("include", "lib"))
COMPILE = ["g++", "-std=c++20", "-g1", "-fPIC", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-w", "-c"]
WATCHED = ["-fsanitize=thread,alignment"]


@functools.cache
def why_not() -> str:
    """Why the emulator cannot be built, or "". Only the sanitizers' hooks are needed, not their libraries."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "the emulator needs Linux and g++"
    command = [*COMPILE, *WATCHED, "-x", "c++", "-", "-o", "/dev/null"]
    done = subprocess.run(command, input=b"", capture_output=True)
    return "" if done.returncode == 0 else f"the emulator needs a g++ with {WATCHED[0]}"


CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not (torch.cuda.is_available() and "cuda" in kernels.DEVICES),
        reason="no GPU, or built without CUDA",
    ),
)
EMULATED = pytest.param("emulated", marks=pytest.mark.skipif(bool(why_not()), reason=why_not()))
GPU = [EMULATED, CUDA]


def rewritten(text: str, namespace: str, **constants: int) -> str:
    """The source with what no macro can stand for: where the operators are registered, which pointers they
    hand to kernels; and with other tiles, so that small operands meet several."""
    for old, new in (
        ("STABLE_TORCH_LIBRARY_IMPL(tg, CUDA, m)", f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m)"),
        ("torch::stable::accelerator::DeviceGuard", "emulated::Guard"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    text, n = re.subn(r"(\w+)\.(const|mutable)_data_ptr\(\)", r"emulated::\2_data_ptr(\1)", text)
    assert n
    for name, value in constants.items():
        text, n = re.subn(rf"\b{name} = \w+", f"{name} = {value}", text)
        assert n == 1, name
    return text


SCREEN = torch.library.Library("aten", "IMPL")  # kept alive: what it registers goes with it
noise = torch.Generator().manual_seed(0)


def screen(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
    """bfloat16 GEMM into float32, which torch has on GPUs only: wrong by what the encoder grants it, up or
    down anew each time, and without what float32 cannot hold in full precision."""
    a, b = a.double(), b.double()
    off = (len(b) + 7) * 2.0**-21 * a.norm(dim=1)[:, None] * b.norm(dim=0)
    wrong = a @ b + off * torch.randn(off.shape, generator=noise).sign()
    return out.copy_(wrong.masked_fill_(wrong.abs() < 2.0**-126, 0))


SCREEN.impl("mm.dtype_out", screen, "CPU")


class Emulated:
    """The operators of `source` as torch.ops.NAMESPACE, and the order in which their threads run."""

    def __init__(self, source: str, namespace: str, **constants: int):
        compiled, library = (f"{folder().name}/{namespace}.{end}" for end in ("o", "so"))
        lines = f'#line 1 "{CSRC}/ops_cuda.cu"\n{rewritten(source, namespace, **constants)}'
        flags = ["-O1", "-ffp-contract=off", *WATCHED, "-DUSE_CUDA", f"-I{EMULATOR}", f"-I{CSRC}"]
        flags += ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-isystem", str(INCLUDE), "-x", "c++", "-"]
        subprocess.run([*COMPILE, *flags, "-o", compiled], input=lines.encode(), check=True)
        # of what both have of the standard library the first one's is taken: not the watched one
        link = ["g++", "-shared", "-Wl,-Bsymbolic", runtime(), compiled, "-o", library, f"-L{LIB}"]
        subprocess.run([*link, "-ltorch_cpu", "-ltorch", "-lc10"], check=True)
        self.definitions = torch.library.Library(namespace, "DEF")
        for schema in re.findall(r'm\.def\("(.*?)"\);', (CSRC / "ops.cpp").read_text(), re.DOTALL):
            self.definitions.define(re.sub(r'"\s*"', "", schema))
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(library)
        self.ops = getattr(torch.ops, namespace)

    def schedule(self, seed: int = 0, every: int = 0) -> None:
        """Threads and blocks in an order drawn from `seed` (0: their own), and every so many accesses, on
        average, a switch to another thread (0: only where one waits)."""
        self.library.schedule(ctypes.c_uint64(seed), ctypes.c_uint64(every))


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def runtime() -> str:
    """Its object file, compiled once."""
    made = f"{folder().name}/emulator.o"
    subprocess.run([*COMPILE, "-O2", EMULATOR / "emulator.cpp", "-o", made], check=True)
    return made


@functools.cache
def emulated(**constants: int) -> Emulated:
    """The source as it stands but for `constants`, compiled once."""
    name = "_".join(["tg_emulated", *(str(value) for value in constants.values())])
    return Emulated((CSRC / "ops_cuda.cu").read_text(), name, **constants)


def place(device: str, monkeypatch: pytest.MonkeyPatch, **constants: int) -> tuple[str, Emulated | None]:
    """The torch device where a test's tensors go, and the emulator where that now serves torch.ops.tg."""
    if device != "emulated":
        return device, None
    own = emulated(**constants)
    own.schedule()
    monkeypatch.setattr(torch.ops, "tg", own.ops)
    return "cpu", own
