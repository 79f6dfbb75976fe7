"""What machine this is, as far as results may depend on it."""

import contextlib
import functools
import os
import pathlib
import platform
import subprocess
import sys

from transport_geometry import FIXED_CODE

import torch


@functools.cache
def processor(device: torch.device | None = None) -> str:
    """The name of the GPU, or of the CPU as the system says it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=10)
            return answer.stdout.strip() or platform.processor()
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instructions() -> dict:
    """What torch's own kernels use of the processor, and the variables in force that choose code in it and
    its libraries.
    """
    names = (*FIXED_CODE, "ANY_X86", "KERNELS", "MKL_ENABLE_INSTRUCTIONS", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {"torch": torch.backends.cpu.get_cpu_capability()} | {
        name: os.environ[name] for name in names if name in os.environ
    }
