"""RecurrentGemma's recurrent block: a real-gated linear recurrence whose gates are block-diagonal."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_impl.layer import PartitionedLinear

_SHARPNESS = 8.0


class RealGatedRecurrence(nn.Module):
    """Compute h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t, with gates a_t and i_t of x_t.

    log a_t = -8 * softplus(decay) * sigmoid(recurrence_gate(x_t)) and i_t = sigmoid(input_gate(x_t)), where each head
    has maps of its own. The first step is h_0 = i_0 * x_0.

    Shape:
        Input and output (batch, time, width).

    Args:
        width: Features, a multiple of `heads`.
        heads: Blocks of the gates; 10 of 256 features in RecurrentGemma 2B.
        implementation: Of the gates; "loop" is one `nn.Linear` a head.

    Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (2024), RG-LRU.
    """

    def __init__(self, width: int = 2560, heads: int = 10, *, implementation: str = "auto") -> None:
        super().__init__()
        size = width // heads
        # Flat features in and out: (..., heads * size), as the rest of the block has them.
        self.input_gate = PartitionedLinear(heads, size, size, partition_axis=-1, implementation=implementation)
        self.recurrence_gate = PartitionedLinear(heads, size, size, partition_axis=-1, implementation=implementation)
        # Such that a_t lies between 0.9 and 0.999 where the gate is fully open.
        start = torch.empty(width).uniform_(0.9**2, 0.999**2).sqrt()
        self.decay = nn.Parameter(torch.expm1(-start.log() / _SHARPNESS).log())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the states of all steps."""
        log_a = -_SHARPNESS * functional.softplus(self.decay) * self.recurrence_gate(x).sigmoid()
        a, gated = log_a.exp(), self.input_gate(x).sigmoid() * x
        scaled = gated * (-torch.expm1(2 * log_a)).sqrt()
        states = [gated[:, 0]]
        for t in range(1, x.shape[1]):
            states.append(a[:, t] * states[-1] + scaled[:, t])
        return torch.stack(states, 1)


class RecurrentBlock(nn.Module):
    """Compute out(gelu(y(x)) * recurrence(convolution(input(x)))), with a causal convolution of each feature over time.

    Shape:
        Input and output (batch, time, model).

    Args:
        model: Features of the residual stream.
        width: Features of the recurrence.
        heads: Blocks of its gates.
        window: Steps that the convolution sees.
        implementation: Of the gates.

    Source: as for `RealGatedRecurrence`; gelu is the approximation by tanh, as in RecurrentGemma.
    """

    def __init__(
        self,
        model: int = 2560,
        width: int = 2560,
        heads: int = 10,
        *,
        window: int = 4,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.input, self.gate = nn.Linear(model, width), nn.Linear(model, width)
        self.convolution = nn.Conv1d(width, width, window, groups=width)
        self.recurrence = RealGatedRecurrence(width, heads, implementation=implementation)
        self.output = nn.Linear(width, model)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's output, without the residual connection."""
        gate = functional.gelu(self.gate(x), approximate="tanh")
        past = functional.pad(self.input(x).mT, (self.window - 1, 0))
        return self.output(gate * self.recurrence(self.convolution(past).mT))
