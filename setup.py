"""Builds csrc into the extension `transport_geometry._kernels`; pyproject.toml says the rest.

It is built against the torch that is installed, or the tested one where none is.

    pip install -e . -c constraints.txt      REQUIRE_KERNELS=1: a failing build is an error, no warning

Where torch is already installed the build takes that one. Else pip fetches one for the build and another copy
for the environment: on Linux, from PyPI, CUDA's of 5 GB each. (docs/install.md)
"""

import hashlib
import os
import pathlib
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable

from setuptools import Extension, setup

ROOT = pathlib.Path(__file__).resolve().parent
GOES_ON = "The install goes on, and plain PyTorch does that work: same numbers, slower."
# the line of a log that says why: a compiler's, a linker's, a shell's
REASON = re.compile(r"\berrors?:|\bfatal\b|cannot find|not found|No such file|undefined reference")
# pip's build isolation hides the environment's own torch: look for it there
sys.path.append(sysconfig.get_path("purelib"))
try:
    import torch
    from torch.utils import cpp_extension

    needs = []
except ImportError:
    # pip fetches these into the build environment and runs this file again
    torch, needs = None, ["torch==2.13.0", "ninja"]


def recorded(build: Callable[[], None]) -> tuple[Exception | None, str]:
    """What `build` raised, and all that it and the compilers that it starts wrote, shown when it is over."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        error = None
        try:
            for stream, _ in kept:
                os.dup2(log.fileno(), stream)
            build()
        except Exception as raised:
            error = raised
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, shown in kept:
                os.dup2(shown, stream)
                os.close(shown)
        log.seek(0)
        said = log.read()
    print(said, end="")
    return error, said


def reason(error: Exception, said: str) -> str:
    """Of a failed build, in one line: what a compiler complained of first, else what was raised."""
    found = [line for line in said.splitlines() if REASON.search(line)]
    return " ".join((found[0] if found else str(error) or type(error).__name__).split())[:500]


commands, extensions = {}, []
if torch:
    import pybind11  # pyproject.toml asks for it

    sources = sorted(p for p in (ROOT / "csrc").glob("*") if p.suffix in (".cpp", ".cu", ".h"))
    # kernels.py compares
    source = hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[:12]
    # not is_available(): a build node has no GPU
    with_cuda = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;9.0+PTX")

    def kernels(cuda: bool) -> Extension:
        devices = "cpu+cuda " + os.environ.get("TORCH_CUDA_ARCH_LIST", "native") if cuda else "cpu"
        common = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
        flags = [*common, f'-DBUILD_DEVICES="{devices}"', f'-DBUILD_SOURCE="{source}"']
        make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
        return make(
            "transport_geometry._kernels",
            ["csrc/ops.cpp", "csrc/encode.cpp"] + ["csrc/ops_cuda.cu"] * cuda,
            include_dirs=[pybind11.get_include()],
            depends=[f"csrc/{p.name}" for p in sources],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--fmad=false", *common[3:], "-DUSE_CUDA"]},
        )

    extensions = [kernels(with_cuda)]

    class Build(cpp_extension.BuildExtension):
        """Where nvcc or CUDA's libraries fail, the CPU's kernels alone; without a working compiler none, and
        the install goes on. pip shows nothing of it: kernels.py says at the start of every run what is in the
        note left here.
        """

        def run(self):
            extension = pathlib.Path(self.get_ext_fullpath("transport_geometry._kernels"))
            note = extension.with_name("_kernels_not_built.txt")
            note.unlink(missing_ok=True)
            asked = {name: getattr(self, name) for name in ("compiler", "inplace")}  # a run uses them up
            print("compiling csrc: a minute or two", flush=True)
            why = ""
            for cuda in (True, False) if with_cuda else (False,):
                vars(self).update(asked)
                # keeps what setuptools has noted in it
                vars(self.extensions[0]).update(vars(kernels(cuda)))
                error, said = recorded(super().run)
                if error is None:
                    break
                if os.environ.get("REQUIRE_KERNELS"):
                    raise error
                what = "the CUDA kernels" if cuda else "the C++ kernels"
                why += ("; " if why else "") + f"{what} do not build: {reason(error, said)}"
            if why:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(why + "\n", encoding="utf-8")
                print(f"\nWARNING: {why}\n{GOES_ON}\n", file=sys.stderr)

    commands["build_ext"] = Build

with tempfile.TemporaryDirectory() as scratch:
    # what a build writes lies in the source tree, where that may be written to
    elsewhere = {"egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}
    options = {} if os.access(ROOT, os.W_OK) else elsewhere
    setup(setup_requires=needs, ext_modules=extensions, cmdclass=commands, options=options)
