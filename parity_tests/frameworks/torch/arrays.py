"""Copy arrays from NumPy to PyTorch and back, bit for bit, and lay them out in memory."""

import ml_dtypes
import numpy as np
import torch

from parity_tests.judge.inputs import Layout


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a tensor, bit for bit (bfloat16 through its 16-bit pattern)."""
    array = np.array(array, order="C", copy=True)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Undo `to_torch`; the array may share the memory of a CPU tensor."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


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
