"""JSON, JUnit and HTML of parity rows: versioned, parseable, self-contained, nothing unescaped."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

pytest.importorskip("einops", reason="einops is not installed here")

from parity_tests.judge.records import ParityRow, environment, junit_document
from parity_tests.pair.report import PairReport, PairRow
from parity_tests.report.html import Curves, html_document

ROW = ParityRow(
    kind="oracle",
    framework="torch",
    implementation="matmul",
    dtype="float32",
    case="square",
    tensor="y",
    status="ok",
    max_abs_error=1e-7,
    bound_fraction=0.25,
    worst_index=(1, 2, 3),
    partition=2,
)
BAD = dataclasses.replace(
    ROW,
    framework="jax",
    tensor="dx",
    status="mismatch",
    reason="dx[0] is 1.0 & <2>, expected \x07 3",
    bound_fraction=float("inf"),
    command="python -m parity_tests run --case 'square'",
)
SKIPPED = dataclasses.replace(
    ROW, dtype="float16", tensor="", status="skipped", reason="no </script> here", bound_fraction=None, partition=None
)
ROWS = [ROW, BAD, SKIPPED]


def test_junit_has_one_case_a_row():
    root = ElementTree.fromstring(junit_document(ROWS))
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), suite.get("errors")) == (
        "3",
        "1",
        "1",
        "0",
    )
    cases = list(suite)
    assert [case.get("name") for case in cases] == ["square y", "square dx", "square"]
    assert cases[0].get("classname") == "oracle.torch.matmul.float32"
    assert len(cases[0]) == 0
    assert "1.0 & <2>" in cases[1].find("failure").get("message")
    assert "--case 'square'" in cases[1].find("failure").text
    assert cases[2].find("skipped").get("message") == "no </script> here"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_self_contained_and_escaped():
    curves = Curves("loss & co", {"torch": [1.0, 0.5, 0.1], "jax": [1.0, 0.5, float("nan")]}, ([0.9] * 3, [1.1] * 3))
    text = html_document(ROWS, environment(), [curves], title="a <b> title")
    page = Page(text)
    foreign = re.compile(r"(src|href)\s*=|https?://|@import|url\(")
    assert not foreign.search(text)
    assert all(map(foreign.search, ('<img src="a">', '<a href = "b">', "http://c", "@import 'd'", "url(e)")))
    assert "<svg width" in text
    assert text.count("</script>") == 1
    assert page.tags.count("tr") == 1 + len(ROWS)
    assert page.tags.count("svg") == 3
    assert page.tags.count("polyline") == 2
    assert page.tags.count("polygon") == 1
    joined = " ".join(page.text)
    assert "a <b> title" in joined
    assert "MISMATCH" in joined
    assert "skipped 1 x: no </script> here" in joined
    assert "2 compared, 1 failed, 1 skipped" in joined
    assert "#b0142a" in text  # the cell above its bound


def test_html_of_nothing_says_so():
    text = html_document([], environment())
    assert "nothing was compared" in text
    assert "<svg" not in text


def test_html_with_nothing_finite_to_draw_says_so():
    assert "nothing finite to draw" in html_document([ROW], environment(), [Curves("loss", {"torch": [float("nan")]})])


def pair_rows():
    return [PairRow(**vars(row), rung="forward", bound="calibrated") for row in (ROW, BAD)]


def test_pair_report_files(tmp_path):
    report = PairReport("mine", pair_rows(), not_compared=("torch buffer steps",), likely_cause="gelu", notes=("odd",))
    assert not report.ok
    assert report.first_failing_rung == "forward"
    with pytest.raises(AssertionError, match="likely cause: gelu"):
        report.assert_ok()
    report.to_json(tmp_path / "r.json")
    report.to_junit(tmp_path / "r.xml")
    report.to_html(tmp_path / "r.html")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema_version"] == 1
    assert document["summary"] == {"compared": 2, "passed": 1, "failed": 1, "skipped": 0}
    assert document["pair"]["likely_cause"] == "gelu"
    assert document["rows"][1]["bound_fraction"] == "inf"
    assert document["rows"][0]["rung"] == "forward"
    assert len(list(ElementTree.parse(tmp_path / "r.xml").getroot()[0])) == 2
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_a_report_of_nothing_is_not_ok():
    report = PairReport("empty", [])
    assert not report.ok
    assert report.first_failing_rung is None
    with pytest.raises(AssertionError, match="0 compared"):
        report.assert_ok()
