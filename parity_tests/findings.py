"""Check for known traps in public libraries, and notice when a library has mended one."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from parity_tests.judge.subjects import FRAMEWORKS, framework_available

State = Literal["present", "not seen here", "mended"]


@dataclass(frozen=True)
class Finding:
    """One trap in a public library."""

    name: str  # short and unique
    library: str  # the package whose behaviour it is
    sentence: str  # a description of the trap
    seen_in: tuple[str, ...]  # the versions in which it was seen
    # Runs the library and returns how far it is from right, as a multiple of what is right (or of the error bound); 1
    # or less means that the trap does not show
    measure: Callable[[], float]
    figure: str  # the quantity that is measured
    needs: str | None = None  # a package that the framework does not bring, or None
    # Says in one sentence what this machine lacks for the check; empty where it can be run
    lacks: Callable[[], str] = str
    # True if it shows only on some processors, whose instructions decide how the library computes
    by_processor: bool = False

    def missing(self) -> str:
        """Return one sentence if the check cannot be run here, else empty."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return self.lacks()
        return f"{self.needs} is not installed; install the extra competitors"

    def present(self, measured: float) -> bool:
        """Return True if a measured figure shows the trap."""
        return measured > 1

    def state(self, measured: float, version: str) -> State:
        """Return the state of the trap in an installed version of the library.

        Args:
            measured: from `measure`.
            version: of the library, with or without a local part such as `+cpu`.

        Returns:
            `present`; `mended` in a version later than all in which the trap was seen; else `not seen here`: an
            earlier version, or a machine on which the trap does not show. One that shows by processor is never mended.
        """
        if self.present(measured):
            return "present"
        if self.by_processor:
            return "not seen here"
        later = Version(version) > max(map(Version, self.seen_in))
        return "mended" if later and Version(version).public not in self.seen_in else "not seen here"

    def readme_line(self) -> str:
        """Return the finding's line in the README."""
        return f"- `{self.name}` ({self.library} {', '.join(self.seen_in)}): {self.sentence}"


def load_findings(framework: str) -> tuple[Finding, ...]:
    """Import a framework's findings.

    Raises:
        ImportError: if the framework is not installed.
    """
    return importlib.import_module(f"parity_tests.frameworks.{framework}.findings").FINDINGS


def all_findings() -> tuple[Finding, ...]:
    """Return the findings of every framework that is installed here."""
    return tuple(
        finding for framework in FRAMEWORKS if framework_available(framework) for finding in load_findings(framework)
    )
