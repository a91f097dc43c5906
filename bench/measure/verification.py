"""Judge a competitor's results with the parity harness, a few partitions at a time: no number without a right answer.

Partitions are independent, so that the float64 oracle of a large workload never has to exist as a whole.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from bench.measure.machine import allowed_cpus, free_bytes
from bench.plan.cells import RESULTS
from bench.records import finite
from parity_tests.judge.comparison import TensorResult, compare, compare_with_limit
from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.fingerprint import observed_precision
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.tolerance import Arithmetic, OracleTensor, Reference, bound, declared_arithmetic, reference
from parity_tests.training.tasks import OPTIMIZERS, OptimizerSpec

PARAMETERS: tuple[str, ...] = ("weight", "bias")
# Roundings of one update, in units of the parameters' roundoff. optax forms 1 - beta2^t in fp32, which alone costs
# about a hundred; the rest are the few products, the root and the quotient.
_UPDATE_ROUNDINGS = 16
_BIAS_CORRECTION_ROUNDINGS = 128


def _first_update(spec: OptimizerSpec) -> Callable[[np.ndarray], np.ndarray]:
    """Return the first update as a function of the gradient, before the learning rate."""
    if spec.clip_norm is not None:
        raise ValueError("optimizer: expected one without clipping, whose norm joins all partitions; choose another.")
    if spec.name == "sgd":
        factor = 1 + spec.momentum if spec.nesterov else 1.0
        return lambda g: factor * g
    # After one step the averages, corrected for their start at zero, are g and g^2; rmsprop corrects nothing.
    scale = np.sqrt(1 - spec.beta2) if spec.name == "rmsprop" else 1.0
    return lambda g: g / (scale * np.abs(g) + spec.epsilon)


def first_step(
    spec: OptimizerSpec, name: str, before: np.ndarray, gradient: OracleTensor, arithmetic: Arithmetic
) -> tuple[np.ndarray, np.ndarray]:
    """Take one step in float64; return the parameter after it, and the largest error of correct code.

    Every first update is a monotone function f of the gradient g, so that an error of at most B in g shows as at most
    `max(f(g + B) - f(g), f(g) - f(g - B))`: no tolerance is chosen, even where an optimiser hides the gradient's scale.

    Raises:
        ValueError: if the optimiser clips.
    """
    update = _first_update(spec)
    parameter = before.astype(np.float64)
    roundoff, eta = FORMATS[arithmetic.output].roundoff, FORMATS[arithmetic.output].smallest_normal
    g, error = gradient.value.astype(np.float64), bound(gradient, arithmetic).astype(np.float64)
    decay = spec.weight_decay if spec.decays(name) else 0.0
    if decay and spec.name != "adamw":
        g = g + decay * parameter
        error = error + 2 * roundoff * (np.abs(g) + decay * np.abs(parameter))
    step = update(g)
    spread = np.maximum(update(g + error) - step, step - update(g - error))
    corrected = spec.name in ("adam", "adamw")
    roundings = _UPDATE_ROUNDINGS + (_BIAS_CORRECTION_ROUNDINGS if corrected and arithmetic.output == "float32" else 0)
    rate = float(spec.rates(1)[0])
    decoupled = decay if spec.name == "adamw" else 0.0
    value = parameter - rate * (step + decoupled * parameter)
    moved = rate * (spread + roundings * roundoff * (np.abs(step) + decoupled * np.abs(parameter)))
    limit = moved + 3 * roundoff * (np.abs(parameter) + np.abs(value)) + eta
    return value, limit


# Elements of x, W and dy together that one comparison takes: its float64 temporaries then stay in the caches, which
# makes it several times faster than arrays whose pages the system has to provide anew.
_ELEMENTS_AT_A_TIME = 500_000
# Both workers may keep an oracle, and the competitors need most of the memory.
_KEPT_FRACTION = 0.15
_EVALUATED = ("y", "dx", "dweight", "dbias")
_PARTITION_AXIS = {"y": -2, "dx": -2, "dweight": 0, "dbias": 0, "weight": 0, "bias": 0}


@dataclass(frozen=True)
class Judgement:
    """The verdict on one set of results."""

    status: str  # `ok` or `mismatch`
    reason: str  # one sentence for a mismatch, else empty
    bound_fraction: float | None  # largest error over its bound; None where it is not finite
    observed_precision: str | None  # the class that the error shows
    # Per tensor: status, bound_fraction and max_abs_error
    tensors: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def results_digest(outputs: Mapping[str, np.ndarray]) -> str:
    """Hash names, shapes and bits: equal digests mean bitwise equal results."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(outputs):
        array = np.ascontiguousarray(outputs[name])
        state.update(f"{name}{array.shape}{array.dtype}".encode())
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def inputs_digest(inputs: Inputs) -> str:
    """Hash the bits that both frameworks are fed with."""
    arrays = {"x": inputs.x, "weight": inputs.weight, "cotangent": inputs.cotangent}
    return results_digest(arrays if inputs.bias is None else arrays | {"bias": inputs.bias})


class Oracle:
    """The truth about one set of inputs, a few partitions at a time."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        n = inputs.num_partitions
        each = max(1, (inputs.x.size + inputs.weight.size + inputs.cotangent.size) // n)
        width = max(1, _ELEMENTS_AT_A_TIME // each)
        # Unequal partitions do not lie along an axis of their own: all are evaluated at once.
        width = n if inputs.sizes is not None else width
        self.slices = [slice(start, min(start + width, n)) for start in range(0, n, width)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        i = self.inputs
        shapes = {"y": i.cotangent.shape, "dx": i.x.shape, "dweight": i.weight.shape}
        shapes |= {"weight": i.weight.shape}
        return shapes if i.bias is None else shapes | {"dbias": i.bias.shape, "bias": i.bias.shape}

    def _evaluate(self, partitions: slice) -> Reference:
        inputs = self.inputs
        if inputs.sizes is not None:
            return reference(inputs)
        return reference(
            replace(
                inputs,
                x=inputs.x[..., partitions, :],
                weight=inputs.weight[partitions],
                bias=None if inputs.bias is None else inputs.bias[partitions],
                cotangent=inputs.cotangent[..., partitions, :],
            )
        )

    @cached_property
    def _kept(self) -> list[Reference] | None:
        """All partitions, evaluated once for all competitors and directions, where memory allows."""
        # Value and magnitude of each tensor, and as much again for the two that y has besides.
        if (
            sum(4 * 8 * math.prod(self.shapes[name]) for name in _EVALUATED if name in self.shapes)
            > _KEPT_FRACTION * free_bytes()
        ):
            return None
        # NumPy lets other threads run while it works on arrays, and nothing is being timed meanwhile.
        with ThreadPoolExecutor(max_workers=max(1, len(allowed_cpus()))) as threads:
            return list(threads.map(self._evaluate, self.slices))

    def truth(self, number: int) -> Reference:
        """Return the oracle of the partitions in `slices[number]`."""
        return self._evaluate(self.slices[number]) if self._kept is None else self._kept[number]


class Verifier:
    """Judges results; shared by all competitors that were fed with the same inputs in the same direction."""

    def __init__(self, oracle: Oracle, direction: str, optimizer: str | None = None):
        self._oracle, self._optimizer = oracle, optimizer
        self._expected = [name for name in RESULTS[direction] if name in oracle.shapes]
        # Tensor, digest and promised precision to judgement: bitwise equal results are judged once.
        self._known: dict[tuple[str, str, str], tuple[dict[str, Any], str]] = {}

    def _compare(self, outputs: Mapping[str, np.ndarray], promised: str) -> dict[str, tuple[dict[str, Any], str]]:
        """Return tensor to its figures and the gravest reason against it."""
        arithmetic, slices = declared_arithmetic(promised), self._oracle.slices

        def one(number: int) -> list[TensorResult]:
            part, truth = self._part(outputs, slices[number]), self._oracle.truth(number)
            stepped = {name: value for name, value in part.items() if name in PARAMETERS}
            direct = {name: value for name, value in part.items() if name not in PARAMETERS}
            found = compare(direct, truth, arithmetic) if direct else []
            return found + [
                self._compare_step(name, value, slices[number], truth, arithmetic) for name, value in stepped.items()
            ]

        self._oracle.truth(0)  # kept or not is decided, and evaluated, by one thread

        found: dict[str, tuple[dict[str, Any], str]] = {}
        with ThreadPoolExecutor(max_workers=max(1, len(allowed_cpus()))) as threads:
            for partitions, results in zip(slices, threads.map(one, range(len(slices))), strict=True):
                for result in results:
                    where = f"partitions {partitions.start} to {partitions.stop - 1}: {result.reason}"
                    _fold(found, result, where)
        return found

    def _compare_step(
        self, name: str, value: np.ndarray, partitions: slice, truth: Reference, arithmetic: Arithmetic
    ) -> TensorResult:
        """Compare a parameter after one step with the step that the specification asks for."""
        inputs = self._oracle.inputs
        before = inputs.weight if name == "weight" else inputs.bias
        assert before is not None  # the worker refuses workloads without a bias
        assert self._optimizer is not None  # a cell of this direction has one
        before = before[partitions] if inputs.sizes is None else before
        right, limit = first_step(OPTIMIZERS[self._optimizer], name, before, truth[f"d{name}"], arithmetic)
        return compare_with_limit(name, value, right, limit, partition_axis=0, labels=truth[f"d{name}"].labels)

    def judge(self, outputs: Mapping[str, np.ndarray], promised: str) -> Judgement:
        """Compare results with the oracle under the bound of the promised precision class.

        Results that lack a tensor, or have one of another shape, are a mismatch.
        """
        if set(outputs) != set(self._expected):
            return Judgement("mismatch", f"returned {sorted(outputs)}, expected {sorted(self._expected)}", None, None)
        for name, value in outputs.items():
            shape = self._oracle.shapes[name]
            if value.shape != shape:
                return Judgement("mismatch", f"{name} has shape {value.shape}, expected {shape}", None, None)
        keys = {name: (name, results_digest({name: value}), promised) for name, value in outputs.items()}
        new = {name: outputs[name] for name, key in keys.items() if key not in self._known}
        if new:
            self._known.update((keys[name], figures) for name, figures in self._compare(new, promised).items())
        found = {name: self._known[key] for name, key in keys.items()}
        wrong = [(figures["bound_fraction"], why) for figures, why in found.values() if figures["status"] != "ok"]
        reason = max(wrong, default=(0.0, ""), key=lambda one: one[0])[1]
        worst = max(figures["bound_fraction"] for figures, _ in found.values())
        # The class of the arithmetic does not change from partition to partition: the first few tell.
        oracle = self._oracle
        direct = {name: value for name, value in outputs.items() if name not in PARAMETERS}
        observed = observed_precision(self._part(direct, oracle.slices[0]), oracle.truth(0), oracle.inputs.dtype)
        tensors = {
            name: {key: finite(value) if isinstance(value, float) else value for key, value in figures.items()}
            for name, (figures, _) in found.items()
        }
        return Judgement("mismatch" if reason else "ok", reason, finite(worst), observed, tensors)

    def _part(self, outputs: Mapping[str, np.ndarray], partitions: slice) -> dict[str, np.ndarray]:
        if self._oracle.inputs.sizes is not None:
            return dict(outputs)
        return {
            name: value[partitions] if _PARTITION_AXIS[name] == 0 else value[..., partitions, :]
            for name, value in outputs.items()
        }


def _fold(found: dict[str, tuple[dict[str, Any], str]], result: TensorResult, where: str) -> None:
    """Add the figures of some partitions to those of the partitions before them; the reason of the worst stays."""
    nothing = {"status": "ok", "bound_fraction": 0.0, "max_abs_error": 0.0}
    figures, reason = found.get(result.tensor, (nothing, ""))
    right = result.status == "ok"
    worse = not right and (not reason or result.bound_fraction > figures["bound_fraction"])
    figures = {
        "status": figures["status"] if right else result.status,
        "bound_fraction": max(figures["bound_fraction"], result.bound_fraction),
        "max_abs_error": max(figures["max_abs_error"], result.max_abs_error),
    }
    found[result.tensor] = (figures, where if worse else reason)
