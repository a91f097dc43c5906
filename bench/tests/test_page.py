"""The page for a browser, its short Markdown and its pictures: whole, self-contained, legible, narrowed by filters."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest

from bench.report import figures as figures_module
from bench.report.figures import BEST, FILTERS, LEADS, figures
from bench.report.page import page_pieces, write_page
from bench.report.sections import PageContent, Told, sections
from bench.study.claims import claim_results
from bench.study.findings import findings
from bench.study.results import read_results
from bench.tests.chromium import chromium
from bench.tests.conftest import example_record
from bench.tests.in_memory import results_of
from bench.tests.synthetic import FINGERPRINT, cell_records, write_sweep

HARNESS = Path(__file__).with_name("page_in_node.js")
PUBLISHED = Path(__file__).resolve().parents[1] / "results"
# In the order in which they are read.
SECTIONS = [*("answer", "winners", "speed", "claims", "roofline", "time", "memory", "compile", "parity"), "noise"]
SECTIONS += ["environment"]
PICTURES = ["speed-batch", "speed-num-partitions", "speed-weights", "roofline", "time", "memory", "compile"]
MOST_BYTES = 3_000_000


class Page(HTMLParser):
    """What a reader of the HTML sees: elements with attributes, their texts, and what is within script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.code, self._open = [], [], {"script": [], "style": []}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        self.code.get(inside, self.texts).append(data)

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def data(self):
        return json.loads(next(code for code in self.code["script"] if code.startswith("{")))


def requests_of(text):
    """Everything in a page that would ask the network or another file for something."""
    page, found = Page(text), []
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(name)
            # A link that the reader may follow is none.
            if value is not None and tag != "a" and urlsplit(value).scheme != "data":
                found.append(f"{tag} {name}")
        found += [f"{tag} {name}" for name in attributes if name.startswith("on")]
    program = next((code for code in page.code["script"] if not code.startswith("{")), "")
    words = r"\b(fetch|XMLHttpRequest|import|importScripts|WebSocket|EventSource|sendBeacon|Worker|eval|Image)\b\s*\("
    found += re.findall(words, program) + re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", program)
    found += re.findall(r"@import|url\(", "".join(page.code["style"]))
    addresses = re.findall(r"https?://[^\"'`\s]+", program + "".join(page.code["style"]))
    return found + [one for one in addresses if one != "http://www.w3.org/2000/svg"]


def compiled_cells(make_record):
    """Two workloads in two directions with all further clocks, and one cell of a single framework."""
    records = []
    for number, (workload, size, direction) in enumerate(
        [
            ("article-base", (128, 32, 32, 32), "forward"),
            ("article-base", (128, 32, 32, 32), "forward_backward"),
            ("article-batch-2048", (2048, 32, 32, 32), "forward"),
            ("electricity-336-96", (16, 321, 336, 96), "forward"),
            ("electricity-336-96", (16, 321, 336, 96), "forward_backward"),
        ]
    ):
        rates = {"ceiling_flops_per_s": 1e14, "ceiling_bytes_per_s": 3e12, "peak_flops_per_s": 2e14}
        for k, record in enumerate(cell_records(make_record, number, size, competitors=3 if number == 2 else 12)):
            clocks = {"enqueue_s": 2e-6 * (k + 1), "device_busy_s": 1e-6 * (k + 1), "kernels": {"gemm": 2}}
            waits = {"synchronised_latency_s": (3e-3, 4e-3), "peak_bytes_per_s": 5e12, "compile_warm_s": 0.1}
            records.append(replace(record, workload=workload, direction=direction, **rates, **clocks, **waits))
    return records


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    records = compiled_cells(example_record)
    results = results_of(records, {"e0": FINGERPRINT})
    groups = {}
    for record in records:
        groups.setdefault(record.cell, []).append(record)
    directory = tmp_path_factory.mktemp("run")
    parts, shown = sections(
        results, [Told(directory, [], claim_results(groups.values()))], [directory], "python -m bench report run"
    )
    return PageContent("Benchmark of run", parts, shown)


@pytest.fixture(scope="module")
def page(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page("--html", path, content)
    return path


def in_node(page, width, *steps):
    if shutil.which("node") is None:
        pytest.skip("node is not installed here: the page's script does not run")
    words = ["node", HARNESS, page, str(width), *(json.dumps(step) for step in steps)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_of(drawn):
    return {int(row) for row in re.findall(r'data-row="(\d+)"', drawn["outer"])}


# --- the file ---


def test_every_section_is_there_in_its_order_and_every_link_leads_to_one(page):
    seen = Page(page.read_text())
    assert [attributes["id"] for tag, attributes in seen.elements if tag == "section"] == SECTIONS
    links = [attributes["href"] for tag, attributes in seen.elements if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    assert len(seen.ids) == len(set(seen.ids))
    assert {f"picture-{name}" for name in PICTURES} <= set(seen.ids)
    used = re.findall(r'getElementById\("([^"]+)"\)', "".join(seen.code["script"]))
    assert used
    assert set(used) <= set(seen.ids)
    text = " ".join(seen.texts)
    for said in ("tie of", "electricity-336-96", "Differences below", "python -m bench report run", "A/A controls"):
        assert said in text, said
    # Each figure says how it is repeated.
    assert sum("python -m bench" in one for one in seen.texts) >= len(SECTIONS)


def test_no_request_leaves_the_page(page):
    text = page.read_text()
    assert requests_of(text) == []
    policy = next(a["content"] for tag, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    # Positive controls.
    for planted in (
        '<img src="https://e.org/a.png">',
        '<script src="//e.org/a.js"></script>',
        "<link href='a.css'>",
        "<p onclick='f()'>",
        "<style>@import 'a.css'</style>",
        "<script>fetch('/a')</script>",
        "<script>x.innerHTML = y</script>",
    ):
        assert requests_of(planted), planted


def test_the_policy_lets_only_this_script_run(page):
    seen = Page(page.read_text())
    policy = next(a["content"] for _, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    programs = [code for code in seen.code["script"] if not code.startswith("{")]
    assert len(programs) == 1
    assert base64.b64encode(hashlib.sha256(programs[0].encode()).digest()).decode() in policy
    assert len(programs[0].splitlines()) <= 250


def test_the_page_holds_what_was_measured(content, page):
    data = Page(page.read_text()).data
    column = data["rows"]["latency_s"]
    assert column == [row["latency_s"] for row in content.shown.rows]
    codes, levels = data["rows"]["label"]["codes"], data["rows"]["label"]["levels"]
    assert [levels[code] for code in codes] == [row["label"] for row in content.shown.rows]
    assert set(data["filters"]) == {*FILTERS}
    for picture in data["pictures"]:
        for axis in filter(None, (picture["x"], picture["y"])):
            # A unit, or what is counted.
            assert re.search(r"\(.+\)|/s$|per", axis["title"]), axis


def test_a_large_page_leaves_out_those_behind_and_says_so(content, monkeypatch):
    monkeypatch.setattr(figures_module, "MOST_ROWS", 20)
    shown = figures(results_of(compiled_cells(example_record), {"e0": FINGERPRINT}))
    assert {row["place"] for row in shown.rows} <= {LEADS, BEST}
    assert shown.left_out == 51 - len(shown.rows)
    text = "".join(page_pieces(replace(content, shown=shown)))
    assert f"Not in the page: {shown.left_out} competitors" in text


def test_a_winner_over_its_own_kin_is_said_to_be_one_framework_s(make_record):
    records = [record for record in cell_records(make_record, 0, (64, 8, 4, 4)) if record.framework == "torch"]
    (cell,) = figures(results_of(records, {"e0": FINGERPRINT})).cells
    assert cell["frameworks"] == "only torch was timed"
    assert cell["lead"].split() == ["win", "torch"]
    (cell,) = figures(results_of(cell_records(make_record, 0, (64, 8, 4, 4), competitors=3), {"e0": FINGERPRINT})).cells
    assert cell["lead"].split() == ["tie", "jax", "torch"]
    assert cell["leaders"].startswith("tie of 3: ")


def test_partitions_of_unequal_sizes_have_a_place_on_the_axes(make_record):
    sizes = {"workload": "ragged", "num_partitions": 3, "in_features": (1, 2, 3), "out_features": (4, 5, 6)}
    records = [replace(one, **sizes) for one in cell_records(make_record, 0, (64, 3, 4, 4), competitors=3)]
    (cell,) = figures(results_of(records, {"e0": FINGERPRINT})).cells
    assert cell["weights"] == (4 + 10 + 18) // 3
    assert cell["sizes"] == "B=64, n=3, (1, 2, 3)->(4, 5, 6)"


def test_several_runs_are_told_of_one_by_one(tmp_path):
    records = compiled_cells(example_record)
    groups = [[one for one in records if one.cell == cell] for cell in dict.fromkeys(one.cell for one in records)]
    results, folders = results_of(records, {"e0": FINGERPRINT}), [tmp_path / "here", tmp_path / "there"]
    told = [Told(folder, findings(groups), claim_results(groups)) for folder in folders]
    parts = {part.name: part for part in sections(results, told, folders, "c")[0]}
    assert {sentence.split(": ")[0] for sentence, _ in parts["answer"].more} == {"here", "there"}
    for sentence, command in parts["answer"].more:
        assert shlex.split(command)[4] == str(tmp_path / sentence.split(": ")[0])
    assert [table.title for table in parts["claims"].tables] == ["here", "there"]
    # One run needs no name.
    (alone,) = [part for part in sections(results, told[:1], folders[:1], "c")[0] if part.name == "answer"]
    assert alone.more
    assert not [sentence for sentence, _ in alone.more if sentence.startswith("here: ")]
    assert alone.sentences[1] == next(one.sentence for one in told[0].findings if one.headline)


# --- what its script draws ---


@pytest.fixture(scope="module")
def desktop(page):
    return in_node(page, 1000)["drawn"]


def test_every_picture_is_drawn_with_axes_and_all_that_it_shows_at_first(content, desktop):
    pictures = {picture.name: picture for part in content.parts for picture in part.pictures}
    assert set(pictures) == set(PICTURES)
    for name, picture in pictures.items():
        drawn = desktop[f"picture-{name}"]
        assert drawn["svg"], name
        shown = content.shown.shown(picture)
        places = {k for k, row in enumerate(content.shown.rows) if any(row["key"] == one["key"] for one in shown)}
        if picture.y:
            assert rows_of(drawn) == places, name
        else:
            assert rows_of(drawn) <= places
            assert len(rows_of(drawn)) == min(len(shown), rows_of(drawn).__len__())
        for svg in drawn["svg"]:
            texts = [one.text for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
            for axis in filter(None, (picture.x, picture.y)):
                assert axis.title in texts, name
    assert "electricity-336-96" in desktop["picture-roofline"]["text"]
    assert "kernels: 2" in desktop["picture-time"]["text"]
    assert "never pays" in desktop["picture-compile"]["text"] or "pays after" in desktop["picture-compile"]["text"]


def boxes(svg):
    """The texts of a drawing with the box of each, by the width of the widest of the usual fonts."""
    found = []
    for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        x, y, text = float(one.get("x")), float(one.get("y")), one.text or ""
        long = 6.3 * len(text)
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[one.get("text-anchor", "start")]
        found.append((text, left, y - 9, left + long, y + 2))
    return found


def overlaps(found):
    return [
        (a[0], b[0])
        for k, a in enumerate(found)
        for b in found[k + 1 :]
        if a[0] and b[0] and a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]


@pytest.mark.parametrize("width", [340, 700, 1000, 1400])
def test_no_text_overlaps_another_or_leaves_its_drawing(page, width):
    drawn, seen = in_node(page, width, ["every"])["drawn"], 0
    for name in PICTURES:
        for svg in drawn[f"picture-{name}"]["svg"]:
            found, wide = boxes(svg), float(ElementTree.fromstring(svg).get("width"))
            assert wide <= max(width, 280)
            seen += len(found)
            assert overlaps(found) == [], name
            assert [one for one in found if one[1] < -1 or one[3] > wide + 20] == [], name
    assert seen > 200
    # Positive control.
    assert overlaps([("a", 0, 0, 10, 10), ("b", 9, 9, 19, 19), ("c", 30, 0, 40, 10)]) == [("a", "b")]


def test_filters_narrow_the_pictures_and_the_matrix(content, page, desktop):
    rows = content.shown.rows
    cells = content.shown.cells
    found = in_node(page, 1000, ["choose", "framework", "jax"], ["choose", "direction", "forward"])["drawn"]
    picked = rows_of(found["picture-speed-batch"])
    assert picked
    assert {rows[k]["framework"] for k in picked} == {"jax"}
    assert {cells[rows[k]["cell"]]["direction"] for k in picked} == {"forward"}
    # Those behind the best are shown once a competitor is chosen.
    assert any(rows[k]["place"] not in (LEADS, BEST) for k in picked)
    assert "forward_backward" not in found["matrix"]["text"]
    assert "forward_backward" in desktop["matrix"]["text"]
    found = in_node(page, 1000, ["choose", "workload", "electricity-336-96"])["drawn"]
    assert "article-base" not in found["matrix"]["text"] + found["picture-roofline"]["text"]
    for name, value in (("implementation", "form-3"), ("mode", "jit")):
        (picked,) = [rows_of(in_node(page, 1000, ["choose", name, value])["drawn"]["picture-memory"])]
        assert {rows[k][name] for k in picked} == {value}
    # And back.
    again = in_node(page, 1000, ["choose", "workload", "article-base"], ["all", "workload"])["drawn"]
    assert rows_of(again["picture-roofline"]) == rows_of(desktop["picture-roofline"])
    nothing = in_node(page, 1000, ["choose", "framework", "jax"], ["choose", "mode", "eager"])["drawn"]
    assert "Nothing is left by the filters." in nothing["picture-roofline"]["text"]
    more = in_node(page, 1000, ["every"])["drawn"]
    assert len(rows_of(more["picture-roofline"])) > len(rows_of(desktop["picture-roofline"]))


def test_the_record_is_shown_under_the_pointer(content, page):
    place = next(k for k, row in enumerate(content.shown.rows) if row["place"] == LEADS)
    tip = in_node(page, 1000, ["point", str(place)])["drawn"]["tip"]["text"]
    row = content.shown.rows[place]
    for name in ("key", "latency_s", "ratio_low", "peak_memory_bytes", "verdict", "kernels"):
        assert f"{name}{row[name]}" in tip, name
    # A click keeps it, and another click takes another.
    other = next(k for k, row in enumerate(content.shown.rows) if row["place"] == BEST)
    steps = (["click", str(place)], ["point", str(other)])
    assert in_node(page, 1000, *steps)["drawn"]["tip"]["text"] == tip
    assert in_node(page, 1000, *steps, ["click", str(other)])["drawn"]["tip"]["text"] != tip
    assert f"cell_hash{content.shown.cells[row['cell']]['cell_hash']}" in tip


@pytest.fixture(scope="module")
def large(content, tmp_path_factory):
    """A page of ten thousand cells."""
    cells, rows = [], []
    for k in range(10_000):
        cell = content.shown.cells[k % 5]
        cells.append(cell | {"workload": f"sweep-{k}", "batch": 1 + k % 4000, "line": f"sweep-{k}"})
        rows += [row | {"cell": k, "key": f"{k}/{row['label']}"} for row in content.shown.rows[:5]]
    path = tmp_path_factory.mktemp("large") / "large.html"
    write_page("--html", path, replace(content, shown=replace(content.shown, cells=cells, rows=rows)))
    return path


def test_ten_thousand_cells_are_drawn_in_time(large):
    """The page's own work; a browser's comes on top, for the few hundred elements that are drawn."""
    found = in_node(large, 1000)
    assert found["cpu_s"] < 3
    assert large.stat().st_size < 20_000_000
    elements = sum(one["outer"].count("<") for one in found["drawn"].values())
    assert 2000 < elements < 100_000
    assert "9800 more workloads" in found["drawn"]["matrix"]["text"]
    more = in_node(large, 1000, ["show more"])["drawn"]["matrix"]["text"]
    assert "9600 more workloads" in more


# --- parity, commands, and what is refused ---


def test_the_judge_s_own_run_is_shown_where_it_lies_beside_the_records(tmp_path, make_record):
    results = results_of(cell_records(make_record, 0, (64, 8, 4, 4), competitors=3), {"e0": FINGERPRINT})

    def said():
        part = next(
            one for one in sections(results, [Told(tmp_path, [], [])], [tmp_path], "c")[0] if one.name == "parity"
        )
        return " ".join(part.sentences), [table.rows for table in part.tables]

    text, tables = said()
    assert "No parity.json" in text
    rows = [
        {"framework": "torch", "dtype": "float32", "status": "passed", "bound_fraction": 0.25},
        {"framework": "torch", "dtype": "float32", "status": "failed", "bound_fraction": 3.0},
    ]
    found = {"summary": {"compared": 2, "passed": 1, "failed": 1, "skipped": 0}, "rows": rows}
    (tmp_path / "parity.json").write_text(json.dumps(found))
    text, tables = said()
    assert "2 compared, 1 failed, 1 passed, 0 skipped" in text
    assert (tmp_path.name, "torch", "float32", "1 failed, 1 passed", "3") in tables[1]
    for damaged in ("{", "[]", '{"summary": {}}', json.dumps(found | {"rows": [1]}), "\ud800"):
        (tmp_path / "parity.json").write_bytes(damaged.encode("utf-8", "surrogatepass"))
        text, tables = said()
        assert "cannot be read" in text
        assert len(tables) == 1


@pytest.fixture
def run(tmp_path, make_record):
    write_sweep(tmp_path / "run", make_record, 6, competitors=4)
    return tmp_path / "run"


def test_one_command_writes_the_page_the_text_and_the_pictures(run, call, tmp_path):
    pytest.importorskip("altair", reason="pictures need the report extra")
    pytest.importorskip("vl_convert", reason="pictures need the report extra")
    page, text, folder = tmp_path / "p.html", tmp_path / "p.md", tmp_path / "new" / "pictures"
    done = call("report", run, "--html", page, "--summary", text, "--pictures", folder)
    assert done.exit_code == 0, done.output
    assert Page(page.read_text()).ids.count("answer") == 1
    lines = text.read_text().splitlines()
    assert len(lines) < 300
    assert [line for line in lines if line.startswith("## ")][:2] == ["## The answer", "## Who wins where"]
    names = {path.name for path in folder.iterdir()}
    assert {"speed-batch.svg", "speed-batch.png", "memory.svg", "compile.png"} <= names
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text.read_text()):
        assert (tmp_path / name).exists()
    for path in folder.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        # Within a page of A4 at the usual 96 pixels an inch.
        wide, high = (float(root.get(side)) for side in ("width", "height"))
        assert wide <= 800
        assert high <= 1120
    said = "".join(ElementTree.parse(folder / "speed-batch.svg").getroot().itertext())
    assert "batch (rows of a partition)" in said
    assert "useful FLOP/s" in said


def test_what_is_refused_leaves_nothing_behind(run, call, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    (run / "records.jsonl").stat()
    for options, message in (
        (("--pictures", run / "records.jsonl"), "is no folder that can be written"),
        (("--pictures", run / "records.jsonl" / "deeper"), "is no folder that can be written"),
        (("--pictures", tmp_path / "new", "--html", tmp_path / "nowhere" / "p.html"), "--html: "),
        (("--pictures", tmp_path / "new", "--where", "batch=3"), "no cell meets"),
    ):
        done = call("report", run, *options)
        assert done.exit_code == 2
        assert message in done.stderr
        assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("report", run, "--pictures", tmp_path / "new", "--html", tmp_path / "p.html")
    assert done.exit_code == 2
    assert "--pictures: altair is not installed" in done.stderr
    assert not (tmp_path / "new").exists()
    # The page needs no package.
    assert Page((tmp_path / "p.html").read_text()).ids


@pytest.mark.parametrize("name", ["h200", "cpu-epyc-2core-catalogue"])
def test_a_published_run_is_a_small_page(name, call, tmp_path):
    if name != "h200" and "EVERY_TEST" not in os.environ:
        pytest.skip("some seconds: run with EVERY_TEST=1")
    path = tmp_path / "p.html"
    assert call("report", PUBLISHED / name, "--html", path).exit_code == 0
    assert path.stat().st_size < MOST_BYTES
    assert requests_of(path.read_text()) == []
    data = Page(path.read_text()).data
    assert data["number_of_cells"] == len(read_results([PUBLISHED / name]).found)
    for width in (340, 1000):
        drawn = in_node(path, width)["drawn"]
        for picture in data["pictures"]:
            for svg in drawn[f"picture-{picture['name']}"]["svg"]:
                assert overlaps(boxes(svg)) == [], picture["name"]


# --- in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


# Texts that overlap or leave their drawing, by the browser's own boxes; those of a line are as high as its font.
OVERLAPS = """[...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
  const box = (one) => one.getBoundingClientRect(), all = [...svg.querySelectorAll('text')], {left, right} = box(svg);
  return all.flatMap((a, k) => [...(box(a).left < left - 1 || box(a).right > right + 1 ? [[a.textContent]] : []),
    ...all.slice(k + 1).filter((b) => box(a).left < box(b).right && box(b).left < box(a).right
      && box(a).top < box(b).bottom - 3 && box(b).top < box(a).bottom - 3)
      .map((b) => [a.textContent, b.textContent])]); })"""
CHARTS = "document.querySelectorAll('svg[role=img]').length"


def marks(name):
    return f"[...document.querySelectorAll('#picture-{name} [data-row]')].map((one) => Number(one.dataset.row))"


@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_draws_every_chart_and_asks_for_nothing(browser, page, desktop, width):
    browser.open(page, width, 20_000)
    for name in PICTURES:
        drawn = browser.until(f"({marks(name)}).length && {marks(name)}")
        assert set(drawn) == rows_of(desktop[f"picture-{name}"]), name
    assert browser.ask(OVERLAPS) == []
    # Wide tables scroll by themselves.
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert (browser.requests, browser.complaints) == ([], [])
    # Positive controls.
    browser.ask("document.querySelectorAll('svg[role=img] text').forEach((one) => one.setAttribute('x', 100))")
    assert browser.ask(OVERLAPS)
    browser.ask("document.querySelector('#matrix').style.width = '2000px'")
    assert browser.ask("document.documentElement.scrollWidth") > width


def test_a_browser_s_requests_and_complaints_would_be_seen(browser, tmp_path):
    (tmp_path / "p.html").write_text("<img src='absent.png'><script>console.log('said'); absent()</script>")
    browser.open(tmp_path / "p.html")
    assert [url.rpartition("/")[2] for url in browser.requests] == ["absent.png"]
    assert len(browser.complaints) == 3


def test_filters_and_the_pointer_work_in_a_browser(content, browser, page, desktop):
    rows = content.shown.rows
    browser.open(page, 1280, 20_000)
    before = browser.until(f"({marks('roofline')}).length && {marks('roofline')}")
    browser.point("[...document.querySelectorAll('#filters option')].find((one) => one.value === 'jax')", click=True)
    after = browser.until(f"({marks('roofline')}).length !== {len(before)} && {marks('roofline')}")
    assert {rows[k]["framework"] for k in before} == {"torch", "jax"}
    assert {rows[k]["framework"] for k in after} == {"jax"}
    every = "[...document.querySelectorAll('#filters button')].find((one) => one.textContent === 'all of framework')"
    browser.point(every, click=True)
    assert sorted(browser.until(f"({marks('roofline')}).length !== {len(after)} && {marks('roofline')}")) == sorted(
        before
    )
    browser.point("document.getElementById('every')", click=True)
    assert len(browser.until(f"({marks('roofline')}).length > {len(before)} && {marks('roofline')}")) > len(before)
    # The last of a drawing lies on top.
    place = browser.ask(f"({marks('roofline')}).at(-1)")
    tip = "document.getElementById('tip')"
    assert browser.ask(f"{tip}.hidden")
    browser.point("[...document.querySelectorAll('#picture-roofline [data-row]')].at(-1)", click=True)
    said = browser.until(f"{tip}.className === 'kept' && {tip}.textContent")
    for name in ("key", "latency_s", "verdict"):
        assert f"{name}{rows[place][name]}" in said, name
    browser.send("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    browser.until(f"{tip}.hidden")
    assert (browser.requests, browser.complaints) == ([], [])


def test_hostile_text_stays_text_in_a_browser(browser, tmp_path, make_record):
    hostile = "</script><img src=x onerror=\"document.title='run'\"><svg onload=document.title='run'>"
    hostile += "\"'&amp;\u202e\x1b]0;run\x07"
    changes = {"workload": hostile, "implementation": hostile, "reason": hostile, "kernels": {hostile: 1}}
    records = [replace(one, **changes) for one in cell_records(make_record, 0, (64, 8, 4, 4), competitors=3)]
    results = results_of(records, {"e0": FINGERPRINT | {"device": hostile, "cpu": hostile}})
    parts, shown = sections(results, [Told(Path(hostile), [], [])], [Path(hostile)], f"python {hostile}")
    write_page("--html", tmp_path / "p.html", PageContent(hostile, parts, shown, (hostile,)))
    browser.open(tmp_path / "p.html", 1280, 20_000)
    browser.until(CHARTS)
    browser.point("document.querySelector('#matrix [data-cell]')")
    for where in ("h1", "#matrix", "#tip", "#picture-memory", "#filters", "#environment"):
        said = browser.until(f"document.querySelector('{where}').textContent")
        assert "<img src=x onerror=" in said, where
        assert not set(said) & set("\u202e\x1b\x07"), where
    assert browser.ask("document.title").startswith("</script><img")
    assert browser.ask("document.querySelectorAll('img, [onload], [onerror]').length") == 0
    assert (browser.requests, browser.complaints) == ([], [])


def test_a_browser_draws_ten_thousand_cells(browser, large):
    browser.open(large, 1280, 20_000)
    browser.until(f"{CHARTS} >= {len(PICTURES)}")
    assert "9800 more workloads" in browser.ask("document.getElementById('matrix').textContent")
    assert browser.complaints == []
