"""What a processor calls itself, and what of it keeps figures of different processors apart."""

import pytest

from bench.environments import device_name
from bench.measure import machine
from bench.report.markdown import environment_lines
from bench.tests.synthetic import FINGERPRINT

MASKED = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse fma avx2 avx512f_not bmi1

processor\t: 1
model\t\t: 2
flags\t\t: amx_tile
"""
ARM = """processor\t: 0
Features\t: fp asimd sve bf16
CPU implementer\t: 0x41
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    def tell(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")

    return tell


def test_the_name_of_a_whole_series_is_completed(told):
    told(MASKED)
    assert machine.cpu_model() == "AMD EPYC (family 25, model 1)"
    told(MASKED.replace("AMD EPYC", "AMD EPYC 7763 64-Core Processor"))
    assert machine.cpu_model() == "AMD EPYC 7763 64-Core Processor"


def test_two_generations_under_one_name_are_two_devices(told):
    names = []
    for model in (1, 17):
        told(MASKED.replace("model\t\t: 1\n", f"model\t\t: {model}\n"))
        names.append(device_name(FINGERPRINT | {"cpu_model": machine.cpu_model()}))
    assert len(set(names)) == 2


@pytest.mark.parametrize(("text", "features"), [(MASKED, ("avx2", "fma")), (ARM, ("asimd", "bf16", "sve")), ("", ())])
def test_features_are_those_of_the_first_processor(told, text, features):
    told(text)
    assert machine.cpu_features() == features
    assert machine.cpu_model()


def test_a_report_names_the_features_where_they_are_known():
    known = environment_lines("e0", FINGERPRINT | {"cpu_features": ["avx2", "fma"]})[0]
    assert "processors used, avx2, fma, " in known
    assert known.replace("avx2, fma, ", "") == environment_lines("e0", FINGERPRINT)[0]
