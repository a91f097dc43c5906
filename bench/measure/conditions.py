"""What the device reports about itself while it is measured: clocks, power, temperature, throttling, energy."""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# The counter of a GPU's energy moves in steps of up to a tenth of a second.
ENERGY_S = 1.0
# NVML's reasons for clocks below the maximum, by bit; an idle GPU lowers its clocks by itself, and that is none.
_THERMAL = {0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
_POWER = {0x4: "software power cap", 0x80: "hardware power brake"}


class Monitor(Protocol):
    """Reads a device."""

    def read(self) -> Mapping[str, Any]:
        """The present conditions; empty where the device reports nothing."""
        ...

    def energy_j(self) -> float | None:
        """Joules since some fixed moment, or None."""
        ...


class NoMonitor:
    """A device that reports nothing: a CPU, or a GPU without NVML's Python package."""

    def read(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def energy_j(self) -> float | None:
        """None."""
        return None


@dataclass
class NvmlMonitor:
    """An NVIDIA GPU.

    Args:
        nvml: the module `pynvml`.
        handle: its handle of the GPU.
    """

    nvml: Any
    handle: Any

    def read(self) -> Mapping[str, Any]:
        """Clocks in MHz, power in watts, temperature in degrees Celsius, reasons for lower clocks, processes.

        Whatever the GPU does not report is not there.
        """
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
            # A slice of a GPU, or a virtual one, does not report all of them: what it lacks is left out.
            with contextlib.suppress(nvml.NVMLError):
                found[name] = reading()
        bits = found.pop("reasons", None)
        if bits is not None:
            found["thermal"] = [name for bit, name in _THERMAL.items() if bits & bit]
            found["power_capped"] = [name for bit, name in _POWER.items() if bits & bit]
        return found

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None on GPUs older than Volta."""
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except self.nvml.NVMLError:
            return None


def energy_of_a_call(monitor: Monitor, run_calls: Callable[[], int | None]) -> float | None:
    """Measures the energy of calls that nothing interrupts.

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
    """Whether heat held the clocks down; such a block is measured again."""
    return bool(conditions.get("thermal"))


def monitor_for(device: str, uuid: str | None) -> Monitor:
    """Returns the monitor of a device.

    Args:
        device: `cpu` or `cuda`.
        uuid: of the GPU, as torch reports it; the first one if not known.
    """
    if device != "cuda":
        return NoMonitor()
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return NoMonitor()
    try:
        nvml.nvmlInit()
        if uuid is None:
            return NvmlMonitor(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        return NvmlMonitor(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError:
        return NoMonitor()
