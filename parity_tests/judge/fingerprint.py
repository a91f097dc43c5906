"""Measure the arithmetic of a subject from its results, and choose the arithmetic that its bound may assume.

Each probe is a product with one-hot or near one-hot operands whose result, bit by bit, can come about in one way only.
The fingerprint is a diagnosis ("operands rounded to TF32", "bias rounded twice"). It also closes what mode and dtype
leave open: whether subnormals are flushed and whether the bias of a 16-bit result is fused. A bound that allows both
where the device does neither would let wrong results through. It never relaxes a promise: TF32 stays a defect of fp32.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from parity_tests.judge.comparison import compare
from parity_tests.judge.dtypes import FORMATS, numpy_dtype
from parity_tests.judge.inputs import Case, Inputs
from parity_tests.judge.subjects import DEFAULT_MODES, EQUAL, Subject, arithmetic_of, sizes_of
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic, Reference, declared_arithmetic

# Three partitions, all alike: some code that is probed looks beyond the first.
_PARTITIONS = 3
_WIDTH = 16  # a multiple of every alignment that an implementation asks for, in every dtype
# Where the large terms 1 and -1 stand: the small term in between must survive in every order of summation that is used.
_PLACES = ((0, 15, 7), (0, 8, 4), (3, 12, 0), (1, 2, 15), (14, 15, 0))


@dataclass(frozen=True)
class Fingerprint:
    """The findings of the probes."""

    dtype: str  # storage dtype of operands and results
    operand_bits: int  # significand bits that an operand keeps
    accumulator_bits: int  # significand bits that the running sum keeps, at least
    fused_bias: bool  # the bias joins the sum before it is rounded to the output
    flushes_subnormals: bool  # subnormal results become zero
    # Products or running sums that are subnormal become zero, though the sum is a normal number; False where no product
    # of the storage format can be that small
    flushes_partial_sums: bool

    def diagnosis(self) -> list[str]:
        """Return sentences for a reader; empty if everything is as the dtype promises."""
        fmt, said = FORMATS[self.dtype], []
        storage_bits = _bits(self.dtype)
        if self.operand_bits < storage_bits:
            known = {_bits(name): name.upper() for name in ("tf32", "bfloat16")}
            said.append(f"operands rounded to {known.get(self.operand_bits, f'{self.operand_bits} bits')}")
        promised = max(storage_bits, _bits("float32"))
        if self.accumulator_bits < promised:
            said.append(f"sums kept in {self.accumulator_bits} bits instead of {promised}")
        if not self.fused_bias and fmt.name in ("bfloat16", "float16"):
            said.append("bias rounded twice")
        if self.flushes_subnormals:
            said.append("subnormals flushed")
        return said

    def honours(self, arithmetic: Arithmetic) -> bool:
        """Return True if operands and sums are at least as precise as `arithmetic` promises."""
        return self.operand_bits >= _bits(arithmetic.operand) and self.accumulator_bits >= _bits(arithmetic.accumulator)

    def refine(self, promised: Arithmetic) -> Arithmetic:
        """Return the promised arithmetic with subnormals treated as this device was seen to treat them."""
        return replace(
            promised,
            flushes_subnormals=self.flushes_subnormals,
            flushes_partial_sums=self.flushes_partial_sums,
        )


def _bits(name: str) -> int:
    return round(-np.log2(FORMATS[name].roundoff))


def _probe(dtype: str, row: Mapping[int, float], column: Mapping[int, float], bias: float, sizes: str) -> Inputs:
    target = numpy_dtype(dtype)
    x, weight = np.zeros((1, _PARTITIONS, _WIDTH)), np.zeros((_PARTITIONS, _WIDTH, _WIDTH))
    for place, value in row.items():
        x[..., place] = value
    for place, value in column.items():
        weight[:, place] = value
    case = _probe_case(sizes)
    arrays = {"x": x, "weight": weight, "bias": np.full((_PARTITIONS, _WIDTH), bias), "cotangent": np.zeros(x.shape)}
    # Of one size, partitions lie in the packed form as they do in the other one.
    flat = {name: array.reshape(case.shapes[name]).astype(target) for name, array in arrays.items()}
    return Inputs(**flat, dtype=dtype, zero_mean=False, sizes=case.sizes)


def _probe_case(sizes: str) -> Case:
    width: int | tuple[int, ...] = _WIDTH if sizes == EQUAL else (_WIDTH,) * _PARTITIONS
    return Case("fingerprint", (1,), _PARTITIONS, width, width)


def _longest(holds: Callable[[int], bool], longest: int) -> int:
    """Return largest number of bits, at most `longest`, for which all shorter lengths hold too."""
    bits = 1
    while bits < longest and holds(bits + 1):
        bits += 1
    return bits


def take_fingerprint(subject: Subject, dtype: str) -> Fingerprint:
    """Run the probes on a subject and return its fingerprint.

    It must support `dtype` with 16 features in and out.
    """
    storage_bits = _bits(dtype)

    def y(row: Mapping[int, float], column: Mapping[int, float], bias: float = 0.0) -> float:
        return float(subject.forward(_probe(dtype, row, column, bias, sizes_of(subject))).ravel()[0])

    def keeps_operand(bits: int) -> bool:
        value = 1.0 + 2.0 ** (1 - bits)
        return y({0: value}, {0: 1.0}) == value and y({0: 1.0}, {0: value}) == value

    def keeps_sum(bits: int) -> bool:
        small = 2.0 ** (1 - bits)
        root = 2.0 ** ((1 - bits) // 2)  # factors of the small term, each inside the storage format's range
        return all(
            y({first: 1.0, middle: root, last: -1.0}, {first: 1.0, middle: small / root, last: 1.0}) == small
            for first, last, middle in _PLACES
        )

    factor, bias, remainder = _fusion_terms(dtype)
    fused = y({0: factor}, {0: factor}, bias=bias) == remainder
    fmt = FORMATS[dtype]
    tiny = fmt.smallest_subnormal
    halves = 2.0 ** (np.log2(fmt.smallest_normal) // 2)
    flushed = y({0: halves}, {0: tiny / halves * 2}) == 0.0

    def loses_partial_sums() -> bool:
        # Sixteen products, each a sixteenth of the smallest normal: without flushing they sum up to just that.
        whole = FORMATS[declared_arithmetic(PRECISION_OF_DTYPE[dtype]).accumulator].smallest_normal
        root = float(2.0 ** (np.log2(whole / _WIDTH) // 2))
        other = whole / _WIDTH / root
        if min(root, other) < fmt.smallest_normal:
            return False
        places = range(_WIDTH)
        return y(dict.fromkeys(places, root), dict.fromkeys(places, other)) != whole

    return Fingerprint(
        dtype=dtype,
        operand_bits=_longest(keeps_operand, storage_bits),
        accumulator_bits=_longest(keeps_sum, max(storage_bits, _bits("float32"))),
        fused_bias=fused,
        flushes_subnormals=flushed,
        flushes_partial_sums=loses_partial_sums(),
    )


def _fusion_terms(dtype: str) -> tuple[float, float, float]:
    """Return a factor, a bias and what is left of `factor^2 + bias` if nothing was rounded before the bias was added.

    `(1 + e)^2 = 1 + 2e + e^2`: after adding `-(1 + 2e)` only `e^2` is left; times 64, so that in fp16 too it is a
    normal number.
    """
    step = 2.0 ** (1 - _bits(dtype))
    return 8 * (1 + step), -64 * (1 + 2 * step), 64 * step * step


def fuses_bias(subject: Subject, case: Case, dtype: str, forward: bool = True) -> bool:
    """Return True if every element of y shows a fused bias, in the very shape and layout of a case.

    Libraries choose a kernel by the shape, so that the fingerprint's own shape says nothing about another.
    """
    factor, bias, remainder = _fusion_terms(dtype)
    target, shapes, outputs = numpy_dtype(dtype), case.shapes, case.sizes_of_each[1]
    zeros = {name: np.zeros(shape, target) for name, shape in shapes.items()}
    zeros["bias"][...] = bias
    probe = Inputs(**zeros, dtype=dtype, layout=case.layout, zero_mean=False, sizes=case.sizes)
    for k in range(case.num_partitions):
        x, weight = probe.x[probe.place("x", k)], probe.weight[probe.place("weight", k)]
        # The first feature, and the first row of the matrix.
        x[..., 0], weight.reshape(-1)[: outputs[k]] = factor, factor
    seen = [subject.vjp(probe)["y"], *([subject.forward(probe)] if forward else [])]
    return all(bool(np.all(y.astype(np.float64) == remainder)) for y in seen)


def observed_precision(outputs: Mapping[str, np.ndarray], reference: Reference, dtype: str) -> str:
    """Name the strictest precision class whose bounds the results keep, judged by the error alone.

    Return `fp64`, `ieee_fp32`, `tf32`, `bf16` or `fp16`, and `lower` if no class of the dtype holds. The results must
    come from random zero-mean inputs.
    """
    classes = {
        "float64": [("fp64", declared_arithmetic("fp64")), ("ieee_fp32", Arithmetic("float64", "float32", "float32"))],
        "float32": [
            ("ieee_fp32", declared_arithmetic("ieee_fp32")),
            ("tf32", declared_arithmetic("tf32")),
            ("bf16", Arithmetic("float32", "bfloat16", "float32", truncates=True)),
        ],
    }.get(dtype, [(PRECISION_OF_DTYPE[dtype], declared_arithmetic(PRECISION_OF_DTYPE[dtype]))])
    for name, arithmetic in classes:
        if all(result.status == "ok" for result in compare(outputs, reference, arithmetic)):
            return name
    return "lower"


# --- entitlement ---

# Of a wider result the probe sees a fused multiply-add, which is no more exact than the order of summation leaves open.
_FUSION_MATTERS = ("bfloat16", "float16")


# In JAX each of the two is a compilation, and every seed and case asks again.
@functools.cache
def fingerprint_of(subject: Subject, dtype: str) -> Fingerprint | None:
    """Return the fingerprint of a subject in its framework's default mode, or None where it cannot be taken.

    It is not taken where the probe's shape is unsupported, nor in other modes: a compiled mode would compile some
    hundred probes, and a mode that casts declares its dtype.
    """
    case = _probe_case(sizes_of(subject))
    if subject.mode != DEFAULT_MODES[subject.framework] or subject.unsupported_reason(case, dtype):
        return None
    return take_fingerprint(subject, dtype)


@functools.cache
def _fuses_bias(subject: Subject, case: Case, dtype: str, forward: bool) -> bool:
    return fuses_bias(subject, case, dtype, forward)


def entitlement(
    subject: Subject,
    inputs: Inputs,
    *,
    forward: bool = True,
    precision: str | None = None,
    measured: Subject | None = None,
    representable: bool = False,
) -> Arithmetic:
    """Return the arithmetic that chooses the bound of a subject on these inputs.

    Args:
        subject: the one to judge.
        inputs: their dtype, shapes and layout count, their numbers do not.
        forward: a call without gradients is judged as well.
        precision: asked for in place of the one that the storage dtype promises, see `arithmetic_of`.
        measured: the subject whose fingerprint counts; None for the subject itself. A mode other than the default has
            no fingerprint: pass the same implementation in the default mode, which treats subnormals alike.
        representable: see `arithmetic_of`.
    """
    promised = arithmetic_of(subject.mode, inputs.dtype, representable, precision)
    source = subject if measured is None else measured
    seen = fingerprint_of(source, promised.output)
    if seen is None:
        return promised
    found = seen.refine(promised)
    fusion = seen.fused_bias and source.mode == subject.mode and found.output in _FUSION_MATTERS
    if not fusion or inputs.bias is None:
        return found
    return replace(found, fused_bias=_fuses_bias(source, inputs.case, inputs.dtype, forward))
