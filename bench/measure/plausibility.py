"""Whether a competitor can have done the work at all: by its program's own account, by the hardware's limits."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from bench.measure.entry import Entry
from bench.measure.processors import cpu_flops_limit
from bench.plan.cells import Cell
from bench.plan.costs import compulsory_bytes, useful_product_flops
from bench.plan.hardware import OVER_THE_CEILING, peak_rates


def take_probe(entry: Entry, found: dict[str, Any]) -> None:
    """Keeps what a probe found; a program that does less than the function needs ends its competitor."""
    doubt = found.pop("doubt")
    entry.probe = found
    if doubt:
        entry.rejected.extend(entry.blocks)
        entry.blocks.clear()
        entry.fail("mismatch", doubt)


def measured_ceilings(replies: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The higher of the frameworks' rates: a ceiling is what the device can do, whoever shows it."""
    highest: dict[str, float] = {}
    for found in replies:
        for name, rate in found.items():
            if name.startswith("ceiling_"):
                highest[name] = max(rate, highest.get(name, 0.0))
    return highest


def flops_limit(
    cell: Cell, ceilings: Mapping[str, float], device_name: str, observed: str | None = None
) -> float | None:
    """Operations a second that the device cannot exceed: by its data sheet, its kind, or what it was seen to do.

    Args:
        cell: what was asked for.
        ceilings: what `measured_ceilings` found.
        device_name: of the GPU, for its data sheet.
        observed: the precision class of the results.
    """
    limit = peak_rates(device_name, cell.precision, observed).get("flops_per_s")
    if limit is None and cell.device == "cpu":
        return cpu_flops_limit(cell.precision)
    if limit is None and "ceiling_flops_per_s" in ceilings:
        return OVER_THE_CEILING * ceilings["ceiling_flops_per_s"]
    return limit


def reject_the_impossible(
    entries: Iterable[Entry], cell: Cell, ceilings: Mapping[str, float], device_name: str
) -> None:
    """Ends every competitor whose rate is above what the hardware can do: the work was not done.

    Args:
        entries: after the rounds.
        cell: what was measured.
        ceilings: what `measured_ceilings` found.
        device_name: of the GPU, for its data sheet.
    """
    for entry in entries:
        if not (entry.going and entry.blocks and entry.calls_per_block):
            continue
        calls_per_s = entry.calls_per_block / median(entry.blocks)
        observed = (entry.judgement or {}).get("observed_precision")
        limits = {
            "operations": (useful_product_flops(cell), flops_limit(cell, ceilings, device_name, observed)),
            # A warm cache may deliver bytes faster than the memory can.
            "bytes of memory": (
                compulsory_bytes(cell),
                peak_rates(device_name, cell.precision).get("bytes_per_s") if cell.cache == "cold" else None,
            ),
        }
        for what, (amount, limit) in limits.items():
            if limit is not None and entry.going and amount * calls_per_s > limit:
                said = f"{amount * calls_per_s:.3g} {what} a second, over the {limit:.3g} that the device can do"
                entry.rejected.extend(entry.blocks)
                entry.blocks.clear()
                entry.fail("mismatch", f"{said}: not all was done")
