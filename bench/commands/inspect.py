"""`bench list`, `doctor`, `validate` and `compress`: look at the catalogue, this machine and finished records."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.commands.arguments import (
    FAILED,
    OK,
    CsvFile,
    Directories,
    JaxPython,
    JsonFile,
    TorchPython,
    check_interpreters,
    check_outputs,
    cut_short,
    tell,
)
from bench.measure.environment import diagnose
from bench.measure.machine import allowed_cpus
from bench.measure.workers import RequestError, WorkerPool, starter
from bench.plan.cells import DIRECTIONS, DIVISIONS, PRECISIONS
from bench.plan.presets import PRESETS
from bench.plan.workloads import WORKLOADS
from bench.record_files import compress as compress_records
from bench.record_files import records_file
from bench.report.export import flat, write_csv
from bench.store import sole_writer
from bench.study.validation import Count, violations
from parity_tests.report.console import PlainConsole, interruptible
from parity_tests.report.files import write_json


def _pool(torch_python: str | None, jax_python: str | None, division: str) -> WorkerPool:
    pythons = check_interpreters(torch_python, jax_python)
    return WorkerPool(starter(pythons, device="auto", division=division, cpus=allowed_cpus()))


def _catalogue(pool: WorkerPool) -> dict[str, Any]:
    return {
        "workloads": [asdict(workload) for workload in WORKLOADS.values()],
        "presets": [
            {
                "name": preset.name,
                "summary": preset.summary,
                "workloads": list(preset.workloads),
                "rounds": preset.rounds,
            }
            for preset in PRESETS.values()
        ],
        "directions": list(DIRECTIONS),
        "divisions": list(DIVISIONS),
        "precisions": list(PRECISIONS),
        "competitors": {catalogue.framework: catalogue.kinds() for catalogue in pool.catalogues()},
        "missing_competitors": {
            catalogue.framework: dict(catalogue.missing) for catalogue in pool.catalogues() if catalogue.missing
        },
        "missing": pool.missing,
    }


def _show_catalogue(found: dict[str, Any]) -> None:
    console = PlainConsole(soft_wrap=True)
    console.print("Workloads:")
    for workload in WORKLOADS.values():
        console.print(f"  {workload.name:30} {workload.shape:30} {workload.source}")
    console.print("Presets:")
    for preset in PRESETS.values():
        console.print(f"  {preset.name:30} {preset.summary}")
    console.print("Competitors:")
    for framework, kinds in found["competitors"].items():
        console.print(f"  {framework:30} {', '.join(kinds)}")
    for framework, reasons in found["missing_competitors"].items():
        for name, reason in reasons.items():
            console.print(f"  {framework:30} without {name}: {reason}")
    for framework, reason in found["missing"].items():
        console.print(f"  {framework:30} {reason}")
    for name in ("directions", "divisions", "precisions"):
        console.print(f"{name.capitalize()}: {', '.join(found[name])}")


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the catalogue as lines of one table: kind of thing, name, and further columns."""
    rows = [{"what": "workload", **workload} for workload in found["workloads"]]
    rows += [{"what": "preset", **preset} for preset in found["presets"]]
    for framework, kinds in found["competitors"].items():
        rows += [{"what": "competitor", "name": name, "framework": framework, "kind": k} for name, k in kinds.items()]
    for what in ("directions", "divisions", "precisions"):
        rows += [{"what": what.removesuffix("s"), "name": name} for name in found[what]]
    return [flat(row) for row in rows]


def list_all(
    torch_python: TorchPython = None,
    jax_python: JaxPython = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """List workloads with their sources, presets, and the competitors of the frameworks that are installed."""
    check_outputs({"--json": json_file, "--csv": csv_file})
    try:
        with _pool(torch_python, jax_python, DIVISIONS[0]) as pool:
            found = _catalogue(pool)
    except RequestError as error:
        tell(f"a worker cannot start: {error}")
        return FAILED
    _show_catalogue(found)
    if json_file is not None:
        write_json("--json", json_file, found)
    if csv_file is not None:
        write_csv("--csv", csv_file, _rows(found))
    return OK


def _facts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what `bench doctor` found as lines of one table: section, name of the fact, and its value."""
    facts: dict[str, Mapping[str, Any]] = {"machine": {}}
    for name, value in found.items():
        if name == "frameworks":
            facts |= value
        elif name == "warnings":
            facts["warning"] = {str(k): line for k, line in enumerate(value, start=1)}
        elif isinstance(value, Mapping):
            facts[name] = value
        else:
            facts["machine"] = {**facts["machine"], name: value}
    return [
        {"section": section, "name": name, "value": value}
        for section, known in facts.items()
        for name, value in flat(known).items()
    ]


def doctor(
    torch_python: TorchPython = None,
    jax_python: JaxPython = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Check the conditions of a measurement: frameworks, CUDA packages, threads, precision switches, load.

    Exit status: 1 if no framework can be measured, whatever else it finds.
    """
    check_outputs({"--json": json_file, "--csv": csv_file})
    try:
        # The stock division changes nothing: these are the settings that a user gets without the benchmark.
        with _pool(torch_python, jax_python, "stock") as pool:
            found = diagnose(pool.hello, pool.missing)
    except RequestError as error:
        tell(f"a worker cannot start: {error}")
        return FAILED
    console = PlainConsole(soft_wrap=True)
    console.print(
        f"Processor: {found['cpu_model']}; {len(found['affinity'])} of {found['cpu_count']} processors usable"
        + (f"; it offers {', '.join(found['cpu_features'])}" if found["cpu_features"] else "")
    )
    for name, framework in found["frameworks"].items():
        console.print(f"{name} (Python {framework['python']}), devices {', '.join(framework['devices'])}")
        for heading in ("versions", "default_switches", "variables"):
            shown = ", ".join(f"{key}={value}" for key, value in framework[heading].items() if value is not None)
            console.print(f"  {heading.replace('_', ' ')}: {shown}")
    pages = {name: part["large_pages"] for name, part in found["frameworks"].items() if part["large_pages"] is not None}
    if pages:
        kinds = ", ".join(f"{name} {'large' if large else 'small'}" for name, large in pages.items())
        console.print(f"Pages that new arrays get on the CPU, which weigh on the speed of large ones: {kinds}")
    if found["gpu"]:
        console.print("GPU now: " + ", ".join(f"{key}={value}" for key, value in found["gpu"].items()))
    for line in found["warnings"]:
        console.print(f"Warning: {line}")
    if not found["warnings"]:
        console.print("Nothing to complain about.")
    if json_file is not None:
        write_json("--json", json_file, found)
    if csv_file is not None:
        write_csv("--csv", csv_file, _facts(found), ["section", "name", "value"])
    return OK if found["frameworks"] else FAILED


def validate(directories: Directories, json_file: JsonFile = None, csv_file: CsvFile = None) -> int:
    """Check every record against the schema and against itself.

    Exit status: 0 if nothing is wrong, whatever is remarked; 1 if anything is; 2 for wrong usage.
    """
    count, problems, stopped = Count(), [], ""
    check_outputs({"--json": json_file, "--csv": csv_file})
    with interruptible() as interruption:
        try:
            for directory in directories:
                for problem in violations(directory, count):
                    problems.append(problem)  # noqa: PERF402 - an interruption keeps what is there
            interruption.settle()
        except KeyboardInterrupt:
            stopped = f"interrupted: {count.records} records were looked at, the others were left"
        if json_file is not None:
            found = {"records": count.records, "cells": count.cells, "violations": problems}
            found |= {"remarks": count.remarks} | ({"stopped": stopped} if stopped else {})
            write_json("--json", json_file, found)
        if csv_file is not None and not stopped:
            rows = [{"violation": problem} for problem in problems]
            rows += [{"remark": remark} for remark in count.remarks]
            write_csv("--csv", csv_file, rows, ["violation", "remark"])
    console = PlainConsole()
    for problem in problems:
        console.out(problem)
    for remark in count.remarks:
        console.out(f"Remark: {remark}.")
    said = ", ".join(
        f"{len(found)} {what}{'' if len(found) == 1 else 's'}"
        for what, found in (("violation", problems), ("remark", count.remarks))
    )
    console.out(f"{count.records} records in {count.cells} cells: {said}.")
    console.out(
        "What records cannot show: a factor that all clocks of a cell share, and the number of calls in a block where "
        f"nothing else timed its calls ({count.unchecked} of {count.speeds} speeds here). Only another run can tell."
    )
    return cut_short(stopped, FAILED if problems else OK)


def compress(directories: Directories) -> int:
    """Replace the records of finished runs by compressed ones, as they are published; every command reads both.

    Exit status: 0 if all were compressed; 2 for wrong usage. What was compressed before a mistake stays so.
    """
    for directory in directories:
        before = records_file(directory).stat().st_size
        with sole_writer(directory):
            packed = compress_records(directory)
        PlainConsole(soft_wrap=True).print(
            f"{packed}: {before / 1e6:.1f} MB became {packed.stat().st_size / 1e6:.1f} MB."
        )
    return OK
