"""What a subject is entitled to: what its mode and dtype promise, closed in what they leave open by what was measured.

The promise leaves open whether subnormals are flushed and whether a bias is fused. A bound that allows both where a
device does neither lets wrong results through, so both are measured, on the device at hand, once in a process.
"""

import functools
from dataclasses import replace

from parity_tests.judge.cases import Case
from parity_tests.judge.fingerprint import Fingerprint, fuses_bias, take_fingerprint
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.modes import DEFAULT_MODES, arithmetic_of
from parity_tests.judge.subjects import Subject
from parity_tests.judge.tolerance import Arithmetic

_PROBE_CASE = Case("fingerprint", (1,), 3, 16, 16)
# Of a wider result the probe sees a fused multiply-add, which is no more exact than the order of summation leaves open.
_FUSION_MATTERS = ("bfloat16", "float16")


# In JAX each of the two is a compilation, and every seed and case asks again.
@functools.cache
def fingerprint_of(subject: Subject, dtype: str) -> Fingerprint | None:
    """The fingerprint of a subject in its framework's default mode, or None where it cannot be taken.

    It is not taken where the probe's shape is unsupported, nor in other modes: in a compiled mode each of some hundred
    probes is a program, and a mode that casts says what it computes in.

    Args:
        subject: hashable, as dictionaries want their keys.
        dtype: storage dtype.
    """
    if subject.mode != DEFAULT_MODES[subject.framework] or subject.unsupported_reason(_PROBE_CASE, dtype):
        return None
    return take_fingerprint(subject, dtype)


@functools.cache
def _fuses_bias(subject: Subject, case: Case, dtype: str, forward: bool) -> bool:
    return fuses_bias(subject, case, dtype, forward)


def _shape_of(inputs: Inputs) -> Case:
    n, i, o = inputs.weight.shape
    return Case("shape", inputs.x.shape[:-2], n, i, o, inputs.bias is not None, inputs.layout)


def entitlement(
    subject: Subject,
    inputs: Inputs,
    *,
    forward: bool = True,
    precision: str | None = None,
    measured: Subject | None = None,
    representable: bool = False,
) -> Arithmetic:
    """Returns the arithmetic that chooses the bound of a subject on these inputs.

    Args:
        subject: what is judged.
        inputs: their dtype, shapes and layout count, their numbers do not.
        forward: a call without gradients is judged as well.
        precision: asked for in place of the one that the storage dtype promises, see `modes.arithmetic_of`.
        measured: whose fingerprint counts; None for the subject's own, in the default mode, and for none in another,
            which then closes nothing that is left open. For a mode it is the same implementation in the default one: a
            mode keeps its own arithmetic and the device's treatment of subnormals.
        representable: see `modes.arithmetic_of`.
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
    return replace(found, fused_bias=_fuses_bias(source, _shape_of(inputs), inputs.dtype, forward))
