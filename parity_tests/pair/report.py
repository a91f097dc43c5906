"""The report of a pair's check: rows, the first failing rung with a likely cause, and the files that show them."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.records import ParityRow, Summary, environment, junit_document, summarize, write_json
from parity_tests.pair.trace import Place
from parity_tests.report.files import write_text
from parity_tests.report.html import html_document
from parity_tests.report.text import printable

# A listener for the steps of a check, a text each, and for its rows.
Tell = Callable[[Any], None]
EFFORTS: tuple[str, ...] = ("full", "quick")
VALUES: tuple[str, ...] = ("drawn", "given")
# Arguments for which the command line has an option, or which change no row that the command shows.
_OF_COMMAND = {"seed", "dtypes", "device", "torch_python", "jax_python", "timeout_s", "semantic", "state", "name"}
_OF_COMMAND |= {"dtypes_equal", "effort", "values"}
# Arguments that a call must repeat in writing, beside the seed and the dtype.
_SCALARS = ("gradients", "semantic", "state", "values", "scale", "not_compared", "device", "torch_python", "jax_python")
_SCALARS += ("timeout_s", "effort", "dtypes_equal", "outputs")
_MOST_UNMATCHED = 12  # modules that the text lists
RUNGS: tuple[str, ...] = ("weights", "forward", "gradients", "state")
CALIBRATED = (
    "every bound is calibrated by a rounding-noise ensemble around a float64 run; it is not derived from a formula, "
    "not even where the module is linear"
)


@dataclass(frozen=True, kw_only=True)
class PairRow(ParityRow):
    """One comparison of a pair."""

    rung: str  # `weights` (bitwise), `forward`, `gradients` or `state` (buffers that a call updates)
    # `exact` (bitwise), `calibrated`, `skipped` where a framework cannot run the dtype, or `undecided` where there is
    # no truth or no bound to judge by: such a row neither holds nor shows a difference, and its status is that of a
    # mismatch because the pair is not shown to hold
    bound: str


@dataclass(frozen=True)
class PairReport:
    """The rows of a check and its outcome."""

    name: str  # of the pair
    rows: Sequence[PairRow]  # one per leg, subject and tensor
    # Buffers without counterpart, with a word where a call updates them, and blocks held at zero
    not_compared: tuple[str, ...] = ()
    likely_cause: str = ""  # one sentence, empty if all holds or no hypothesis fits
    # What a reader must know: operations with a generic rounding model or a coarse accumulator,
    notes: tuple[str, ...] = ()
    random: bool = False  # True if a side draws random numbers, which ends the check before any dtype
    stopped: str = ""  # why the check did not come to its end, one sentence; empty if it did
    # Where the models part, in order of execution; empty if all holds or it is not known
    places: tuple[Place, ...] = ()
    unmatched: tuple[str, ...] = ()  # modules of either side none of whose values the other side has
    # The torch modules in order of execution with their Flax names, each with `agrees`, `differs` or `place`
    ladder: tuple[tuple[str, str, str], ...] = ()

    @property
    def place(self) -> str:
        """Return where the models part first, in one sentence; empty if that is not known."""
        return str(self.places[0]) if self.places else ""

    @property
    def summary(self) -> Summary:
        """Count rows by status."""
        return summarize(self.rows)

    @property
    def ok(self) -> bool:
        """Tell whether something was compared, all of it holds, and the check came to its end."""
        return self.summary.ok and not self.stopped

    @property
    def undecided(self) -> str:
        """Return why nothing can be said, where every failing row has no truth or no bound; else an empty text."""
        failed = [row for row in self.rows if row.status == "mismatch"]
        return failed[0].reason if failed and all(row.bound == "undecided" for row in failed) else ""

    @property
    def first_failing_rung(self) -> str | None:
        """Return the lowest rung with a mismatch, or None."""
        failed = {row.rung for row in self.rows if row.status == "mismatch"}
        return next((rung for rung in RUNGS if rung in failed), None)

    def with_commands(self, command: Callable[[PairRow], str]) -> Self:
        """Return the same report, every row with its reproduction."""
        rows = [dataclasses.replace(row, command=command(row)) for row in self.rows]
        return dataclasses.replace(self, rows=rows)

    def __str__(self) -> str:
        """Describe the report; its rows would fill pages."""
        return self.describe()

    def describe(self) -> str:
        """Describe in a few lines what holds and what does not."""
        summary = self.summary
        verdict = "holds" if self.ok else "MISMATCH" if summary.failed else "FAILED: nothing was compared"
        if self.undecided:
            verdict = f"UNDECIDED: {self.undecided}"
        if self.stopped:
            verdict = "STOPPED, MISMATCH" if summary.failed else "STOPPED"
        lines = [
            f"{self.name}: {verdict}; {summary.compared} compared, {summary.passed} passed, {summary.failed} failed, "
            f"{summary.skipped} skipped"
        ]
        lines += [f"  stopped: {self.stopped}"] if self.stopped else []
        rung = self.first_failing_rung
        if rung is not None:
            lines.append(self.headline)
        lines += self._where()
        lines += self._largest()
        failures = [row for row in self.rows if row.status == "mismatch" and row.rung == rung]
        lines += [f"  {row.framework} {row.dtype} {row.case}: {row.reason}" for row in failures[:10]]
        lines += [f"  and {len(failures) - 10} more" for _ in failures[10:11]]
        lines += [f"  reproduce: {row.command}" for row in failures[:1] if row.command]
        lines += [
            f"  skipped {row.framework} {row.dtype}: {row.reason}" for row in self.rows if row.status == "skipped"
        ]
        lines += [f"  not compared: {what}" for what in self.not_compared]
        lines += [f"  note: {what}" for what in (*self.notes, CALIBRATED)]
        return "\n".join(map(printable, lines))

    @property
    def headline(self) -> str:
        """Return the first failing rung and the likely cause; empty if nothing failed."""
        rung = self.first_failing_rung
        if rung is None:
            return ""
        if self.undecided:
            return f"undecided in rung {rung}: {self.undecided}"
        return f"first failing rung: {rung}; likely cause: {self.likely_cause or 'none of those tried'}"

    def _where(self) -> list[str]:
        lines = []
        for place in self.places:
            cause = place.cause if place.cause not in ("", self.likely_cause) else ""
            if not place.cause and len(self.places) > 1:
                cause = "none of the causes tried"
            lines.append(f"  place: {place}{f'; cause: {cause}' if cause else ''}")
        if self.places and self.unmatched:
            more = f" and {len(self.unmatched) - _MOST_UNMATCHED} more" * (len(self.unmatched) > _MOST_UNMATCHED)
            lines.append(f"  without counterpart: {', '.join(self.unmatched[:_MOST_UNMATCHED])}{more}")
        return lines

    def _largest(self) -> list[str]:
        """Describe for each dtype and rung the tensor closest to its bound, or furthest beyond it."""
        groups: dict[tuple[str, str], list[PairRow]] = {}
        for row in self.rows:
            if row.status != "skipped":
                groups.setdefault((row.dtype, row.rung), []).append(row)
        lines = []
        for (dtype, rung), rows in groups.items():
            worst = max(rows, key=lambda row: row.bound_fraction or 0.0)
            what = f"{worst.bound_fraction or 0.0:.3g} of the bound ({worst.tensor}, {worst.framework})"
            if rung == "weights":
                what = "bit for bit" if worst.status == "ok" else f"other bits ({worst.tensor}, {worst.framework})"
            if worst.bound == "undecided":
                what = f"no bound ({worst.tensor}, {worst.framework})"
            failed = sum(row.status == "mismatch" for row in rows)
            unknown = sum(row.bound == "undecided" for row in rows)
            counts = f"{len(rows) - failed} ok" + (f", {failed - unknown} MISMATCH" if failed > unknown else "")
            counts += f", {unknown} undecided" if unknown else ""
            lines.append(f"  {rung:<9} {dtype:<8} {counts:<16} {what}")
        return lines

    def assert_ok(self) -> None:
        """Raise AssertionError, with the description, unless everything compared holds."""
        if not self.ok:
            raise AssertionError(self.describe())

    def to_json(self, path: str | Path) -> None:
        """Write the harness' document, with the pair's own findings under `pair`."""
        pair = {
            "name": self.name,
            "ok": self.ok,
            "stopped": self.stopped,
            "first_failing_rung": self.first_failing_rung,
            "likely_cause": self.likely_cause,
            "place": self.place,
            "places": [dataclasses.asdict(place) for place in self.places],
            "unmatched": list(self.unmatched),
            "ladder": [list(entry) for entry in self.ladder],
            "not_compared": list(self.not_compared),
            "notes": list(self.notes),
            "bound": CALIBRATED,
        }
        # The number of comparisons that are left is known only at the end: at least one.
        write_json(path, self.rows, cells_left=1 if self.stopped else 0, stopped=self.stopped, pair=pair)

    def to_junit(self, path: str | Path) -> None:
        """Write JUnit XML, one case a row."""
        write_text("--junit", path, junit_document(self.rows, stopped=self.stopped))

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page."""
        notes = [f"not compared: {what}" for what in self.not_compared]
        told = [f"place: {place}{f'; cause: {place.cause}' if place.cause else ''}" for place in self.places]
        notes = [*filter(None, [self.stopped, self.headline]), *told, *notes, *self.notes, CALIBRATED]
        page = html_document(
            self.rows, environment(), title=self.name, notes=notes, stopped=bool(self.stopped), ladder=self.ladder
        )
        write_text("--html", path, page)


def reproduction(
    spec: str | None, given: Mapping[str, Any], arguments: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[PairRow], str]:
    """Return a function from a row to its reproduction: a command, or the call with that row's seed and dtype.

    Everything that a check draws follows from the seed and from names, in every process and whatever other dtypes are
    judged beside it: the same seed and one dtype repeat the row to the bit. A pair of objects has no name that another
    process could find: there the call has `...` for the modules, rules and inputs that the caller holds.

    Args:
        spec: `package.module:factory`, or None for objects.
        given: all other arguments, as the caller passed them.
        arguments: the same with a factory's own arguments filled in.
        defaults: of `check_pair`.
    """
    changed = {name for name, value in given.items() if value is not defaults[name]}
    if spec is not None and changed <= _OF_COMMAND:
        return lambda row: _command(spec, arguments, row.dtype)
    scalars = {name: arguments[name] for name in _SCALARS if arguments[name] != defaults[name]}
    options = "".join(f", {name}={value!r}" for name, value in scalars.items())
    objects = changed - _OF_COMMAND - set(_SCALARS)
    held = "".join([*([] if spec is None else [f"pair={spec!r}, "]), *(["..., "] if objects else [])])

    def call(row: PairRow) -> str:
        seed_and_dtype = f"seed={arguments['seed']}, dtypes=({row.dtype!r},)"
        return f"check_pair({held}{seed_and_dtype}{options})" + (f"  # {row.tensor}" if row.tensor else "")

    return call


def _command(spec: str, arguments: Mapping[str, Any], dtype: str) -> str:
    """Return the command that repeats a named pair's check in one dtype."""
    words = ["python", "-m", "parity_tests", "run", "--pair", spec, "--seed", str(arguments["seed"])]
    words += ["--device", arguments["device"]]
    for option in ("torch_python", "jax_python"):
        if arguments[option] is not None:
            words += [f"--{option.replace('_', '-')}", arguments[option]]
    if arguments["timeout_s"] != DEFAULT_TIMEOUT_S:
        words += ["--timeout-s", f"{arguments['timeout_s']:g}"]
    words += ["--dtypes-equal"] if arguments["dtypes_equal"] else []
    for option, default in (("effort", EFFORTS[0]), ("values", VALUES[0])):
        words += [f"--{option}", arguments[option]] if arguments[option] != default else []
    return shlex.join([*words, "--dtype", dtype])
