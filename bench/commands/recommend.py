"""`bench recommend`: what to use for a shape, how fast it is, what it costs to be wrong, and how to settle it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from bench.commands.arguments import (
    FAILED,
    OK,
    CsvFile,
    Directories,
    JsonFile,
    UsageError,
    check_choices,
    check_outputs,
    reading,
    tell_damage,
)
from bench.plan.cells import DEVICES, DIRECTIONS, DIVISIONS, STORAGE_DTYPES
from bench.plan.competitors import FRAMEWORKS, STOCK
from bench.plan.presets import PRESETS, STEPPED_OPTIMIZERS
from bench.plan.workloads import sweep_workload
from bench.records import finite
from bench.report.export import interval_json, write_csv
from bench.report.snippets import code_to_paste
from bench.report.text import MORE_PROCESSES, ratio, seconds, share, source_line
from bench.store import Archive, read_cells
from bench.study.cost_model import FAR, LEAST_SHAPES, MOST_HIGH, MOST_MEDIAN, Trial, cell_of
from bench.study.process_spread import seen_spreads
from bench.study.recommendation import (
    MEASURED,
    MODEL,
    NEAR,
    NOTHING,
    SIZES,
    Answer,
    Near,
    Neighbour,
    Shape,
    answer,
    loss_at,
    near_cells,
    neighbours,
)
from parity_tests.judge.dtypes import PRECISIONS, precision_class, short_name, storage_dtype
from parity_tests.report.console import PlainConsole
from parity_tests.report.files import write_json

# The preset whose effort settles a question: all competitors, in several sets of processes.
_SETTLING = PRESETS["seed"]
# Of a cell's competitors, beside those that are not told apart; --json has all.
_LISTED = 5


def recommend(
    directories: Directories,
    num_partitions: Annotated[int, typer.Option(min=1, help="Number of partitions, n.")],
    in_features: Annotated[int, typer.Option(min=1, help="Inputs of one partition.")],
    out_features: Annotated[int, typer.Option(min=1, help="Outputs of one partition.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows that one partition sees.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16 or fp64; default: that of --precision, else fp32.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, ...; default: that of --dtype.")] = None,
    direction: Annotated[str, typer.Option(help="forward, forward_backward or train_step.")] = "forward",
    division: Annotated[
        str | None, typer.Option(help="stock, matched or tuned; default: matched where it was measured.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the only one that was measured.")] = None,
    framework: Annotated[str | None, typer.Option(help="torch or jax; default: both.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Answer even if the nearest measurement is far away.")
    ] = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Name what to use for a shape, with its code, its expected time, and the expected cost of being wrong.

    Measures nothing. A shape that was measured is answered by its own records; another by a cost model, if its choices
    for shapes that were left out were good; else by the nearest measured cells. What would settle it is printed.

    Exit status: 0 with an answer; 1 if the nearest measurement is too far away to say anything; 2 for wrong usage.
    """
    with reading() as damage:
        shape = _shape(
            (batch, num_partitions, in_features, out_features), dtype, precision, direction, device, framework, division
        )
        check_outputs({"--json": json_file, "--csv": csv_file})
        archive = Archive(directories, damage=damage)
        devices = sorted({str(fingerprint["device"]) for fingerprint in archive.environments.values()})
        if device is None and len(devices) > 1:
            raise UsageError(f"--device: expected one, since {' and '.join(devices)} were measured; choose one.")
        near = near_cells(shape, archive)
        found = neighbours(shape, read_cells(near.places), seen_spreads(archive), archive.environments)
        if not found and damage.sentences:
            raise damage.error()
        if not found:
            raise UsageError(
                f"nothing was measured undisturbed with dtype {short_name(shape.dtype)}, precision "
                f"{short_name(shape.precision or 'of the dtype')}, {direction}, division {division or 'any'}, device "
                f"{device or 'any'} and framework {framework or 'any'}; give the directory of a run that has them."
            )
        said = answer(shape, found, extrapolate=extrapolate)
        machines = tuple(dict.fromkeys(neighbour.machine for neighbour in found))
        if json_file is not None:
            write_json("--json", json_file, _json(shape, said, near))
        if csv_file is not None:
            write_csv("--csv", csv_file, _rows(said.neighbours))
    used = {neighbour.ranking.first.environment_id for neighbour in said.neighbours}
    source = source_line({name: found for name, found in archive.environments.items() if name in used})
    _show(PlainConsole(soft_wrap=True), shape, said, near, machines, source)
    return tell_damage(damage.sentences, FAILED if said.basis == NOTHING else OK)


def _shape(
    sizes: tuple[int, int, int, int],
    dtype: str | None,
    precision: str | None,
    direction: str,
    device: str | None,
    framework: str | None,
    division: str | None,
) -> Shape:
    """Check the options, and return the shape that they mean."""
    asked = None if precision is None else precision_class(precision)
    check_choices("--precision", [short_name(asked)] if asked else [], PRECISIONS)
    stored = storage_dtype(dtype) if dtype else STORAGE_DTYPES[asked or "ieee_fp32"]
    check_choices("--dtype", [short_name(stored)], [name for name in PRECISIONS if name != "tf32"])
    check_choices("--direction", [direction], DIRECTIONS)
    check_choices("--division", [division] if division else [], DIVISIONS)
    check_choices("--device", [device] if device else [], DEVICES)
    check_choices("--framework", [framework] if framework else [], FRAMEWORKS)
    if asked and STORAGE_DTYPES[asked] != stored:
        raise UsageError(
            f"--precision: {short_name(asked)} is stored in {short_name(STORAGE_DTYPES[asked])}, got --dtype "
            f"{short_name(stored)}; give both alike, or --precision alone."
        )
    return Shape(*sizes, stored, direction, device, framework, asked, division)


def _settling(shape: Shape, near: Near, said: Answer) -> tuple[str, float | None]:
    """Return the command that would settle the question on a machine, and for how many seconds it runs there."""
    first = said.neighbours[0].ranking.first
    words = ["python", "-m", "bench", "run", "--preset", _SETTLING.name]
    words += ["--workload", sweep_workload(*shape.sizes).name, "--direction", shape.direction]
    words += ["--precision", short_name(first.precision), "--device", first.device]
    words += ["--division", first.division] if first.division in DIVISIONS else []
    words += ["--optimizer", first.optimizer] if first.optimizer in STEPPED_OPTIMIZERS else []
    words += ["--framework", shape.framework] if shape.framework else []
    words += ["--out", f"runs/{sweep_workload(*shape.sizes).name}"]
    return shlex.join(words), None if near.cell_s is None else near.cell_s * _SETTLING.replicates


def _code(shape: Shape, said: Answer) -> str | None:
    if said.recommended is None:
        return None
    return code_to_paste(said.recommended, cell_of(said.neighbours[0].ranking.first, shape.sizes))


def _of(neighbour: Neighbour, *names: str) -> dict[str, Any]:
    return {name: getattr(neighbour.ranking.first, name) for name in names}


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "cells": trial.cells,
        "answered": len(trial.regrets),
        "regret_median": trial.median,
        "regret_95th_percentile": trial.high,
        "passed": trial.passed,
    }


def _json(shape: Shape, said: Answer, near: Near) -> dict[str, Any]:
    first = said.neighbours[0]
    command, taken = _settling(shape, near, said)
    answered = said.recommended is not None
    expected = said.expected and {name: finite(value) for name, value in asdict(said.expected).items()}
    return {
        "schema_version": 1,
        "shape": asdict(shape),
        "basis": said.basis,
        "machine": first.machine,
        "division": near.division,
        "recommended": [said.recommended.label, *said.tied] if said.recommended else [],
        "expected_s": expected,
        "runner_up": said.runner_up,
        "runner_up_speed": interval_json(said.runner_up_speed),
        "expected_loss": finite(said.loss),
        "code": _code(shape, said),
        "settle": {"command": command, "estimated_s": taken},
        "cost_model": _trial(said.model) | {"regret_median_at_most": MOST_MEDIAN, "regret_95th_at_most": MOST_HIGH},
        "nearest_cell": _trial(said.nearest),
        "distance_doublings": first.distance,
        "extrapolated": first.distance > NEAR,
        "refused": not answered,
        "nearest": [
            {
                **_of(neighbour, "workload", *SIZES, "precision", "division", "layout", "device", "environment_id"),
                "machine": neighbour.machine,
                "distance_doublings": neighbour.distance,
                "leaders": list(neighbour.leaders),
                "expected_loss_there": finite(loss_at(neighbour, said.recommended.label)) if said.recommended else None,
                "speeds": {label: interval_json(interval) for label, interval in neighbour.speeds.items()},
            }
            for neighbour in said.neighbours
        ],
    }


def _rows(found: Sequence[Neighbour]) -> list[dict[str, Any]]:
    return [
        {
            **_of(neighbour, "workload", *SIZES),
            "distance_doublings": neighbour.distance,
            "competitor": label,
            "leads": label in neighbour.leaders,
            **(interval_json(interval) or {}),
        }
        for neighbour in found
        for label, interval in neighbour.speeds.items()
    ]


def _far(shape: Shape, neighbour: Neighbour) -> str:
    """Tell how the nearest measurement differs, size by size."""
    sizes = _of(neighbour, *SIZES)
    factors = [f"{k} {size} instead of {getattr(shape, k)}" for k, size in sizes.items() if size != getattr(shape, k)]
    return ", ".join(factors) or "exactly this shape"


def _tried(trial: Trial, what: str) -> str:
    """Tell what the choices for shapes that were left out lost."""
    if not trial.regrets:
        return f"{what}: too few shapes were measured to try it."
    return (
        f"{what}: tried on {len(trial.regrets)} of {trial.cells} cells whose shape was left out, its choice takes "
        f"{share(trial.median)} longer than the fastest there in the median, and {share(trial.high)} in the 95th "
        "percentile."
    )


def _stock_ties(said: Answer, kinds: Mapping[str, str]) -> list[str]:
    return [label for label in said.tied if kinds.get(label) == STOCK]


def _show(console: PlainConsole, shape: Shape, said: Answer, near: Near, machines: Sequence[str], source: str) -> None:
    first = said.neighbours[0]
    command, taken = _settling(shape, near, said)
    if said.recommended is None:
        console.print(
            f"No answer: the nearest measurement is {first.ranking.title}, {2**first.distance:.1f} times away "
            f"({_far(shape, first)}), and beyond {2**FAR:.0f} times it says nothing about this shape. Measure nearer "
            "with the command below, or take what follows as a guess with --extrapolate."
        )
    else:
        _recommended(console, shape, said, near)
    console.print(f"Machine: {first.machine or first.ranking.first.device}. {source}")
    if machines[1:]:
        console.print(f"Also measured, and not part of this answer: {'; '.join(machines[1:])}.")
    if code := _code(shape, said):
        console.print("To paste:")
        console.print()
        for line in code.splitlines():
            console.out(f"    {line}" if line else "")
        console.print()
    if said.basis != MEASURED:
        console.print(_tried(said.model, "Cost model"))
        if said.basis != MODEL and said.model.regrets:
            most = f"{share(MOST_MEDIAN)} in the median and {share(MOST_HIGH)} in the 95th percentile"
            why = (
                "the shape is too far away"
                if said.model.passed
                else f"at most {most} of {LEAST_SHAPES} or more is good"
            )
            console.print(f"So it gives no estimate here ({why}): the nearest cells stand below, with their distance.")
        console.print(_tried(said.nearest, "The nearest cell's fastest"))
    if said.basis != MEASURED or first.ranking.one_process:
        about = "" if taken is None else f" (about {_duration(taken)} there, by how long these records took)"
        console.print(f"To settle it{about}:")
        console.out(f"    {command}")
    for neighbour in said.neighbours:
        _neighbour(console, neighbour, said)


def _duration(taken: float) -> str:
    return f"{taken:.0f} s" if taken < 100 else f"{math.ceil(taken / 60)} minutes"


def _recommended(console: PlainConsole, shape: Shape, said: Answer, near: Near) -> None:
    first, chosen = said.neighbours[0], said.recommended
    assert chosen is not None
    kinds = {label: one.kind for neighbour in said.neighbours for label, one in neighbour.competitors().items()}
    console.print(f"Recommended: {chosen.label}")
    if said.expected is not None:
        end = "unknown" if math.isinf(said.expected.high) else seconds(said.expected.high)
        how = "measured at this shape" if said.basis == MEASURED else "by the cost model"
        console.print(
            f"Expected: {seconds(said.expected.seconds)} a call [{seconds(said.expected.low)}, {end}], {how}."
        )
    if said.tied:
        how = "Predicted within 2%" if said.basis == MODEL else "Not shown to be slower"
        console.print(f"{how}: {', '.join(said.tied)}.")
    if ties := _stock_ties(said, kinds):
        console.print(f"What users write instead ties with it: {', '.join(ties)}.")
    if said.runner_up is not None:
        console.print(f"Runner-up: {said.runner_up}, {ratio(said.runner_up_speed)} its speed.")
    elif not said.tied:
        console.print("Runner-up: none, since nothing else was timed.")
    if said.loss is not None and math.isfinite(said.loss):
        console.print(f"Expected cost of being wrong: {share(said.loss)} more time than the truly fastest takes.")
    others = f" Also measured: {', '.join(near.others)}; see --division." if near.others else ""
    console.print(f"Conditions: {first.ranking.first.direction}, {_how(first)}.{others}")
    console.print(f"Nearest measurement: {first.ranking.title} ({_far(shape, first)}).")
    if first.distance > NEAR:
        console.print(f"Warning: extrapolated, {2**first.distance:.1f} times away; measure this shape to be sure.")
    alike = [neighbour for neighbour in said.neighbours if neighbour.distance <= FAR]
    if said.basis == MEASURED:
        # Other shapes say nothing against it, other cells of this one may.
        alike = [neighbour for neighbour in alike if not neighbour.distance]
    if alike and not set(alike[0].leaders).intersection(*(neighbour.leaders for neighbour in alike)):
        same = len({neighbour.distance for neighbour in alike}) == 1
        on = "what took part" if same else "the exact size"
        console.print(f"The measurements below disagree, so the answer depends on {on}.")
    if first.ranking.one_process and said.tied:
        console.print(f"One process measured it; {MORE_PROCESSES}.")


def _how(neighbour: Neighbour) -> str:
    record = neighbour.ranking.first
    return f"{short_name(record.precision)}, the {record.division} division, {record.layout} rows"


def _neighbour(console: PlainConsole, neighbour: Neighbour, said: Answer) -> None:
    label = said.recommended.label if said.recommended else ""
    lost = loss_at(neighbour, label)
    costs = "" if lost is None or math.isinf(lost) else f"; there {label} is expected to lose {share(lost)}"
    # What takes part in the answer was measured on the machine that was named above.
    on = "" if neighbour.machine == said.neighbours[0].machine else f", on {neighbour.machine}"
    away = f"{2**neighbour.distance:.1f} times away"
    console.print(f"{neighbour.ranking.title}, {away}{on}{costs}; speed over its fastest:")
    marks = dict.fromkeys(neighbour.leaders, "not told apart") | {neighbour.leaders[0]: "fastest"}
    for k, (name, interval) in enumerate(sorted(neighbour.speeds.items(), key=lambda item: -item[1].ratio)):
        if k < _LISTED or name in marks or name == label:
            console.print(f"  {name:36} {ratio(interval):26} {marks.get(name, '')}")
