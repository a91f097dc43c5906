"""Rows that compare two subjects: torch against JAX, and a mode against its subject's default mode."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from parity_tests.judge.cases import Case
from parity_tests.judge.cell import Judgement
from parity_tests.judge.comparison import compare_pair, pair_limits
from parity_tests.judge.modes import COUNTERPARTS, DEFAULT_MODES
from parity_tests.judge.oracle import Reference
from parity_tests.judge.records import ParityRow, row_from_result
from parity_tests.judge.subjects import Subject
from parity_tests.judge.tolerance import Arithmetic


def command_of(dtype: str, case: str, seed: int, device: str, precision: str | None, *subjects: Subject) -> str:
    """The command that repeats a row: everything by name; mode, device and precision where not the default."""
    frameworks = dict.fromkeys(subject.framework for subject in subjects)
    names = dict.fromkeys(subject.implementation for subject in subjects)
    modes = dict.fromkeys(subject.mode for subject in subjects)
    if all(subject.mode == DEFAULT_MODES[subject.framework] for subject in subjects):
        modes = {}
    options = [
        *(f"--framework {name}" for name in frameworks if len(frameworks) == 1),
        *(f"--implementation {name}" for name in names),
        *(f"--mode {name}" for name in modes),
        *([] if device == "auto" else [f"--device {device}"]),
        *([] if precision is None else [f"--precision {precision}"]),
    ]
    return f"python -m parity_tests run {' '.join(options)} --dtype {dtype} --case {case} --seed {seed}"


def _kind_of_pair(first: Subject, second: Subject) -> str | None:
    """`pair` for torch against JAX in counterpart modes, `mode` for a mode against its subject's default.

    Every implementation meets every other in the default modes; in the others it meets itself.
    """
    default = tuple(DEFAULT_MODES.values())
    if (first.framework, second.framework) == ("torch", "jax"):
        modes = (first.mode, second.mode)
        same = first.implementation == second.implementation
        return "pair" if modes == default or (same and modes in COUNTERPARTS) else None
    if (first.framework, first.implementation) != (second.framework, second.implementation):
        return None
    return "mode" if first.mode != second.mode == DEFAULT_MODES[second.framework] else None


def pair_rows(
    judged: Sequence[tuple[Subject, Judgement]],
    truth: Reference,
    dtype: str,
    case: Case,
    command: Callable[..., str],
) -> Iterator[ParityRow]:
    """Compares every two subjects that belong together, within the sum of their bounds.

    Args:
        judged: who ran the case, with what it returned.
        truth: the oracle's tensors.
        dtype: storage dtype.
        case: the shape.
        command: of two subjects, what repeats their row.
    """
    # The same for many pairs, and dearer than a comparison.
    limits: dict[tuple[Arithmetic, Arithmetic], dict[str, np.ndarray]] = {}
    for first, first_judgement in judged:
        for second, second_judgement in judged:
            kind = _kind_of_pair(first, second)
            if kind is None:
                continue
            used = (first_judgement.arithmetic, second_judgement.arithmetic)
            if used not in limits:
                limits[used] = pair_limits(truth, used)
            results = compare_pair(first_judgement.outputs, second_judgement.outputs, truth, limits[used])
            frameworks = dict.fromkeys((first.framework, second.framework))
            where: dict[str, Any] = {
                "kind": kind,
                "framework": "+".join(frameworks),
                "implementation": "+".join(
                    [first.implementation, *([second.implementation] if kind == "pair" else [])]
                ),
                "mode": f"{first.mode}+{second.mode}",
                "dtype": dtype,
                "case": case.name,
                "command": command(first, second),
                "tensor_fractions": {result.tensor: result.bound_fraction for result in results},
            }
            # Some thousand pairs hold in a run: one row each that names its closest tensor, and one for each failure.
            failed = [result for result in results if result.status == "mismatch"]
            for result in failed or [max(results, key=lambda result: result.bound_fraction)]:
                yield row_from_result(result, **where)
