"""The torch halves of ported pairs: recurrent layers, forecasters, and models of physics and chemistry."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from parity_tests.frameworks.torch.pairs_basic import Half, half, parameter


def lstm_cell() -> Half:
    """Make the stock one, called with a state."""
    return half(lambda m, x, h, c: m.cell(x, (h, c)), cell=nn.LSTMCell(4, 5))


def lstm_layers() -> Half:
    """Make two stock layers over time, behind a norm."""
    return half(
        lambda m, x: m.head(m.lstm(m.norm(x))[0]),
        norm=nn.LayerNorm(4),
        lstm=nn.LSTM(4, 5, num_layers=2, batch_first=True),
        head=nn.Linear(5, 3),
    )


def bidirectional_lstm() -> Half:
    """Make a stock layer in both directions."""
    return half(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 5, batch_first=True, bidirectional=True))


def gru() -> Half:
    """Make the stock one over time: its outputs and its last state."""
    return half(lambda m, x: m.gru(x), gru=nn.GRU(4, 5, batch_first=True))


def diagonal_ssm() -> Half:
    """Make a diagonal state-space layer (S4D-real), discretised exactly, as a causal convolution."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, step = -m.log_a.exp(), m.log_step.exp()[:, None]
        decay = a * step
        t = torch.arange(x.shape[1], dtype=x.dtype)
        kernel = torch.einsum("hn,hnt->ht", m.c * (decay.exp() - 1) / a * m.b, (decay[..., None] * t).exp())
        lag = t[:, None] - t
        toeplitz = kernel[:, lag.clamp(min=0).long()] * (lag >= 0)
        return F.gelu(torch.einsum("hts,bsh->bth", toeplitz, x) + m.d * x)

    parts = {"log_a": parameter(3, 4, scale=0.3), "log_step": parameter(3, scale=0.3)}
    return half(call, **parts, b=parameter(3, 4), c=parameter(3, 4), d=parameter(3))


def rg_lru() -> Half:
    """Make Griffin's real-gated linear recurrence."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        log_a = -8.0 * F.softplus(m.decay) * m.recurrence(x).sigmoid()
        a, gated = log_a.exp(), m.gate(x).sigmoid() * x * (1 - (2 * log_a).exp()).sqrt()
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = a[:, t] * state + gated[:, t]
            states.append(state)
        return torch.stack(states, 1)

    return half(call, decay=parameter(4), recurrence=nn.Linear(4, 4), gate=nn.Linear(4, 4))


def fourier_layer() -> Half:
    """Make a layer of a Fourier neural operator: three modes kept, a pointwise skip."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft(x, dim=1)
        kept = torch.einsum("bkc,kcd->bkd", modes[:, :3], m.weight)
        spectrum = torch.cat([kept, torch.zeros_like(modes[:, 3:])], 1)
        return F.gelu(torch.fft.irfft(spectrum, n=x.shape[1], dim=1) + m.skip(x))

    weight = nn.Parameter(torch.randn(3, 4, 4, dtype=torch.complex64))
    return half(call, weight=weight, skip=nn.Linear(4, 4))


def dlinear() -> Half:
    """Make DLinear: a moving average with repeated ends, and a layer for each part."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([x[:, :1].repeat(1, 2, 1), x, x[:, -1:].repeat(1, 2, 1)], 1)
        trend = F.avg_pool1d(padded.transpose(1, 2), 5, 1)
        return (m.seasonal(x.transpose(1, 2) - trend) + m.trend(trend)).transpose(1, 2)

    return half(call, seasonal=nn.Linear(8, 3), trend=nn.Linear(8, 3))


def nlinear() -> Half:
    """Make NLinear: a layer over time around the last value."""
    return half(lambda m, x: m.fc((x - x[:, -1:]).transpose(1, 2)).transpose(1, 2) + x[:, -1:], fc=nn.Linear(8, 3))


def nbeats_block() -> Half:
    """Make N-BEATS' block with a polynomial basis: what is left of the input, and the forecast."""

    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.relu(m.fc2(F.relu(m.fc1(x))))
        powers = torch.arange(3, dtype=x.dtype)[:, None]
        past, future = (torch.arange(n, dtype=x.dtype) / n for n in (8, 4))
        return x - m.backcast(h) @ past**powers, m.forecast(h) @ future**powers

    sizes = {"fc1": (8, 7), "fc2": (7, 7)}
    thetas = {name: nn.Linear(7, 3, bias=False) for name in ("backcast", "forecast")}
    return half(call, **{name: nn.Linear(*size) for name, size in sizes.items()}, **thetas)


def pendulum() -> Half:
    """Solve a damped pendulum by three steps of Runge and Kutta."""

    def slope(m: Any, y: torch.Tensor) -> torch.Tensor:
        angle, speed = y.unbind(-1)
        return torch.stack([speed, -m.stiffness * torch.sin(angle) - m.damping * speed], -1)

    def call(m: Any, y: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            k1 = slope(m, y)
            k2 = slope(m, y + 0.05 * k1)
            k3 = slope(m, y + 0.05 * k2)
            k4 = slope(m, y + 0.1 * k3)
            y = y + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    return half(call, stiffness=nn.Parameter(torch.tensor([2.0])), damping=nn.Parameter(torch.tensor([0.3])))


def gaussian_process() -> Half:
    """Predict by a Gaussian process: a factor of Cholesky and two solves."""

    def call(m: Any, x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            squares = ((a[:, None] - b) ** 2 / m.log_length.exp() ** 2).sum(-1)
            return (-0.5 * squares).exp()

        covariance = kernel(x, x) + (0.1 + m.log_noise.exp()) * torch.eye(len(x), dtype=x.dtype)
        factor = torch.linalg.cholesky(covariance)
        inner = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return kernel(new, x) @ torch.linalg.solve_triangular(factor.mT, inner, upper=True)[:, 0]

    return half(call, log_length=parameter(2, scale=0.2), log_noise=parameter(1, scale=0.2))


def radial_filter() -> Half:
    """Make SchNet's continuous filter: Gaussians of distances, shifted softplus, a smooth cut-off."""

    def call(m: Any, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        apart = positions[:, None] - positions + torch.eye(len(x), dtype=x.dtype)[..., None]
        distances = apart.square().sum(-1).sqrt()
        centres = torch.linspace(0, 4, 5, dtype=x.dtype)
        gaussians = (-((distances[..., None] - centres) ** 2) / 2).exp()
        cut = 0.5 * ((torch.pi * distances / 4).cos() + 1) * (distances < 4) * (1 - torch.eye(len(x), dtype=x.dtype))
        weights = m.out(F.softplus(m.hidden(gaussians)) - math.log(2.0))
        return torch.einsum("ij,ijc,jc->ic", cut, weights, x)

    return half(call, hidden=nn.Linear(5, 6), out=nn.Linear(6, 3))
