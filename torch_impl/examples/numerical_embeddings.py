"""Periodic embeddings of numerical features: each feature of a table has frequencies and a linear map of its own."""

import math

import torch
from torch import Tensor, nn

from torch_impl.layer import PartitionedLinear


class PeriodicEmbeddings(nn.Module):
    """Embed feature j by relu(W_j [cos(2 pi c_j x_j), sin(2 pi c_j x_j)] + b_j), with trained frequencies c_j.

    Shape:
        Input (..., features); output (..., features, width).

    Args:
        features: Numerical features of the table.
        frequencies: Frequencies of each feature.
        width: Length of an embedding.
        scale: Standard deviation of the initial frequencies, which are cut off at three of it.
        implementation: Of the layer; "loop" is a list of `nn.Linear`, one a feature.

    Source: Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning" (2022), PLR.
    """

    def __init__(
        self,
        features: int = 100,
        frequencies: int = 48,
        width: int = 24,
        *,
        scale: float = 0.01,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(features, frequencies))
        nn.init.trunc_normal_(self.frequencies, std=scale, a=-3 * scale, b=3 * scale)
        self.linear = PartitionedLinear(features, 2 * frequencies, width, implementation=implementation)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the embeddings."""
        angles = 2 * math.pi * self.frequencies * x[..., None]
        return self.linear(torch.cat([angles.cos(), angles.sin()], -1)).relu()
