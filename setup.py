"""What of the build must be code; pyproject.toml says the rest.

Builds csrc into the extension `transport_geometry._kernels` against the torch that is installed, or the
tested one where none is, and puts into a wheel what the package otherwise finds beside it in the checkout.

    pip install -e . -c constraints.txt      REQUIRE_KERNELS=1: a failing build is an error, no warning
"""

import hashlib
import os
import pathlib
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
# what an installed copy carries of the checkout, and under which folder of the package
CARRIED = {
    "demo/stdlib-*/*": "",
    "outputs/reference/seed_sd.*": "",
    "audit.py": "scripts",
    "common.py": "scripts",
    "exp*.py": "scripts",
}
NOT_BUILT = """
WARNING: kernels NOT built: {why}
The install goes on with plain PyTorch: same numbers, slower.
"""
# pip's build isolation hides the environment's own torch: look for it there
sys.path.append(sysconfig.get_path("purelib"))
try:
    import torch
    from torch.utils import cpp_extension

    needs = []
except ImportError:
    # pip fetches these into the build environment and runs this file again
    torch, needs = None, ["torch==2.13.0", "ninja"]


class Carry(build_py):
    """The modules, and in all but an editable install what is CARRIED."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for pattern, folder in CARRIED.items():
            for source in sorted(ROOT.glob(pattern)):
                target = pathlib.Path(self.build_lib, "transport_geometry", folder, source.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


commands, extensions = {"build_py": Carry}, []
if torch:
    import pybind11  # pyproject.toml asks for it

    sources = sorted(p for p in (ROOT / "csrc").glob("*") if p.suffix in (".cpp", ".cu", ".h"))
    # kernels.py compares
    source = hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[:12]
    # not is_available(): a build node has no GPU
    cuda = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;9.0+PTX")
    devices = "cpu+cuda " + os.environ.get("TORCH_CUDA_ARCH_LIST", "native") if cuda else "cpu"
    common = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
    flags = [*common, f'-DBUILD_DEVICES="{devices}"', f'-DBUILD_SOURCE="{source}"']
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extensions = [
        make(
            "transport_geometry._kernels",
            ["csrc/ops.cpp", "csrc/encode.cpp"] + ["csrc/ops_cuda.cu"] * cuda,
            include_dirs=[pybind11.get_include()],
            depends=[f"csrc/{p.name}" for p in sources],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--fmad=false", *common[3:], "-DUSE_CUDA"]},
        )
    ]

    class Build(cpp_extension.BuildExtension):
        """Without a working compiler the install goes on: kernels.py then runs plain PyTorch and shows the
        note left here.
        """

        def run(self):
            extension = pathlib.Path(self.get_ext_fullpath("transport_geometry._kernels"))
            note = extension.with_name("_kernels_not_built.txt")
            note.unlink(missing_ok=True)
            try:
                super().run()
            except Exception as error:
                if os.environ.get("REQUIRE_KERNELS"):
                    raise
                why = " ".join(str(error).split())[:300]
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"the C++ build failed: {why}\n", encoding="utf-8")
                print(NOT_BUILT.format(why=why), file=sys.stderr)

    commands["build_ext"] = Build

setup(setup_requires=needs, ext_modules=extensions, cmdclass=commands)
