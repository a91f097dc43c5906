"""NLinear-I and DLinear-I: linear forecasters with weights of their own for each channel of a time series."""

from torch import Tensor, nn
from torch.nn import functional

from torch_impl.layer import PartitionedLinear


def _channel_maps(channels: int, steps: int, horizon: int, implementation: str) -> PartitionedLinear:
    """Make one linear map over time per channel, for inputs as they come: (..., steps, channels)."""
    return PartitionedLinear(
        channels, steps, horizon, in_axis=-2, partition_axis=-1, implementation=implementation, init="torch"
    )


class NLinear(nn.Module):
    """Forecast each channel by its own linear map of its differences from the last value.

    Shape:
        Input (batch, steps, channels); output (batch, horizon, channels).

    Args:
        channels: Channels of the series; 321 in Electricity, 862 in Traffic.
        steps: Past values that are seen.
        horizon: Future values that are forecast.
        implementation: Of the layer; "loop" is the list of `nn.Linear` that it replaces.

    Source: Zeng et al., "Are Transformers Effective for Time Series Forecasting?" (2023), NLinear with `individual`.
    """

    def __init__(
        self, channels: int = 321, steps: int = 336, horizon: int = 96, *, implementation: str = "auto"
    ) -> None:
        super().__init__()
        self.linear = _channel_maps(channels, steps, horizon, implementation)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the forecast."""
        last = x[:, -1:]
        return self.linear(x - last) + last


class DLinear(nn.Module):
    """Forecast each channel by two linear maps of its own: of its moving average, and of what is left.

    Shape:
        Input (batch, steps, channels); output (batch, horizon, channels).

    Args:
        channels: Channels of the series.
        steps: Past values that are seen.
        horizon: Future values that are forecast.
        window: Length of the moving average, an odd number; the series is continued by its first and last value.
        implementation: Of the layers; "loop" is the lists of `nn.Linear` that they replace.

    Source: as for `NLinear`; DLinear with `individual`.
    """

    def __init__(
        self,
        channels: int = 321,
        steps: int = 336,
        horizon: int = 96,
        *,
        window: int = 25,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.window = window
        self.seasonal = _channel_maps(channels, steps, horizon, implementation)
        self.trend = _channel_maps(channels, steps, horizon, implementation)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the forecast."""
        half = self.window // 2
        by_time = functional.pad(x.mT, (half, half), mode="replicate")
        trend = functional.avg_pool1d(by_time, self.window, stride=1).mT
        return self.seasonal(x - trend) + self.trend(trend)
