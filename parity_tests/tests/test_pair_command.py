"""`run --pair`: reports in every format, options that reach the pair, and every mistake in one sentence."""

import json
import textwrap
from xml.etree import ElementTree

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.pair.judging import outcome

USER_CODE = """
import functools
import sys
import numpy as np
import torch
from flax import nnx

RULES = [("weight", "kernel", "o i -> i o"), ("bias", "bias")]
ZEROS = {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}

def linear(**changes):
    sides = {"torch_module": torch.nn.Linear(4, 3), "flax_module": nnx.Linear(4, 3, rngs=nnx.Rngs(0))}
    return sides | {"params": RULES, "inputs": ((2, 4),)} | changes

def without_bias(p, x):
    return x @ p["kernel"]

def half():
    module = nnx.Linear(4, 3, param_dtype=np.float16, rngs=nnx.Rngs(0))
    return linear(flax_module=module)

def failing(p, x):
    return {"logits": p["missing"]}

def in_single_precision(p, x):
    return (x @ p["kernel"] + p["bias"]).astype(np.float32)

wide = functools.partial(linear, flax_module=in_single_precision, flax_params=ZEROS, gradients=False)
lost_bias = functools.partial(linear, flax_module=without_bias, flax_params=ZEROS)
left_out = functools.partial(linear, params=RULES[:1])
twice = functools.partial(linear, params=[*RULES, ("bias", "bias")])
mis_shaped = functools.partial(linear, params=[("weight", "kernel"), RULES[1]])
misspelt = functools.partial(linear, params=[("wieght", "kernel"), RULES[1]])
other_argument = functools.partial(linear, parameters=RULES)
no_inputs = functools.partial(linear, inputs=None)
wrong_width = functools.partial(linear, inputs=((2, 5),))
forgotten_tuple = functools.partial(linear, inputs=(2, 4))
raises_inside = functools.partial(linear, flax_module=failing, flax_params=ZEROS)

def returns_list():
    return [1]

def raises():
    return {}["torch_module"]

def two_arguments(a, b):
    return {}

not_a_function = 3
def exits():
    sys.exit(0)

def returns_class():
    return dict

def wrong_keys():
    return {1: 2, "x": 3}

class Speechless(Exception):
    def __str__(self):
        raise RuntimeError

def speechless():
    raise Speechless

def recursion():
    return recursion()

def memory():
    raise MemoryError

def many_lines():
    raise RuntimeError("the first line\\nthe second\\x1b[31m")
"""


@pytest.fixture(scope="module")
def user_code(tmp_path_factory):
    """A module of a user, importable by name."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_pairs.py").write_text(textwrap.dedent(USER_CODE))
    (folder / "user_broken.py").write_text("def pair(:\n")
    (folder / "user_exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def command(*arguments):
    result = CliRunner().invoke(app, ["run", *arguments], catch_exceptions=False)
    return result


def test_a_pair_that_holds_is_reported_in_every_format(user_code, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "junit", "html")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    result = command(
        "--pair",
        "user_pairs:linear",
        "--dtype",
        "bfloat16",
        "--dtype",
        "float64",
        "--seed",
        "7",
        "--device",
        "cpu",
        *options,
    )
    assert result.exit_code == 0, result.output
    assert "user_pairs:linear: holds; 36 compared, 36 passed, 0 failed, 0 skipped" in result.output
    document = json.loads(files["json"].read_text())
    assert document["schema_version"] == 1
    assert document["pair"]["ok"] is True
    assert document["pair"]["first_failing_rung"] is None
    # The options reached the pair, and every row says how to repeat it.
    assert {row["dtype"] for row in document["rows"]} == {"float64", "bfloat16"}
    assert all(row["case"].endswith("seed 7") for row in document["rows"])
    assert all("--pair user_pairs:linear --seed 7" in row["command"] for row in document["rows"])
    suite = ElementTree.parse(files["junit"]).getroot()[0]
    assert int(suite.get("tests")) == len(document["rows"]) == document["summary"]["compared"]
    assert len({(case.get("classname"), case.get("name")) for case in suite}) == len(suite)
    assert "user_pairs:linear" in files["html"].read_text()


def test_a_pair_that_differs_ends_with_status_one_and_its_cause(user_code, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "junit", "html")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    result = command("--pair", "user_pairs:lost_bias", "--device", "cpu", *options)
    assert result.exit_code == 1, result.output
    cause = "bias has no effect on the flax side"
    assert f"first failing rung: forward; likely cause: {cause}" in result.output
    document = json.loads(files["json"].read_text())
    assert document["pair"]["likely_cause"].startswith(cause)
    failed = [row for row in document["rows"] if row["status"] == "mismatch"]
    assert {"y", "d_bias"} <= {row["tensor"] for row in failed}
    assert all(row["worst_index"] is not None and row["reason"] for row in failed)
    cases = ElementTree.parse(files["junit"]).getroot()[0]
    messages = [case.find("failure").get("message") for case in cases if case.find("failure") is not None]
    assert len(messages) == len(failed)
    assert cause in files["html"].read_text()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("user_pairs", "expected package.module:factory"),
        ("user_pairs:exits", "expected a factory that returns, got one that raised SystemExit: 0"),
        ("user_exits:pair", "expected a module that can be imported, got one that raised SystemExit: 0"),
        ("user_pairs:returns_class", "expected a dict of check_pair's arguments, got type"),
        ("user_pairs:wrong_keys", "to return arguments among torch_module, flax_module, params"),
        ("user_pairs:speechless", "got one that raised Speechless: its message cannot be shown"),
        ("user_pairs:recursion", "got one that raised RecursionError: maximum recursion depth exceeded"),
        ("user_pairs:memory", "got one that raised MemoryError: no reason given"),
        ("user_pairs:many_lines", "got one that raised RuntimeError: the first line ("),
        ("builtins:dict", "expected a function whose arguments can be counted, got type"),
        ("no_such_module:pair", "expected a module that can be imported, got 'no_such_module'"),
        ("user_broken:pair", "got one that raised SyntaxError"),
        ("user_pairs:no_such", "expected a function of user_pairs, got 'no_such'; it has linear"),
        ("user_pairs:not_a_function", "expected a function of user_pairs, got 'not_a_function'"),
        ("user_pairs:returns_list", "expected a dict of check_pair's arguments, got list"),
        ("user_pairs:raises", "got one that raised KeyError: 'torch_module'"),
        ("user_pairs:two_arguments", "expected a factory of no argument, or of one"),
        ("user_pairs:other_argument", "expected user_pairs:other_argument to return arguments among torch_module"),
        ("user_pairs:no_inputs", "inputs: expected a value, got None"),
        ("user_pairs:left_out", "expected every parameter to be mapped; left on the torch side: bias (3,)"),
        ("user_pairs:twice", "expected every element once, got torch bias twice"),
        ("user_pairs:mis_shaped", "expected equal shapes without an axis pattern, got (3, 4) and (4, 3)"),
        ("user_pairs:misspelt", "expected a torch parameter among weight, bias, got 'wieght'"),
        ("user_pairs:half", "expected one dtype on both sides"),
        ("user_pairs:forgotten_tuple", "inputs[0]: expected a shape such as (8, 64)"),
        (
            "user_pairs:wrong_width",
            "torch_module: expected a module that runs on its inputs (float32 (2, 5)), got RuntimeError",
        ),
        ("user_pairs:raises_inside", "got KeyError: 'missing'"),
    ],
)
def test_a_pair_that_cannot_be_checked_is_one_sentence(user_code, spec, sentence):
    """What the command's process answers, here in this one: a process for each would take minutes."""
    refused = outcome(spec, {"device": "cpu"}, lambda found: None)["refused"]
    assert sentence in refused
    assert refused.isprintable()


def test_a_refusal_ends_the_command_with_exit_two_and_is_in_the_files(user_code, tmp_path):
    file = tmp_path / "report.json"
    result = command("--pair", "user_pairs:misspelt", "--device", "cpu", "--json", str(file))
    assert result.exit_code == 2, result.output
    sentence = "expected a torch parameter among weight, bias, got 'wieght'"
    assert sentence in result.stderr
    assert result.stderr.startswith("error: --pair user_pairs:misspelt: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    document = json.loads(file.read_text())
    assert document["pair"]["ok"] is False
    assert sentence in document["pair"]["stopped"]
    assert (document["rows"], document["cells_left"]) == ([], 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--framework", "torch"], "--framework: expected none beside --pair"),
        (["--implementation", "matmul"], "--implementation: expected none beside --pair"),
        (["--cases", "smoke"], "--cases: expected none beside --pair"),
        (["--dtype", "float8"], "--dtype: expected one of float64, float32"),
        (["--device", "tpu"], "--device: expected one of auto, cpu, cuda"),
        (["--json", "/no/such/folder/x.json"], "--json: expected a file in a writable folder"),
        (["--torch-python", "/no/such/python"], "torch_python: expected an interpreter, got '/no/such/python'"),
        (["--jax-python", ""], "jax_python: expected an interpreter, got ''"),
        (["--timeout-s", "0"], "--timeout-s: expected seconds above 0"),
        (["--timeout-s", "nan"], "--timeout-s: expected seconds above 0"),
        (["--timeout-s", "inf"], "--timeout-s: expected seconds above 0"),
    ],
)
def test_options_that_do_not_fit_a_pair_are_refused(options, sentence):
    result = command("--pair", "parity_tests.pair.examples:linear", *options)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr


def test_one_dtype_can_be_demanded(user_code):
    asked = ("--dtype", "bfloat16", "--dtypes-equal", "--values", "given")
    result = command("--pair", "user_pairs:wide", "--device", "cpu", *asked)
    assert result.exit_code == 1, result.output
    assert "y is bfloat16 on the torch side and float32 on the flax side" in result.output
    assert "--device cpu --dtypes-equal --values given --dtype bfloat16" in result.output
    assert "the torch side's own values" in result.output
    refused = command("--dtypes-equal")
    assert refused.exit_code == 2
    assert "--dtypes-equal: expected --pair beside it" in refused.stderr
    refused = command("--values", "given")
    assert refused.exit_code == 2
    assert "--values: expected --pair beside values" in refused.stderr


def test_an_interpreter_without_a_pair_is_refused():
    result = command("--jax-python", "python3")
    assert result.exit_code == 2
    assert "expected --pair beside an interpreter" in result.stderr
