"""What a pair's row gives as its reproduction repeats that row to the bit."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import torch
from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.pair import check_pair, run_pair
from parity_tests.pair.check import DEFAULT_ARGUMENTS
from parity_tests.pair.report import PairRow, reproduction

ROW = PairRow("oracle", "torch", "Linear", "bfloat16", "mine seed 3", "y", "mismatch", rung="forward", bound="exact")


def written(spec=None, **given):
    arguments = DEFAULT_ARGUMENTS | given
    return reproduction(spec, arguments, arguments, DEFAULT_ARGUMENTS)(ROW)


def test_the_call_of_a_failing_row_repeats_it_to_the_bit():
    pair = {
        "torch_module": torch.nn.Linear(6, 4),
        "flax_module": lambda p, x: x @ p["kernel"],
        "flax_params": {"kernel": np.ones((6, 4), np.float32), "bias": np.zeros(4, np.float32)},
        "params": [("weight", "kernel", "o i -> i o"), ("bias", "bias")],
        "inputs": ((3, 6),),
    }
    report = check_pair(**pair, seed=5, dtypes=("float32", "bfloat16"), gradients=False)
    failed = [row for row in report.rows if row.status == "mismatch"]
    assert {row.dtype for row in failed} == {"float64", "float32", "bfloat16"}
    assert "  reproduce: check_pair(..., seed=5, dtypes=('float64',), gradients=False)  # y" in report.describe()
    row = next(row for row in failed if row.dtype == "bfloat16")
    assert row.command == "check_pair(..., seed=5, dtypes=('bfloat16',), gradients=False)  # y"
    again = eval(row.command.replace("...", "**pair"), {"check_pair": check_pair, "pair": pair})
    assert row in again.rows


def test_the_command_of_a_named_pair_repeats_its_rows(tmp_path):
    row = run_pair("parity_tests.pair.examples:linear", seed=2).rows[-1]
    command = (
        "python -m parity_tests run --pair parity_tests.pair.examples:linear --seed 2 --device cpu --dtype float32"
    )
    assert row.command == command
    result = CliRunner().invoke(app, [*command.split()[3:], "--json", str(tmp_path / "r.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f'"subject_value": {row.subject_value!r}' in (tmp_path / "r.json").read_text()


def test_what_no_command_can_express_is_a_call():
    held = {"torch_module": 1, "flax_module": 2, "params": [], "inputs": ((2, 3),)}
    assert written(**held, seed=3, device="cuda", semantic=False) == (
        "check_pair(..., seed=3, dtypes=('bfloat16',), semantic=False, device='cuda')  # y"
    )
    named = written("mine.pairs:mlp", torch_python="/a b/python", seed=3)
    assert named.endswith("--pair mine.pairs:mlp --seed 3 --device cpu --torch-python '/a b/python' --dtype bfloat16")
    changed = written("mine.pairs:mlp", inputs=((2, 3),))
    assert changed == "check_pair(pair='mine.pairs:mlp', ..., seed=0, dtypes=('bfloat16',))  # y"
    outputs = written("mine.pairs:mlp", gradients=False)
    assert outputs == "check_pair(pair='mine.pairs:mlp', seed=0, dtypes=('bfloat16',), gradients=False)  # y"
    of_no_tensor = dataclasses.replace(ROW, tensor="")
    assert "#" not in reproduction(None, *[DEFAULT_ARGUMENTS] * 3)(of_no_tensor)
