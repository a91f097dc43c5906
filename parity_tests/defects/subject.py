"""Planted defects: each spoils a copy of a subject the way real code goes wrong; the judge must notice every one.

A judge that cannot fail proves nothing. `python -m parity_tests defects` prints how many were planted and killed.
"""

import dataclasses
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from parity_tests.defects.planting import Defect, Outputs, Spoil
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.oracle import reference
from parity_tests.judge.subjects import Subject


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
    """Keeps `bits` significand bits and drops the rest, without rounding."""
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
    return {"x": _rounded_to_tf32(inputs.x), "weight": _rounded_to_tf32(inputs.weight)}


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
