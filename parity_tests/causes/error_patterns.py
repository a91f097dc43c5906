"""What the errors of one tensor look like: scaled, truncated, of few significand bits, of few elements, of coarse sums.

Each function asks one question of the same evidence and answers with a clause, or None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity_tests.judge.comparison import applicable_tiers
from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.oracle import OracleTensor
from parity_tests.judge.tolerance import Arithmetic, Tier, bound, bounds

_FEW = 0.01  # a larger share of elements outside the bound is no accident of single elements
_LEAST = 8  # fewer numbers than this can have the same sign of their error, or short significands, by chance
_ONE_SIDED = 0.95  # share of the errors that point to zero; half of them do when results are rounded to nearest
_WIDTHS = {24: "float32's 24", 11: "TF32's or float16's 11", 8: "bfloat16's 8"}
# Errors of sums kept at roundoff u have this root mean square over u S: the lower end where they are summed in blocks.
_SUMMED = (1 / 64, 1.0)


@dataclass(frozen=True)
class Evidence:
    """One tensor that was rejected, or some of its partitions.

    Attributes:
        name: of the tensor.
        value: what the subject returned.
        truth: the oracle's tensor.
        arithmetic: what the subject was entitled to.
        zero_mean: whether the oracle's data allow tier T3.
    """

    name: str
    value: np.ndarray
    truth: OracleTensor
    arithmetic: Arithmetic
    zero_mean: bool

    @property
    def error(self) -> np.ndarray:
        """Value minus truth, in the oracle's dtype."""
        return self.value.astype(self.truth.value.dtype) - self.truth.value

    def outside(self, tiers: Sequence[Tier] = ()) -> np.ndarray:
        """Which elements lie outside the bound of any of these tiers, or of any that applies."""
        tiers = tiers or applicable_tiers(self.arithmetic, self.zero_mean)
        limits = bounds(self.truth, self.arithmetic, tiers)
        error = np.abs(self.error)
        # Not "error > limit": NaN lies outside every bound.
        return ~np.logical_and.reduce([error <= limit for limit in limits.values()])

    def fits(self, tiers: Sequence[Tier] = ()) -> bool:
        """Whether the value is right for this truth."""
        return not self.outside(tiers).any()

    def partitions(self, chosen: np.ndarray) -> "Evidence":
        """The same for some partitions only."""
        return replace(
            self,
            value=np.take(self.value, chosen, self.truth.partition_axis),
            truth=restricted(self.truth, chosen),
        )


def restricted(tensor: OracleTensor, chosen: np.ndarray) -> OracleTensor:
    """Returns some partitions of the oracle's tensor."""

    def taken(array: np.ndarray) -> np.ndarray:
        return np.take(array, chosen, tensor.partition_axis)

    return replace(
        tensor,
        value=taken(tensor.value),
        magnitude=taken(tensor.magnitude),
        addend=None if tensor.addend is None else taken(tensor.addend),
        product=None if tensor.product is None else taken(tensor.product),
    )


def not_finite(evidence: Evidence) -> str | None:
    """NaN or infinities where the truth is finite."""
    wrong = evidence.value.astype(np.float64)[np.isfinite(evidence.truth.value)]
    if np.isfinite(wrong).all():
        return None
    return f"{evidence.name} contains {'NaN' if np.isnan(wrong).any() else 'infinities'}"


def all_zero(evidence: Evidence) -> str | None:
    """Nothing but zeros."""
    return None if np.any(evidence.value) else f"{evidence.name} is all zero"


def scaled(evidence: Evidence, named_factors: dict[str, float]) -> str | None:
    """A constant factor, by name if it is one of `named_factors`."""
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
    """The most significand bits that any of the numbers makes use of."""
    numbers = value.astype(np.float64)
    mantissa, _ = np.frexp(np.abs(numbers[np.isfinite(numbers) & (numbers != 0)]))
    if not mantissa.size:
        return 0
    integers = (mantissa * 2.0**53).astype(np.int64)
    return int(53 - np.log2((integers & -integers).astype(np.float64)).min())


def coarse_output(evidence: Evidence) -> str | None:
    """A result that was truncated, or rounded to a shorter significand than its dtype has."""
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
    """Single elements that are wrong while all others are right."""
    outside = evidence.outside()
    count = int(outside.sum())
    if outside.size < _LEAST or count > max(1, int(_FEW * outside.size)):
        return None
    first = [int(k[0]) for k in np.nonzero(outside)]
    which = f"{evidence.name}{first}" if count == 1 else f"{count} elements, first {evidence.name}{first},"
    return f"only {which} of {outside.size} elements {'differs' if count == 1 else 'differ'}"


def coarse_sums(evidence: Evidence) -> str | None:
    """Sums that were kept in a shorter format than promised: spread errors of the size that its roundings add up to."""
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
