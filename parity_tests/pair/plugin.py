"""A pytest plugin: the fixture `parity_pair`, which checks a pair and fails the test with its report."""

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity_tests.pair.report import PairReport


@pytest.fixture
def parity_pair(request: pytest.FixtureRequest) -> "Callable[..., PairReport]":
    """Return a function of `check_pair`'s arguments that fails the test unless the report is ok, and returns it.

    The modules run in the test's own process. The test itself is what reproduces a row: it makes the modules.
    Parameters are drawn around the scale of the initial ones, so that a test which seeds torch (`torch.manual_seed`)
    before it makes one repeats the row to the bit.

    Example::

        def test_port(parity_pair):
            parity_pair(torch_module=old, flax_module=new, params=rules, inputs=((8, 64),))
    """
    # The plugin is loaded into every pytest run of an environment: the frameworks only into tests that use it.
    from parity_tests.pair import check_pair

    command = shlex.join(["pytest", request.node.nodeid])

    def check(**arguments: Any) -> "PairReport":
        report = check_pair(**arguments).with_commands(lambda row: command)
        if not report.ok:
            # The report says it all: a traceback through the judge would hide it.
            pytest.fail(report.describe(), pytrace=False)
        return report

    return check
