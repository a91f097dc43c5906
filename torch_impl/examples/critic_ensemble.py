"""An ensemble of critics, as REDQ trains it: all see one input, and a target takes the least of a random few."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_impl.layer import PartitionedLinear


class Critics(nn.Module):
    """Estimate Q(s, a) by n perceptrons with two hidden layers.

    Shape:
        Observations (..., observations) and actions (..., actions); values (..., n), or (..., m) of m chosen critics.

    Args:
        observations: Length of an observation.
        actions: Length of an action.
        critics: n, the number of critics; 10 in REDQ.
        width: Of both hidden layers.
        implementation: Of the layers with inputs per critic; "loop" is the lists of `nn.Linear` that they replace.

    Source: Chen et al., "Randomized Ensembled Double Q-Learning" (2021).
    """

    def __init__(
        self,
        observations: int = 17,
        actions: int = 6,
        critics: int = 10,
        width: int = 256,
        *,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        # One dense product: the input, which all critics share, is not copied n times.
        self.first = PartitionedLinear(critics, observations + actions, width, partition_axis=None)
        self.second = PartitionedLinear(critics, width, width, implementation=implementation)
        self.third = PartitionedLinear(critics, width, 1, implementation=implementation)

    def forward(self, observations: Tensor, actions: Tensor, chosen: Sequence[int] | Tensor | None = None) -> Tensor:
        """Compute the values of all critics, or those of the chosen ones alone."""
        x = torch.cat([observations, actions], -1)
        x = self.first(x, partitions=chosen).relu()
        x = self.second(x, partitions=chosen).relu()
        return self.third(x, partitions=chosen).squeeze(-1)


def least_value(critics: Critics, observations: Tensor, actions: Tensor, chosen: Sequence[int] | Tensor) -> Tensor:
    """Return the least value of the chosen critics: for each target, draw `torch.randperm(n)[:2]`."""
    return critics(observations, actions, chosen).amin(-1)
