"""Relations that hold between results, whatever the right result is: no oracle, and mostly no tolerance.

Each check returns sentences that say what is wrong; an empty list means that the relation holds.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from parity_tests.judge.comparison import compare, compare_pair, compare_with_limit, pair_limits
from parity_tests.judge.dtypes import FORMATS, numpy_dtype
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.subjects import Subject, arithmetic_of
from parity_tests.judge.tolerance import bound, reference

Check = Callable[[Subject, Inputs], list[str]]


def _within(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray], subject: Subject, inputs: Inputs, what: str
) -> list[str]:
    """Two evaluations of the same sums, perhaps in another order: each within the bound of the shared truth."""
    truth, arithmetic = reference(inputs), arithmetic_of(subject.mode, inputs.dtype)
    results = [
        *compare(first, truth, arithmetic, inputs.zero_mean),
        *compare(second, truth, arithmetic, inputs.zero_mean),
    ]
    return [f"{what}: {result.reason}" for result in results if result.status != "ok"]


def check_permutation(subject: Subject, inputs: Inputs) -> list[str]:
    """Permuting the partitions of x, W, b and dy permutes y, dx, dW and db."""
    n = len(inputs.weight)
    if n < 2:
        raise ValueError(f"inputs: expected at least two partitions to permute, got {n}; use a larger case.")
    # A reflection that keeps partition 0: it commutes neither with a shift of all partitions nor with their reversal,
    # so that code that confuses partitions in such a way does not permute along. Two can only be exchanged.
    order = np.roll(np.arange(n)[::-1], 1) if n > 2 else np.array([1, 0])
    plain, permuted = subject.vjp(inputs), subject.vjp(inputs.partitions(order))
    axes = {"y": -2, "dx": -2, "dweight": 0, "dbias": 0}
    back = {name: np.take(value, np.argsort(order), axis=axes[name]) for name, value in permuted.items()}
    return _within(plain, back, subject, inputs, "permutation of partitions")


def check_scaling(subject: Subject, inputs: Inputs) -> list[str]:
    """Scaling x and b by a power of two scales y and dW by it, exactly, and leaves dx and db as they are.

    Subnormal results are left out: they keep fewer bits, or none, and scaled by four they keep others.
    """
    factor = numpy_dtype(inputs.dtype).type(4)
    scaled = dataclasses.replace(
        inputs, x=inputs.x * factor, bias=None if inputs.bias is None else inputs.bias * factor
    )
    plain, large = subject.vjp(inputs), subject.vjp(scaled)
    arithmetic = arithmetic_of(subject.mode, inputs.dtype)
    # A result that a mode hands out in a wider format was rounded to the mode's own before.
    least = FORMATS[arithmetic.output].smallest_normal
    wrong = []
    for name, value in large.items():
        expected = plain[name].astype(np.float64) * (4 if name in ("y", "dweight") else 1)
        found = value.astype(np.float64)
        if not np.all((found == expected) | ((np.abs(found) <= 4 * least) & (np.abs(expected) <= 4 * least))):
            wrong.append(f"scaling by 4: {name} is not scaled exactly")
    return wrong


def _integers(inputs: Inputs) -> bool:
    arrays = (inputs.x, inputs.weight, inputs.cotangent, *(() if inputs.bias is None else (inputs.bias,)))
    return all(np.all(array == np.rint(array)) for array in arrays)


def check_adjoint(subject: Subject, inputs: Inputs) -> list[str]:
    """`<dy, xW> = <dx, x> = <dW, W>` and `<dy, 1 b> = <db, b>`, in float64 on results of integer inputs: exact."""
    if not _integers(inputs):
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
    wrong = _within({name: whole[name] for name in joined}, joined, subject, inputs, "concatenated batches")
    arithmetic = arithmetic_of(subject.mode, inputs.dtype)
    truths = [reference(one) for one in (inputs, *parts)]
    for name in sorted({"dweight", "dbias"} & set(whole)):
        limit = np.sum([bound(truth[name], arithmetic) for truth in truths], axis=0)
        # Added in the oracle's dtype: the addition is no part of what is judged.
        total = np.sum([half[name].astype(limit.dtype) for half in halves], axis=0)
        result = compare_with_limit(name, whole[name], total, limit, truths[0][name].partition_axis)
        if result.status != "ok":
            wrong.append(f"concatenated batches: {result.reason}")
    return wrong


def check_one_partition(subject: Subject, inputs: Inputs, plain: Subject) -> list[str]:
    """With n = 1 the map is the framework's own Linear: bit for bit on integers, else within both bounds.

    Args:
        subject: the subject.
        inputs: with one partition.
        plain: the framework's Linear, from `load_plain_linear`.
    """
    if len(inputs.weight) != 1:
        raise ValueError(f"inputs: expected one partition, as a Linear has, got {len(inputs.weight)}; use n = 1.")
    ours, theirs = subject.vjp(inputs), plain.vjp(inputs)
    if set(ours) != set(theirs):
        return [f"one partition: got {', '.join(ours)}, {plain.implementation} has {', '.join(theirs)}"]
    if _integers(inputs):
        return [
            f"one partition: {name} differs from {plain.implementation} on integers"
            for name, value in ours.items()
            if not np.array_equal(value.astype(np.float64), theirs[name].astype(np.float64))
        ]
    truth, arithmetic = reference(inputs), arithmetic_of(subject.mode, inputs.dtype)
    limits = pair_limits(truth, (arithmetic, arithmetic))
    if "dbias" in limits:
        # The other side only: Flax's Linear sums the bias gradient in the storage format.
        low = dataclasses.replace(arithmetic, accumulator=arithmetic.output)
        limits["dbias"] = bound(truth["dbias"], arithmetic) + bound(truth["dbias"], low)
    wrong = [result for result in compare_pair(ours, theirs, truth, limits) if result.status != "ok"]
    return [
        *(f"one partition, against {plain.implementation}: {result.reason}" for result in wrong),
        *(f"one partition: {result.reason}" for result in compare(ours, truth, arithmetic) if result.status != "ok"),
    ]


def check_affine_differences(subject: Subject, inputs: Inputs) -> list[str]:
    """The map is affine: on integers a finite difference with step 1 is exact, and equals the derivative it returns.

    For a unit step in one entry of x, W or b, the change of `<dy, y>` is that entry of dx, dW or db, exactly.
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
