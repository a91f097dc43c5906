"""Likely causes of a mismatch, found by trying: which known mistake turns the oracle into what the subject returned?

Mistakes in the operands and in whole tensors are tried first, on the partitions that differ; then what the errors look
like. Only evidence that distinguishes counts: a wide bound alone (low-precision sums over many terms) fits anything.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.causes import error_patterns
from parity_tests.causes.error_patterns import Evidence
from parity_tests.judge.comparison import TensorResult
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.oracle import Reference, reference
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic, declared_arithmetic

UNEXPLAINED = "none of the known mistakes explains it"
_GRADIENTS = {"dx": "gradient of x", "dweight": "gradient of the weight", "dbias": "gradient of the bias"}
# What each tensor is computed from: a mistake in anything else does not touch it.
_OPERANDS_OF = {
    "y": ("x", "weight", "bias"),
    "dx": ("cotangent", "weight"),
    "dweight": ("x", "cotangent"),
    "dbias": ("cotangent",),
}
_SAMPLED_ROWS = 16  # of y and dx, which most mistakes are ruled out by
# The oracle is evaluated once for each mistake that is tried: seconds for a case beyond this many products.
_MOST_PRODUCTS = 2**25
Change = Callable[[Inputs], Inputs | None]


@dataclass(frozen=True)
class Hypothesis:
    """A mistake in the operands: evaluating the oracle on the changed inputs gives what the mistake would give."""

    sentence: str
    change: Change


def _with(inputs: Inputs, **arrays: np.ndarray | None) -> Inputs:
    return dataclasses.replace(inputs, **arrays)


def _transposed(inputs: Inputs) -> Inputs | None:
    _, i, o = inputs.weight.shape
    return _with(inputs, weight=inputs.weight.swapaxes(1, 2)) if i == o else None


def _reshaped(inputs: Inputs) -> Inputs:
    """(n, o, i) numbers read as (n, i, o): a transposition forgotten where the sizes differ."""
    return _with(inputs, weight=inputs.weight.swapaxes(1, 2).reshape(inputs.weight.shape))


def _shifted(by: int) -> Change:
    return lambda inputs: _with(inputs, weight=np.roll(inputs.weight, by, axis=0))


def _without_bias(inputs: Inputs) -> Inputs | None:
    return None if inputs.bias is None else _with(inputs, bias=np.zeros_like(inputs.bias))


def _bias_rolled(by: int) -> Change:
    return lambda inputs: None if inputs.bias is None else _with(inputs, bias=np.roll(inputs.bias, by, axis=0))


def _bias_twice(inputs: Inputs) -> Inputs | None:
    return None if inputs.bias is None else _with(inputs, bias=(2 * inputs.bias).astype(inputs.bias.dtype))


def _summed(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, cotangent=np.ones_like(inputs.cotangent), zero_mean=False)


OPERANDS: tuple[Hypothesis, ...] = (
    Hypothesis("the kernel is transposed", _transposed),
    Hypothesis("the kernel's (n, o, i) numbers are read as (n, i, o)", _reshaped),
    Hypothesis("partitions are off by one", _shifted(1)),
    Hypothesis("partitions are off by minus one", _shifted(-1)),
    Hypothesis("the bias is missing", _without_bias),
    Hypothesis("the bias is rolled by one partition", _bias_rolled(1)),
    Hypothesis("the bias is rolled back by one partition", _bias_rolled(-1)),
    Hypothesis("the bias is added twice", _bias_twice),
    Hypothesis("the cotangent is replaced by ones", _summed),
)


def _shortened(array: np.ndarray, bits: int, nearest: bool) -> np.ndarray:
    """The numbers with so many significand bits, rounded or chopped (hardware does either)."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    scaled = mantissa * 2.0**bits
    return np.ldexp((np.rint(scaled) if nearest else np.trunc(scaled)) / 2.0**bits, exponent).astype(array.dtype)


_SHORTER = (("float32", 24), ("TF32", 11), ("bfloat16", 8))


def _first_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[-2:])[:_SAMPLED_ROWS]


def _explained(whole: Evidence, changed: Inputs, original: Inputs) -> Evidence | None:
    """The value beside the oracle's on changed inputs; None where a few rows, or the operands, already rule it out."""
    kept = [(getattr(changed, key), getattr(original, key)) for key in _OPERANDS_OF[whole.name]]
    if all(new is old or (new is not None and np.array_equal(new, old)) for new, old in kept):
        return None
    zero_mean = whole.zero_mean and changed.zero_mean
    if whole.name in ("y", "dx"):
        rows = dataclasses.replace(changed, x=_first_rows(changed.x), cotangent=_first_rows(changed.cotangent))
        sample = dataclasses.replace(whole, value=_first_rows(whole.value), truth=reference(rows)[whole.name])
        # Some partition must agree. T1 alone: it does not depend on how many elements there are.
        if sample.outside(("T1",)).any(axis=(0, 2)).all():
            return None
    return dataclasses.replace(whole, truth=reference(changed)[whole.name], zero_mean=zero_mean)


def _rounded_operands(evidence: Evidence, inputs: Inputs) -> str | None:
    """Operands that lost bits on their way into the product: the oracle on the shortened ones explains the errors."""
    before = float(np.sqrt(np.mean(evidence.error.astype(np.float64) ** 2)))
    # What rounds its operands is a tensor core more often than not, and those chop their sums.
    chopping = dataclasses.replace(evidence, arithmetic=dataclasses.replace(evidence.arithmetic, truncates=True))
    for name, bits in _SHORTER:
        for nearest in (True, False):
            arrays = {key: _shortened(getattr(inputs, key), bits, nearest) for key in ("x", "weight", "cotangent")}
            candidate = _explained(chopping, _with(inputs, **arrays), inputs)
            if candidate is None or not candidate.fits():
                continue
            after = float(np.sqrt(np.mean(candidate.error.astype(np.float64) ** 2)))
            if after <= before / 4:
                return f"operands are rounded to {name}"
    return None


def _whole_tensors(evidence: Evidence) -> Iterator[tuple[str, np.ndarray]]:
    """Results that are right but in the wrong place: how to say it, and the value put right."""
    name, axis = evidence.name, evidence.truth.partition_axis
    if evidence.value.shape[axis] > 1:
        for by, direction in ((1, "rolled"), (-1, "rolled back")):
            yield f"{name} is {direction} by one partition", np.roll(evidence.value, -by, axis)
    if name == "dweight" and evidence.value.shape[1] == evidence.value.shape[2]:
        yield f"{name} is transposed", evidence.value.swapaxes(1, 2)


def _by_trying(whole: Evidence, different: np.ndarray, inputs: Inputs, truth: Reference) -> str | None:
    """Mistakes in the operands and in whole tensors, looked for in the partitions that differ."""
    part = whole.partitions(different)
    factors = {"1/n": 1 / len(inputs.weight), "n": float(len(inputs.weight)), "-1": -1.0}
    if rows := truth["dweight"].terms:
        factors |= {"1/rows (a mean, not a sum)": 1 / rows}
    if found := error_patterns.not_finite(part) or error_patterns.all_zero(part):
        return found
    for hypothesis in OPERANDS:
        changed = hypothesis.change(inputs)
        if changed is None:
            continue
        candidate = _explained(whole, changed, inputs)
        if candidate is not None and candidate.partitions(different).fits():
            return hypothesis.sentence
    for sentence, righted in _whole_tensors(whole):
        if dataclasses.replace(whole, value=righted).fits():
            return sentence
    return error_patterns.scaled(part, {name: factor for name, factor in factors.items() if factor != 1.0})


def explain(
    results: Sequence[TensorResult],
    outputs: Mapping[str, np.ndarray],
    inputs: Inputs,
    arithmetic: Arithmetic | None = None,
) -> str:
    """Returns a likely cause of the first mismatch in one clause, or that none of the known mistakes explains it.

    Args:
        results: the verdicts on the subject's tensors.
        outputs: those tensors.
        inputs: what the subject was given.
        arithmetic: what the subject was entitled to; None for what its dtype promises.
    """
    failed = next((result for result in results if result.status == "mismatch"), None)
    if failed is None:
        return ""
    name, truth = failed.tensor, reference(inputs)
    arithmetic = arithmetic or declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    if name not in outputs:
        return f"no {_GRADIENTS.get(name, name)} is returned"
    value, expected = outputs[name], truth[name]
    if value.shape != expected.value.shape:
        return f"{name} has another shape"
    if value.dtype.name != arithmetic.dtype_of(name):
        return f"{name} is returned as {value.dtype.name} instead of {arithmetic.dtype_of(name)}"
    whole = Evidence(name, value, expected, arithmetic, inputs.zero_mean)
    axis = expected.partition_axis
    outside = whole.outside()
    if not outside.any():
        return "these numbers are right: another call (without gradients, or on numbers that a cast leaves) differs"
    n = value.shape[axis]
    different = np.nonzero(outside.any(axis=tuple(k for k in range(outside.ndim) if k != axis)))[0]
    listed = f"{'partition' if len(different) == 1 else 'partitions'} {', '.join(map(str, different))} of {n}"
    if found := _by_trying(whole, different, inputs, truth):
        return found if len(different) == n else f"{found} in {listed}"
    found = (
        _rounded_operands(whole, inputs)
        or error_patterns.coarse_output(whole)
        or error_patterns.few_elements(whole)
        or error_patterns.coarse_sums(whole)
    )
    return found or (UNEXPLAINED if len(different) == n else f"only {listed} differ")


def with_cause(
    result: TensorResult, outputs: Mapping[str, np.ndarray], inputs: Inputs, arithmetic: Arithmetic
) -> TensorResult:
    """Returns a mismatch with its likely cause in its reason; anything else unchanged.

    Args:
        result: a verdict.
        outputs: the subject's tensors.
        inputs: what it was given.
        arithmetic: what it was entitled to.
    """
    if result.status != "mismatch":
        return result
    products = inputs.x.size * inputs.weight.shape[2]
    small = products <= _MOST_PRODUCTS
    cause = explain([result], outputs, inputs, arithmetic) if small else "sought on smaller cases only"
    return dataclasses.replace(result, reason=f"{result.reason}; likely cause: {cause}")
