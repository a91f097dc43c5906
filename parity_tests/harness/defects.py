"""Planted defects: each spoils a copy of a subject the way real code goes wrong; the judge must notice every one.

A judge that cannot fail proves nothing. ``python -m parity_tests defects`` prints how many were planted and killed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from parity_tests.harness.cases import Case
from parity_tests.harness.exact import check_isolation
from parity_tests.harness.inputs import Inputs, draw_inputs
from parity_tests.harness.oracle import reference
from parity_tests.harness.run import judge
from parity_tests.harness.subjects.base import Subject

Outputs = dict[str, np.ndarray]
Spoil = Callable[[Subject, Inputs], Outputs]

# Square, so that a transposed kernel still fits; three partitions, so that a shift is no exchange; bias and many rows.
CASE = Case("defects", (512,), 3, 32, 32)


@dataclass(frozen=True)
class Defect:
    """One way to be wrong.

    Attributes:
        name: what was planted.
        spoil: evaluates the subject with the defect.
        dtypes: storage dtypes in which the defect changes the function; in others it is equivalent to correct code.
        isolation: True if only the isolation check can see it.
    """

    name: str
    spoil: Spoil
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    isolation: bool = False


@dataclass(frozen=True)
class SpoiledSubject:
    """A subject with a defect planted."""

    subject: Subject
    spoil: Spoil
    framework: str
    implementation: str
    isolates_partitions: bool
    mode: str

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """As the healthy subject."""
        return self.subject.unsupported_reason(case, dtype)

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns the spoiled y."""
        return self.spoil(self.subject, inputs)["y"]

    def vjp(self, inputs: Inputs) -> Outputs:
        """Returns the spoiled tensors."""
        return self.spoil(self.subject, inputs)


def _on_inputs(change: Callable[[Inputs], Mapping[str, np.ndarray | None]]) -> Spoil:
    return lambda subject, inputs: subject.vjp(dataclasses.replace(inputs, **change(inputs)))


def _on_outputs(change: Callable[[Inputs, Outputs], Mapping[str, np.ndarray]]) -> Spoil:
    def spoil(subject: Subject, inputs: Inputs) -> Outputs:
        outputs = subject.vjp(inputs)
        return outputs | dict(change(inputs, outputs))

    return spoil


def _bias(inputs: Inputs) -> np.ndarray:
    if inputs.bias is None:
        raise ValueError(
            "inputs.bias: expected an array (n, o) to plant a bias defect in, got None; use a case with bias."
        )
    return inputs.bias


def _without_one_bias(inputs: Inputs) -> dict[str, np.ndarray]:
    bias = _bias(inputs).copy()
    bias[1] = 0
    return {"bias": bias}


def _chopped(array: np.ndarray, bits: int) -> np.ndarray:
    """Keeps ``bits`` significand bits and drops the rest, without rounding."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    return np.ldexp(np.trunc(mantissa * 2.0**bits) / 2.0**bits, exponent).astype(array.dtype)


def _rounded_to_tf32(array: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(array.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 2.0**11) / 2.0**11, exponent).astype(array.dtype)


def _bf16_sums(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    """Y with a running sum that is rounded to bfloat16 after every product."""
    total = np.zeros(outputs["y"].shape, ml_dtypes.bfloat16)
    for i in range(inputs.weight.shape[1]):
        product = inputs.x[..., i, None].astype(np.float32) * inputs.weight[:, i].astype(np.float32)
        total = (total.astype(np.float32) + product).astype(ml_dtypes.bfloat16)
    return {"y": (total.astype(np.float32) + _bias(inputs).astype(np.float32)).astype(outputs["y"].dtype)}


def _bf16_bias_gradient(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    total = np.zeros(outputs["dbias"].shape, ml_dtypes.bfloat16)
    for row in inputs.cotangent.reshape(-1, *total.shape):
        total = (total.astype(np.float32) + row.astype(np.float32)).astype(ml_dtypes.bfloat16)
    return {"dbias": total.astype(outputs["dbias"].dtype)}


def _truncated(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    """Y chopped instead of rounded: from the oracle's digits in bfloat16, to half precision in float32."""
    if inputs.dtype == "bfloat16":
        exact = reference(inputs)["y"].value
        return {"y": _chopped(exact, 8).astype(outputs["y"].dtype)}
    return {"y": _chopped(outputs["y"], 12)}


def _scaled_partition(array: np.ndarray, factor: float) -> np.ndarray:
    array = array.astype(np.float64)
    array[1] *= factor
    return array


def _one_element(outputs: Outputs) -> np.ndarray:
    y = outputs["y"].copy()
    flat = y.reshape(-1)
    flat[int(np.argmax(np.abs(flat)))] *= 1.01
    return y


def _swallow(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    del inputs
    return {"y": np.nan_to_num(outputs["y"].astype(np.float64)).astype(outputs["y"].dtype)}


DEFECTS: tuple[Defect, ...] = (
    Defect("kernel transposed", _on_inputs(lambda a: {"weight": np.ascontiguousarray(a.weight.swapaxes(1, 2))})),
    Defect("partitions off by one", _on_inputs(lambda a: {"weight": np.roll(a.weight, 1, axis=0)})),
    Defect("bias missing on one partition", _on_inputs(_without_one_bias)),
    Defect("bias rolled", _on_inputs(lambda a: {"bias": np.roll(_bias(a), 1, axis=0)})),
    Defect("bf16 accumulation", _on_outputs(_bf16_sums)),
    Defect("truncated output", _on_outputs(_truncated)),
    Defect("output scaled by 1/n", _on_outputs(lambda a, o: {"y": (o["y"] / len(a.weight)).astype(o["y"].dtype)})),
    Defect("dW all zero", _on_outputs(lambda a, o: {"dweight": np.zeros_like(o["dweight"])})),
    Defect(
        "dW of one partition times 1.01",
        _on_outputs(lambda a, o: {"dweight": _scaled_partition(o["dweight"], 1.01).astype(o["dweight"].dtype)}),
    ),
    Defect("db accumulated in bf16", _on_outputs(_bf16_bias_gradient)),
    Defect("NaN swallowed", _on_outputs(_swallow), isolation=True),
    Defect("one element off by 1 percent", _on_outputs(lambda a, o: {"y": _one_element(o)})),
    Defect(
        "TF32 in place of fp32",
        _on_inputs(lambda a: {"x": _rounded_to_tf32(a.x), "weight": _rounded_to_tf32(a.weight)}),
        dtypes=("float32",),  # a bfloat16 operand has fewer bits than TF32 keeps
    ),
    Defect("result in another dtype", _on_outputs(lambda a, o: {name: v.astype(np.float64) for name, v in o.items()})),
    Defect("no gradient of the bias", lambda subject, a: {k: v for k, v in subject.vjp(a).items() if k != "dbias"}),
    Defect("dx of the wrong partition", _on_outputs(lambda a, o: {"dx": np.roll(o["dx"], 1, axis=-2)})),
    Defect(
        "gradient of a sum instead of the cotangent", _on_inputs(lambda a: {"cotangent": np.ones_like(a.cotangent)})
    ),
)


def plant(defect: Defect, subject: Subject) -> SpoiledSubject:
    """Returns a copy of the subject that has the defect."""
    return SpoiledSubject(
        subject, defect.spoil, subject.framework, subject.implementation, subject.isolates_partitions, subject.mode
    )


def killed(defect: Defect, subject: Subject, dtype: str, seed: int = 0) -> bool:
    """True if the judge rejects the subject once the defect is planted (and the healthy one passes the same check)."""
    inputs = draw_inputs(CASE, dtype, seed)
    truth = reference(inputs)

    def rejected(candidate: Subject) -> bool:
        if defect.isolation:
            return not check_isolation(candidate, inputs, partition=1, poison=float("nan"))["visible"]
        return any(result.status == "mismatch" for result in judge(candidate, inputs, truth, measured=subject).results)

    # Rejecting a subject that was broken before says nothing about the defect.
    return rejected(plant(defect, subject)) and not rejected(subject)
