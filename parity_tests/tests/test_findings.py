"""Each finding is seen where it was seen before; when a library mends it, the test says so, for the page."""

import importlib
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from parity_tests.findings import Finding, all_findings
from parity_tests.judge.subjects import FRAMEWORKS, framework_available

PAGE = (Path(__file__).resolve().parents[1] / "README.md").read_text()
FINDINGS = {finding.name: finding for finding in all_findings()}


@pytest.mark.parametrize("name", FINDINGS)
def test_finding_is_as_recorded(name):
    finding = FINDINGS[name]
    if finding.missing():
        pytest.skip(finding.missing())
    version, measured = metadata.version(finding.library), finding.measure()
    state = finding.state(measured, version)
    if state == "mended":
        pytest.fail(f"{name} is mended in {finding.library} {version}: say so in the finding and on the page")
    if state == "not seen here" and finding.by_processor:
        pytest.skip(f"{name} does not show on this processor: it measures {measured:.3g}")
    if state == "not seen here":
        assert version.split("+")[0] not in finding.seen_in, (
            f"{name} was seen in {version}, now it measures {measured:.3g}"
        )


def test_the_command_lists_what_it_cannot_check(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError

    common = {"library": "numpy", "sentence": "It is wrong.", "seen_in": ("1.0",), "figure": "how wrong"}
    checks = [
        Finding("works", measure=lambda: 2.0, **common),
        Finding("infinite", measure=lambda: float("inf"), **common),
        Finding("lacks", measure=fails, needs="a_package_that_is_not_there", **common),
        Finding("raises", measure=fails, **common),
    ]
    command = importlib.import_module("parity_tests.commands.findings")
    monkeypatch.setattr(command, "all_findings", lambda: checks)
    assert command.findings(tmp_path / "f.json") == 0
    rows = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert [row["state"] for row in rows] == ["present", "present", "skipped", "skipped"]
    assert [row.get("measured") for row in rows] == [2.0, None, None, None]
    assert "a_package_that_is_not_there is not installed" in rows[2]["reason"]
    assert rows[3]["reason"] == "the check raised RuntimeError: no reason given"
    monkeypatch.setattr(command, "all_findings", lambda: checks[2:])
    assert command.findings(None) == 1


def test_there_are_findings_for_what_is_installed():
    assert FINDINGS
    assert len(FINDINGS) == len(all_findings()), "a name is used twice"


def test_a_finding_says_present_mended_or_not_seen_here():
    finding = Finding("a-trap", "library", "It is wrong.", ("1.2.0", "1.10.1"), lambda: 2.0, "how wrong")
    assert finding.state(2.0, "1.2.0") == finding.state(2.0, "9.0") == "present"
    assert finding.state(1.0, "1.11.0") == finding.state(0.5, "1.10.2+cpu") == "mended"
    assert (
        finding.state(1.0, "1.1.0")
        == finding.state(1.0, "1.3.0")
        == finding.state(1.0, "1.10.1+cpu")
        == "not seen here"
    )


def test_the_page_has_a_line_for_each_finding_and_none_else():
    (section,) = re.findall(r"^## Findings in public libraries\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
    lines = {re.match(r"- `([\w-]+)`", line)[1]: line for line in section.splitlines() if line.startswith("- ")}
    assert {name: lines.get(name) for name in FINDINGS} == {
        name: finding.readme_line() for name, finding in FINDINGS.items()
    }
    # Without a framework its findings cannot be listed; with both, nothing else may stand there.
    if all(framework_available(framework) for framework in FRAMEWORKS):
        assert set(lines) == set(FINDINGS)
