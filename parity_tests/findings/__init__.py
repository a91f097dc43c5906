"""Findings in public libraries, each a runnable check that also notices when the library has mended it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from parity_tests.harness.subjects.base import FRAMEWORKS, framework_available


@dataclass(frozen=True)
class Finding:
    """One trap in a public library.

    Attributes:
        name: short and unique.
        library: the package whose behaviour it is.
        sentence: what goes wrong, in one sentence.
        seen_in: the versions in which it was seen.
        measure: runs the library and returns how far it is from right, as a multiple of what is right (or of the error
            bound); 1 or less means mended.
        figure: what the measure counts.
    """

    name: str
    library: str
    sentence: str
    seen_in: tuple[str, ...]
    measure: Callable[[], float]
    figure: str

    def present(self, measured: float) -> bool:
        """Whether a measured figure shows the trap."""
        return measured > 1


def load_findings(framework: str) -> tuple[Finding, ...]:
    """Imports a framework's findings.

    Raises:
        ImportError: if the framework is not installed.
    """
    return importlib.import_module(f"parity_tests.findings.{framework}").FINDINGS


def all_findings() -> tuple[Finding, ...]:
    """The findings of every framework that is installed here."""
    return tuple(
        finding for framework in FRAMEWORKS if framework_available(framework) for finding in load_findings(framework)
    )
