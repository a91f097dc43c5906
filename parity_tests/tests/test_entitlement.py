"""The bound is chosen by what was measured: what a device does not do is no excuse, and correct code stays accepted."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.judge.comparison import compare
from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.fingerprint import entitlement, fingerprint_of, fuses_bias, take_fingerprint
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.records import environment
from parity_tests.judge.run import judge, observed_class, run_cells
from parity_tests.judge.subjects import DEFAULT_MODES, FRAMEWORKS, arithmetic_of, framework_available, load_subjects
from parity_tests.judge.tolerance import declared_arithmetic, reference
from parity_tests.tests.numpy_subject import NumpySubject

INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
SUBJECTS = {
    framework: next(s for s in load_subjects(framework, "cpu") if s.implementation == "matmul")
    for framework in INSTALLED
}
CASE = Case("square", (8,), 4, 16, 16)


def leak(inputs, outputs):
    """What reaches a partition whose weights and bias are zero: nothing may."""
    y = outputs["y"].copy()
    silent = ~inputs.weight.any(axis=(1, 2)) & (inputs.bias is None or ~inputs.bias.any(axis=1))
    y[..., silent, :] += np.float16(5.9e-5)
    return outputs | {"y": y}


def lost(inputs, outputs):
    return {name: value if name == "y" else np.zeros_like(value) for name, value in outputs.items()}


def silenced(dtype):
    inputs = draw_inputs(CASE, dtype)
    inputs.weight[2], inputs.bias[2] = 0, 0
    return inputs


def tiny_cotangent(dtype, scale=2.0**-20):
    inputs = draw_inputs(CASE, dtype)
    cotangent = (inputs.cotangent.astype(np.float64) * scale).astype(inputs.cotangent.dtype)
    assert 0 < np.abs(cotangent.astype(np.float64)).max() <= 1e-5
    return dataclasses.replace(inputs, cotangent=cotangent)


@dataclasses.dataclass(frozen=True)
class Planted:
    """A framework's own subject with a defect."""

    subject: object
    spoil: object
    framework: str
    mode: str
    implementation: str = "planted"
    isolates_partitions: bool = True

    def unsupported_reason(self, case, dtype):
        return None

    def vjp(self, inputs):
        return self.spoil(inputs, self.subject.vjp(inputs))

    def forward(self, inputs):
        return self.vjp(inputs)["y"]


def failures(subject, inputs, **options):
    return {r.tensor for r in judge(subject, inputs, reference(inputs), **options).results if r.status != "ok"}


@pytest.mark.parametrize("framework", SUBJECTS)
@pytest.mark.parametrize(
    ("inputs", "spoil", "expected"),
    [(silenced, leak, {"y"}), (tiny_cotangent, lost, {"dx", "dweight", "dbias"})],
    ids=["leak below the smallest normal", "small gradients lost"],
)
def test_fp16_results_below_the_smallest_normal_are_judged(framework, inputs, spoil, expected):
    subject, inputs = SUBJECTS[framework], inputs("float16")
    assert failures(subject, inputs) == set()
    planted = Planted(subject, spoil, framework, subject.mode)
    assert failures(planted, inputs) == expected
    # What nobody has measured is held to the promise: fp16 subnormals are kept.
    promised = compare(planted.vjp(inputs), reference(inputs), declared_arithmetic("fp16"))
    assert {result.tensor for result in promised if result.status != "ok"} == expected
    # The bound for a device that flushes them, used where none does, sees nothing: the defects are real tests of it.
    flushing = dataclasses.replace(declared_arithmetic("fp16"), flushes_subnormals=True)
    assert {r.status for r in compare(planted.vjp(inputs), reference(inputs), flushing)} == {"ok"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_device_that_flushes_is_accepted_and_one_that_does_not_is_held_to_it(dtype):
    inputs = draw_inputs(CASE, dtype)
    # Just above the smallest normal on the way in; the products with weights below 1 are subnormal on the way out.
    scale = FORMATS[dtype].smallest_normal * 4
    small = np.sign(inputs.cotangent.astype(np.float64)) * scale
    inputs = dataclasses.replace(inputs, cotangent=small.astype(inputs.cotangent.dtype), zero_mean=False)
    flushing, keeping = NumpySubject(flushes=True), NumpySubject()
    assert fingerprint_of(flushing, dtype).flushes_subnormals
    assert not fingerprint_of(keeping, dtype).flushes_subnormals
    assert "subnormals flushed" in fingerprint_of(flushing, dtype).diagnosis()
    assert failures(flushing, inputs) == failures(keeping, inputs) == set()
    assert "dx" in failures(flushing, inputs, measured=keeping)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bias_that_was_seen_to_be_fused_leaves_no_room_for_a_second_rounding(dtype):
    inputs = draw_inputs(Case("fused", (64,), 3, 16, 16), dtype)
    fused, apart = NumpySubject(), NumpySubject(fused=False)
    assert entitlement(fused, inputs).fused_bias
    assert not entitlement(apart, inputs).fused_bias
    assert failures(fused, inputs) == failures(apart, inputs) == set()
    assert failures(apart, inputs, measured=fused) == {"y"}
    assert "bias rounded twice" in fingerprint_of(apart, dtype).diagnosis()


def test_fusion_is_measured_in_the_shape_at_hand():
    class ByShape(NumpySubject):
        def vjp(self, inputs):
            fused = inputs.x.shape[-1] <= 16
            return NumpySubject(fused=fused).vjp(inputs)

    subject = ByShape()
    short, long = Case("short", (32,), 3, 16, 16), Case("long", (32,), 3, 24, 16)
    assert fuses_bias(subject, short, "bfloat16")
    assert not fuses_bias(subject, long, "bfloat16")
    for case in (short, long):
        assert failures(subject, draw_inputs(case, "bfloat16")) == set()


def test_the_fingerprint_relaxes_nothing_that_the_dtype_promises():
    def to_tf32(array):
        mantissa, exponent = np.frexp(array)
        return np.ldexp(np.rint(mantissa * 2.0**11) / 2.0**11, exponent)

    subject, inputs = NumpySubject(operand=to_tf32), draw_inputs(Case("tf32", (16,), 3, 64, 16), "float32")
    truth = reference(inputs)
    fingerprint = take_fingerprint(subject, "float32")
    assert "operands rounded to TF32" in fingerprint.diagnosis()
    promised = declared_arithmetic("ieee_fp32")
    assert fingerprint.refine(promised).operand == "float32"
    strict = judge(subject, inputs, truth)
    assert {result.status for result in strict.results if result.tensor != "dbias"} == {"mismatch"}
    assert observed_class(strict, inputs, truth) == "tf32"
    # Asked for, it holds, and is what the row says; other dtypes keep their own promise.
    asked = judge(subject, inputs, truth, precision="tf32")
    assert {result.status for result in asked.results} == {"ok"}
    assert observed_class(asked, inputs, truth, "tf32") == "tf32"
    exact = judge(NumpySubject(), inputs, truth, precision="tf32")
    assert observed_class(exact, inputs, truth, "tf32") == "ieee_fp32"
    assert arithmetic_of("eager", "bfloat16", precision="tf32") == declared_arithmetic("bf16")


def test_a_mode_keeps_its_arithmetic_and_takes_the_flushing_of_its_default():
    class Cast(NumpySubject):
        mode = "autocast"

    inputs = draw_inputs(CASE, "float32")
    alone = entitlement(Cast(), inputs)
    assert alone == arithmetic_of("autocast", "float32")
    measured = entitlement(Cast(), inputs, measured=NumpySubject())
    assert measured == dataclasses.replace(alone, flushes_subnormals=False, flushes_partial_sums=False)
    assert alone.flushes_subnormals


def test_rows_and_document_say_what_the_bound_was_derived_for():
    (row, *_) = run_cells([NumpySubject()], ["bfloat16"], [CASE])
    assert row.observed == "bf16"
    assert row.arithmetic == ("bfloat16 operands, float32 sums, bfloat16 results, bias fused, subnormals kept")
    assert environment()["false_alarm_rate"] == 1e-6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--precision", "magic"], "--precision: expected one of fp32, tf32, got 'magic'"),
        (["--precision", "tf32", "--dtype", "bfloat16"], "expected float32 among --dtype"),
        (["--precision", "tf32", "--pair", "a.b:c"], "expected none beside --pair"),
        *(
            (["--precision", "tf32", "--device", "cpu", "--framework", framework], "has no TF32 arithmetic")
            for framework in INSTALLED
        ),
    ],
)
def test_tf32_is_refused_where_it_means_nothing(arguments, sentence):
    result = CliRunner().invoke(app, ["run", *arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_on_the_command_line_writes_what_it_measured(tmp_path):
    target = tmp_path / "rows.json"
    arguments = ["--framework", INSTALLED[0], "--implementation", "matmul", "--dtype", "float16", "--case", "square"]
    result = CliRunner().invoke(app, ["run", *arguments, "--json", str(target)], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    document = json.loads(target.read_text())
    assert document["environment"]["false_alarm_rate"] == 1e-6
    kinds = {row["kind"]: row for row in document["rows"]}
    assert set(kinds) == {"oracle", "exact"}
    assert "subnormals kept" in kinds["oracle"]["arithmetic"]
    assert kinds["oracle"]["observed"] == "fp16"
    assert kinds["oracle"]["mode"] == DEFAULT_MODES[INSTALLED[0]]
