"""What a machine is set up with, and what an interpreter without the packages says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
