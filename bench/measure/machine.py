"""The machine: its processors, its memory, and the conditions that its GPU reports while it is measured."""

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def allowed_cpus() -> tuple[int, ...]:
    """Return the processors that this process may use; empty where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


_CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that a product's speed hangs on, as Linux calls them, on x86 and on ARM.
_FEATURES = {"fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
_FEATURES |= {"amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "sve", "sve2", "bf16", "svebf16", "sme"}


def _first_processor() -> dict[str, str]:
    """Return Linux's account of the first processor; empty elsewhere."""
    if not _CPUINFO.exists():
        return {}
    lines = (line.split(":", 1) for line in _CPUINFO.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def cpu_model() -> str:
    """Return the processor's name for itself, with family and model number where the name is that of a whole series.

    Virtual machines are often told a name such as "AMD EPYC", under which processors of several generations go.
    """
    found = _first_processor()
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(found) and not any(letter.isdigit() for letter in name):
        return f"{name} (family {found['cpu family']}, model {found['model']})"
    return name


def cpu_features() -> tuple[str, ...]:
    """Return the instruction sets of this processor on which a product's speed depends, in order of name."""
    found = _first_processor()
    return tuple(sorted(_FEATURES & set((found.get("flags") or found.get("Features") or "").split())))


def governor() -> str | None:
    """Return the frequency governor of the first processor, where the system has one."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


# No processor runs faster than this, nor multiplies and adds more numbers in a cycle of one core: two units of 512 bits
# each, or a matrix unit for 16-bit numbers.
_HIGHEST_CLOCK_HZ = 6.5e9
_FLOPS_A_CYCLE = {"fp64": 32, "ieee_fp32": 64, "tf32": 64, "bf16": 2048, "fp16": 2048}


def cpu_flops_limit(precision: str) -> float:
    """Return operations a second that the processors of this run cannot exceed, whatever their make.

    A coarse limit on purpose: it takes no measurement that a busy machine could spoil, and still shows work that was
    not done.
    """
    return len(allowed_cpus() or [0]) * _HIGHEST_CLOCK_HZ * _FLOPS_A_CYCLE[precision]


HIGH_WATER_RESET, LIFETIME_PEAK = "resident_high_water", "lifetime_resident_peak"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PAGES = Path("/proc/self/smaps_rollup")


def _kernel_bytes(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no field {field}")


# Larger than what glibc keeps for the next call when it is freed (32 MiB), so that it changes nothing that is measured.
_NEW_BYTES = 2**26


def large_pages(take: Callable[[int], object]) -> bool | None:
    """Say whether an array of many bytes that `take` returns, new and written to, lies in large pages (2 MiB, say).

    A page that is touched for the first time costs the kernel a visit, so that small ones can take longer than the
    products that fill them. Which it is depends on the kernel's setting, on variables, on the library of malloc and on
    the framework: so it is looked at.

    Returns:
        None where the system does not tell, or keeps a peak for life, which the array would raise.
    """

    def held() -> int:
        fields = ("AnonHugePages:", "Private_Hugetlb:", "Shared_Hugetlb:")
        return sum(int(line.split()[1]) << 10 for line in _PAGES.read_text().splitlines() if line.startswith(fields))

    if not os.access(_CLEAR, os.W_OK):
        return None
    try:
        before = held()
        array = take(_NEW_BYTES)
        found = held() - before >= _NEW_BYTES // 2
        del array
    except (OSError, RuntimeError, MemoryError):  # no such account; no such device; no such memory
        return None
    return found


def _return_free_memory() -> None:
    gc.collect()
    # musl and macOS have no malloc_trim; the growth is then an underestimate, which their allocators make small.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_growth(call: Callable[[], object]) -> tuple[int, str]:
    """Run the call once and measure by how much the resident set rose at its highest.

    Linux keeps a high-water mark for each process and lets the process reset its own. Memory that the allocator holds
    back is returned first, so that the call has to fault its pages in again: held pages would not show.

    Args:
        call: returns when its result is ready; the result is dropped.

    Returns:
        Bytes, and the method: `resident_high_water`, or `lifetime_resident_peak` where the system cannot reset its
        mark (then only a fresh process gives more than a lower bound).
    """
    _return_free_memory()
    try:
        _CLEAR.write_text("5")
        before = _kernel_bytes(_STATUS, "VmRSS")
    except OSError:
        before = _lifetime_peak()
        call()
        return max(0, _lifetime_peak() - before), LIFETIME_PEAK
    call()
    return max(0, _kernel_bytes(_STATUS, "VmHWM") - before), HIGH_WATER_RESET


def free_bytes() -> int:
    """Return the bytes that a process may still take: of the machine, or of the control group where that is less.

    Raises:
        OSError: where the system does not say.
    """
    try:
        available = _kernel_bytes(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def last_cache_bytes() -> int:
    """Return the size of the last level of this processor's caches; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)


# The counter of a GPU's energy moves in steps of up to a tenth of a second.
ENERGY_S = 1.0
# NVML's reasons for clocks below the maximum, by bit; an idle GPU lowers its clocks by itself, and that is none.
_THERMAL = {0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
_POWER = {0x4: "software power cap", 0x80: "hardware power brake"}


class Monitor:
    """Reads a device; this one is of a device that reports nothing: a CPU, or a GPU without NVML's Python package."""

    def read(self) -> Mapping[str, Any]:
        """Return the present conditions; empty where the device reports nothing."""
        return {}

    def energy_j(self) -> float | None:
        """Return joules since some fixed moment, or None."""
        return None


@dataclass
class NvmlMonitor(Monitor):
    """An NVIDIA GPU."""

    nvml: Any
    handle: Any

    def read(self) -> Mapping[str, Any]:
        """Return clocks in MHz, watts, degrees Celsius, reasons for lower clocks and processes, if reported."""
        nvml, handle = self.nvml, self.handle
        readings: dict[str, Callable[[], Any]] = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        found: dict[str, Any] = {}
        for name, reading in readings.items():
            # A slice of a GPU, or a virtual one, does not report all of them.
            with contextlib.suppress(nvml.NVMLError):
                found[name] = reading()
        bits = found.pop("reasons", None)
        if bits is not None:
            found["thermal"] = [name for bit, name in _THERMAL.items() if bits & bit]
            found["power_capped"] = [name for bit, name in _POWER.items() if bits & bit]
        return found

    def energy_j(self) -> float | None:
        """Return joules since the driver was loaded; None on GPUs older than Volta."""
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except self.nvml.NVMLError:
            return None


def energy_of_a_call(monitor: Monitor, run_calls: Callable[[], int | None]) -> float | None:
    """Measure the energy of calls that nothing interrupts.

    Args:
        monitor: reads the device's counter.
        run_calls: runs calls for `ENERGY_S` seconds and returns how many; None if it failed.

    Returns:
        Joules of one call, or None where the device reports no energy or the calls failed.
    """
    before = monitor.energy_j()
    if before is None:
        return None
    calls = run_calls()
    after = monitor.energy_j()
    return None if calls is None or after is None else (after - before) / calls


def thermally_throttled(conditions: Mapping[str, Any]) -> bool:
    """Return True if heat held the clocks down; such a block is measured again."""
    return bool(conditions.get("thermal"))


def monitor_for(device: str, uuid: str | None) -> Monitor:
    """Return the monitor of a device; of the first GPU if its UUID is not known."""
    if device != "cuda":
        return Monitor()
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Monitor()
    try:
        nvml.nvmlInit()
        if uuid is None:
            return NvmlMonitor(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        return NvmlMonitor(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError:
        return Monitor()
