"""Write rows as JUnit XML, which continuous-integration systems read: one case a row."""

from collections.abc import Sequence
from xml.etree import ElementTree

from parity_tests.judge.records import ParityRow, summarize
from parity_tests.report.text import printable


def _case(row: ParityRow) -> ElementTree.Element:
    parts = (row.kind, row.framework, row.implementation, row.mode, row.dtype)
    place = printable(".".join(part for part in parts if part))
    name = printable(" ".join(part for part in (row.case, row.tensor) if part))
    case = ElementTree.Element("testcase", {"classname": place, "name": name, "time": "0"})
    if row.status == "mismatch":
        failure = ElementTree.SubElement(case, "failure", {"message": printable(row.reason)})
        details = [f"error over bound: {row.bound_fraction}", row.diagnosis, row.command]
        failure.text = "\n".join(printable(line) for line in details if line)
    elif row.status == "skipped":
        ElementTree.SubElement(case, "skipped", {"message": printable(row.reason)})
    return case


def junit_document(rows: Sequence[ParityRow], stopped: str = "") -> str:
    """Return a JUnit document with one case a row: failures with their reason and the command that reproduces them.

    `stopped` says why the run did not come to its end; it becomes a case of its own, with an error.
    """
    summary = summarize(rows)
    counts = {
        "tests": str(len(rows) + bool(stopped)),
        "failures": str(summary.failed),
        "skipped": str(summary.skipped),
        "errors": str(int(bool(stopped))),
    }
    root = ElementTree.Element("testsuites", {"name": "parity", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity", **counts})
    suite.extend(_case(row) for row in rows)
    if stopped:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "run", "name": "comes to its end", "time": "0"})
        ElementTree.SubElement(case, "error", {"message": printable(stopped)})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
