"""Compute the oracle, and derive error bounds from the arithmetic that was used; no tolerance is chosen by hand.

The oracle is the truth in float64 (longdouble for float64 subjects), with the magnitudes that the bounds need.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.inputs import Inputs, Sizes

TENSORS: tuple[str, ...] = ("y", "dx", "dweight", "dbias")


@dataclass(frozen=True)
class OracleTensor:
    """One tensor of the truth."""

    value: np.ndarray  # the exact sum, up to the oracle's own rounding
    magnitude: np.ndarray  # `S`, the sum of absolute products, element by element
    # `K`, the number of products in each sum; an array that broadcasts to the tensor where it differs
    terms: int | np.ndarray
    addend: np.ndarray | None  # `|b|` broadcast to the tensor (only y has one), or None
    product: np.ndarray | None  # the sum without the addend (y - b), or None where there is no addend
    partition_axis: int  # the axis of `n`
    # The partition of each place along that axis, where each has several; None where each has one
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


# --- bounds ---

Tier = Literal["T1", "T2", "T3"]
TIERS: tuple[Tier, ...] = ("T1", "T2", "T3")
FALSE_ALARM_RATE = 1e-6
_TRUNCATING_ROUNDOFF = 2.0**-23  # a chopping fp32 accumulator loses up to one unit, twice the rounding of a nearest one


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a product."""

    output: str  # format that the result is stored in
    operand: str  # format that the operands are rounded to before they are multiplied (the storage format when exact)
    accumulator: str  # format of the running sum
    # The bias is certainly added before the one rounding to the output; False leaves both open
    fused_bias: bool = False
    flushes_subnormals: bool = True  # results below the smallest normal of `output` may become zero
    # The same for products and running sums, below the smallest normal of `accumulator`
    flushes_partial_sums: bool = True
    truncates: bool = False  # the accumulator chops instead of rounding to nearest (tensor cores)
    # Operands, bias and cotangent are stored wider and rounded to `operand` first (autocast, a dtype policy); they are
    # taken to be normal numbers of that format
    casts: bool = False
    # Wider dtype that gradients are handed out in after they were rounded to `output`, or None
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
