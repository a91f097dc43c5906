"""Copy arrays from NumPy to PyTorch and back, bit for bit, and lay them out in memory."""

import numpy as np
import torch

from parity_tests.judge.inputs import Layout
from torch_impl.parameters import to_array, to_tensor

to_numpy = to_array


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a tensor, bit for bit."""
    return to_tensor(np.array(array, order="C", copy=True), device)


def lay_out(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and x.ndim > 2:
        # The rows in between are NaN: reading past a stride shows.
        wide = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 0] = x
        return wide[:, 0]
    return x
