"""Relations that hold between results, whatever the right result is: no oracle, and mostly no tolerance.

Each check returns sentences that say what is wrong; an empty list means that the relation holds.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from parity_tests.harness.comparison import compare
from parity_tests.harness.dtypes import numpy_dtype
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.oracle import reference
from parity_tests.harness.subjects.base import Subject
from parity_tests.harness.tolerance import PRECISION_OF_DTYPE, declared_arithmetic

Check = Callable[[Subject, Inputs], list[str]]


def _take(inputs: Inputs, order: np.ndarray) -> Inputs:
    return dataclasses.replace(
        inputs,
        x=np.take(inputs.x, order, axis=-2),
        weight=inputs.weight[order],
        bias=None if inputs.bias is None else inputs.bias[order],
        cotangent=np.take(inputs.cotangent, order, axis=-2),
    )


def _within(first: dict[str, np.ndarray], second: dict[str, np.ndarray], inputs: Inputs, what: str) -> list[str]:
    """Two evaluations of the same sums, perhaps in another order: each within the bound of the shared truth."""
    truth, arithmetic = reference(inputs), declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    results = [
        *compare(first, truth, arithmetic, inputs.zero_mean),
        *compare(second, truth, arithmetic, inputs.zero_mean),
    ]
    return [f"{what}: {result.reason}" for result in results if result.status != "ok"]


def check_permutation(subject: Subject, inputs: Inputs) -> list[str]:
    """Permuting the partitions of x, W, b and dy permutes y, dx, dW and db."""
    n = len(inputs.weight)
    order = np.roll(np.arange(n)[::-1], 1)
    plain, permuted = subject.vjp(inputs), subject.vjp(_take(inputs, order))
    axes = {"y": -2, "dx": -2, "dweight": 0, "dbias": 0}
    back = {name: np.take(value, np.argsort(order), axis=axes[name]) for name, value in permuted.items()}
    return _within(plain, back, inputs, "permutation of partitions")


def check_scaling(subject: Subject, inputs: Inputs) -> list[str]:
    """Scaling x and b by a power of two scales y and dW by it, exactly, and leaves dx and db as they are."""
    factor = numpy_dtype(inputs.dtype).type(4)
    scaled = dataclasses.replace(
        inputs, x=inputs.x * factor, bias=None if inputs.bias is None else inputs.bias * factor
    )
    plain, large = subject.vjp(inputs), subject.vjp(scaled)
    expected = {name: value * factor if name in ("y", "dweight") else value for name, value in plain.items()}
    return [
        f"scaling by 4: {name} is not scaled exactly"
        for name, value in large.items()
        if not np.array_equal(value.astype(np.float64), expected[name].astype(np.float64))
    ]


def check_adjoint(subject: Subject, inputs: Inputs) -> list[str]:
    """``<dy, xW> = <dx, x> = <dW, W>`` and ``<dy, 1 b> = <db, b>``, in float64 on results of integer inputs: exact."""
    if any(np.any(a != np.rint(a)) for a in (inputs.x, inputs.weight, inputs.cotangent) if a.size):
        raise ValueError("inputs: expected integers, for exact inner products, got other numbers; use draw_lattice.")

    def inner(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.sum(first.astype(np.float64) * second.astype(np.float64)))

    out = subject.vjp(inputs)
    bias = 0.0 if inputs.bias is None else inner(inputs.cotangent, np.broadcast_to(inputs.bias, out["y"].shape))
    product = inner(inputs.cotangent, out["y"]) - bias
    sides = {"<dx, x>": inner(out["dx"], inputs.x), "<dW, W>": inner(out["dweight"], inputs.weight)}
    wrong = [f"adjoint: <dy, xW> = {product} but {name} = {value}" for name, value in sides.items() if value != product]
    if inputs.bias is not None and inner(out["dbias"], inputs.bias) != bias:
        wrong.append(f"adjoint: <dy, b> = {bias} but <db, b> = {inner(out['dbias'], inputs.bias)}")
    return wrong


def check_one_hot_jacobian(subject: Subject, inputs: Inputs) -> list[str]:
    """With x the rows of an identity, y - b is W itself: each column of the Jacobian, bit for bit."""
    n, i, _ = inputs.weight.shape
    x = np.zeros((i, n, i), inputs.x.dtype)
    x[np.arange(i), :, np.arange(i)] = 1
    cotangent = np.zeros((i, n, inputs.weight.shape[2]), inputs.x.dtype)
    y = subject.forward(dataclasses.replace(inputs, x=x, bias=None, cotangent=cotangent, layout="contiguous"))
    same = np.array_equal(np.moveaxis(y, 0, 1).astype(np.float64), inputs.weight.astype(np.float64))
    return [] if same else ["one-hot Jacobian: y of the identity is not W"]


def check_concatenation(subject: Subject, inputs: Inputs) -> list[str]:
    """Two batches at once give both batches' y and dx, and the sum of their dW and db (within the bound of the sum)."""
    if inputs.x.ndim < 3 or inputs.x.shape[0] < 2:
        raise ValueError(
            f"inputs.x: expected at least two rows to split, got shape {inputs.x.shape}; use a larger batch."
        )
    cut = inputs.x.shape[0] // 2
    parts = [
        dataclasses.replace(inputs, x=inputs.x[rows], cotangent=inputs.cotangent[rows])
        for rows in (slice(None, cut), slice(cut, None))
    ]
    whole, halves = subject.vjp(inputs), [subject.vjp(part) for part in parts]
    joined = {name: np.concatenate([half[name] for half in halves]) for name in ("y", "dx")}
    return _within({name: whole[name] for name in joined}, joined, inputs, "concatenated batches")


def check_affine_differences(subject: Subject, inputs: Inputs) -> list[str]:
    """The map is affine: on integers a finite difference with step 1 is exact, and equals the derivative it returns.

    For a unit step in one entry of x, W or b, the change of ``<dy, y>`` is that entry of dx, dW or db, exactly.
    """
    out = subject.vjp(inputs)
    rng = np.random.default_rng(7)
    wrong = []

    def value(changed: Inputs) -> float:
        return float(np.sum(changed.cotangent.astype(np.float64) * subject.forward(changed).astype(np.float64)))

    start = value(inputs)
    names = {"x": "dx", "weight": "dweight"} | ({} if inputs.bias is None else {"bias": "dbias"})
    for name, gradient in names.items():
        array = getattr(inputs, name)
        for flat in rng.choice(array.size, size=min(4, array.size), replace=False):
            index = np.unravel_index(int(flat), array.shape)
            stepped = array.copy()
            stepped[index] += 1
            difference = value(dataclasses.replace(inputs, **{name: stepped})) - start
            if difference != float(out[gradient][index]):
                place = [int(k) for k in index]
                wrong.append(
                    f"finite difference of {name}{place} is {difference}, {gradient} says {out[gradient][index]}"
                )
    return wrong


RANDOM_CHECKS: dict[str, Check] = {
    "permutation": check_permutation,
    "scaling": check_scaling,
    "one-hot Jacobian": check_one_hot_jacobian,
    "batch concatenation": check_concatenation,
}
LATTICE_CHECKS: dict[str, Check] = {"adjoint": check_adjoint, "affine differences": check_affine_differences}
