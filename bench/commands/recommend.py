"""`bench recommend`: the fastest implementation at the measured sizes nearest to a shape."""

from collections.abc import Sequence
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
from bench.plan.cells import DEVICES, DIRECTIONS, STORAGE_DTYPES
from bench.plan.competitors import FRAMEWORKS
from bench.report.export import interval_json, write_csv
from bench.report.text import MORE_PROCESSES, ratio
from bench.store import Archive
from bench.study.process_spread import seen_spreads
from bench.study.recommendation import FAR, NEAR, SIZES, Neighbour, Shape, nearest
from parity_tests.judge.precisions import PRECISIONS, precision_class, short_name, storage_dtype
from parity_tests.report.console import PlainConsole
from parity_tests.report.files import write_json


def recommend(
    directories: Directories,
    num_partitions: Annotated[int, typer.Option(min=1, help="Number of partitions, n.")],
    in_features: Annotated[int, typer.Option(min=1, help="Inputs of one partition.")],
    out_features: Annotated[int, typer.Option(min=1, help="Outputs of one partition.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows that one partition sees.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "fp32",
    precision: Annotated[str | None, typer.Option(help="tf32; default: that of --dtype.")] = None,
    direction: Annotated[str, typer.Option(help="forward or forward_backward.")] = "forward",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the only one that was measured.")] = None,
    framework: Annotated[str | None, typer.Option(help="torch or jax; default: both.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Answer even if the nearest measurement is far away.")
    ] = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Name the implementation that was fastest at the measured sizes nearest to yours, and say how near those are.

    Exit status: 0 with an answer; 1 if the nearest measurement is too far away to say anything; 2 for wrong usage.
    """
    sizes = (batch, num_partitions, in_features, out_features)
    dtype, precision = storage_dtype(dtype), None if precision is None else precision_class(precision)
    shape = Shape(*sizes, dtype, direction, device, framework, precision)
    with reading() as damage:
        check_choices("--dtype", [short_name(dtype)], [name for name in PRECISIONS if name != "tf32"])
        check_choices("--direction", [direction], DIRECTIONS)
        check_choices("--device", [device] if device else [], DEVICES)
        check_choices("--precision", [short_name(precision)] if precision else [], PRECISIONS)
        if precision and STORAGE_DTYPES[precision] != dtype:
            raise UsageError(
                f"--precision: {precision} is of {STORAGE_DTYPES[precision]}, got --dtype {dtype}; give both alike."
            )
        check_choices("--framework", [framework] if framework else [], FRAMEWORKS)
        check_outputs({"--json": json_file, "--csv": csv_file})
        archive = Archive(directories, damage=damage)
        devices = sorted({str(fingerprint["device"]) for fingerprint in archive.environments.values()})
        if device is None and len(devices) > 1:
            raise UsageError(f"--device: expected one, since {' and '.join(devices)} were measured; choose one.")
        found = nearest(shape, archive.cells(), seen_spreads(archive))
        if not found and damage.sentences:
            raise damage.error()
        if not found:
            raise UsageError(
                f"nothing was measured undisturbed with dtype {dtype}, precision {precision or 'of the dtype'}, "
                f"{direction}, device {device or 'any'} and framework {framework or 'any'}; "
                "give the directory of a run that has them."
            )
        answered = extrapolate or found[0].distance <= FAR
        if json_file is not None:
            write_json("--json", json_file, _json(shape, found, answered=answered))
        if csv_file is not None:
            write_csv("--csv", csv_file, _rows(found))
    _show(shape, found, answered=answered)
    return tell_damage(damage.sentences, OK if answered else FAILED)


def _of(neighbour: Neighbour, *names: str) -> dict[str, Any]:
    return {name: getattr(neighbour.ranking.first, name) for name in names}


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
                **_of(neighbour, "workload", *SIZES, "precision", "division", "layout", "device", "environment_id"),
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
        marks = dict.fromkeys(neighbour.leaders, "not told apart") | {neighbour.leaders[0]: "fastest"}
        for label, interval in sorted(neighbour.speeds.items(), key=lambda item: -item[1].ratio):
            console.print(f"  {label:36} {ratio(interval):26} {marks.get(label, '')}")
