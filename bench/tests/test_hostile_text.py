"""Hostile text in every field of records and environments, in paths and names: it stays text in whatever is shown."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from bench.commands import inspect
from bench.measure.workers import CHECKOUT
from bench.plan.competitors import Catalogue
from bench.records import Record
from bench.report import pictures
from bench.report.markdown import RESULTS, markers
from bench.store import Store
from bench.study.results import Results
from bench.tests.test_page import Page, in_node, requests_of
from parity_tests.tests.test_hostile_text import HOSTILE as WITH_HALF_A_PAIR
from parity_tests.tests.test_hostile_text import NAME, assert_plain
from parity_tests.tests.test_hostile_text import assert_json as assert_json_holds

# A record or an environment with half of a surrogate pair is refused when it is read.
HOSTILE = "".join(character for character in WITH_HALF_A_PAIR if not 0xD800 <= ord(character) <= 0xDFFF)


def assert_json(text):
    """JSON that holds the hostile text."""
    assert_json_holds(text, HOSTILE)


HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
# What decides whether anything is compared and drawn at all.
COMPARED = {"framework", "kind", "direction", "dtype", "precision", "device", "observed_precision", "implementation"}
CLAIMED = COMPARED | {"workload", "mode"}
TEXTS = (
    *("cell", "workload", "dtype", "device", "framework", "implementation", "kind", "mode", "direction", "division"),
    *(
        "precision",
        "observed_precision",
        "layout",
        "cache",
        "memory_method",
        "inputs_digest",
        "started_at",
        "optimizer",
    ),
    *("stopped", "environment_id", "finished_at"),
)


def hostile_records(make_record, kept):
    """A cell with a loop, a batched product, its control and one without an answer; hostile but for the fields kept."""
    spoiled = {name: f"{HOSTILE} {name}" for name in TEXTS if name not in kept}
    spoiled |= {"cell_size": 4, "workload": spoiled.get("workload", "article-base"), "switches": {HOSTILE: HOSTILE}}
    spoiled |= {"parity": {HOSTILE: {"status": "ok", HOSTILE: HOSTILE}}, "kernels": {HOSTILE: 1}}
    spoiled |= {"conditions": ({HOSTILE: HOSTILE},)}
    rng = np.random.default_rng(0)

    def name(field, value):
        return {field: f"{spoiled[field]} {value}" if field in spoiled else value}

    def record(key, framework, implementation, mode, factor, **more):
        blocks = tuple((factor * np.exp(0.01 * rng.standard_normal(20))).tolist())
        fields = spoiled | name("framework", framework) | name("implementation", implementation) | name("mode", mode)
        fields |= {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10} | more
        fields |= {"useful_flops": 2_000_000, "compulsory_bytes": 100_000}
        return make_record(key=f"{HOSTILE} {key}", **fields)

    failed = {"status": "crash", "reason": f"{HOSTILE} reason", "latency_s": None, "block_latency_s": ()}
    return [
        record("a", "torch", "matmul", "eager", 0.02, baseline=True),
        record("b", "torch", "matmul", "eager", 0.02, baseline=True, control=True),
        record("c", "jax", "matmul", "jit", 0.01),
        record("d", "torch", "loop", "eager", 0.0, **failed),
    ]


def fingerprint():
    return {
        "git": {"commit": HOSTILE, "dirty": True},
        "cpu_model": HOSTILE,
        "affinity": [0],
        "cpu_features": [HOSTILE],
        "system": HOSTILE,
        "device": HOSTILE,
        "division": HOSTILE,
        "gpus": [HOSTILE],
        "frameworks": {
            HOSTILE: {"python": HOSTILE, "versions": {HOSTILE: HOSTILE}, "default_switches": {HOSTILE: HOSTILE}}
        },
    }


@pytest.fixture
def run(tmp_path, make_record):
    """Makes a directory with a hostile name, and hostile records in it."""

    def make(kept=frozenset()):
        directory = tmp_path / NAME
        store = Store(directory, resume=False)
        records = hostile_records(make_record, kept)
        store.add_environment(records[0].environment_id, fingerprint())
        store.append(records)
        return directory

    return make


def assert_markdown(text):
    """As a reader of Markdown sees it: the hostile text is there as text, and has made nothing else."""
    assert_plain(text)
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    # The page's own: a folded table for each cell.
    own = re.sub(r"</?(details|summary|b)>|<!-- [a-z]+:(begin|end) -->", "", page)
    root = ElementTree.fromstring(f"<page>{own}</page>")
    made = {element.tag for element in root.iter()} - {"page"}
    assert made <= {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code"}
    seen = "".join(root.itertext())
    assert "<svg onload=f()></script><script>f()</script><!-- results:end -->[l](http://e)![i](e)&lt;$m$" in seen
    assert "|`a`|*b*|__c__|~~d~~" in seen
    for table in root.iter("table"):
        assert len({len(row) for row in table.iter("tr")}) == 1
    headings = [element for element in root.iter() if element.tag in ("h1", "h2", "h3")]
    assert len(headings) == len(HEADING.findall(text))


def assert_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(path.read_text().splitlines())
    assert {len(row) for row in rows} == {len(rows[0])}
    assert_plain(path.read_text().replace("\\nFORGED", " FORGED"))
    texts = [cell for row in rows for cell in row if "FORGED" in cell]
    assert texts
    assert not [cell for cell in texts if cell[0] in "=+-@"]


def assert_svg(path):
    root = ElementTree.fromstring(path.read_bytes())
    seen = "".join(root.itertext())
    assert_plain(seen)
    assert "<svg onload=f()></script>" in seen
    assert not [element for element in root.iter() if element.tag.endswith("script") or element.get("onload")]


def assert_script(text, *, there=True):
    """One page whose scripts end where altair ended them: the specification in it is still JSON."""
    assert_plain(text)
    start = text.index("var spec = ") + len("var spec = ")
    specification, _ = json.JSONDecoder().raw_decode(text[start:])
    assert "</script><script>f()</script>" in json.dumps(specification)
    assert text.count("</script>") == text.count("<script")


def test_every_text_of_a_record_is_hostile():
    """So that a field that is added is tried as well."""
    texts = {name for name, hint in get_type_hints(Record).items() if hint in (str, str | None)}
    assert texts - {"status"} == {*TEXTS, "key", "reason"}


def test_the_checks_notice_hostile_text():
    for check, text in (
        (assert_markdown, f"| a |\n|---|\n| {HOSTILE.translate(dict.fromkeys(range(32)))} |\n"),
        (assert_script, f"var spec = {json.dumps([HOSTILE])}; FORGED"),
    ):
        with pytest.raises((AssertionError, ElementTree.ParseError)):
            check(text)


@pytest.mark.parametrize("kept", [set(), COMPARED], ids=["every field", "compared"])
def test_a_report_shows_it_as_text(run, call, tmp_path, kept):
    directory, page = run(kept), tmp_path / "page.md"
    page.write_text("\n".join(markers(RESULTS)))
    names = ["markdown", "json", "csv"]
    # Where no framework's name is known, none is compared with another.
    names += ["frameworks-csv"] if kept else []
    files = {name: tmp_path / name for name in names}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = call("report", directory, "--efficiency", "--readme", page, *options)
    assert done.exit_code == 0, done.output
    assert_plain(done.output)
    assert_markdown(files["markdown"].read_text())
    assert_json(files["json"].read_text())
    for name in names:
        if "csv" in name:
            assert_csv(files[name])
    assert_markdown(page.read_text())
    # The block can be found again, and is the same.
    assert call("report", directory, "--readme", page, "--check").exit_code == 0


@pytest.mark.parametrize("kept", [set(), COMPARED], ids=["every field", "compared"])
def test_a_page_shows_it_as_text(run, call, tmp_path, kept):
    directory, page, text = run(kept), tmp_path / "page.html", tmp_path / "page.md"
    (directory / "parity.json").write_text(
        json.dumps(
            {"summary": {HOSTILE: 1}, "rows": [{"framework": HOSTILE, "dtype": HOSTILE, "status": HOSTILE}]},
        )
    )
    done = call("report", directory, "--html", page, "--summary", text)
    assert done.exit_code == 0, done.output
    found = page.read_text()
    assert_plain(found)
    seen = Page(found)
    # The page's own elements, and nothing that the text has made.
    assert [tag for tag, _ in seen.elements if tag in ("script", "svg", "img", "iframe")] == ["script", "script"]
    assert requests_of(found) == []
    assert "</script><script>f()</script>" in " ".join(seen.texts)
    assert "</script><script>f()</script>" in json.dumps(seen.data)
    assert_markdown(re.sub("^    python -m bench .*", "", text.read_text(), flags=re.MULTILINE))
    assert len(re.findall("^    python -m bench ", text.read_text(), re.MULTILINE)) >= 10
    if shutil.which("node") is not None:
        for drawn in in_node(page, 340, ["point", "0"])["drawn"].values():
            ElementTree.fromstring(drawn["outer"])
            assert not re.search("<(script|img)", drawn["outer"])


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["svg", "html"])
def test_pictures_show_it_as_text(run, call, tmp_path, kind):
    pytest.importorskip("altair", reason="charts need the report extra")
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    # All of them go the same way, and drawing takes seconds.
    names = ("chart", "framework-map") if kind == "svg" else ("chart", "winner-map", "roofline", "framework-map")
    files = {name: tmp_path / f"{name}.{kind}" for name in names}
    done = call("report", run(COMPARED), *(part for name, path in files.items() for part in (f"--{name}", path)))
    assert done.exit_code == 0, done.output
    for path in files.values():
        if kind == "svg":
            assert_svg(path)
        else:
            # The headings of rooflines have six characters of an environment's name.
            assert_script(path.read_text(), there=path.stem != "roofline")


def test_what_the_drawing_library_cannot_draw_is_a_sentence(tmp_path, monkeypatch):
    """The library aborts its process on such text, if it ever comes to it."""
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    alt = pytest.importorskip("altair", reason="charts need the report extra")
    drawn = alt.Chart(alt.InlineData(values=[{"x": "\x1b[31m"}])).mark_bar().encode(y="x:N")
    path = tmp_path / "picture.svg"
    path.write_text("old")
    monkeypatch.setattr(pictures, "printable_tree", lambda value, longest: value)
    with pytest.raises(pictures.ChartError, match=r"^--chart: the picture cannot be drawn \(.*\); choose other cells"):
        pictures.save_picture(lambda _: drawn, "--chart", path, Results((), {}, {}))
    assert path.read_text() == "old"
    monkeypatch.undo()
    pictures.save_picture(lambda _: drawn, "--chart", path, Results((), {}, {}))
    assert "x1b[31m" in path.read_text()


def test_names_of_any_length_are_drawn(tmp_path):
    alt = pytest.importorskip("altair", reason="charts need the report extra")
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    drawn = (
        alt.Chart(alt.InlineData(values=[{"x": "n" * 10**6}])).mark_bar().encode(y="x:N").properties(title="t" * 10**6)
    )
    pictures.save_picture(lambda _: drawn, "--chart", tmp_path / "picture.png", Results((), {}, {}))
    assert (tmp_path / "picture.png").stat().st_size < 10**6


@pytest.mark.parametrize(
    ("command", "kept"),
    [("claims", CLAIMED), ("compare", set()), ("compare", COMPARED), ("recommend", COMPARED), ("validate", set())],
)
def test_other_commands_show_it_as_text(run, call, tmp_path, command, kept):
    directory = run(kept)
    more = {
        "claims": ["--markdown", tmp_path / "claims.md"],
        "compare": [directory],
        "recommend": [f"--{name}={value}" for name, value in SHAPE.items()],
        "validate": [],
    }[command]
    done = call(command, directory, *more, "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv")
    assert done.exit_code in (0, 1), done.output
    assert_plain(done.output)
    assert_json((tmp_path / "out.json").read_text())
    assert_csv(tmp_path / "out.csv")
    if command == "claims":
        assert_markdown((tmp_path / "claims.md").read_text())


SHAPE = {"num-partitions": 32, "in-features": 32, "out-features": 32, "batch": 128, "device": "cpu"}


@pytest.mark.parametrize("command", ["list", "doctor"])
def test_what_workers_say_of_themselves_is_text(call, tmp_path, monkeypatch, command):
    catalogue = Catalogue(HOSTILE, (HOSTILE,), (HOSTILE,), (HOSTILE,), missing={HOSTILE: HOSTILE})
    hello = {
        "python": HOSTILE,
        "devices": [HOSTILE],
        "environment": {HOSTILE: HOSTILE},
        "default_switches": {HOSTILE: HOSTILE},
        "variables": {HOSTILE: HOSTILE},
        "large_pages": True,
        "cuda_packages": {HOSTILE: [HOSTILE], "13": [HOSTILE]},
    }
    pool = SimpleNamespace(hello={HOSTILE: hello}, missing={HOSTILE: HOSTILE}, catalogues=lambda: (catalogue,))
    monkeypatch.setattr(inspect, "_pool", lambda *arguments: nullcontext(pool))
    done = call(command, "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    assert_plain(done.output)
    assert_json((tmp_path / "out.json").read_text())
    assert_csv(tmp_path / "out.csv")


def test_messages_echo_names_and_paths_as_text(tmp_path, call):
    name, absent = NAME, tmp_path / NAME
    for arguments in (
        ("report", absent),
        ("claims", absent),
        ("compare", absent, absent),
        ("validate", absent),
        ("report", tmp_path, "--json", absent / "out.json"),
        ("report", tmp_path, "--where", name),
        ("report", tmp_path, "--chart", tmp_path / name),
        ("run", "--preset", name, "--out", absent),
        ("run", "--workload", name, "--out", absent),
        ("run", "--torch-python", name, "--out", absent),
        ("recommend", tmp_path, *(f"--{key}={value}" for key, value in SHAPE.items()), "--direction", name),
    ):
        done = call(*arguments)
        assert done.exit_code == 2, arguments
        assert not [c for c in done.output + done.stderr if not c.isprintable() and c != "\n"], arguments
        assert len(done.stderr.splitlines()) == 1, arguments
        if "--chart" not in arguments:
            assert "FORGED" in done.stderr, arguments


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_without_a_character_gets_its_escape(encoding, tmp_path):
    name = tmp_path / "\u00e9\udc80"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(CHECKOUT), "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "validate", os.fsencode(name)],
        capture_output=True,
        check=False,
        cwd=CHECKOUT,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"bench: ")
    assert (b"\\xe9" if encoding == "ascii" else "\u00e9".encode()) + b"\\udc80" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_standard_output_ends_in_one_sentence(run):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bench", "validate", os.fsencode(run())],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=CHECKOUT,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        )
    assert done.returncode == 2
    assert done.stderr == (
        "bench: standard output: cannot be written (No space left on device); make room or write to a file.\n"
    )
