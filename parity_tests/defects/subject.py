"""Plant defects in copies of correct subjects, as real code goes wrong, and ask the judge about each.

A judge that cannot fail proves nothing. `python -m parity_tests defects` prints how many were planted and killed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from parity_tests.causes.layer import explain, shortened
from parity_tests.judge.exact import check_isolation
from parity_tests.judge.inputs import Case, Inputs, draw_inputs
from parity_tests.judge.run import judge
from parity_tests.judge.subjects import Subject, sizes_of
from parity_tests.judge.tolerance import Reference, reference

Outputs = dict[str, np.ndarray]
Spoil = Callable[[Subject, Inputs], Outputs]

# Square, so that a transposed kernel still fits; three partitions, so that a shift is no exchange; bias and many rows.
CASE = Case("defects", (512,), 3, 32, 32)


@dataclass(frozen=True)
class Defect:
    """One way to be wrong."""

    name: str  # the planted mistake
    spoil: Spoil  # evaluates the subject with the defect
    cause: str  # must be in the answer of `causes.layer.explain`; for `isolation`, in that of the check
    # Storage dtypes in which the defect changes the function; in others it is equivalent to correct code
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    isolation: bool = False  # True if only the isolation check can see it
    forward: bool = True  # True if it is in y as computed without gradients
    backward: bool = True  # True if it is in y and the gradients as computed together
    case: Case = CASE  # the shape that it is planted in


@dataclass(frozen=True)
class Killing:
    """The verdict on a planted defect."""

    killed: bool  # True if it was rejected and the healthy subject was not
    cause: str  # the likely cause that was named


@dataclass(frozen=True)
class SpoiledSubject:
    """A subject with a defect planted."""

    subject: Subject
    defect: Defect
    framework: str
    implementation: str
    isolates_partitions: bool
    mode: str
    sizes: str

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """Answer as the healthy subject."""
        return self.subject.unsupported_reason(case, dtype)

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Return the spoiled y."""
        return self.defect.spoil(self.subject, inputs)["y"] if self.defect.forward else self.subject.forward(inputs)

    def vjp(self, inputs: Inputs) -> Outputs:
        """Return the spoiled tensors."""
        return self.defect.spoil(self.subject, inputs) if self.defect.backward else self.subject.vjp(inputs)


def plant(defect: Defect, subject: Subject) -> SpoiledSubject:
    """Return a copy of the subject that has the defect."""
    return SpoiledSubject(
        subject,
        defect,
        subject.framework,
        subject.implementation,
        subject.isolates_partitions,
        subject.mode,
        sizes_of(subject),
    )


@functools.cache
def _problem(case: Case, dtype: str) -> tuple[Inputs, Reference]:
    inputs = draw_inputs(case, dtype)
    return inputs, reference(inputs)


def _verdict(candidate: Subject, case: Case, dtype: str, isolation: bool, measured: Subject) -> Killing:
    """Return the verdict on a subject, within the bound of the subject that was measured."""
    inputs, truth = _problem(case, dtype)
    if isolation:
        found = check_isolation(candidate, inputs, partition=1, poison=float("nan"))
        if found.swallowed:
            return Killing(True, f"NaN does not reach {', '.join(found.swallowed)}")
        leaks = candidate.isolates_partitions and not found.isolated
        return Killing(leaks, "NaN of one partition reaches others" if leaks else "")
    judgement = judge(candidate, inputs, truth, measured=measured)
    rejected = any(result.status == "mismatch" for result in judgement.results)
    return Killing(rejected, explain(judgement.results, judgement.outputs, inputs, judgement.arithmetic))


# Once for all defects that are planted in the same subject.
_healthy = functools.cache(_verdict)


def observe(defect: Defect, subject: Subject, dtype: str) -> Killing:
    """Plant a defect, judge it, and judge the healthy subject by the same check."""
    spoiled = _verdict(plant(defect, subject), defect.case, dtype, defect.isolation, subject)
    # Rejecting a subject that was broken before says nothing about the defect.
    healthy = not _healthy(subject, defect.case, dtype, defect.isolation, subject).killed
    return Killing(spoiled.killed and healthy, spoiled.cause)


# --- the defects ---


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


def _bf16_sums(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    """Compute y with a running sum that is rounded to bfloat16 after every product."""
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
    """Chop y instead of rounding it: from the oracle's digits in bfloat16, to half precision in float32."""
    if inputs.dtype == "bfloat16":
        exact = reference(inputs)["y"].value
        return {"y": shortened(exact, 8, nearest=False).astype(outputs["y"].dtype)}
    return {"y": shortened(outputs["y"], 12, nearest=False)}


def _scaled_partition(array: np.ndarray, factor: float) -> np.ndarray:
    array = array.astype(np.float64)
    array[1] *= factor
    return array


def _one_element(outputs: Outputs) -> np.ndarray:
    y = outputs["y"].copy()
    flat = y.reshape(-1)
    flat[int(np.argmax(np.abs(flat)))] *= 1.01
    return y


def _swallow(*names: str) -> Spoil:
    def finite(array: np.ndarray) -> np.ndarray:
        return np.nan_to_num(array.astype(np.float64)).astype(array.dtype)

    return _on_outputs(lambda inputs, outputs: {name: finite(outputs[name]) for name in names})


def _transposed(inputs: Inputs) -> dict[str, np.ndarray]:
    return {"weight": np.ascontiguousarray(inputs.weight.swapaxes(1, 2))}


def _one_over_n(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    return {"y": (outputs["y"] / len(inputs.weight)).astype(outputs["y"].dtype)}


def _dweight_off(inputs: Inputs, outputs: Outputs) -> dict[str, np.ndarray]:
    del inputs
    return {"dweight": _scaled_partition(outputs["dweight"], 1.01).astype(outputs["dweight"].dtype)}


def _tf32_operands(inputs: Inputs) -> dict[str, np.ndarray]:
    return {name: shortened(getattr(inputs, name), 11, nearest=True) for name in ("x", "weight")}


def _without_bias_gradient(subject: Subject, inputs: Inputs) -> Outputs:
    return {name: array for name, array in subject.vjp(inputs).items() if name != "dbias"}


DEFECTS: tuple[Defect, ...] = (
    Defect("kernel transposed", _on_inputs(_transposed), "the kernel is transposed"),
    Defect(
        "partitions off by one",
        _on_inputs(lambda a: {"weight": np.roll(a.weight, 1, axis=0)}),
        "partitions are off by one",
    ),
    Defect("bias missing on one partition", _on_inputs(_without_one_bias), "the bias is missing in partition 1 of 3"),
    Defect(
        "bias rolled",
        _on_inputs(lambda a: {"bias": np.roll(_bias(a), 1, axis=0)}),
        "the bias is rolled by one partition",
    ),
    Defect("bf16 accumulation", _on_outputs(_bf16_sums), "sums are accumulated in bfloat16"),
    Defect("truncated output", _on_outputs(_truncated), "y is truncated"),
    Defect("output scaled by 1/n", _on_outputs(_one_over_n), "y is scaled by 1/n"),
    Defect("dW all zero", _on_outputs(lambda a, o: {"dweight": np.zeros_like(o["dweight"])}), "dweight is all zero"),
    Defect(
        "dW of one partition times 1.01", _on_outputs(_dweight_off), "dweight is scaled by 1.01 in partition 1 of 3"
    ),
    Defect("db accumulated in bf16", _on_outputs(_bf16_bias_gradient), "sums are accumulated in bfloat16"),
    Defect("NaN swallowed", _swallow("y"), "NaN does not reach y, forward", isolation=True),
    Defect(
        "NaN swallowed without gradients", _swallow("y"), "NaN does not reach forward", isolation=True, backward=False
    ),
    *(
        Defect(f"NaN swallowed in {name}", _swallow(name), f"NaN does not reach {name}", isolation=True)
        for name in ("dx", "dweight", "dbias")
    ),
    Defect("one element off by 1 percent", _on_outputs(lambda a, o: {"y": _one_element(o)}), "only y["),
    Defect(
        "TF32 in place of fp32",
        _on_inputs(_tf32_operands),
        "operands are rounded to TF32",
        dtypes=("float32",),  # a bfloat16 operand has fewer bits than TF32 keeps
    ),
    Defect(
        "result in another dtype",
        _on_outputs(lambda a, o: {name: v.astype(np.float64) for name, v in o.items()}),
        "y is returned as float64",
    ),
    Defect("no gradient of the bias", _without_bias_gradient, "no gradient of the bias"),
    Defect(
        "dx of the wrong partition",
        _on_outputs(lambda a, o: {"dx": np.roll(o["dx"], 1, axis=-2)}),
        "dx is rolled by one partition",
    ),
    Defect(
        "gradient of a sum instead of the cotangent",
        _on_inputs(lambda a: {"cotangent": np.ones_like(a.cotangent)}),
        "the cotangent is replaced by ones",
    ),
)
