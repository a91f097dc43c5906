"""Hostile text in every field of a row, in names and options: it stays text in whatever is shown."""

import dataclasses
import json
import re
from typing import get_type_hints
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.judge.records import ParityRow, environment, junit_document, summarize, write_json
from parity_tests.pair.report import PairReport, PairRow
from parity_tests.report.console import PlainConsole, print_report
from parity_tests.report.html import Curves, html_document
from parity_tests.report.text import csv_cell, json_text, markdown_line, markdown_text, printable

# What a terminal, Markdown, HTML, SVG, rich, the blocks of a page, a spreadsheet, XML and JSON would obey, or refuse.
HOSTILE = (
    "=x\x1b[31m\x1b]0;t\x07\x00\x7f\x9b1m\u202e\u2066\ufeff\u2028\ufffe\ud800\r\nFORGED\n# FORGED\n|`a`|*b*|__c__|~~d~~"
    "<svg onload=f()></script><script>f()</script><!-- results:end -->[l](http://e)![i](e)&lt;$m$ [bold]r[/] [/] "
    "[link=http://e]k[/link] :boom: \\| ]]> 'q\" datum['x'] \u00e9"
)
# No argument and no name of a file has a NUL or that half of a pair; other bytes that are no text they may have.
NAME = HOSTILE.translate({0: None, ord("/"): None, 0xD800: "\udc80"})[:100]
TEXTS = ("framework", "implementation", "dtype", "case", "tensor", "reason", "diagnosis", "command", "mode")
TEXTS += ("arithmetic", "observed", "note")


def assert_plain(text, *, there=True):
    """Nothing in it that a terminal would obey, and no line that the hostile text has begun."""
    strange = {character for character in text if not character.isprintable() and character != "\n"}
    assert not strange
    assert ("FORGED" in text) == there
    assert not {"FORGED", "# FORGED"} & {line.strip() for line in text.splitlines()}


def texts_in(value):
    """Every text in nested lists and dicts, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts_in(item)


def assert_json(text, hostile=HOSTILE):
    """ASCII, for strict readers too, and the text as it was but for halves of pairs."""
    assert text.isascii()
    assert_plain(text.replace("\\nFORGED", " FORGED"))
    found = list(texts_in(json.loads(text)))
    "".join(found).encode()
    assert any(hostile.replace("\ud800", "\ufffd") in value for value in found)


def test_the_checks_notice_hostile_text():
    for check, text in ((assert_plain, HOSTILE), (assert_plain, "\n# FORGED"), (assert_json, json.dumps([HOSTILE]))):
        with pytest.raises((AssertionError, UnicodeEncodeError)):
            check(text)


def hostile_rows(kind=ParityRow, **more):
    """A row of every kind and status; every text in them is hostile."""
    rows = []
    for name in ("oracle", "pair", "mode", "exact", "ladder", "training"):
        for status in ("ok", "mismatch", "skipped"):
            fields = {field: f"{HOSTILE} {field}" for field in TEXTS}
            fields |= (
                {"mode": f"{HOSTILE}+{HOSTILE}", "implementation": f"{HOSTILE}+{HOSTILE}"} if name == "pair" else {}
            )
            numbers = {"bound_fraction": 0.5, "max_abs_error": 1.0, "partition": 1, "worst_index": (0, 1)}
            rows.append(kind(kind=name, status=status, tensor_fractions={HOSTILE: 0.5}, **fields, **numbers, **more))
    return rows


def test_every_text_of_a_row_is_hostile():
    """So that a field that is added is tried as well."""
    hints = get_type_hints(ParityRow)
    assert {name for name, hint in hints.items() if hint is str} == set(TEXTS)


def assert_page(page):
    """Scripts, drawings and elements are those of the page with other text."""
    assert_plain(page)
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 1
    assert not re.search(r"<(svg|[a-z]+)[^>]*onload=f\(\)>", page)
    assert "&lt;svg onload=f()&gt;&lt;/script&gt;" in page
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)


def assert_cases(document, count):
    (suite,) = ElementTree.fromstring(document)
    assert len(suite) == count
    for case in suite:
        assert_plain(case.get("classname"), there=case.get("classname") != "run")
        for part in case:
            assert_plain(part.get("message"))
            if part.text:
                assert_plain(part.text)


def test_reports_of_a_run_show_it_as_text(tmp_path):
    rows = hostile_rows()
    console = PlainConsole(width=400)
    with console.capture() as capture:
        print_report(console, rows, summarize(rows))
    assert_plain(capture.get())
    assert_cases(junit_document(rows, stopped=HOSTILE), len(rows) + 1)
    curves = [Curves(HOSTILE, {HOSTILE: [1.0, 2.0]}), Curves(HOSTILE, {HOSTILE: []})]
    place = environment() | {"packages": {HOSTILE: HOSTILE}, "python": HOSTILE}
    assert_page(html_document(rows, place, curves, title=HOSTILE, notes=[HOSTILE]))
    write_json(tmp_path / "rows.json", rows, stopped=HOSTILE)
    assert_json((tmp_path / "rows.json").read_text())


def test_reports_of_a_pair_show_it_as_text(tmp_path):
    rows = hostile_rows(PairRow, rung="forward", bound="calibrated")
    report = PairReport(HOSTILE, rows, (HOSTILE,), HOSTILE, (HOSTILE,))
    assert_plain(report.describe())
    with pytest.raises(AssertionError) as error:
        report.assert_ok()
    assert_plain(str(error.value))
    report.to_json(tmp_path / "json")
    report.to_junit(tmp_path / "junit")
    report.to_html(tmp_path / "html")
    assert_json((tmp_path / "json").read_text())
    assert_cases((tmp_path / "junit").read_text(), len(rows))
    assert_page((tmp_path / "html").read_text())


def test_a_pair_that_is_judged_has_its_name_as_text(tmp_path):
    """From check_pair's argument to the files."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("flax")
    import numpy as np

    from parity_tests.pair import check_pair

    linear = torch.nn.Linear(2, 2)
    report = check_pair(
        torch_module=linear,
        flax_module=lambda params, x: x @ params["kernel"] + params["bias"],
        flax_params={"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)},
        params=[("weight", "kernel", "o i -> i o"), ("bias", "bias")],
        inputs=((3, 2),),
        name=HOSTILE,
    )
    assert report.ok
    assert_plain(report.describe())
    report.to_junit(tmp_path / "junit")
    (suite,) = ElementTree.parse(tmp_path / "junit").getroot()
    for case in suite:
        assert_plain(case.get("name"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--framework", NAME),
        ("run", "--implementation", NAME),
        ("run", "--mode", NAME),
        ("run", "--case", NAME),
        ("run", "--train", NAME),
        ("run", "--device", NAME),
        ("run", "--precision", NAME),
        ("run", "--pair", NAME),
        ("run", "--pair", "parity_tests.pair.examples:" + NAME),
        ("run", "--json", f"{NAME}/rows.json"),
        ("defects", "--implementation", NAME),
        ("pairs", "--readme", NAME),
        ("findings", "--json", f"{NAME}/rows.json"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_messages_echo_names_and_paths_as_text(arguments):
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 2
    assert_plain(done.output)
    assert "error: " in done.output


def test_what_shows_stays_as_it_is():
    """The ways that text goes change nothing in names and numbers as they are."""
    for text in (
        *(
            "torch stock:bmm+bias (eager)",
            "forward_backward",
            "article-base (B=128, n=32, 32->32)",
            "\u00e9\u4e2d\U0001f600",
        ),
        *("1.02x [0.98, 1.06]", "<0.01x", "n <= 8", "A&B", "float32, 1e-05, 100%", "C:/a/b_c.json", "2.5 ms"),
    ):
        assert printable(text) == markdown_text(text) == markdown_line(text) == csv_cell(text) == text
        assert json.loads(json_text({text: text})) == {text: text}
    assert csv_cell(-1.5) == -1.5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(
            ("# a", r"\# a"),
            ("- a", r"\- a"),
            ("+ a", r"\+ a"),
            ("1. a", r"1\. a"),
            ("12) a", r"12\) a"),
            ("> a", r"\> a"),
        ),
        *(("===", r"\==="), ("---", r"\---"), ("[a]: b", r"\[a]: b"), ("    a", "a"), ("| a |", r"\| a \|")),
        *(("_a_", r"\_a\_"), ("a #", r"a \#"), ("<b>", "&lt;b>"), ("&amp;", r"\&amp;"), ("[a](b)", r"\[a]\(b)")),
    ],
)
def test_what_begins_something_in_markdown_is_escaped(text, shown):
    assert markdown_line(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\uff1d1", "\t=1", "\r=1"])
def test_what_a_spreadsheet_would_compute_is_a_text(text):
    assert csv_cell(text)[0] in "'\\"


def test_a_row_takes_other_text_as_it_is():
    """So that the rows above are not refused for another reason: the same ones with plain text are shown too."""
    rows = [dataclasses.replace(row, **dict.fromkeys(TEXTS, "plain")) for row in hostile_rows()]
    assert "plain" in html_document(rows, environment())
    assert "FORGED" not in junit_document(rows)
