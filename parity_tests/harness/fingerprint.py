"""Arithmetic fingerprint: what a subject really computes with, inferred from its results.

Each probe is a product with one-hot or near one-hot operands whose result, bit by bit, can come about in one way
only. The fingerprint is a diagnosis ("operands rounded to TF32", "bias rounded twice", "subnormals flushed"): it may
relax the bound only in what the requested precision leaves open, never below what it promises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.harness.comparison import compare
from parity_tests.harness.dtypes import FORMATS, numpy_dtype
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.oracle import Reference
from parity_tests.harness.subjects.base import Subject
from parity_tests.harness.tolerance import PRECISION_OF_DTYPE, Arithmetic, declared_arithmetic

_WIDTH = 16  # a multiple of every alignment that an implementation asks for, in every dtype
# Where the large terms 1 and -1 stand: the small term in between must survive in every order of summation that is used.
_PLACES = ((0, 15, 7), (0, 8, 4), (3, 12, 0), (1, 2, 15), (14, 15, 0))


@dataclass(frozen=True)
class Fingerprint:
    """What the probes saw.

    Attributes:
        dtype: storage dtype of operands and results.
        operand_bits: significand bits that an operand keeps.
        accumulator_bits: significand bits that the running sum keeps, at least.
        fused_bias: the bias joins the sum before it is rounded to the output.
        flushes_subnormals: subnormal results become zero.
    """

    dtype: str
    operand_bits: int
    accumulator_bits: int
    fused_bias: bool
    flushes_subnormals: bool

    def diagnosis(self) -> list[str]:
        """Sentences for a reader; empty if everything is as the dtype promises."""
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
        """Whether operands and sums are at least as precise as ``arithmetic`` promises."""
        return self.operand_bits >= _bits(arithmetic.operand) and self.accumulator_bits >= _bits(arithmetic.accumulator)


def _bits(name: str) -> int:
    return round(-np.log2(FORMATS[name].roundoff))


def _probe(dtype: str, row: Mapping[int, float], column: Mapping[int, float], bias: float = 0.0) -> Inputs:
    target = numpy_dtype(dtype)
    x, weight = np.zeros((1, 1, _WIDTH)), np.zeros((1, _WIDTH, _WIDTH))
    for place, value in row.items():
        x[0, 0, place] = value
    for place, value in column.items():
        weight[0, place, :] = value
    return Inputs(
        x=x.astype(target),
        weight=weight.astype(target),
        bias=np.full((1, _WIDTH), bias).astype(target),
        cotangent=np.zeros((1, 1, _WIDTH), target),
        dtype=dtype,
        zero_mean=False,
    )


def _longest(holds: Callable[[int], bool], longest: int) -> int:
    """Largest number of bits, at most ``longest``, for which all shorter lengths hold too."""
    bits = 1
    while bits < longest and holds(bits + 1):
        bits += 1
    return bits


def take_fingerprint(subject: Subject, dtype: str) -> Fingerprint:
    """Runs the probes on a subject.

    Args:
        subject: an implementation that supports ``dtype`` with 16 features in and out.
        dtype: storage dtype.

    Returns:
        The fingerprint.
    """
    storage_bits = _bits(dtype)

    def y(row: Mapping[int, float], column: Mapping[int, float], bias: float = 0.0) -> float:
        return float(subject.forward(_probe(dtype, row, column, bias)).ravel()[0])

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

    # (1 + e)^2 = 1 + 2e + e^2: after adding -(1 + 2e) only e^2 is left, and only if nothing was rounded before.
    step = 2.0 ** (1 - storage_bits)
    fused = y({0: 1 + step}, {0: 1 + step}, bias=-(1 + 2 * step)) == step * step
    fmt = FORMATS[dtype]
    tiny = fmt.smallest_subnormal
    halves = 2.0 ** (np.log2(fmt.smallest_normal) // 2)
    flushed = y({0: halves}, {0: tiny / halves * 2}) == 0.0
    return Fingerprint(
        dtype=dtype,
        operand_bits=_longest(keeps_operand, storage_bits),
        accumulator_bits=_longest(keeps_sum, max(storage_bits, _bits("float32"))),
        fused_bias=fused,
        flushes_subnormals=flushed,
    )


def observed_precision(outputs: Mapping[str, np.ndarray], reference: Reference, dtype: str) -> str:
    """Names the strictest precision class whose bounds the results keep, judged by the error alone.

    Args:
        outputs: the subject's tensors for random zero-mean inputs that the harness drew.
        reference: the oracle's tensors for the same inputs.
        dtype: storage dtype of the inputs.

    Returns:
        ``fp64``, ``ieee_fp32``, ``tf32``, ``bf16`` or ``fp16``; ``lower`` if no class of that storage dtype holds.
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
