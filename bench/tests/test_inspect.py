"""`bench list` and `bench doctor`."""

import csv
import json

import pytest

from bench.measure.environment import warnings_for
from bench.measure.switches import cuda_packages


@pytest.mark.usefixtures("fake_pool")
def test_list_and_doctor(tmp_path, call):
    listed = call("list", "--json", tmp_path / "list.json")
    assert listed.exit_code == 0
    for expected in ("electricity-336-720", "cure-lab/LTSF-Linear", "smoke", "dense"):
        assert expected in listed.output
    found = json.loads((tmp_path / "list.json").read_text())
    assert found["competitors"]["torch"]["dense"] == "yardstick"
    # A competitor whose package is absent is not offered, but said to be missing.
    assert found["missing_competitors"]["jax"] == {"stock:absent": "absent is not installed"}
    assert "without stock:absent: absent is not installed" in listed.output
    checked = call("doctor", "--json", tmp_path / "doctor.json")
    assert checked.exit_code == 0
    assert "Processor:" in checked.output
    assert "torch small, jax small" in checked.output
    assert set(json.loads((tmp_path / "doctor.json").read_text())["frameworks"]) == {"torch", "jax"}
    assert call("doctor", "--torch-python", "/nowhere/python").exit_code == 2


@pytest.mark.usefixtures("fake_pool")
def test_the_table_of_doctor_holds_every_fact_and_warning(tmp_path, call, monkeypatch):
    said = ['Only torch sees a GPU: a comma, a "quotation".', "The machine is busy."]
    monkeypatch.setattr("bench.measure.environment.warnings_for", lambda *args: said)
    files = ("--json", tmp_path / "d.json", "--csv", tmp_path / "d.csv")
    assert call("doctor", *files).exit_code == 0
    found = json.loads((tmp_path / "d.json").read_text())
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row) for row in rows} == {("section", "name", "value")}
    facts = {(row["section"], row["name"]): row["value"] for row in rows}
    assert len(facts) == len(rows)
    assert facts["machine", "cpu_model"] == found["cpu_model"]
    assert facts["machine", "affinity"] == "; ".join(map(str, found["affinity"]))
    assert facts["git", "commit"] == (found["git"]["commit"] or "")
    assert (facts["torch", "versions_torch"], facts["jax", "devices"]) == ("0", "cpu")
    assert [row["value"] for row in rows if row["section"] == "warning"] == said == found["warnings"]
    refused = call("doctor", "--csv", "/nowhere/d.csv")
    assert (refused.exit_code, "--csv: /nowhere/d.csv cannot be written" in refused.stderr) == (2, True)


def test_doctor_warns_of_two_cuda_majors_and_of_a_gpu_that_one_framework_sees():
    both = cuda_packages(["nvidia-cudnn-cu12", "nvidia_cublas_cu13", "jax-cuda12-plugin", "numpy"])
    assert both == {"12": ["jax-cuda12-plugin", "nvidia-cudnn-cu12"], "13": ["nvidia-cublas-cu13"]}
    one = cuda_packages(["nvidia-cudnn-cu12", "jax-cuda12-plugin"])
    hello = {
        "torch": {"devices": ["cpu", "cuda"], "cuda_packages": one},
        "jax": {"devices": ["cpu"], "cuda_packages": both},
    }
    said = " ".join(warnings_for(hello, {"flax": "not installed"}))
    # An interpreter of its own, with another CUDA, spoils nothing.
    assert (
        said.count("several CUDA majors are installed for jax's interpreter") == said.count("several CUDA majors") == 1
    )
    for expected in ("Only torch sees a GPU", "flax cannot take part"):
        assert expected in said
    hello["jax"] |= {"cuda_packages": one}
    assert not any("CUDA majors" in line for line in warnings_for(hello, {}))
