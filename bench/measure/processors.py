"""The processors that a process may use, and what they call themselves."""

import os
import platform
from pathlib import Path


def allowed_cpus() -> tuple[int, ...]:
    """The processors that this process may use; empty where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


_CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that a product's speed hangs on, as Linux calls them, on x86 and on ARM.
_FEATURES = {"fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
_FEATURES |= {"amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "sve", "sve2", "bf16", "svebf16", "sme"}


def _first_processor() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    if not _CPUINFO.exists():
        return {}
    lines = (line.split(":", 1) for line in _CPUINFO.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def cpu_model() -> str:
    """The processor's name for itself, with its family and model number where the name is that of a whole series.

    Virtual machines are often told a name such as "AMD EPYC", under which processors of several generations go.
    """
    found = _first_processor()
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(found) and not any(letter.isdigit() for letter in name):
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name


def cpu_features() -> tuple[str, ...]:
    """The instruction sets that a product's speed hangs on and that this processor offers, in order of name."""
    found = _first_processor()
    return tuple(sorted(_FEATURES & set((found.get("flags") or found.get("Features") or "").split())))


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
