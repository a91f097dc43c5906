"""`bench list` and `bench doctor`: what there is to measure, and whether it can be measured here."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.commands.usage import FAILED, OK, UsageError, check_interpreters, check_writable, complain, tell
from bench.measure.environment import diagnose
from bench.measure.machine import allowed_cpus
from bench.measure.workers import RequestError, WorkerPool, starter
from bench.plan.cells import DIRECTIONS, DIVISIONS, PRECISIONS
from bench.plan.presets import PRESETS
from bench.plan.workloads import WORKLOADS
from bench.report.output import OutputError, columns_of, flat, write_csv, write_json
from parity_tests.report.console import PlainConsole


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
    """The catalogue as lines of one table: what kind of thing, its name, and what else is known of it."""
    rows = [{"what": "workload", **workload} for workload in found["workloads"]]
    rows += [{"what": "preset", **preset} for preset in found["presets"]]
    for framework, kinds in found["competitors"].items():
        rows += [{"what": "competitor", "name": name, "framework": framework, "kind": k} for name, k in kinds.items()]
    for what in ("directions", "divisions", "precisions"):
        rows += [{"what": what.removesuffix("s"), "name": name} for name in found[what]]
    return [flat(row) for row in rows]


def list_command(
    torch_python: str | None, jax_python: str | None, json_file: Path | None, csv_file: Path | None = None
) -> int:
    """Runs `bench list` and returns its exit status."""
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        with _pool(torch_python, jax_python, DIVISIONS[0]) as pool:
            found = _catalogue(pool)
    except UsageError as error:
        return complain(error)
    except RequestError as error:
        tell(f"a worker cannot start: {error}")
        return FAILED
    _show_catalogue(found)
    try:
        if json_file is not None:
            write_json(json_file, found)
        if csv_file is not None:
            rows = _rows(found)
            write_csv(csv_file, columns_of(rows), rows)
    except OutputError as error:
        return complain(error)
    return OK


def _facts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `bench doctor` found as lines of one table: what it is about, which fact, and its value."""
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


def doctor_command(
    torch_python: str | None, jax_python: str | None, json_file: Path | None, csv_file: Path | None = None
) -> int:
    """Runs `bench doctor`; its exit status is 1 if no framework can be measured, whatever else it finds."""
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        # The stock division changes nothing, so what is shown is what a user gets without the benchmark.
        with _pool(torch_python, jax_python, "stock") as pool:
            found = diagnose(pool.hello, pool.missing)
    except UsageError as error:
        return complain(error)
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
    if found["gpu"]:
        console.print("GPU now: " + ", ".join(f"{key}={value}" for key, value in found["gpu"].items()))
    for line in found["warnings"]:
        console.print(f"Warning: {line}")
    if not found["warnings"]:
        console.print("Nothing to complain about.")
    try:
        if json_file is not None:
            write_json(json_file, found)
        if csv_file is not None:
            write_csv(csv_file, ["section", "name", "value"], _facts(found))
    except OutputError as error:
        return complain(error)
    return OK if found["frameworks"] else FAILED
