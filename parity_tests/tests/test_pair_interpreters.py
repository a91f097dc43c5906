"""Two interpreters, each with one framework only, and neutral code that imports none."""

import dataclasses
import json
import stat
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.judge.subjects import framework_available
from parity_tests.pair.loading import RemoteSide, _packed, _unpacked
from parity_tests.pair.side import Constants
from parity_tests.tests.test_architecture import JAX_BAN, TORCH_BAN, run_isolated

both = pytest.mark.skipif(
    not (framework_available("torch") and framework_available("jax")), reason="needs both frameworks, one a process"
)


@pytest.fixture
def interpreters(tmp_path):
    """Two interpreters that cannot import the other framework."""
    paths = {}
    for framework, banned in (("torch", JAX_BAN), ("jax", TORCH_BAN)):
        path = tmp_path / f"only-{framework}"
        path.write_text(
            f"#!{sys.executable}\n"
            + textwrap.dedent(f"""
            import runpy, sys
            class Ban:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] in {sorted(banned)!r}:
                        raise ModuleNotFoundError(f"No module named {{name!r}} (banned by the test)", name=name)
            sys.meta_path.insert(0, Ban())
            assert sys.argv[1] == "-m"
            sys.argv = sys.argv[2:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            """)
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        paths[framework] = str(path)
    return paths


@both
def test_sides_in_their_own_interpreters_give_the_verdict_of_one(interpreters):
    code = f"""
import dataclasses, sys
from parity_tests.pair import run_pair
from parity_tests.pair.check import DEFAULT_ARGUMENTS, judge_pair, merged, prepared
spec = "parity_tests.pair.examples:linear"
pythons = {{"torch_python": {interpreters["torch"]!r}, "jax_python": {interpreters["jax"]!r}}}
with prepared(merged(spec, DEFAULT_ARGUMENTS | pythons), spec) as pair:
    report = judge_pair(pair, dtypes=("float32", "bfloat16"))
    report.assert_ok()
    assert {{row.dtype for row in report.rows}} == {{"float64", "float32", "bfloat16"}}
    assert {{"y", "d_weight", "d_bias", "d_input0"}} <= {{row.tensor for row in report.rows}}
    assert sum("in an interpreter of its own: Python" in note for note in report.notes) == 2, report.notes
    halves = [("weight[0:8]", "kernel[:, 8:]", "o i -> i o"), ("weight[8:]", "kernel[:, :8]", "o i -> i o")]
    halves += [("bias[0:8]", "bias[8:]"), ("bias[8:]", "bias[:8]")]
    report = judge_pair(dataclasses.replace(pair, rules=halves), gradients=False)
    assert not report.ok and report.first_failing_rung == "forward"
    assert "weight, bias come in the order 1, 0 on the flax side" in report.likely_cause, report.likely_cause
    # An interpreter that dies ends the check: it does not pass for a dtype that is not supported.
    pair.sides["jax"]._process.kill()
    try:
        judge_pair(pair)
    except ConnectionError as error:
        assert "the jax interpreter ended with status -9" in str(error), error
    else:
        raise AssertionError("judged with a dead interpreter")
try:
    run_pair(spec, **pythons | {{"torch_python": {interpreters["jax"]!r}}})
except ValueError as error:
    assert "the torch side of parity_tests.pair.examples:linear cannot be built" in str(error), error
    assert "No module named 'torch'" in str(error), error
else:
    raise AssertionError("torch was built without torch")
assert not set(sys.modules) & set({sorted(TORCH_BAN | JAX_BAN)!r})
"""
    result = run_isolated(code, TORCH_BAN | JAX_BAN)
    assert result.returncode == 0, result.stderr


def test_an_interpreter_that_is_not_there_gets_one_sentence():
    with pytest.raises(ValueError, match="torch_python: expected an interpreter, got '/no/such/python'"):
        RemoteSide("torch", "parity_tests.pair.examples:linear", "/no/such/python")


def test_neutral_code_of_pairs_imports_no_framework():
    code = """
import importlib, pkgutil, sys
import parity_tests.pair as pair
for module in pkgutil.iter_modules(pair.__path__, "parity_tests.pair."):
    importlib.import_module(module.name)
loaded = set(sys.modules) & {"torch", "jax", "flax", "optax", "torch_impl", "jax_impl"}
assert not loaded, loaded
"""
    result = run_isolated(code, set())
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "uint8", "bool"],
)
def test_exchange_is_bit_exact(dtype):
    target = numpy_dtype(dtype) if "float" in dtype else np.dtype(dtype)
    width = np.dtype(f"u{min(target.itemsize, 8)}")
    columns = 3 * max(target.itemsize // 8, 1)
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else np.iinfo(width).max, (5, columns), width)
    arrays = {"a.b": bits.view(target), "scalar": bits.view(target)[0, 0]}
    value = (arrays, (bits[:0].view(target), None), Constants(dict(arrays), ("a text",), members=3), {})
    message, payload = _packed(value)
    read = _unpacked(json.loads(json.dumps(message)) | {"payload": payload})
    assert (read[1][1], read[3]) == (None, {})
    assert dataclasses.replace(read[2], spread=arrays) == value[2]
    for found, sent in ((read[0], arrays), (read[2].spread, arrays), ({"a": read[1][0]}, {"a": value[1][0]})):
        assert list(found) == list(sent)
        for name, array in sent.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()


def test_exchange_refuses_other_dtypes():
    with pytest.raises(ValueError, match="b: expected an array of numbers or booleans, got <U1"):
        _packed({"a": {"b": np.array(["1", "2"])}})
