"""Which operators `expb.py --device mps` runs there, with which dtypes, and what serves each. No Mac needed.

    python bench/mps_operators.py
    python bench/mps_operators.py --wheel torch-2.13.0-cp311-cp311-macosx_14_0_arm64.whl

Recorded on the pretend device of tests/pretend.py, which raises at an operator that has no MPS kernel in this
torch's own native_functions.yaml, and at float64: the parity check, both recipes with few and many dead
latents, null rows, evaluation, SAEs from files; GPT-NeoX, Llama, Gemma 2 and Qwen 2, float32 and bfloat16.
`MPS`: a kernel of its own. `parts`: made of other operators of the list. `view`: computes nothing. --wheel:
also looks for each kernel's symbol in libtorch_cpu.dylib of a macOS wheel, and exits with 1 where one is
missing.
"""

import itertools
import pathlib
import re
import sys
import tempfile
import zipfile

import bench
import pretend
from transport_geometry.models import lm
from transport_geometry.models.lm import Hook
from transport_geometry.running import check_device
from transport_geometry.running.run import Experiment

import torch

# one kernel on a Mac, where the pretend device, which C++ takes for another, meets their parts
WHOLE = ("aten::linear", "aten::linear_backward", "aten::_scaled_dot_product_attention_math_for_mps")


def record() -> pretend.PretendMps:
    with tempfile.TemporaryDirectory() as folder, pretend.PretendMps() as device:
        pretend.one_hook(pathlib.Path(folder), pretend.MPS, Experiment("expb"))
        pretend.files(pathlib.Path(folder), pretend.MPS)
        check_device.trained(pretend.MPS)
        for family, dtype in itertools.product(pretend.FAMILIES, (torch.float32, torch.bfloat16)):
            model = pretend.tiny_model(family=family, dtype=dtype)
            lm.check_parity(Hook(model, 1), pretend.tiny_rows(), pretend.MPS)
            pretend.patched_sums(model, pretend.MPS)
    return device


def symbols(wheel: str) -> set[str]:
    """The MPS kernels that a macOS wheel registers: wrapper_MPS_..., as torchgen names them, each preceded by
    its length in the mangled name.
    """
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("torch/lib/libtorch_cpu.dylib")
    found = re.finditer(rb"(\d\d)(?=wrapper_MPS_)", library)
    return {library[m.end() : m.end() + int(m[1])].decode("latin1") for m in found}


def registered(operator: str, names: set[str]) -> bool:
    """torchgen puts an overload before the name or, of a structured operator, behind it."""
    name, _, overload = operator.removeprefix("aten::").partition(".")
    written = [f"{overload}_{name}", f"{name}_{overload}".removesuffix("_" * (not overload))]
    if overload.endswith("out"):
        written += [f"{overload}_{name}_out", f"{name}_out_{overload}"]
    return any(f"wrapper_MPS_{one}" in names for one in written)


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--wheel", help="of torch for macOS")
    wheel = parser.parse_args().wheel
    device, names = record(), symbols(wheel) if wheel else None
    for operator in WHOLE:
        assert operator in device.native, operator
        device.served[operator], device.ran[operator] = "MPS", {torch.float32, torch.bfloat16}
    lost = []
    for operator, by in sorted(device.served.items()):
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in device.ran[operator]))
        there = ""
        if names is not None and by == "MPS" and operator not in pretend.COPIES:
            there = "in the wheel" if registered(operator, names) else "NOT in the wheel"
            lost += [operator] * there.startswith("NOT")
        print(f"{operator:58} {by:6} {there:17} {dtypes}".rstrip())
    counts = {by: list(device.served.values()).count(by) for by in ("MPS", "parts", "view")}
    print(
        f"torch {torch.__version__}: {len(device.served)} operators, {counts}; without a kernel: {lost or 0}"
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
