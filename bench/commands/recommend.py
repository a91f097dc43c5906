"""`bench recommend`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.archive import Archive, Damage
from bench.commands.usage import FAILED, OK, UsageError, check_choices, check_writable, complain, tell_damage
from bench.environments import StoreError
from bench.plan.cells import DEVICES, DIRECTIONS, STORAGE_DTYPES
from bench.plan.competitors import FRAMEWORKS
from bench.report.export import interval_json
from bench.report.output import OutputError, columns_of, write_csv, write_json
from bench.report.text import MORE_PROCESSES, ratio
from bench.study.process_spread import seen_spreads
from bench.study.recommendation import FAR, NEAR, SIZES, Neighbour, Shape, nearest
from parity_tests.judge.precisions import PRECISIONS, short_name
from parity_tests.report.console import PlainConsole


def _far(shape: Shape, neighbour: Neighbour) -> str:
    """How the nearest measurement differs, size by size."""
    factors = [
        f"{name} {getattr(neighbour.ranking.first, name)} instead of {getattr(shape, name)}"
        for name in SIZES
        if getattr(neighbour.ranking.first, name) != getattr(shape, name)
    ]
    return ", ".join(factors) or "exactly this shape"


def _json(shape: Shape, found: Sequence[Neighbour], *, answered: bool) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "shape": asdict(shape),
        "recommended": list(found[0].leaders) if answered else [],
        "distance_doublings": found[0].distance,
        "extrapolated": found[0].distance > NEAR,
        "refused": not answered,
        "nearest": [
            {
                **{name: getattr(neighbour.ranking.first, name) for name in ("workload", *SIZES, "precision")},
                **{name: getattr(neighbour.ranking.first, name) for name in ("division", "layout", "device")},
                "environment_id": neighbour.ranking.first.environment_id,
                "distance_doublings": neighbour.distance,
                "leaders": list(neighbour.leaders),
                "speeds": {label: interval_json(interval) for label, interval in neighbour.speeds.items()},
            }
            for neighbour in found
        ],
    }


def _rows(found: Sequence[Neighbour]) -> list[dict[str, Any]]:
    return [
        {
            "workload": neighbour.ranking.first.workload,
            **{name: getattr(neighbour.ranking.first, name) for name in SIZES},
            "distance_doublings": neighbour.distance,
            "competitor": label,
            "leads": label in neighbour.leaders,
            **(interval_json(interval) or {}),
        }
        for neighbour in found
        for label, interval in neighbour.speeds.items()
    ]


def _show(shape: Shape, found: Sequence[Neighbour], *, answered: bool) -> None:
    console = PlainConsole(soft_wrap=True)
    first = found[0]
    if not answered:
        console.print(
            f"No answer: the nearest measurement is {first.ranking.title}, {2**first.distance:.1f} times away "
            f"({_far(shape, first)}), and beyond {2**FAR:.0f} times it says nothing about this shape. Measure nearer "
            "with `bench run`, or take what follows as a guess with --extrapolate."
        )
    else:
        console.print(f"Recommended: {first.leaders[0]}")
        if first.leaders[1:]:
            console.print(f"Not shown to be slower: {', '.join(first.leaders[1:])}.")
        console.print(f"Nearest measurement: {first.ranking.title} ({_far(shape, first)}).")
        if first.distance > NEAR:
            console.print(f"Warning: extrapolated, {2**first.distance:.1f} times away; measure this shape to be sure.")
        near = [neighbour for neighbour in found if neighbour.distance <= FAR]
        if near and not set(near[0].leaders).intersection(*(neighbour.leaders for neighbour in near)):
            alike = len({neighbour.distance for neighbour in near}) == 1
            why = "what took part, or on the division" if alike else "the exact size"
            console.print(f"The measurements below disagree, so the answer depends on {why}.")
        if first.ranking.one_process and first.leaders[1:]:
            console.print(f"One process measured it; {MORE_PROCESSES}.")
    for neighbour in found:
        console.print(f"{neighbour.ranking.title}, {2**neighbour.distance:.1f} times away, speed over the fastest:")
        for label, interval in sorted(neighbour.speeds.items(), key=lambda item: -item[1].ratio):
            mark = (
                ""
                if label not in neighbour.leaders
                else "fastest"
                if label == neighbour.leaders[0]
                else "not told apart"
            )
            console.print(f"  {label:36} {ratio(interval):26} {mark}")


def recommend_command(
    directories: Sequence[Path],
    shape: Shape,
    *,
    extrapolate: bool = False,
    json_file: Path | None = None,
    csv_file: Path | None = None,
) -> int:
    """Runs `bench recommend`; its exit status is 1 if the nearest measurement is too far away to say anything."""
    damage = Damage()
    try:
        check_choices("--dtype", [short_name(shape.dtype)], [name for name in PRECISIONS if name != "tf32"])
        check_choices("--direction", [shape.direction], DIRECTIONS)
        check_choices("--device", [shape.device] if shape.device else [], DEVICES)
        check_choices("--precision", [short_name(shape.precision)] if shape.precision else [], PRECISIONS)
        if shape.precision and STORAGE_DTYPES[shape.precision] != shape.dtype:
            raise UsageError(
                f"--precision: {shape.precision} is of {STORAGE_DTYPES[shape.precision]}, got --dtype {shape.dtype}; "
                "give both alike."
            )
        check_choices("--framework", [shape.framework] if shape.framework else [], FRAMEWORKS)
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        archive = Archive(directories, damage=damage)
        devices = sorted({str(fingerprint["device"]) for fingerprint in archive.environments.values()})
        if shape.device is None and len(devices) > 1:
            raise UsageError(f"--device: expected one, since {' and '.join(devices)} were measured; choose one.")
        found = nearest(shape, archive.cells(), seen_spreads(archive))
        if not found and damage.sentences:
            raise damage.error()
        if not found:
            raise UsageError(
                f"nothing was measured undisturbed with dtype {shape.dtype}, "
                f"precision {shape.precision or 'of the dtype'}, {shape.direction}, "
                f"device {shape.device or 'any'} and framework {shape.framework or 'any'}; "
                "give the directory of a run that has them."
            )
        answered = extrapolate or found[0].distance <= FAR
        if json_file is not None:
            write_json(json_file, _json(shape, found, answered=answered))
        if csv_file is not None:
            rows = _rows(found)
            write_csv(csv_file, columns_of(rows), rows)
    except (UsageError, StoreError, OutputError) as error:
        tell_damage(damage.sentences, FAILED)
        return complain(error)
    _show(shape, found, answered=answered)
    return tell_damage(damage.sentences, OK if answered else FAILED)
