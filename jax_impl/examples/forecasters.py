"""NLinear-I and DLinear-I: linear forecasters with weights of their own for each channel of a time series."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_impl.layer import PartitionedLinear


def _channel_maps(channels: int, steps: int, horizon: int, implementation: str, rngs: nnx.Rngs) -> PartitionedLinear:
    """Make one linear map over time per channel, for inputs as they come: (..., steps, channels)."""
    return PartitionedLinear(
        channels, steps, horizon, in_axis=-2, partition_axis=-1, implementation=implementation, init="torch", rngs=rngs
    )


class NLinear(nnx.Module):
    """Forecast each channel by its own linear map of its differences from the last value.

    Shape:
        Input (batch, steps, channels); output (batch, horizon, channels).

    Args:
        channels: Channels of the series; 321 in Electricity, 862 in Traffic.
        steps: Past values that are seen.
        horizon: Future values that are forecast.
        implementation: Of the layer; "loop" is the list of `nnx.Linear` that it replaces.
        rngs: Random streams of the initial values.

    Source: Zeng et al., "Are Transformers Effective for Time Series Forecasting?" (2023), NLinear with `individual`.
    """

    def __init__(
        self,
        channels: int = 321,
        steps: int = 336,
        horizon: int = 96,
        *,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.linear = _channel_maps(channels, steps, horizon, implementation, rngs)

    def __call__(self, x: Array) -> Array:
        """Compute the forecast."""
        last = x[:, -1:]
        return self.linear(x - last) + last


class DLinear(nnx.Module):
    """Forecast each channel by two linear maps of its own: of its moving average, and of what is left.

    Shape:
        Input (batch, steps, channels); output (batch, horizon, channels).

    Args:
        channels: Channels of the series.
        steps: Past values that are seen.
        horizon: Future values that are forecast.
        window: Length of the moving average, an odd number; the series is continued by its first and last value.
        implementation: Of the layers; "loop" is the lists of `nnx.Linear` that they replace.
        rngs: Random streams of the initial values.

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
        rngs: nnx.Rngs,
    ) -> None:
        self.window = window
        self.seasonal = _channel_maps(channels, steps, horizon, implementation, rngs)
        self.trend = _channel_maps(channels, steps, horizon, implementation, rngs)

    def __call__(self, x: Array) -> Array:
        """Compute the forecast."""
        half = self.window // 2
        continued = jnp.pad(x, ((0, 0), (half, half), (0, 0)), mode="edge")
        trend = nnx.avg_pool(continued, (self.window,), strides=(1,))
        return self.seasonal(x - trend) + self.trend(trend)
