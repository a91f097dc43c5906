"""The pytest fixture `parity_pair` in a user's own test suite."""

import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

from parity_tests.judge.subjects import framework_available
from parity_tests.tests.test_architecture import run_isolated

pytest_plugins = "pytester"
ROOT = Path(__file__).resolve().parents[2]
NAME = "parity_tests.pair.plugin"
SUITE = """
import torch
from flax import nnx

NODE = __file__.rpartition("/")[2]


def test_holds(parity_pair):
    rules = [("weight", "kernel", "o i -> i o"), ("bias", "bias")]
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    report = parity_pair(torch_module=torch.nn.Linear(4, 3), flax_module=module, params=rules, inputs=((2, 4),))
    assert report.ok and report.summary.compared > 10
    assert {row.command for row in report.rows} == {"pytest " + NODE + "::test_holds"}


def test_misused(parity_pair):
    parity_pair(nothing_that_is_known=1)


def test_must_fail(parity_pair):
    rules = [("weight", "scale"), ("bias", "bias")]
    module = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    parity_pair(torch_module=torch.nn.LayerNorm(4), flax_module=module, params=rules, inputs=((2, 4),), gradients=False)
"""


@pytest.mark.skipif(
    not (framework_available("torch") and framework_available("jax")), reason="a pair needs both frameworks"
)
def test_a_pair_that_holds_passes_and_one_that_differs_fails_with_its_report(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("-p", NAME, "-p", "no:cacheprovider", timeout=300)
    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert "first failing rung: forward; likely cause: epsilon: the torch side uses 1e-05" in text
    assert "FAILED" in text
    assert "test_must_fail" in text
    assert re.search(r"^  reproduce: pytest test_\S+\.py::test_must_fail$", text, re.M)
    # The report, not a traceback through the judge, which a call that is wrong gets.
    sections = dict(zip(*[iter(re.split(r"^_+ (\w+) _+$", text, flags=re.M)[1:])] * 2, strict=True))
    assert {name: "plugin.py" in section for name, section in sections.items()} == {
        "test_misused": True,
        "test_must_fail": False,
    }


def test_installing_the_package_registers_the_plugin():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    # The module's own name: "-p" with it and the entry are then one plugin, which pytest registers once.
    assert entries == {NAME: NAME}
    assert importlib.import_module(NAME).parity_pair


def test_the_plugin_costs_other_suites_neither_frameworks_nor_scipy():
    banned = {"torch", "jax", "flax", "scipy", "einops", "numpy"}
    result = run_isolated(f"import {NAME}", banned)
    assert result.returncode == 0, result.stderr
    code = """
import parity_tests.pair
try:
    parity_tests.pair.check_pair
except ModuleNotFoundError as error:
    assert "install the extra: pip install 'partitioned-linear[pair]'" in str(error), error
else:
    raise AssertionError("imported without scipy")
"""
    result = run_isolated(code, {"scipy"})
    assert result.returncode == 0, result.stderr
