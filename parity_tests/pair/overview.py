"""The five example pairs in one view: made equal, with every default, and the differences by default, as measured."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity_tests.pair.check import run_pair
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.report import PairReport
from parity_tests.report.text import markdown_text, printable

_HERE = "parity_tests.pair.examples"
BEGIN, END = "<!-- pairs:begin -->", "<!-- pairs:end -->"


@dataclass(frozen=True)
class Difference:
    """Hold one aspect in which freshly created modules of a pair may differ."""

    pair: str
    aspect: str
    torch: str
    flax: str

    @property
    def differs(self) -> bool:
        """Tell whether the two measurements read differently."""
        return self.torch != self.flax


def default_differences() -> list[Difference]:
    """Measure every aspect on both sides; needs both frameworks."""
    sides = [
        importlib.import_module(f"parity_tests.frameworks.{side}.examples").measure_defaults()
        for side in ("torch", "jax")
    ]
    return [Difference(key[0], key[1], sides[0][key], sides[1][key]) for key in sides[0]]


@dataclass(frozen=True)
class Entry:
    """Hold the outcome of one example pair."""

    name: str
    matched: PairReport
    defaults: PairReport
    differences: tuple[Difference, ...]

    def describe(self) -> str:
        """Describe the pair in a few lines for a terminal."""
        worst = max(row.bound_fraction or 0.0 for row in self.matched.rows)
        verdict = f"holds, largest error {worst:.2g} of its bound" if self.matched.ok else self.matched.headline
        lines = [self.name, f"  made equal:   {verdict}", f"  by default:   {outcome(self.defaults)}"]
        for difference in self.differences:
            mark = "differs" if difference.differs else "equal"
            lines.append(f"  {mark:<13} {difference.aspect}: torch {difference.torch}, flax {difference.flax}")
        return "\n".join(map(printable, lines))

    def record(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        return {
            "name": self.name,
            "matched_ok": self.matched.ok,
            "defaults_ok": self.defaults.ok,
            "defaults_likely_cause": self.defaults.likely_cause,
            "differences": [
                {"aspect": d.aspect, "torch": d.torch, "flax": d.flax, "differs": d.differs} for d in self.differences
            ],
        }


def outcome(report: PairReport) -> str:
    """Describe a report in half a sentence."""
    return "holds" if report.ok else f"MISMATCH: {report.likely_cause or report.headline}"


def by_default(name: str) -> PairReport:
    """Judge the outputs of an example with every setting but the parameters at its default."""
    return run_pair(f"{_HERE}:{name}_defaults", gradients=False)


def overview() -> Iterator[Entry]:
    """Judge and measure every example; needs both frameworks."""
    differences = default_differences()
    for name in EXAMPLES:
        yield Entry(
            name,
            run_pair(f"{_HERE}:{name}", dtypes=("float32", "bfloat16")),
            by_default(name),
            tuple(difference for difference in differences if difference.pair == name),
        )


def readme_block(outcomes: Mapping[str, PairReport], differences: Sequence[Difference]) -> str:
    """Return the README's table of the five pairs, markers included."""
    lines = [BEGIN, "", "| pair | the check, everything else at its default | differs by default (torch / Flax) |"]
    lines += ["|---|---|---|"]
    for name, report in outcomes.items():
        own = "; ".join(f"{d.aspect}: {d.torch} / {d.flax}" for d in differences if d.pair == name and d.differs)
        lines.append("| " + " | ".join(map(markdown_text, (name, outcome(report), own))) + " |")
    return "\n".join([*lines, "", END])


def with_block(text: str, block: str) -> str:
    """Return the README's text with its table replaced.

    Raises:
        ValueError: if the markers are not there exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END} once each, in this order; add them to the file.")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
