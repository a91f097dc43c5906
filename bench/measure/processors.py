"""The processors that a process may use, and what they call themselves."""

import os
import platform
from pathlib import Path


def allowed_cpus() -> tuple[int, ...]:
    """The processors that this process may use; empty where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def cpu_model() -> str:
    """The processor's name for itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def governor() -> str | None:
    """The frequency governor of the first processor, where the system has one."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


# No processor runs faster than this, nor multiplies and adds more numbers in a cycle of one core: two units of 512 bits
# each, or a matrix unit for 16-bit numbers.
_HIGHEST_CLOCK_HZ = 6.5e9
_FLOPS_A_CYCLE = {"fp64": 32, "ieee_fp32": 64, "tf32": 64, "bf16": 2048, "fp16": 2048}


def cpu_flops_limit(precision: str) -> float:
    """Operations a second that the processors of this run cannot exceed, whatever their make.

    A coarse limit on purpose: it takes no measurement that a busy machine could spoil, and still shows work that was
    not done.
    """
    return len(allowed_cpus() or [0]) * _HIGHEST_CLOCK_HZ * _FLOPS_A_CYCLE[precision]
