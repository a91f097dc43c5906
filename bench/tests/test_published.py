"""What is shown of the published records is what `make publish` draws from them: none of it is stale."""

import lzma
import os
import re
import shutil
import statistics
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from bench.environments import read_environments
from bench.plan.cells import DIRECTIONS
from bench.plan.workloads import SHARED, workload
from bench.record_files import COMPRESSED, RECORDS
from bench.store import read_records
from bench.tests.conftest import example_record
from bench.tests.synthetic import write_sweep
from parity_tests.tests.forked import run_python

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = RESULTS / "README.md"
# Those whose results the page shows, and those that are published without.
SHOWN = ("h200", "cpu-epyc-2core", "cpu-xeon-2core")
UNSHOWN = (
    "cpu-epyc-2core-catalogue",
    "cpu-epyc-2core-pages",
    "cpu-epyc-2core-training",
    "cpu-epyc-avx2-2core",
    "cpu-xeon-amx-2core",
)
# Tables of times relative to "auto", in the order of the page.
RELATIVE = ("cpu-epyc-2core-training", "cpu-epyc-avx2-2core")
PICTURES = [("h200", "throughput.svg"), ("cpu-epyc-2core", "frameworks.svg"), ("cpu-xeon-2core", "frameworks.svg")]
# What the example models gain is said of these, on their page.
EXEMPLIFIED = ("cpu-epyc-2core-catalogue", "cpu-epyc-2core")
EXAMPLES = ROOT / "torch_impl" / "examples" / "README.md"
# What all of them may take together, compressed.
MOST_BYTES = 12_000_000
# Vega writes the minus sign of typography.
NUMBER = re.compile(r"[-\u2212]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder into which everything was drawn anew."""
    if "EVERY_TEST" not in os.environ:
        pytest.skip("a minute: run with EVERY_TEST=1 before the published pages are changed")
    for package in ("altair", "vl_convert"):
        pytest.importorskip(package, reason=f"pictures need {package} (extra report)")
    if shutil.which("make") is None:
        pytest.skip("make is not installed here")
    directory = tmp_path_factory.mktemp("drawn")
    page = Path(shutil.copy(PAGE, directory))
    (directory / "front").mkdir()
    front = Path(shutil.copy(ROOT / "README.md", directory / "front"))
    examples = Path(shutil.copy(EXAMPLES, directory / "examples.md"))
    places = {"VENV": sys.prefix, "DRAWN": directory, "PAGE": page, "FRONT": front, "EXAMPLES": examples}
    done = subprocess.run(
        ["make", "publish", *(f"{name}={place}" for name, place in places.items())],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def words_and_numbers(text):
    """A text without its numbers, and its numbers."""
    return NUMBER.sub("#", text), [float(found.replace("\u2212", "-")) for found in NUMBER.findall(text)]


def told(picture):
    """What a picture says of its marks: their descriptions, in order, without where they lie (fonts differ)."""
    return "\n".join(unescape(found) for found in re.findall(r'aria-label="([^"]*)"', picture))


def assert_the_same(fresh, published):
    """Texts are equal; numbers to what another processor's sums may change."""
    fresh_words, fresh_numbers = words_and_numbers(fresh)
    words, numbers = words_and_numbers(published)
    assert fresh_words == words
    assert fresh_numbers == pytest.approx(numbers, rel=1e-6, abs=1e-12)


def test_the_page_shows_what_is_drawn(drawn):
    page = PAGE.read_text()
    assert_the_same((drawn / PAGE.name).read_text(), page)
    claims = page.split("<!-- claims:begin h200 -->")[1].split("<!-- claims:end h200 -->")[0]
    assert len(re.findall(r"^\| \d+ \| ", claims, flags=re.M)) == 10


@pytest.mark.parametrize("directory", SHOWN if "EVERY_TEST" in os.environ else SHOWN[:1])
def test_the_results_are_those_of_the_published_records(directory):
    """As above, but without pictures, for which a package may be missing."""
    block = PAGE.read_text().split(f"<!-- results:begin {directory} -->")[1].split("<!-- results:end")[0]
    assert len(re.findall(r"^\| \d+=? \| (?:torch|jax) ", block, flags=re.M)) >= 18, "the block has no rankings"
    assert len(re.findall(r"^\| \S+ \(B=\d+, ", block, flags=re.M)) >= 18, "the block does not compare the frameworks"
    result = run_python("-m", "bench", "report", str(RESULTS / directory), "--readme", str(PAGE), "--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif("EVERY_TEST" not in os.environ, reason="nine seconds each: run with EVERY_TEST=1")
@pytest.mark.parametrize("directory", EXEMPLIFIED)
def test_what_the_examples_gain_over_their_loops_is_that_of_the_records(directory, tmp_path):
    copy, text = Path(shutil.copy(EXAMPLES, tmp_path)), EXAMPLES.read_text()
    begin, end = (f"<!-- examples:{side} {directory} -->" for side in ("begin", "end"))
    block = text[text.index(begin) + len(begin) : text.index(end)]
    copy.write_text(text.replace(block, "\n"))
    result = run_python("-m", "bench", "findings", str(RESULTS / directory), "--readme", str(copy))
    assert result.returncode == 0, result.stdout + result.stderr
    assert_the_same(copy.read_text(), text)
    assert len(re.findall(r"^\| .* \| .*x \[.*\] (?:FASTER|SLOWER|SAME|UNRESOLVED)", block, flags=re.M)) >= 4


def test_every_example_has_its_speed_or_the_page_says_that_it_was_not_measured():
    text = EXAMPLES.read_text()
    models = re.findall(r"^\| \[([\w, ]+)\]\(\w+\.py\) \|", text, flags=re.M)
    rows = re.findall(r"^\| ([\w, ]+) \| `[\w-]+`, ", text, flags=re.M)
    unmeasured = set(re.findall(r"^(\w+) was not measured", text, flags=re.M))
    assert len(models) == 5
    assert set(models) == set(rows) | unmeasured
    assert not set(rows) & unmeasured


@pytest.mark.parametrize(("directory", "name"), PICTURES)
def test_pictures_are_those_of_the_records(drawn, directory, name):
    fresh = told((drawn / directory / name).read_text())
    assert fresh.count("matmul") > 10, "the picture describes no competitor"
    assert_the_same(fresh, told((RESULTS / directory / name).read_text()))


def test_what_is_drawn_is_what_the_page_shows(drawn):
    shown = re.findall(r"!\[[^]]*\]\(([\w-]+)/([\w.-]+)\)", PAGE.read_text())
    assert sorted(shown) == sorted(PICTURES)
    first = re.findall(r"!\[[^]]*\]\(bench/results/([\w-]+)/([\w.-]+)\)", (ROOT / "README.md").read_text())
    assert first
    assert set(first) <= set(PICTURES)
    assert sorted((path.parent.name, path.name) for path in drawn.glob("*/*.svg")) == sorted(PICTURES)


def test_records_are_published_compressed_and_nothing_else_is_that_they_can_be_made_into():
    records = [(directory, name) for directory in (*SHOWN, *UNSHOWN) for name in ("environment.json", COMPRESSED)]
    published = [path for path in RESULTS.glob("*/*") if path.parent.name != "local"]
    assert sorted((path.parent.name, path.name) for path in published) == sorted([*records, *PICTURES])
    assert 1_000_000 < sum(path.stat().st_size for path in published) < MOST_BYTES


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_new_records_are_compressed_before_they_are_drawn(tmp_path):
    write_sweep(tmp_path / "machine", example_record, 1, competitors=2)
    before = (tmp_path / "machine" / RECORDS).read_bytes()
    places = (f"VENV={sys.prefix}", f"RESULTS={tmp_path}", "SHOWN=")
    for _ in range(2):
        subprocess.run(["make", "publish", *places], cwd=ROOT, capture_output=True, timeout=100, check=True)
    assert sorted(path.name for path in (tmp_path / "machine").iterdir()) == ["environment.json", COMPRESSED]
    assert lzma.decompress((tmp_path / "machine" / COMPRESSED).read_bytes()) == before


def test_the_table_of_the_base_setting_on_the_h200_is_that_of_the_records():
    """This one table is written by hand, since no report puts the GPU's share of several competitors side by side."""
    modes = {"eager": "eager", "`jit`": "jit", "CUDA graph": "cuda-graph"}
    timed = {
        (one.framework, one.implementation, one.mode, one.direction): (one.latency_s, one.device_busy_s)
        for one in read_records(RESULTS / "h200")
        if (one.workload, one.precision, one.division) == ("article-base", "ieee_fp32", "matched") and not one.control
    }
    table = PAGE.read_text().split("| | forward | GPU |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (PyTorch|JAX) `(\w+)`, ([^:|]+?)(?::[^|]*)? \|(.+)\|$", table, flags=re.M)
    assert len(rows) == 5
    for framework, implementation, mode, cells in rows:
        name = ("jax" if framework == "JAX" else "torch", implementation, modes[mode])
        figures = [*timed[(*name, "forward")], *timed[(*name, "forward_backward")]]
        shown = [cell.strip().replace(",", "") for cell in cells.split("|")]
        for figure, cell in zip(figures, shown, strict=True):
            digits = len(cell.partition(".")[2])
            assert f"{figure * 1e6:.{digits}f}" == cell, (name, figure)


def test_the_table_of_small_and_large_pages_is_that_of_the_records():
    """Written by hand, since no report puts two environments side by side."""
    directory = RESULTS / "cpu-epyc-2core-pages"
    large = {
        name: all(framework["large_pages"] for framework in found["frameworks"].values())
        for name, found in read_environments(directory).items()
    }
    columns = (("torch", "matmul", "eager"), ("jax", "matmul", "jit"), ("jax", "in_turn", "jit"))
    timed = {
        (one.workload, one.direction, (one.framework, one.implementation, one.mode), large[one.environment_id]): (
            f"{one.latency_s * 1e3:{'.3g' if one.latency_s < 0.1 else '.0f'}}"
        )
        for one in read_records(directory)
        if one.latency_s and not one.control
    }
    table = PAGE.read_text().split("## Small and large pages")[1].split("|---|---|---|---|---|\n")[1].split("\n\n")[0]
    directions = {"forward": "forward", "forward and backward": "forward_backward"}
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) == 17
    for name, direction, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            if cell or column != columns[-1]:
                key = (name, directions[direction], column)
                assert cell == f"{timed[(*key, False)]} / {timed[(*key, True)]}", key


def test_sentences_about_speeds_come_from_the_records_and_set_graphs_against_graphs(drawn):
    """No page says by hand how many times as fast anything is."""
    front = ROOT / "README.md"
    assert_the_same((drawn / "front" / front.name).read_text(), front.read_text())
    for page, blocks in ((PAGE, ("findings", "claims", "results")), (front, ("headlines",))):
        text = page.read_text()
        for what in blocks:
            for name in re.findall(rf"<!-- {what}:begin ([\w-]+) -->", text):
                begin, end = (f"<!-- {what}:{side} {name} -->" for side in ("begin", "end"))
                block = text[text.index(begin) : text.index(end)]
                if what in ("findings", "headlines"):
                    told = " ".join(block.split())
                    assert re.search(r"\d+(\.\d+)?x (to \d+(\.\d+)?x )?(as fast as|the time of)", told), name
                    assert (
                        "CUDA graph is" not in told or "as fast as compiled JAX" not in told.split("CUDA graph is")[1]
                    )
                text = text.replace(block, "")
        said = " ".join(text.split())
        assert not re.search(r"\d(x| times)?( to \d\S*)? (as fast|faster|slower)|times as long", said), page


def test_a_stale_number_or_word_is_noticed():
    picture = '<path aria-label="low: 1.25; competitor: torch matmul (eager)"/>'
    assert_the_same(told(picture), told(picture.replace("1.25", "1.2500000001")))
    for stale in (picture.replace("1.25", "1.26"), picture.replace("matmul", "einsum"), picture.replace("low", "high")):
        with pytest.raises(AssertionError):
            assert_the_same(told(stale), told(picture))


def run_by_auto(record, workload):
    """The implementation that `auto` runs in the cell of a record on a CPU."""
    if record.framework == "torch" or record.direction != "forward" or workload.layout == SHARED:
        return "matmul"
    jax = pytest.importorskip("jax", reason="JAX's rule needs jax")
    from jax_impl.selection import gains_by_feature, gains_in_turn

    n, i, o = workload.num_partitions, workload.in_features, workload.out_features
    names = []

    def named(x, weight):
        by_feature = "by_feature" if gains_by_feature(x, weight, x.dtype, None) else "matmul"
        names.append("in_turn" if gains_in_turn(x, weight, x.dtype) else by_feature)

    jax.eval_shape(named, *(jax.ShapeDtypeStruct(shape, "float32") for shape in ((workload.batch, n, i), (n, i, o))))
    return names[0]


@pytest.mark.parametrize("directory", RELATIVE)
def test_the_table_of_times_relative_to_auto_is_that_of_the_records(monkeypatch, directory):
    """Written by hand too: no report knows the rules of "auto"."""
    jax = pytest.importorskip("jax", reason="JAX's rule needs jax")
    if jax.device_count() > 1:
        pytest.skip("with several devices auto is matmul")
    # Those of the machine that was measured.
    monkeypatch.setattr("jax_impl.selection._PROCESSORS", 2)
    times = {}
    for one in read_records(RESULTS / directory):
        equal = isinstance(one.in_features, int) and isinstance(one.out_features, int)
        if one.latency_s and not one.control and equal and one.mode in ("eager", "jit"):
            times.setdefault((one.framework, one.direction, one.workload), {})[one.implementation] = one
    ratios = {}
    for (framework, direction, name), cell in times.items():
        own = cell.get(run_by_auto(next(iter(cell.values())), workload(name)))
        for implementation, one in cell.items() if own else ():
            found = ratios.setdefault((framework, implementation), {}).setdefault(direction, [])
            found.append(one.latency_s / own.latency_s)
    table = re.findall(r"\| framework \| .*?\n\n", PAGE.read_text(), re.DOTALL)[RELATIVE.index(directory)]
    lines = [[entry.strip(" `") for entry in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    shown = {({"PyTorch": "torch", "JAX": "jax"}[framework], name): rest for framework, name, *rest in lines}
    expected = {
        key: [f"{statistics.geometric_mean(found[d]):.2f} ({len(found[d])})" for d in DIRECTIONS]
        for key, found in ratios.items()
    }
    assert shown == expected
