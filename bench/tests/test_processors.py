"""What a processor calls itself, which pages arrays get, and what of it keeps figures of different machines apart."""

import os
import platform
import subprocess
import sys
from pathlib import Path

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


ROOT = Path(__file__).resolve().parents[2]
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_pages(**kinds):
    """The fingerprint of a machine on which these frameworks' new arrays get large pages, or do not."""
    known = FINGERPRINT["frameworks"]
    return FINGERPRINT | {"frameworks": {name: known[name] | {"large_pages": large} for name, large in kinds.items()}}


# Not forked: glibc reads its tunables when a process starts.
LOOKED_AT = """
import sys
from bench.measure.machine import large_pages
if sys.argv[1] == "asked for":
    import mmap
    from pathlib import Path
    area = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    area.write(b"1" * 2**26)
    found = Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0]
    print(int(found) >= 2**15)
elif sys.argv[1] == "python":
    print(large_pages(lambda size: bytearray(b"1") * size))
elif sys.argv[1] == "torch":
    from bench.measure.torch.timer import TorchTimer
    print(large_pages(TorchTimer().new_array))
else:
    from bench.measure.jax.timer import JaxTimer
    print(large_pages(JaxTimer().new_array))
"""


def looked_at(whose, **variables):
    unset = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    command = [sys.executable, "-c", LOOKED_AT, whose]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell which pages one has")
@pytest.mark.parametrize("whose", ["python", "torch", "jax"])
def test_pages_are_seen_as_they_are(whose):
    """By what an array really gets: the kernel's setting, glibc's variable and the framework's own come to that."""
    if whose != "python":
        pytest.importorskip(whose, reason=f"an array of {whose} needs it")
    mode = KERNEL.read_text().split("[")[1].split("]")[0] if KERNEL.exists() else "never"
    if mode == "always":
        pytest.skip("the kernel gives large pages to all, as far as it has any")
    assert looked_at(whose) == "False"
    library, release = platform.libc_ver()
    if mode == "never" or library != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
        pytest.skip("glibc asks for large pages from 2.35 on, where the kernel gives them to those who ask")
    if looked_at("asked for") != "True":
        pytest.skip("the kernel has no large pages left")
    assert looked_at(whose, GLIBC_TUNABLES="glibc.malloc.hugetlb=1") == "True"
    assert looked_at(whose, THP_MEM_ALLOC_ENABLE="1") == str(whose == "torch")


def test_pages_that_nobody_can_see_are_not_known(monkeypatch, tmp_path):
    def without_memory(size):
        raise MemoryError(size)

    assert machine.large_pages(without_memory) is None
    monkeypatch.setattr(machine, "_PAGES", tmp_path / "nowhere")
    assert machine.large_pages(bytearray) is None


def test_figures_of_large_pages_are_those_of_another_device():
    small, large = (device_name(in_pages(torch=kind, jax=kind)) for kind in (False, True))
    assert small == device_name(FINGERPRINT)
    assert large == f"{small}, large pages"
    assert device_name(in_pages(torch=True, jax=None)) == f"{small}, large pages in torch"
    on_a_gpu = {"device": "cuda", "gpus": ["a GPU, 1"]}
    assert "pages" not in device_name(in_pages(torch=True, jax=True) | on_a_gpu)


def test_a_report_names_the_pages_where_they_are_known():
    lines = environment_lines("e0", in_pages(torch=True, jax=False))
    assert [line for line in lines if "New arrays of torch lie in large pages." in line]
    assert [line for line in lines if "New arrays of jax lie in small pages." in line]
    assert "pages" not in "".join(environment_lines("e0", FINGERPRINT))
