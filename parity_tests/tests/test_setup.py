"""What a machine is set up with, what is installed, and what an interpreter without the packages says."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available
from parity_tests.tests.forked import run_python

ROOT = Path(__file__).resolve().parents[2]
OLD = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {}    |"
NEW = "| NVIDIA-SMI 610.57.04    KMD Version: 610.57.04    CUDA UMD Version: {}    |"


def requirements(tmp_path, header):
    """The command that would install the packages on a machine whose nvidia-smi prints this header."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' '{header}' '| a table |'\n")
    fake.chmod(0o755)
    result = subprocess.run(
        ["make", "-n", "lint", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in result.stdout.splitlines() if "pip install" in line]
    return line, result.stderr


@pytest.mark.sample(3)
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("header", [OLD, NEW], ids=["to-609", "from-610"])
@pytest.mark.parametrize(("version", "extra"), [("12.4", "cuda12"), ("13.0", "cuda13"), ("14.1", "cuda13")])
def test_the_cuda_extra_fits_the_driver(tmp_path, header, version, extra):
    line, warning = requirements(tmp_path, header.format(version))
    assert f".[{extra}," in line
    assert "constraints.txt" not in line
    assert warning == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_driver_that_is_too_old_or_not_understood_gets_the_build_for_cpus(tmp_path):
    line, _ = requirements(tmp_path, OLD.format("11.8"))
    assert "-c constraints.txt" in line
    line, warning = requirements(tmp_path, "| something else |")
    assert "-c constraints.txt" in line
    assert "names no CUDA version that is understood" in warning


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("budget", "given"), [("420", "40[0-9]"), ("9", "1")])
def test_the_budget_of_a_gpu_run_holds_the_parity_before_the_cells(tmp_path, budget, given):
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    # The judge takes a second or two of it.
    python.write_text(f'#!/bin/bash\necho "$*" >> {calls}\ncase "$*" in *parity_tests*) sleep 0.5;; esac\n')
    python.chmod(0o755)
    command = ["make", "-s", "gpu", f"BUDGET={budget}", f"OUT={tmp_path / 'run'}", f"GPU_PYTHON={python}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    checked, fp32, tf32, single, cells, claims = calls.read_text().splitlines()
    assert "--dtype bfloat16 --dtype float16 --case no-leading --case batch-one" in single
    assert checked.endswith("--dry-run")
    for line, precision in ((fp32, ""), (tf32, "--precision tf32 ")):
        assert f"parity_tests run --device cuda --cases smoke {precision}" in line
    words = "fp16 --precision fp64 .*--resume .*--budget-s"
    assert re.search(rf"^-m bench run --device cuda .*--precision {words} {given}$", cells), cells
    assert claims.startswith("-m bench claims")
    # Without a GPU the judge refuses: nothing is left behind.
    python.write_text('#!/bin/bash\ncase "$*" in *--dry-run*) ;; *) exit 2;; esac\n')
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode != 0
    assert not (tmp_path / "run").exists()


def test_a_mistyped_search_profile_is_one_sentence_with_the_choices():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env=os.environ | {"HYPOTHESIS_PROFILE": "thorogh"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR, result.stdout
    sentence = "HYPOTHESIS_PROFILE: expected one of quick, thorough, got 'thorogh'; set it to one of these."
    assert result.stderr.strip() == f"ERROR: {sentence}"


@pytest.mark.parametrize("package", ["parity_tests", "bench"])
def test_without_the_packages_a_command_says_what_to_install(package):
    result = subprocess.run(
        # -S leaves out everything that was installed.
        [sys.executable, "-S", "-m", package, "--help"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"{package}: the package typer is not installed for ")
    assert "pip install -e ." in result.stderr
    assert "Traceback" not in result.stderr


WITHOUT = """
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "{banned}".split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Ban())
try:
    import {tree}
except ModuleNotFoundError as error:
    print(error, "|", error.name, "|", error.__cause__, "|", error.__suppress_context__)
"""


def fresh_python(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("tree", "banned", "extra"),
    [("torch_impl", "torch", "torch"), ("jax_impl", "jax", "jax"), ("jax_impl", "flax", "jax")],
)
def test_a_tree_without_its_framework_names_the_extra(tree, banned, extra):
    if not framework_available(extra):
        pytest.skip(f"{extra} is not installed here")
    found = fresh_python(WITHOUT.format(tree=tree, banned=banned))
    sentence, name, cause, alone = found.stdout.strip().split(" | ")
    assert sentence.startswith(f"{tree}: expected ")
    assert f"with its extra `{extra}`" in sentence
    assert (name, cause, alone) == (banned, "None", "True")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra, "cuda12", "cuda13"} <= set(extras)


def test_without_the_extra_of_pairs_layers_are_judged_and_pairs_name_it():
    judged = "parity_tests.commands.run, parity_tests.training.criteria as tree\n    print('layers')\n"
    commands = """    from parity_tests.__main__ import app
    from parity_tests.report.console import run_application
    sys.argv = ["parity_tests", "pairs"]
    run_application(app, "python -m parity_tests")"""
    found = fresh_python(WITHOUT.format(tree=judged + commands, banned="einops scipy"))
    assert (found.stdout, found.returncode) == ("layers\n", 2)
    assert found.stderr.startswith("parity_tests: expected einops and scipy, got no ")
    assert "'partitioned-linear[pair]'" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(("side", "banned", "extra"), [("torch", "torch", "torch"), ("jax", "jax flax", "jax")])
def test_a_side_of_a_pair_without_its_framework_names_the_extra(side, banned, extra):
    pytest.importorskip("scipy", reason="scipy is not installed here")
    modules = {f"{prefix}_module": 1 for prefix in ("torch", "flax")}
    code = f"parity_tests.pair.loading as tree\n    tree.make_side('{side}', {modules}, 'cpu')"
    found = fresh_python(WITHOUT.format(tree=code, banned=banned))
    assert f"expected {extra} for this side" in found.stdout
    assert f"'partitioned-linear[{extra}]'" in found.stdout


def test_a_tree_that_lacks_something_else_says_what():
    if not framework_available("torch"):
        pytest.skip("torch is not installed here")
    # What every installation brings: no extra would help.
    found = fresh_python(WITHOUT.format(tree="torch_impl", banned="jaxtyping"))
    assert found.stdout.startswith("No module named 'jaxtyping'")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_names_every_target_and_fast_tests_are_there_for_every_package():
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = {"help", "test-fast", "test-newest", "seed"}
    assert [target for target in targets.split() if target not in steps and f"make {target} " not in shown] == []
    plan = subprocess.run(["make", "-n", "test", "FAST=1"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in plan.splitlines() if "pytest" in line]
    files = [ROOT / word for word in line.split() if word.endswith(".py")]
    assert [str(path) for path in files if not path.exists()] == []
    text = "".join(path.read_text() for path in files)
    for package in ("torch_impl", "jax_impl", "parity_tests.judge", "parity_tests.pair", "parity_tests.training"):
        assert f"from {package}" in text, package
    for package in ("bench.plan", "bench.measure", "bench.study", "bench.report"):
        assert f"from {package}" in text, package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, as a file that is built anew."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed here")
    directory = tmp_path_factory.mktemp("wheel")
    return Path(next(builder.WheelBuilder(str(ROOT)).build(directory=str(directory), versions=["standard"])))


def test_the_wheel_holds_no_tests_and_two_small_published_runs(wheel):
    files = zipfile.ZipFile(wheel).infolist()
    names = {file.filename for file in files}
    assert {"parity_tests/pair/plugin.py", "bench/README.md", "torch_impl/py.typed"} <= names
    assert [name for name in names if "/tests/" in name or "conftest" in name] == []
    runs = [name for name in names if name.endswith(".xz")]
    assert sorted(Path(name).parent.name for name in runs) == ["cpu-epyc-2core-catalogue", "h200"]
    assert 0 < sum(file.compress_size for file in files if "/results/" in file.filename) < 2_000_000
    (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(scripts).decode()
    for line in (
        "partitioned-linear-bench = bench.__main__:main",
        "partitioned-linear-parity = parity_tests.__main__:main",
        "parity_tests.pair.plugin = parity_tests.pair.plugin",
    ):
        assert line in text.splitlines()


def test_what_the_wheel_installs_finds_its_published_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    console = "from bench.__main__ import main; main()"
    sizes = ["--num-partitions", "32", "--in-features", "32", "--out-features", "32", "--batch", "128"]
    installed = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}
    found = run_python("-c", console, "recommend", "h200", *sizes, **installed)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Recommended: torch matmul (cuda-graph)")
    absent = run_python("-c", console, "recommend", "cpu-xeon-2core", *sizes, **installed)
    assert absent.returncode == 2
    assert "cpu-epyc-2core-catalogue, h200; a checkout has all, in bench/results" in absent.stderr


def test_a_directory_of_the_name_of_a_published_run_comes_first(tmp_path):
    (tmp_path / "h200").mkdir()
    found = run_python("-m", "bench", "report", "h200", cwd=tmp_path)
    assert found.returncode == 2
    assert "h200: holds no records.jsonl" in found.stderr


@pytest.mark.parametrize("package", ["bench", "parity_tests"])
def test_the_console_command_is_the_module(package):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (name,) = [name for name, target in scripts.items() if target == f"{package}.__main__:main"]
    for program, arguments in (
        (name, ("-c", f"from {package}.__main__ import main; main()")),
        (f"python -m {package}", ("-m", package)),
    ):
        found = run_python(*arguments, "run", "--help", COLUMNS="200", NO_COLOR="1", TERM="dumb")
        assert found.returncode == 0, found.stderr
        assert f"Usage: {program} run" in found.stdout


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
