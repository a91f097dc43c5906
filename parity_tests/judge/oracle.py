"""Compute the truth in float64 (longdouble for float64 subjects), with the magnitudes that error bounds need."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.inputs import Inputs
from parity_tests.judge.sizes import Sizes

TENSORS: tuple[str, ...] = ("y", "dx", "dweight", "dbias")


@dataclass(frozen=True)
class OracleTensor:
    """One tensor of the truth.

    Attributes:
        value: the exact sum, up to the oracle's own rounding.
        magnitude: `S`, the sum of absolute products, element by element.
        terms: `K`, the number of products in each sum; an array that broadcasts to the tensor where it differs.
        addend: `|b|` broadcast to the tensor (only y has one), or None.
        product: the sum without the addend (y - b), or None where there is no addend.
        partition_axis: the axis of `n`.
        labels: the partition of each place along that axis, where each has several; None where each has one.
    """

    value: np.ndarray
    magnitude: np.ndarray
    terms: int | np.ndarray
    addend: np.ndarray | None
    product: np.ndarray | None
    partition_axis: int
    labels: np.ndarray | None = None


Reference = Mapping[str, OracleTensor]


def _partition_major(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Turn (..., n, f) into (n, rows, f), in the oracle's dtype."""
    n, features = array.shape[-2:]
    rows = array.size // (n * features) if array.size else int(np.prod(array.shape[:-2]))
    return np.moveaxis(array.astype(dtype).reshape(rows, n, features), 1, 0)


def _leading(array: np.ndarray, leading: tuple[int, ...]) -> np.ndarray:
    """Turn (n, rows, f) into (..., n, f)."""
    return np.moveaxis(array, 0, 1).reshape(*leading, array.shape[0], array.shape[2])


def _joined(parts: list[dict[str, OracleTensor]], inputs: Inputs, sizes: Sizes) -> dict[str, OracleTensor]:
    """Put the tensors of single partitions into the layout of unequal ones."""
    found = {}
    for name in parts[0]:
        leading, labels = inputs.leading if name in ("y", "dx") else (), sizes.labels(name)

        def put(
            arrays: list[np.ndarray | None],
            name: str = name,
            shape: tuple[int, ...] = (*leading, len(labels)),
        ) -> np.ndarray | None:
            if arrays[0] is None:
                return None
            whole = np.empty(shape, arrays[0].dtype)
            for place, array in zip(sizes.places(name), arrays, strict=True):
                assert array is not None  # a bias is that of all partitions or of none
                whole[..., place] = array.reshape(*shape[:-1], place.stop - place.start)
            return whole

        terms = [part[name].terms for part in parts]
        value, magnitude = put([part[name].value for part in parts]), put([part[name].magnitude for part in parts])
        assert value is not None
        assert magnitude is not None  # every tensor has both
        found[name] = OracleTensor(
            value,
            magnitude,
            np.asarray(terms)[labels] if name in ("y", "dx") else terms[0],
            put([part[name].addend for part in parts]),
            put([part[name].product for part in parts]),
            value.ndim - 1,
            labels,
        )
    return found


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

    Each partition of unequal sizes is evaluated as a map of its own, whose sums have as many terms as it has.
    """
    if inputs.sizes is not None:
        return _joined([reference(inputs.alone(k)) for k in range(inputs.num_partitions)], inputs, inputs.sizes)
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
