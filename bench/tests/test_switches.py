"""Switches left in the shell: unset or told, recorded, and a compiled mode that proves that it compiled."""

import json
from contextlib import contextmanager

import pytest

from bench.measure.switches import TOLD, UNSET, recorded, sentences, unset_for
from bench.measure.timer import Unsupported
from bench.measure.workers import RequestError, WorkerProcess, worker_environment
from bench.report.markdown import environment_lines
from bench.tests.test_commands import TINY
from bench.tests.test_programs import REQUEST, judged, opened, timer_of

ON = {
    "JAX_DEFAULT_DTYPE_BITS": "32",
    "PYTHONMALLOC": "debug",
    "TORCH_COMPILE_OVERRIDE_BACKENDS": "eager",
    "NVIDIA_TF32_OVERRIDE": "0",
}
ON |= {name: "log" for name in UNSET if name.startswith("JAX_TRANSFER_GUARD")}


@pytest.mark.parametrize("name", UNSET)
def test_a_switch_that_makes_a_mode_a_lie_does_not_reach_the_worker(name, monkeypatch):
    value = ON.get(name, "1")
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("PARTITIONED_LINEAR_CONTROL", "1")
    for framework in ("torch", "jax"):
        found = worker_environment(framework, device="cpu", division="matched", cpus=(0, 1))
        assert name not in found
        assert found["PARTITIONED_LINEAR_CONTROL"] == "1"
    said = [line for line in sentences(("torch", "jax"), 2) if line.startswith(f"{name}={value} is unset")]
    assert len(said) == 1
    for framework in ("torch", "jax"):
        assert (name in unset_for(framework)) == (framework in UNSET[name].frameworks)


def test_a_switch_that_is_off_is_not_worth_a_word():
    off = {"JAX_DISABLE_JIT": "0", "TORCHDYNAMO_DISABLE": "", "JAX_DEBUG_NANS": "False", "XLA_FLAGS": ""}
    assert sentences(("torch", "jax"), 2, off) == []
    assert len(sentences(("torch", "jax"), 2, dict.fromkeys(off, "1"))) == len(off)
    # For this one, 0 overrules the precision as much as 1 does.
    assert len(sentences(("torch",), 2, {"NVIDIA_TF32_OVERRIDE": "0"})) == 1


@pytest.mark.parametrize(
    ("name", "framework"),
    [
        ("JAX_A_SWITCH_OF_LATER", "jax"),
        ("TORCHINDUCTOR_COMPREHENSIVE_PADDING", "torch"),
        ("OMP_THREAD_LIMIT", "torch"),
        ("DNNL_MAX_CPU_ISA", "torch"),
    ],
)
def test_a_switch_that_no_table_names_is_told_and_recorded(name, framework, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert recorded(worker_environment(framework, device="cpu", division="stock", cpus=()))[name] == "0"
    assert [line for line in sentences((framework,), 2) if line.startswith(f"{name}=0 stays in force in the workers")]
    other = "torch" if framework == "jax" else "jax"
    assert not [line for line in sentences((other,), 2) if name in line]
    ours = worker_environment("jax", device="cpu", division="matched", cpus=(0, 1))
    quiet = {key: value for key, value in ours.items() if key != name} | {"TORCHINDUCTOR_CACHE_DIR": "x"}
    assert not set(recorded(quiet)) & {name, "TORCHINDUCTOR_CACHE_DIR", "XLA_PYTHON_CLIENT_PREALLOCATE"}


def test_a_switch_that_stays_is_told_and_recorded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert (
        "--xla_cpu_enable_fast_math=false"
        in recorded(worker_environment("jax", device="cpu", division="stock", cpus=()))["XLA_FLAGS"]
    )
    said = " ".join(sentences(("torch", "jax"), 2))
    assert "XLA_FLAGS=--xla_cpu_enable_fast_math=false stays in force" in said
    assert "OMP_NUM_THREADS=7 is 2 in the workers" in said
    assert "XLA_FLAGS" not in " ".join(sentences(("torch",), 2))
    assert not set(TOLD) & set(UNSET)


# Of JAX's options, by words in their names, that do not concern what is measured.
_NOT_MEASURED = {
    "JAX_DEBUG_KEY_REUSE",
    "JAX_DEBUG_LEAKED_CLIENTS_ON_CLEAR_BACKENDS",
    "JAX_DEBUG_LOG_MODULES",
    "JAX_DISABLE_BWD_CHECKS",
    "JAX_DISABLE_VMAP_SHMAP_ERROR",
    "JAX_DISTRIBUTED_DEBUG",
    "JAX_INCLUDE_DEBUG_INFO_IN_DUMPS",
    "JAX_PALLAS_ENABLE_DEBUG_CHECKS",
}


def test_no_option_of_jax_that_changes_what_is_compiled_is_forgotten():
    """A new release may bring one: this fails then, until its meaning was looked up."""
    from jax._src import config

    words = (
        "DEBUG",
        "DISABLE",
        "OPTIMIZATION",
        "EFFORT",
        "GUARD_",
        "PROMOTION",
        "NO_EXECUTION",
        "RAGGED",
        "REDUCTIONS",
    )
    options = {name.upper() for name in config.config.values if name.startswith("jax_")}
    found = {name for name in options if any(word in name for word in words)}
    assert {"JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_DISABLE_MOST_OPTIMIZATIONS"} <= found
    assert found - set(TOLD) - set(UNSET) - _NOT_MEASURED == set()


@pytest.mark.usefixtures("fake_pool")
def test_the_fingerprint_tells_both(call, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    done = call("run", *TINY, "--direction", "forward", "--implementation", "matmul", "--out", tmp_path / "run")
    assert (
        "JAX_DISABLE_JIT=1 is unset in the workers: it runs what is called `jit` without compiling it." in done.output
    )
    (found,) = json.loads((tmp_path / "run" / "environment.json").read_text()).values()
    assert found["unset_variables"] == {"JAX_DISABLE_JIT": "1"}
    lines = environment_lines("id", found)
    assert "Set in the shell, and unset for the measurement: JAX_DISABLE_JIT=1." in lines


@contextmanager
def not_compiling(framework):
    """Turns compilation off inside a running process, as a start-up file or a library may do."""
    if framework == "jax":
        import jax

        with jax.disable_jit():
            yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("direction", ["forward", "train_step"])
def test_jit_proves_that_it_compiled(direction):
    bench = opened("jax", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    assert judged(bench, "jax", "einsum")["status"] == "ok"
    with not_compiling("jax"), pytest.raises(Unsupported, match="jit did not compile it: Python ran the function in 3"):
        judged(bench, "jax", "einsum")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_compile_proves_that_it_compiled(direction):
    bench = opened("torch", direction=direction)
    assert judged(bench, "torch", "einsum", mode="compile")["status"] == "ok"
    block = {"calls": 2, "after_other": False, "verify": True, **REQUEST}
    assert bench.block(block)["judgement"]["status"] == "ok"
    with not_compiling("torch"):
        with pytest.raises(Unsupported, match=r"compile did not compile it: Python ran the function in [23] calls"):
            bench.block(block)
        with pytest.raises(Unsupported, match="compile did not compile it"):
            judged(bench, "torch", "einsum", mode="compile")
        assert judged(bench, "torch", "einsum")["status"] == "ok"


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_process_that_starts_with_such_a_switch_is_refused():
    timer = timer_of("torch")
    assert timer.refusals() == []
    import torch

    with torch.autograd.detect_anomaly(check_nan=False):
        assert timer.refusals() == ["torch.autograd.set_detect_anomaly"]
        with pytest.raises(Unsupported, match="set_detect_anomaly is on when the process starts"):
            opened("torch")
    import jax

    assert timer_of("jax").refusals() == []
    with jax.debug_nans(True):
        assert timer_of("jax").refusals() == ["jax_debug_nans"]


def test_a_start_up_file_that_turns_compilation_off_is_named(tmp_path):
    timer_of("jax")
    (tmp_path / "sitecustomize.py").write_text("import jax\njax.config.update('jax_disable_jit', True)\n")
    environment = worker_environment("jax", device="cpu", division="matched", cpus=())
    worker = WorkerProcess("jax", environment | {"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(RequestError, match=r"jax_disable_jit is on when the process starts.*sitecustomize"):
            worker.request({"operation": "hello"}, 120)
    finally:
        worker.close()
