"""Likely causes of a mismatch, found by trying: which known mistake turns the oracle into what the subject returned?"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.harness.comparison import TensorResult, compare_tensor
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.optimizers import OptimizerSpec
from parity_tests.harness.oracle import Reference, reference
from parity_tests.harness.tolerance import PRECISION_OF_DTYPE, Arithmetic, declared_arithmetic

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


OPERANDS: tuple[Hypothesis, ...] = (
    Hypothesis("the kernel is transposed", _transposed),
    Hypothesis("the kernel's (n, o, i) numbers are read as (n, i, o)", _reshaped),
    Hypothesis("partitions are off by one", _shifted(1)),
    Hypothesis("partitions are off by minus one", _shifted(-1)),
    Hypothesis("the bias is missing", _without_bias),
    Hypothesis("the bias is rolled by one partition", _bias_rolled(1)),
    Hypothesis("the bias is rolled back by one partition", _bias_rolled(-1)),
    Hypothesis("the bias is added twice", _bias_twice),
    Hypothesis("the cotangent is replaced by ones", lambda a: _with(a, cotangent=np.ones_like(a.cotangent))),
)


def _fits(name: str, value: np.ndarray, truth: Reference, arithmetic: Arithmetic) -> bool:
    return name in truth and compare_tensor(name, value, truth[name], arithmetic, zero_mean=False).status == "ok"


def _by_arithmetic(name: str, value: np.ndarray, truth: Reference, dtype: str) -> str | None:
    candidates = [("operands are rounded to TF32", Arithmetic(dtype, "tf32", "float32", truncates=True))]
    if dtype == "float32":
        candidates.append(
            ("operands are rounded to bfloat16", Arithmetic(dtype, "bfloat16", "float32", truncates=True))
        )
    candidates.append(("sums are accumulated in bfloat16", Arithmetic(dtype, dtype, "bfloat16")))
    candidates.append(("sums are accumulated in float16", Arithmetic(dtype, dtype, "float16")))
    return next((sentence for sentence, arithmetic in candidates if _fits(name, value, truth, arithmetic)), None)


def _by_pattern(name: str, value: np.ndarray, truth: Reference, arithmetic: Arithmetic) -> str | None:
    expected = truth[name].value
    if not np.any(value):
        return f"{name} is all zero"
    if np.isnan(value.astype(np.float64)).any():
        return f"{name} contains NaN"
    axis = truth[name].partition_axis
    n = expected.shape[axis]
    if n > 1 and _fits(name, value.astype(np.float64) * n, truth, dataclasses.replace(arithmetic, output="bfloat16")):
        return f"{name} is scaled by 1/n"
    good = [
        k
        for k in range(n)
        if np.allclose(
            np.take(value.astype(np.float64), k, axis), np.take(expected, k, axis).astype(np.float64), rtol=1e-2
        )
    ]
    if 0 < len(good) < n:
        bad = sorted(set(range(n)) - set(good))
        return f"only {'partition' if len(bad) == 1 else 'partitions'} {', '.join(map(str, bad))} of {n} differ"
    return None


def explain(results: Sequence[TensorResult], outputs: Mapping[str, np.ndarray], inputs: Inputs) -> str:
    """Returns a likely cause of the first mismatch in one clause, or that none of the known mistakes explains it.

    Args:
        results: the verdicts on the subject's tensors.
        outputs: those tensors.
        inputs: what the subject was given.
    """
    failed = next((result for result in results if result.status == "mismatch"), None)
    if failed is None:
        return ""
    name, value = failed.tensor, outputs[failed.tensor]
    truth = reference(inputs)
    arithmetic = declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    if value.shape != truth[name].value.shape:
        return f"{name} has another shape"
    for hypothesis in OPERANDS:
        changed = hypothesis.change(inputs)
        if changed is not None and _fits(name, value, reference(changed), arithmetic):
            return hypothesis.sentence
    found = _by_pattern(name, value, truth, arithmetic) or _by_arithmetic(name, value, truth, inputs.dtype)
    return found or "none of the known mistakes explains it"


Replay = Callable[[OptimizerSpec], Mapping[str, np.ndarray]]


def explain_optimizer(spec: OptimizerSpec, replay: Replay, observed: Mapping[str, np.ndarray], limit: float) -> str:
    """Returns which change to the optimiser's settings reproduces an observed state.

    Args:
        spec: what both sides were meant to run.
        replay: runs the trusted side with another spec over the same gradients and returns its final parameters.
        observed: the other side's final parameters.
        limit: Euclidean distance within which two states are equal.
    """
    decay = spec.weight_decay
    candidates: list[tuple[str, OptimizerSpec]] = [
        (f"epsilon is {value:g} instead of {spec.epsilon:g}", dataclasses.replace(spec, epsilon=value))
        for value in (1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 0.0)
        if value != spec.epsilon and spec.name != "sgd"
    ]
    candidates += [
        (f"weight decay is {value:g} instead of {decay:g}", dataclasses.replace(spec, weight_decay=value))
        for value in (0.0, 1e-4, 1e-2)
        if value != decay
    ]
    candidates += [
        ("weight decay also touches the biases", dataclasses.replace(spec, decay_bias=not spec.decay_bias)),
        ("Nesterov momentum is switched", dataclasses.replace(spec, nesterov=not spec.nesterov and spec.momentum > 0)),
        ("the gradient is not clipped", dataclasses.replace(spec, clip_norm=None)),
        ("there is no warm-up", dataclasses.replace(spec, warmup_steps=0)),
        ("the schedule is off by one step", dataclasses.replace(spec, first_step=spec.first_step + 1)),
        ("weight decay is coupled", dataclasses.replace(spec, name="adam" if spec.name == "adamw" else spec.name)),
    ]
    for sentence, candidate in candidates:
        if candidate == spec:
            continue
        state = replay(candidate)
        distance = np.sqrt(sum(float(np.sum((state[k] - observed[k]).astype(np.float64) ** 2)) for k in observed))
        if distance <= limit:
            return sentence
    return "none of the known settings explains it"
