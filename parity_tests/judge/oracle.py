"""Compute the truth in float64 (longdouble for float64 subjects), with the magnitudes that error bounds need."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.inputs import Inputs

TENSORS: tuple[str, ...] = ("y", "dx", "dweight", "dbias")


@dataclass(frozen=True)
class OracleTensor:
    """One tensor of the truth.

    Attributes:
        value: the exact sum, up to the oracle's own rounding.
        magnitude: `S`, the sum of absolute products, element by element.
        terms: `K`, the number of products in each sum.
        addend: `|b|` broadcast to the tensor (only y has one), or None.
        product: the sum without the addend (y - b), or None where there is no addend.
        partition_axis: the axis of `n`.
    """

    value: np.ndarray
    magnitude: np.ndarray
    terms: int
    addend: np.ndarray | None
    product: np.ndarray | None
    partition_axis: int


Reference = Mapping[str, OracleTensor]


def _partition_major(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Turn (..., n, f) into (n, rows, f), in the oracle's dtype."""
    n, features = array.shape[-2:]
    rows = array.size // (n * features) if array.size else int(np.prod(array.shape[:-2]))
    return np.moveaxis(array.astype(dtype).reshape(rows, n, features), 1, 0)


def _leading(array: np.ndarray, leading: tuple[int, ...]) -> np.ndarray:
    """Turn (n, rows, f) into (..., n, f)."""
    return np.moveaxis(array, 0, 1).reshape(*leading, array.shape[0], array.shape[2])


def reference(inputs: Inputs) -> dict[str, OracleTensor]:
    """Evaluate the map and its vector-Jacobian product on the inputs as stored.

    With `z` for the product `xW`: `y = xW + b`, `dx = dy W^T`, `dW = x^T dy`, `db = sum dy`; each with
    the magnitude `S` and the number of terms `K` of its sums:

    | tensor | K | S |
    |---|---|---|
    | y | i | `|x| |W|` |
    | dx | o | `|dy| |W|^T` |
    | dW | rows | `|x|^T |dy|` |
    | db | rows | `sum |dy|` |
    """
    # A float64 subject needs a judge with more digits than it has itself.
    dtype = np.dtype(np.longdouble if inputs.dtype == "float64" else np.float64)
    leading = inputs.x.shape[:-2]
    x, dy = _partition_major(inputs.x, dtype), _partition_major(inputs.cotangent, dtype)
    weight = inputs.weight.astype(dtype)
    rows = x.shape[1]

    product = _leading(x @ weight, leading)
    magnitude = _leading(np.abs(x) @ np.abs(weight), leading)
    bias = None if inputs.bias is None else np.broadcast_to(inputs.bias.astype(dtype), product.shape)
    weight_t = weight.swapaxes(1, 2)
    result = {
        "y": OracleTensor(
            value=product if bias is None else product + bias,
            magnitude=magnitude,
            terms=x.shape[2],
            addend=None if bias is None else np.abs(bias),
            product=None if bias is None else product,
            partition_axis=product.ndim - 2,
        ),
        "dx": OracleTensor(
            _leading(dy @ weight_t, leading),
            _leading(np.abs(dy) @ np.abs(weight_t), leading),
            dy.shape[2],
            None,
            None,
            product.ndim - 2,
        ),
        "dweight": OracleTensor(
            x.swapaxes(1, 2) @ dy, np.abs(x).swapaxes(1, 2) @ np.abs(dy), rows, None, None, partition_axis=0
        ),
    }
    if bias is not None:
        result["dbias"] = OracleTensor(dy.sum(1), np.abs(dy).sum(1), rows, None, None, partition_axis=0)
    return result
