"""Derive error bounds from the arithmetic that was used; no tolerance is chosen by hand.

Notation: `u` is a unit roundoff, `gamma_n = n u / (1 - n u)`, K the number of products in a sum and S the sum of
their magnitudes. For an exact value z, with operands rounded by `theta = 2 u_in + u_in^2` and accumulated at u_acc::

    E = theta S + gamma_{K+1}(u_acc) ((1 + theta) S + |b|)              bias inside the sum ("fused")
    B = E + u_out (|z| + E) + eta_out + K eta_acc + gamma_{K+2}(2^-53) (S + |b|)

Without fusion the product is rounded to the output dtype first, the bias is added, and the sum is rounded again. Where
a mode casts fp32 operands to bf16, theta is that of the cast, and the bias, rounded too, adds `(1 + u_out) u_in |b|`.
Without a promise of fusion, an implementation may still start its sum at the bias, and every partial sum is then
rounded at the magnitude of the bias: the bound is the larger of the two. (For |b| T3 takes the growth of T2.)

Tiers: T1 as above holds for any order of summation. T2 replaces gamma_n by
`expm1(lambda sqrt(n) u + n u^2 / (1 - u))` and T3 by `lambda u` (zero-mean data only), with
`lambda = sqrt(2 ln(2 K numel / delta))` from the declared false-alarm rate delta; both assume roundings of zero mean,
so not a truncating accumulator.

Sources: Higham, Accuracy and Stability of Numerical Algorithms, ch. 3; Higham and Mary (2019, 2020) on probabilistic
rounding error analysis; Blanchard, Higham, Lopez, Mary and Pranesh (2020) on mixed-precision block FMA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.oracle import OracleTensor

Tier = Literal["T1", "T2", "T3"]
TIERS: tuple[Tier, ...] = ("T1", "T2", "T3")
FALSE_ALARM_RATE = 1e-6
_TRUNCATING_ROUNDOFF = 2.0**-23  # a chopping fp32 accumulator loses up to one unit, twice the rounding of a nearest one


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a product.

    Attributes:
        output: format that the result is stored in.
        operand: format that the operands are rounded to before they are multiplied (the storage format when exact).
        accumulator: format of the running sum.
        fused_bias: the bias is certainly added before the one rounding to the output; False leaves both open.
        flushes_subnormals: results below the smallest normal of `output` may become zero.
        flushes_partial_sums: the same for products and running sums, below the smallest normal of `accumulator`.
        truncates: the accumulator chops instead of rounding to nearest (tensor cores).
        casts: operands, bias and cotangent are stored wider and rounded to `operand` first (autocast, a dtype
            policy); they are taken to be normal numbers of that format.
        gradients_in: wider dtype that gradients are handed out in after they were rounded to `output`, or None.
    """

    output: str
    operand: str
    accumulator: str
    fused_bias: bool = False
    flushes_subnormals: bool = True
    flushes_partial_sums: bool = True
    truncates: bool = False
    casts: bool = False
    gradients_in: str | None = None

    @property
    def operand_error(self) -> float:
        """Theta: the relative error that rounding both operands puts on a product; 0 when operands are exact."""
        if not self.casts and FORMATS[self.operand].roundoff <= FORMATS[self.output].roundoff:
            return 0.0
        u = FORMATS[self.operand].roundoff
        return 2 * u + u * u

    @property
    def addend_error(self) -> float:
        """The relative error that rounding the bias on its way in puts on it; 0 when it is exact."""
        return FORMATS[self.operand].roundoff if self.casts else 0.0

    def dtype_of(self, tensor: str) -> str:
        """Return the dtype that a tensor is handed out in."""
        return self.output if tensor == "y" or self.gradients_in is None else self.gradients_in

    @property
    def accumulator_roundoff(self) -> float:
        """The unit roundoff of the running sum."""
        return _TRUNCATING_ROUNDOFF if self.truncates else FORMATS[self.accumulator].roundoff

    @property
    def underflow(self) -> float:
        """Largest absolute error that underflow of a result can cause."""
        return _underflow(self.output, self.flushes_subnormals)

    @property
    def partial_underflow(self) -> float:
        """Largest absolute error that underflow of one product, or of the sum that it joins, can cause."""
        return _underflow(self.accumulator, self.flushes_partial_sums)

    def describe(self) -> str:
        """Describe the arithmetic in one clause."""
        said = [
            f"{self.operand} operands{' (cast)' if self.casts else ''}",
            f"{self.accumulator} sums{' (truncated)' if self.truncates else ''}",
            f"{self.output} results",
            "bias fused" if self.fused_bias else "bias fused or not",
            "subnormals may be flushed" if self.flushes_subnormals else "subnormals kept",
        ]
        return ", ".join(said)


def _underflow(name: str, flushed: bool) -> float:
    fmt = FORMATS[name]
    return fmt.smallest_normal if flushed else fmt.smallest_subnormal


_DECLARED = {
    "fp64": Arithmetic("float64", "float64", "float64"),
    "ieee_fp32": Arithmetic("float32", "float32", "float32"),
    "tf32": Arithmetic("float32", "tf32", "float32", truncates=True),
    "bf16": Arithmetic("bfloat16", "bfloat16", "float32"),
    # Results of ordinary size lie below fp16's smallest normal, 6e-5: unless a device was seen to flush them, a result
    # that became zero there is lost. (fp32 and bf16 subnormals lie below 1.2e-38, and XLA flushes them on a CPU.)
    "fp16": Arithmetic("float16", "float16", "float32", flushes_subnormals=False),
}
PRECISION_OF_DTYPE = {"float64": "fp64", "float32": "ieee_fp32", "bfloat16": "bf16", "float16": "fp16"}


def declared_arithmetic(precision: str) -> Arithmetic:
    """Return the arithmetic that a precision promises: storage, operands, and an fp32 accumulator for 16-bit formats.

    Two choices stay open: the bias may be added after the product was rounded, and subnormals of formats other than
    fp16 may be flushed. Probes of the device close them, see `fingerprint.entitlement`.


    Raises:
        ValueError: for another name.
    """
    if precision not in _DECLARED:
        raise ValueError(f"precision: expected one of {', '.join(_DECLARED)}, got {precision!r}; choose one of these.")
    return _DECLARED[precision]


def _growth(n: Any, u: float, tier: Tier, confidence: Any) -> Any:
    """Return gamma_n of a tier: the relative error of a sum of n terms; element by element for an array of n."""
    if tier == "T1":
        share = np.minimum(np.multiply(n, u), 1.0)
        with np.errstate(divide="ignore"):
            return share / (1 - share)
    if tier == "T2":
        return np.expm1(confidence * np.sqrt(n) * u + n * u * u / (1 - u))
    return confidence * u


def bounds(tensor: OracleTensor, arithmetic: Arithmetic, tiers: Sequence[Tier]) -> dict[Tier, np.ndarray]:
    """Return B of several tiers, element by element: the largest error that correct code can show.

    B is linear in S, |b|, the magnitude of the value and, without fusion, of the product; only the coefficients of S
    and |b| depend on the tier, so that the rest is added up once.

    Args:
        tensor: the oracle's value with its magnitude S, number of terms K and addend.
        arithmetic: of the subject's value.
        tiers: `T1` (certain), `T2` or `T3` (with false-alarm rate `FALSE_ALARM_RATE`).

    Returns:
        Arrays of the tensor's shape, at least 0; 0 up to underflow where S is 0.
    """
    theta, u_acc = arithmetic.operand_error, arithmetic.accumulator_roundoff
    u = FORMATS[arithmetic.output].roundoff
    eta = arithmetic.underflow
    terms, magnitude, addend = tensor.terms, tensor.magnitude, tensor.addend
    confidence = np.sqrt(2 * np.log(2 * np.maximum(terms, 1) * max(tensor.value.size, 1) / FALSE_ALARM_RATE))
    underflow = eta + terms * arithmetic.partial_underflow
    u_oracle = 2.0**-53 if tensor.value.dtype == np.float64 else float(np.finfo(np.longdouble).eps) / 2
    oracle_error = _growth(terms + 2, u_oracle, "T1", 0.0)
    unfused = addend is not None and not arithmetic.fused_bias
    # Without fusion E is rounded with the product, and the result is rounded once more.
    roundings = (1 + u) ** 2 if unfused else 1 + u
    shared = u * np.abs(tensor.value)
    if addend is not None:
        # A bias that was rounded on its way in is rounded once more with the sum that it joins.
        shared += (oracle_error + (1 + u) * arithmetic.addend_error) * addend
    if unfused:
        assert tensor.product is not None  # an addend always comes with the product it was added to
        shared += (1 + u) * u * np.abs(tensor.product)
        underflow = (1 + u) * underflow + eta
    shared += underflow
    found: dict[Tier, np.ndarray] = {}
    fused = bounds(tensor, replace(arithmetic, fused_bias=True), tiers) if unfused else {}
    for tier in tiers:
        growth = _growth(terms + 1 if addend is not None and not unfused else terms, u_acc, tier, confidence)
        limit = shared + (roundings * (theta + growth * (1 + theta)) + oracle_error) * magnitude
        if addend is not None and not unfused:
            # Partial sums around a bias do not shrink with zero-mean data: their roundings add up as in T2.
            around = _growth(terms + 1, u_acc, "T2" if tier == "T3" else tier, confidence)
            limit += roundings * around * (1 + arithmetic.addend_error) * addend
        found[tier] = np.maximum(limit, fused[tier]) if unfused else limit
    return found


def bound(tensor: OracleTensor, arithmetic: Arithmetic, tier: Tier = "T1") -> np.ndarray:
    """Return B of one tier; see `bounds`."""
    return bounds(tensor, arithmetic, (tier,))[tier]
