"""When does an SAE's R² lie? The machinery behind the experiments, exp*.py.

What numerical libraries read from the environment when they are loaded is set here, before any module of this
package loads them; that is why this package is imported before torch and numpy wherever both are (the linter
sorts them so).
"""

import os
import pathlib
import platform
import sys

# Threads that wait asleep. Spinning at the end of every small operation costs ten times the work itself as
# soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # under torchrun one rank draws bars

# Left alone, each library picks code by the processor's maker and generation, and the last bits differ from
# machine to machine. ANY_X86=1 ties them to code that every x86-64 processor with AVX2 runs alike: the same
# bytes everywhere, at 1.6 times the CPU time (bench/RESULTS.md). numpy calls AVX-512 by other names in other
# versions, and passes over those that it does not know.
ANY_X86 = os.environ.get("ANY_X86") == "1" and platform.machine() in ("x86_64", "AMD64")
FIXED_CODE = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR "
    "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL",
}
if ANY_X86:
    if {"torch", "numpy"} & sys.modules.keys() and any(
        os.environ.get(name) != value for name, value in FIXED_CODE.items()
    ):
        raise ImportError(
            "ANY_X86=1: import transport_geometry before torch and numpy, which have chosen their code by now"
        )
    os.environ.update(FIXED_CODE)

PACKAGE = pathlib.Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the checkout, with demo/, csrc/ and outputs/reference
