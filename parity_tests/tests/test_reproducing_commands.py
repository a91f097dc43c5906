"""The command of a failing row repeats just that row, and every failure has one."""

import dataclasses
import shlex

import pytest
from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.commands import run as command
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.judge.inputs import Case
from parity_tests.judge.records import ParityRow, summarize
from parity_tests.judge.run import run_cells
from parity_tests.judge.subjects import DEFAULT_MODES, FRAMEWORKS, framework_available
from parity_tests.judge.tolerance import reference
from parity_tests.report.console import PlainConsole, print_report
from parity_tests.training.ladder import TRAINED, TRAININGS, TrainingRows

CASE = Case("square", (4,), 3, 8, 8)
BOTH = all(map(framework_available, FRAMEWORKS))
needs_both = pytest.mark.skipif(not BOTH, reason="training is judged across both frameworks")


class Oracle:
    """A subject that returns the rounded truth, its tensors multiplied by factors."""

    implementation, isolates_partitions = "matmul", True

    def __init__(self, framework, factors=()):
        self.framework, self.mode, self.factors = framework, DEFAULT_MODES[framework], dict(factors)

    def unsupported_reason(self, case, dtype):
        return None if case == CASE else "only one case"

    def forward(self, inputs):
        return self.vjp(inputs)["y"]

    def vjp(self, inputs):
        return {
            name: (truth.value * self.factors.get(name, 1)).astype(numpy_dtype(inputs.dtype))
            for name, truth in reference(inputs).items()
        }


def rows_of(*subjects, **options):
    return list(run_cells(subjects, ["float32"], [CASE], **options))


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_command_names_the_device_that_was_asked_for(device):
    rows = rows_of(Oracle("torch"), Oracle("jax"), device=device)
    assert {row.kind for row in rows} == {"oracle", "pair"}
    given = [shlex.split(row.command) for row in rows]
    expected = [] if device == "auto" else ["--device", device]
    assert all([a for a in words if a in ("--device", device)] == expected for words in given)


def test_a_pair_gives_every_tensor_and_a_row_for_each_failure():
    (holds,) = [row for row in rows_of(Oracle("torch"), Oracle("jax")) if row.kind == "pair"]
    assert (holds.status, holds.tensor_fractions) == ("ok", {"y": 0, "dx": 0, "dweight": 0, "dbias": 0})
    wrong = Oracle("jax", {"dx": 1.01, "dbias": 1.01})
    failed = [row for row in rows_of(Oracle("torch"), wrong) if row.kind == "pair"]
    assert [(row.tensor, row.status) for row in failed] == [("dx", "mismatch"), ("dbias", "mismatch")]
    for row in failed:
        assert row.partition == row.worst_index[0 if row.tensor == "dbias" else 1]
        assert row.tensor_fractions["y"] == 0
        assert row.tensor_fractions[row.tensor] == row.bound_fraction > 1


def printed(row):
    console = PlainConsole(width=60)
    with console.capture() as capture:
        print_report(console, [row], summarize([row]))
    return capture.get()


def test_the_report_prints_a_command_on_one_line_and_none_where_there_is_none():
    words = "python -m parity_tests run --train partitioned-mlp:adamw-clip-warmup-cosine --html [page].html"
    row = ParityRow("training", "torch+jax", "mlp: adam", "float32", "semantic (jax)", "", "mismatch", "apart")
    assert f"  reproduce: {words}\n" in printed(dataclasses.replace(row, command=words))
    assert "apart" in printed(row)
    assert "reproduce" not in printed(row)


def test_every_training_of_the_sets_can_be_run_alone():
    for trainings in TRAINED.values():
        assert {f"{task}:{optimizer}" for task, optimizer in trainings} <= set(TRAININGS)


@needs_both
def test_a_named_training_is_all_that_runs(monkeypatch, tmp_path):
    asked = []

    def trained(task, optimizer):
        asked.append((task, optimizer))
        row = ParityRow("training", "torch+jax", f"{task}: {optimizer}", "float32", "semantic", "", "ok")
        return TrainingRows([row], None)

    monkeypatch.setattr(command, "training_rows", trained)
    monkeypatch.setattr(command, "chosen_subjects", lambda *_: pytest.fail("subjects were loaded"))
    names = [part for name in ("nlinear:sgd", "partitioned-mlp:adamw", "nlinear:sgd") for part in ("--train", name)]
    result = invoke("run", *names)
    assert result.exit_code == 0
    assert asked == [("nlinear", "sgd"), ("partitioned-mlp", "adamw")]
    assert "2 compared, 2 passed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train", "nlinear"], "--train: expected one of partitioned-mlp:sgd"),
        (["--train", "nlinear:sgd", "--dtype", "float32", "--device", "cpu"], "got --dtype, --device; run trainings"),
        (["--train", "nlinear:sgd", "--cases", "smoke"], "got --cases; run trainings"),
        (["--train", "nlinear:sgd", "--seed", "1"], "got --seed; run trainings"),
        (["--train", "nlinear:sgd", "--pair", "some.module:factory"], "--train: expected none beside --pair"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence(arguments, sentence):
    result = invoke("run", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert sentence in result.stderr


@needs_both
def test_training_one_framework_is_refused():
    result = invoke("run", "--train", "nlinear:sgd", "--framework", "torch")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--train: expected torch and jax, got torch alone" in result.stderr
