"""No number without a right answer: judges a competitor's results with the parity harness, a few partitions at a time.

Partitions are independent, so the float64 oracle of a large workload never has to exist as a whole.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from bench.records import finite
from parity_tests.harness.comparison import compare
from parity_tests.harness.fingerprint import observed_precision
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.oracle import Reference, reference
from parity_tests.harness.tolerance import declared_arithmetic

# Elements of x, W and dy together that one oracle evaluation takes: about 200 MB of float64 arrays at its peak.
_ELEMENTS_AT_A_TIME = 2_000_000
_PARTITION_AXIS = {"y": -2, "dx": -2, "dweight": 0, "dbias": 0}
_TENSORS: Mapping[str, tuple[str, ...]] = {"forward": ("y",), "forward_backward": tuple(_PARTITION_AXIS)}


@dataclass(frozen=True)
class Judgement:
    """The verdict on one set of results.

    Attributes:
        status: ``ok`` or ``mismatch``.
        reason: one sentence for a mismatch, else empty.
        bound_fraction: largest error over its bound; None where it is not finite.
        observed_precision: the class that the error shows.
        tensors: per tensor: status, bound_fraction and max_abs_error.
    """

    status: str
    reason: str
    bound_fraction: float | None
    observed_precision: str | None
    tensors: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def results_digest(outputs: Mapping[str, np.ndarray]) -> str:
    """Hashes names, shapes and bits: equal digests mean bitwise equal results."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(outputs):
        array = np.ascontiguousarray(outputs[name])
        state.update(f"{name}{array.shape}{array.dtype}".encode())
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def inputs_digest(inputs: Inputs) -> str:
    """Hashes the bits that both frameworks are fed with."""
    arrays = {"x": inputs.x, "weight": inputs.weight, "cotangent": inputs.cotangent}
    return results_digest(arrays if inputs.bias is None else arrays | {"bias": inputs.bias})


class Verifier:
    """Judges results for one set of inputs.

    Args:
        inputs: what the competitors were fed with.
        direction: ``forward`` or ``forward_backward``.
    """

    def __init__(self, inputs: Inputs, direction: str):
        self.inputs = inputs
        self.expected = tuple(name for name in _TENSORS[direction] if name != "dbias" or inputs.bias is not None)

    def _slices(self) -> list[slice]:
        inputs = self.inputs
        n = inputs.weight.shape[0]
        each = max(1, (inputs.x.size + inputs.weight.size + inputs.cotangent.size) // n)
        width = max(1, _ELEMENTS_AT_A_TIME // each)
        return [slice(start, min(start + width, n)) for start in range(0, n, width)]

    def _part(self, partitions: slice) -> Inputs:
        inputs = self.inputs
        return replace(
            inputs,
            x=inputs.x[..., partitions, :],
            weight=inputs.weight[partitions],
            bias=None if inputs.bias is None else inputs.bias[partitions],
            cotangent=inputs.cotangent[..., partitions, :],
        )

    @cached_property
    def _whole(self) -> Reference | None:
        """The oracle of all partitions where that is small: computed once for all competitors."""
        slices = self._slices()
        return reference(self._part(slices[0])) if len(slices) == 1 else None

    def _references(self) -> Iterator[tuple[slice, Reference]]:
        for partitions in self._slices():
            yield partitions, self._whole or reference(self._part(partitions))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        i = self.inputs
        shapes = {"y": i.cotangent.shape, "dx": i.x.shape, "dweight": i.weight.shape}
        return shapes if i.bias is None else shapes | {"dbias": i.bias.shape}

    def judge(self, outputs: Mapping[str, np.ndarray], promised: str) -> Judgement:
        """Compares results with the oracle.

        Args:
            outputs: the competitor's tensors, in the storage dtype.
            promised: precision class whose bound must hold.

        Returns:
            The judgement; results that lack a tensor, or have one of another shape, are a mismatch.
        """
        if set(outputs) != set(self.expected):
            return Judgement("mismatch", f"returned {sorted(outputs)}, expected {sorted(self.expected)}", None, None)
        for name, shape in self._shapes().items():
            if name in outputs and outputs[name].shape != shape:
                reason = f"{name} has shape {outputs[name].shape}, expected {shape}"
                return Judgement("mismatch", reason, None, None)
        arithmetic, tensors, reason, observed = declared_arithmetic(promised), {}, "", None
        for partitions, truth in self._references():
            part = {
                name: value[partitions] if _PARTITION_AXIS[name] == 0 else value[..., partitions, :]
                for name, value in outputs.items()
            }
            if observed is None:  # the class of the arithmetic, which does not change from partition to partition
                observed = observed_precision(part, truth, self.inputs.dtype)
            for result in compare(part, truth, arithmetic):
                before = tensors.get(result.tensor, {"status": "ok", "bound_fraction": 0.0, "max_abs_error": 0.0})
                tensors[result.tensor] = {
                    "status": before["status"] if result.status == "ok" else result.status,
                    "bound_fraction": max(before["bound_fraction"], result.bound_fraction),
                    "max_abs_error": max(before["max_abs_error"], result.max_abs_error),
                }
                if result.status != "ok" and not reason:
                    reason = f"partitions {partitions.start} to {partitions.stop - 1}: {result.reason}"
        worst = max((values["bound_fraction"] for values in tensors.values()), default=None)
        finite_tensors = {
            name: {key: finite(value) if isinstance(value, float) else value for key, value in values.items()}
            for name, values in tensors.items()
        }
        return Judgement("mismatch" if reason else "ok", reason, finite(worst), observed, finite_tensors)
