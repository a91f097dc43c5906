"""Each finding is seen where it was seen before; when a library mends it, the test says so, for the README."""

from importlib import metadata

import pytest

from parity_tests.findings import all_findings

FINDINGS = {finding.name: finding for finding in all_findings()}


@pytest.mark.parametrize("name", FINDINGS)
def test_finding_is_as_recorded(name):
    finding = FINDINGS[name]
    version, measured = metadata.version(finding.library), finding.measure()
    if finding.present(measured):
        return
    assert version.split("+")[0] not in finding.seen_in, (
        f"{name} was seen in {version}, but measures {measured:.3g} now"
    )
    pytest.fail(f"{name} is mended in {finding.library} {version}: say so in the finding and in the README")


def test_there_are_findings_for_what_is_installed():
    assert FINDINGS
