"""The score of the planted defects for user pairs: every one must be killed in every dtype in which it matters."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from parity_tests.pair.check import judge_pair


@dataclass(frozen=True)
class Killing:
    """One defect in one dtype.

    Attributes:
        name: what was planted, and in which pair.
        dtype: storage dtype judged in, beside the float64 leg.
        killed: whether the report was not ok.
        likely_cause: what the report said.
        cause_named: whether that contains what the defect's table promises.
    """

    name: str
    dtype: str
    killed: bool
    likely_cause: str
    cause_named: bool


def score(dtypes: tuple[str, ...] = ("float32", "bfloat16"), seed: int = 0, name: str = "") -> Iterator[Killing]:
    """Plants every defect and judges it; needs both frameworks.

    Args:
        dtypes: storage dtypes.
        seed: of all draws.
        name: only the defect of this name; empty for all.
    """
    table = importlib.import_module("parity_tests.frameworks.jax.defects")
    for defect in table.DEFECTS:
        if name and defect.name != name:
            continue
        chosen = tuple(dtype for dtype in dtypes if dtype in defect.dtypes)
        if not chosen:
            continue
        report = judge_pair(table.planted(defect), seed, chosen)
        named = defect.cause in report.likely_cause
        for dtype in chosen:
            # Each dtype's verdict rests on its own rows and on the float64 leg, which is part of every check.
            killed = any(row.status == "mismatch" and row.dtype in (dtype, "float64") for row in report.rows)
            yield Killing(
                f"{defect.example}: {defect.name}", dtype, killed or report.random, report.likely_cause, named
            )
