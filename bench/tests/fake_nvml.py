"""A GPU's management library without a GPU."""


class FakeNvml:
    """The few functions of NVML that are read; hot for the first reads."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, hot=0):
        self.hot, self.joules = hot, 0.0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        self.hot -= 1
        return 0x40 if self.hot >= 0 else 0x4

    def nvmlDeviceGetClockInfo(self, handle, which):
        return 1980 if which == 0 else 3201

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetTemperature(self, handle, which):
        return 70

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [1, 2]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.joules += 5.0
        return 1000 * self.joules
