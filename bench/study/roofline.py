"""Compare rates of useful work with the ceilings of the machine."""

import math
from dataclasses import dataclass

from bench.plan.competitors import EAGER
from bench.records import Record
from bench.study.ranking import Ranking, Row


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Derived figures of one competitor in one cell; None where a part of them was not measured."""

    flops_per_s: float | None  # useful operations a second: a dense form earns nothing for its zeros
    bytes_per_s: float | None  # compulsory bytes a second
    ceiling_fraction: float | None  # least possible time by the rates measured in the same session, over the time taken
    peak_fraction: float | None  # the same by the data sheet
    waste_factor: int  # how many times the useful products are carried out
    payback_calls: float | None  # calls after which compiling has paid; infinite if it never does
    # Label of what the compiled call is held against: eager calls of the same implementation, and where none were
    # timed, as in JAX, those of the baseline.
    payback_against: str | None
    enqueue_s: float | None  # host seconds until a call returns
    waited_s: float | None  # median seconds of a single call that is waited for
    kernels_per_call: int | None  # executions on the device in one call


def least_s(record: Record, flops_per_s: float | None, bytes_per_s: float | None) -> float | None:
    """Return the least seconds of a call, by its operations or by its bytes, whichever takes longer."""
    bounds = [
        amount / rate
        for amount, rate in ((record.useful_flops, flops_per_s), (record.compulsory_bytes, bytes_per_s))
        if rate
    ]
    return max(bounds) if bounds else None


def _payback(record: Record, latency_s: float | None, eager: Row | None) -> tuple[float | None, str | None]:
    if record.mode == EAGER or record.compile_s is None or latency_s is None or eager is None:
        return None, None
    saved = (eager.latency_s or 0.0) - latency_s
    return record.compile_s / saved if saved > 0 else math.inf, eager.record.label


def efficiencies(ranking: Ranking) -> dict[str, Efficiency]:
    """Return label to figures, for every row of a ranking."""
    eager = {row.record.label: row for row in ranking.rows if row.record.mode == EAGER and row.latency_s is not None}
    same = {(row.record.framework, row.record.implementation): row for row in eager.values()}
    # A failed baseline has no speed.
    baseline = eager.get(ranking.baseline or "")
    found = {}
    for row in ranking.rows:
        r, taken = row.record, row.latency_s
        ceiling = least_s(r, r.ceiling_flops_per_s, r.ceiling_bytes_per_s)
        peak = least_s(r, r.peak_flops_per_s, r.peak_bytes_per_s)
        payback, against = _payback(r, taken, same.get((r.framework, r.implementation), baseline))
        found[r.label] = Efficiency(
            flops_per_s=r.useful_flops / taken if taken else None,
            bytes_per_s=r.compulsory_bytes / taken if taken else None,
            ceiling_fraction=ceiling / taken if ceiling and taken else None,
            peak_fraction=peak / taken if peak and taken else None,
            waste_factor=r.waste_factor,
            payback_calls=payback,
            payback_against=against,
            enqueue_s=r.enqueue_s,
            waited_s=row.waited_s,
            kernels_per_call=sum(r.kernels.values()) if r.kernels else None,
        )
    return found
