"""Find the likely cause of a mismatch: try which known mistake turns the oracle into what the subject returned.

Mistakes in the operands and in whole tensors are tried first, on the partitions that differ; then the pattern of the
errors (scaled, truncated, few elements, coarse sums). Only evidence that distinguishes counts: a wide bound alone
(low-precision sums over many terms) fits anything.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity_tests.causes import unequal
from parity_tests.causes.search import first_confirmed
from parity_tests.judge.comparison import TensorResult, applicable_tiers
from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.tolerance import (
    PRECISION_OF_DTYPE,
    Arithmetic,
    OracleTensor,
    Reference,
    Tier,
    bound,
    bounds,
    declared_arithmetic,
    reference,
)

_FEW = 0.01  # a larger share of elements outside the bound is no accident of single elements
_LEAST = 8  # fewer numbers than this can have the same sign of their error, or short significands, by chance
_ONE_SIDED = 0.95  # share of the errors that point to zero; half of them do when results are rounded to nearest
_WIDTHS = {24: "float32's 24", 11: "TF32's or float16's 11", 8: "bfloat16's 8"}
# Errors of sums kept at roundoff u have this root mean square over u S: the lower end where they are summed in blocks.
_SUMMED = (1 / 64, 1.0)


@dataclass(frozen=True)
class Evidence:
    """One tensor that was rejected, or some of its partitions."""

    name: str  # of the tensor
    value: np.ndarray  # as the subject returned it
    truth: OracleTensor  # the oracle's tensor
    arithmetic: Arithmetic  # of the bound
    zero_mean: bool  # True if the oracle's data allow tier T3

    @property
    def error(self) -> np.ndarray:
        """Value minus truth, in the oracle's dtype."""
        return self.value.astype(self.truth.value.dtype) - self.truth.value

    def outside(self, tiers: Sequence[Tier] = ()) -> np.ndarray:
        """Return a mask of the elements outside the bound of any of these tiers, by default of all that apply."""
        tiers = tiers or applicable_tiers(self.arithmetic, self.zero_mean)
        limits = bounds(self.truth, self.arithmetic, tiers)
        error = np.abs(self.error)
        # Not "error > limit": NaN lies outside every bound.
        return ~np.logical_and.reduce([error <= limit for limit in limits.values()])

    def fits(self) -> bool:
        """Return True if the value is right for this truth."""
        return not self.outside().any()

    def partitions(self, chosen: np.ndarray) -> "Evidence":
        """Return the same for some partitions only."""
        places = _places(self.truth, chosen)
        return replace(
            self,
            value=np.take(self.value, places, self.truth.partition_axis),
            truth=restricted(self.truth, chosen),
        )


def _places(tensor: OracleTensor, partitions: np.ndarray) -> np.ndarray:
    """Return the places of some partitions along their axis."""
    return partitions if tensor.labels is None else np.nonzero(np.isin(tensor.labels, partitions))[0]


def restricted(tensor: OracleTensor, chosen: np.ndarray) -> OracleTensor:
    """Return some partitions of the oracle's tensor."""
    places = _places(tensor, chosen)

    def taken(array: np.ndarray) -> np.ndarray:
        return np.take(array, places, tensor.partition_axis)

    return replace(
        tensor,
        terms=tensor.terms[places] if isinstance(tensor.terms, np.ndarray) else tensor.terms,
        labels=None if tensor.labels is None else tensor.labels[places],
        value=taken(tensor.value),
        magnitude=taken(tensor.magnitude),
        addend=None if tensor.addend is None else taken(tensor.addend),
        product=None if tensor.product is None else taken(tensor.product),
    )


def not_finite(evidence: Evidence) -> str | None:
    """Name NaN or infinities where the truth is finite."""
    wrong = evidence.value.astype(np.float64)[np.isfinite(evidence.truth.value)]
    if np.isfinite(wrong).all():
        return None
    return f"{evidence.name} contains {'NaN' if np.isnan(wrong).any() else 'infinities'}"


def all_zero(evidence: Evidence) -> str | None:
    """Recognise a tensor of zeros."""
    return None if np.any(evidence.value) else f"{evidence.name} is all zero"


def scaled(evidence: Evidence, named_factors: dict[str, float]) -> str | None:
    """Return a constant factor, by name if it is one of `named_factors`."""
    expected = evidence.truth.value.astype(np.float64).ravel()
    square = float(expected @ expected)
    if not square or evidence.value.size < 2:
        return None
    value = evidence.value.astype(np.float64)
    factor = float(value.ravel() @ expected) / square
    u = FORMATS[evidence.arithmetic.output].roundoff
    # A factor this near 1 is what truncation looks like on average.
    if abs(factor - 1) <= 2 * u:
        return None
    # Rounded twice: before the factor and after it.
    limit = 2 * abs(factor) * bound(evidence.truth, evidence.arithmetic)
    if not (np.abs(value - factor * evidence.truth.value) <= limit).all():
        return None
    for name, known in named_factors.items():
        if abs(factor / known - 1) <= 2 * u:
            return f"{evidence.name} is scaled by {name}"
    return f"{evidence.name} is scaled by {factor:.4g}"


def significand_bits(value: np.ndarray) -> int:
    """Return the most significand bits that any of the numbers makes use of."""
    numbers = value.astype(np.float64)
    mantissa, _ = np.frexp(np.abs(numbers[np.isfinite(numbers) & (numbers != 0)]))
    if not mantissa.size:
        return 0
    integers = (mantissa * 2.0**53).astype(np.int64)
    return int(53 - np.log2((integers & -integers).astype(np.float64)).min())


def coarse_output(evidence: Evidence) -> str | None:
    """Return a result that was truncated, or rounded to a shorter significand than its dtype has."""
    if evidence.value.size < _LEAST:
        return None
    own = round(-np.log2(FORMATS[evidence.arithmetic.output].roundoff))
    bits = min(significand_bits(evidence.value), own)
    error, expected = evidence.error, evidence.truth.value
    unit = 2.0**-bits * np.abs(expected)
    slack = bound(evidence.truth, evidence.arithmetic)
    inexact = error[np.abs(error) > unit / 64] * np.sign(expected[np.abs(error) > unit / 64])
    inwards = inexact.size >= _LEAST and np.mean(inexact < 0) >= _ONE_SIDED
    if inwards and (np.abs(error) <= 2 * unit + slack).all():
        width = f" to {bits} significand bits" if bits < own else ""
        return f"{evidence.name} is truncated{width} instead of rounded"
    # One bit less than the dtype has may be chance in few numbers.
    if bits <= own - 2 and (np.abs(error) <= unit + slack).all():
        return f"{evidence.name} is rounded to {_WIDTHS.get(bits, bits)} significand bits"
    return None


def few_elements(evidence: Evidence) -> str | None:
    """Name single elements that are wrong while all others are right."""
    outside = evidence.outside()
    count = int(outside.sum())
    if outside.size < _LEAST or count > max(1, int(_FEW * outside.size)):
        return None
    first = [int(k[0]) for k in np.nonzero(outside)]
    which = f"{evidence.name}{first}" if count == 1 else f"{count} elements, first {evidence.name}{first},"
    return f"only {which} of {outside.size} elements {'differs' if count == 1 else 'differ'}"


def coarse_sums(evidence: Evidence) -> str | None:
    """Name a shorter format than promised for the sums: errors are spread, of the size that its roundings add up to."""
    own = evidence.arithmetic.accumulator_roundoff
    error, magnitude = evidence.error.astype(np.float64), evidence.truth.magnitude.astype(np.float64)
    size = float(np.sqrt(np.mean(error**2) / np.mean(magnitude**2)))
    for name in ("float32", "float16", "bfloat16"):
        u = FORMATS[name].roundoff
        if u <= own or not _SUMMED[0] * u <= size <= _SUMMED[1] * u:
            continue
        coarse = replace(evidence, arithmetic=replace(evidence.arithmetic, accumulator=name, truncates=False))
        if replace(coarse, zero_mean=False).fits():
            return f"sums are accumulated in {name}"
    return None


# --- mistakes that are tried ---

UNEXPLAINED = "none of the known mistakes explains it"
_GRADIENTS = {"dx": "gradient of x", "dweight": "gradient of the weight", "dbias": "gradient of the bias"}
# The operands of each tensor: a mistake in any other does not touch it.
_OPERANDS_OF = {
    "y": ("x", "weight", "bias"),
    "dx": ("cotangent", "weight"),
    "dweight": ("x", "cotangent"),
    "dbias": ("cotangent",),
}
_SAMPLED_ROWS = 16  # of y and dx; they rule out most mistakes
# The oracle is evaluated once for each mistake that is tried: seconds for a case beyond this many products.
_MOST_PRODUCTS = 2**25
Change = Callable[[Inputs], Inputs | None]


def _with(inputs: Inputs, **arrays: np.ndarray | None) -> Inputs:
    return dataclasses.replace(inputs, **arrays)


def _transposed(inputs: Inputs) -> Inputs | None:
    _, i, o = inputs.weight.shape
    return _with(inputs, weight=inputs.weight.swapaxes(1, 2)) if i == o else None


def _reshaped(inputs: Inputs) -> Inputs:
    """Read (n, o, i) numbers as (n, i, o): a transposition forgotten where the sizes differ."""
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


# Mistakes in the operands: the oracle on the changed inputs returns what a subject with the mistake would.
OPERANDS: tuple[tuple[str, Change], ...] = (
    ("the kernel is transposed", _transposed),
    ("the kernel's (n, o, i) numbers are read as (n, i, o)", _reshaped),
    ("partitions are off by one", _shifted(1)),
    ("partitions are off by minus one", _shifted(-1)),
    ("the bias is missing", _without_bias),
    ("the bias is rolled by one partition", _bias_rolled(1)),
    ("the bias is rolled back by one partition", _bias_rolled(-1)),
    ("the bias is added twice", _bias_twice),
    ("the cotangent is replaced by ones", _summed),
)


def shortened(array: np.ndarray, bits: int, nearest: bool) -> np.ndarray:
    """Return the numbers with so many significand bits, rounded or chopped (hardware does either)."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    scaled = mantissa * 2.0**bits
    return np.ldexp((np.rint(scaled) if nearest else np.trunc(scaled)) / 2.0**bits, exponent).astype(array.dtype)


_SHORTER = (("float32", 24), ("TF32", 11), ("bfloat16", 8))


def _first_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[-2:])[:_SAMPLED_ROWS]


def _explained(whole: Evidence, changed: Inputs, original: Inputs) -> Evidence | None:
    """Return the value beside the oracle on changed inputs; None where operands or a few rows already rule it out."""
    kept = [(getattr(changed, key), getattr(original, key)) for key in _OPERANDS_OF[whole.name]]
    if all(new is old or (new is not None and np.array_equal(new, old)) for new, old in kept):
        return None
    zero_mean = whole.zero_mean and changed.zero_mean
    if whole.name in ("y", "dx") and original.sizes is None:
        rows = dataclasses.replace(changed, x=_first_rows(changed.x), cotangent=_first_rows(changed.cotangent))
        sample = dataclasses.replace(whole, value=_first_rows(whole.value), truth=reference(rows)[whole.name])
        # Some partition must agree. T1 alone: it does not depend on how many elements there are.
        if sample.outside(("T1",)).any(axis=(0, 2)).all():
            return None
    return dataclasses.replace(whole, truth=reference(changed)[whole.name], zero_mean=zero_mean)


def _rounded_operands(evidence: Evidence, inputs: Inputs) -> str | None:
    """Name operands that lost bits on their way into the product, if shortened operands explain the errors."""
    before = float(np.sqrt(np.mean(evidence.error.astype(np.float64) ** 2)))
    # Rounded operands point to a tensor core, which chops its sums.
    chopping = dataclasses.replace(evidence, arithmetic=dataclasses.replace(evidence.arithmetic, truncates=True))
    for name, bits in _SHORTER:
        for nearest in (True, False):
            arrays = {key: shortened(getattr(inputs, key), bits, nearest) for key in ("x", "weight", "cotangent")}
            candidate = _explained(chopping, _with(inputs, **arrays), inputs)
            if candidate is None or not candidate.fits():
                continue
            after = float(np.sqrt(np.mean(candidate.error.astype(np.float64) ** 2)))
            if after <= before / 4:
                return f"operands are rounded to {name}"
    return None


def _whole_tensors(evidence: Evidence, inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    """Yield results that are right but in the wrong place: the sentence, and the value put right."""
    if inputs.sizes is not None:
        yield from unequal.misplaced(evidence.name, evidence.value, inputs.sizes)
        return
    name, axis = evidence.name, evidence.truth.partition_axis
    if evidence.value.shape[axis] > 1:
        for by, direction in ((1, "rolled"), (-1, "rolled back")):
            yield f"{name} is {direction} by one partition", np.roll(evidence.value, -by, axis)
    if name == "dweight" and evidence.value.shape[1] == evidence.value.shape[2]:
        yield f"{name} is transposed", evidence.value.swapaxes(1, 2)


def _by_trying(whole: Evidence, different: np.ndarray, inputs: Inputs, truth: Reference) -> str | None:
    """Return mistakes in the operands and in whole tensors, looked for in the partitions that differ."""
    part = whole.partitions(different)
    factors = {"1/n": 1 / inputs.num_partitions, "n": float(inputs.num_partitions), "-1": -1.0}
    if rows := inputs.case.rows:
        factors |= {"1/rows (a mean, not a sum)": 1 / rows}

    def in_operands(change: Change) -> bool:
        changed = change(inputs)
        candidate = None if changed is None else _explained(whole, changed, inputs)
        return candidate is not None and candidate.partitions(different).fits()

    def hypotheses() -> Iterator[tuple[str, Callable[[], bool]]]:
        for sentence, change in OPERANDS if inputs.sizes is None else unequal.OPERANDS:
            yield sentence, lambda change=change: in_operands(change)
        for sentence, righted in _whole_tensors(whole, inputs):
            yield sentence, lambda righted=righted: dataclasses.replace(whole, value=righted).fits()

    if found := not_finite(part) or all_zero(part):
        return found
    return first_confirmed(hypotheses()) or scaled(
        part, {name: factor for name, factor in factors.items() if factor != 1.0}
    )


def explain(
    results: Sequence[TensorResult],
    outputs: Mapping[str, np.ndarray],
    inputs: Inputs,
    arithmetic: Arithmetic | None = None,
) -> str:
    """Return a likely cause of the first mismatch in one clause, or that none of the known mistakes explains it.

    Without `arithmetic`, the subject is entitled to that of its dtype.
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
    n = inputs.num_partitions
    different = np.nonzero(outside.any(axis=tuple(k for k in range(outside.ndim) if k != axis)))[0]
    if expected.labels is not None:
        different = np.unique(expected.labels[different])
    listed = f"{'partition' if len(different) == 1 else 'partitions'} {', '.join(map(str, different))} of {n}"
    if found := _by_trying(whole, different, inputs, truth):
        return found if len(different) == n else f"{found} in {listed}"
    found = _rounded_operands(whole, inputs) or coarse_output(whole) or few_elements(whole) or coarse_sums(whole)
    return found or (UNEXPLAINED if len(different) == n else f"only {listed} differ")


def with_cause(
    result: TensorResult, outputs: Mapping[str, np.ndarray], inputs: Inputs, arithmetic: Arithmetic
) -> TensorResult:
    """Return a mismatch with its likely cause in its reason."""
    products = inputs.case.rows * inputs.weight.size
    small = products <= _MOST_PRODUCTS
    cause = explain([result], outputs, inputs, arithmetic) if small else "sought on smaller cases only"
    return dataclasses.replace(result, reason=f"{result.reason}; likely cause: {cause}")
