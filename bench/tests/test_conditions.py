"""What is read of a GPU around the blocks, and what the doctor makes of it."""

import pytest

from bench.measure.environment import gpu_warnings
from bench.measure.machine import Monitor, NvmlMonitor, energy_of_a_call, monitor_for, thermally_throttled
from bench.plan.costs import data_sheet, peak_rates
from bench.tests.fake_nvml import FakeNvml


def test_energy_is_read_around_calls_alone():
    monitor = NvmlMonitor(FakeNvml(), None)
    # Five joules from reading to reading.
    assert energy_of_a_call(monitor, lambda: 10) == pytest.approx(0.5)
    assert energy_of_a_call(monitor, lambda: None) is None
    assert energy_of_a_call(Monitor(), lambda: pytest.fail("calls run where no energy is reported")) is None


def test_what_a_slice_of_a_gpu_does_not_report_is_left_out():
    nvml = FakeNvml()

    def not_supported(*arguments):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetPowerUsage = nvml.nvmlDeviceGetCurrentClocksThrottleReasons = not_supported
    seen = NvmlMonitor(nvml, None).read()
    assert set(seen) == {"sm_clock_mhz", "memory_clock_mhz", "temperature_c", "processes"}
    assert not thermally_throttled(seen)


def test_a_cpu_reports_nothing():
    monitor = monitor_for("cpu", None)
    assert (monitor.read(), monitor.energy_j()) == ({}, None)


def test_data_sheets_are_found_by_the_longest_name():
    assert peak_rates("NVIDIA H200", "bf16") == pytest.approx({"flops_per_s": 989.4e12, "bytes_per_s": 4.8e12})
    sheet = data_sheet("NVIDIA A100-SXM4-80GB")
    assert sheet is not None
    assert sheet.bytes_per_s == pytest.approx(2.039e12)
    assert data_sheet("cpu") is None
    assert peak_rates("", "fp64") == {}


def test_the_doctor_warns_of_a_busy_or_hot_gpu():
    assert gpu_warnings({}, 2) == []
    cool = {"processes": 2, "thermal": [], "power_capped": []}
    assert gpu_warnings(cool, 2) == []
    # With one framework one of them is somebody else.
    assert len(gpu_warnings(cool, 1)) == 1
    said = gpu_warnings({"processes": 5, "thermal": ["hardware thermal slowdown"], "power_capped": []}, 2)
    assert len(said) == 2
    assert said[0].startswith("3 other processes use the GPU")
    assert "hardware thermal slowdown" in said[1]
