"""Rankings, reports and intervals of records and rounds that are in memory, where commands read them from files."""

from collections import defaultdict

import numpy as np

from bench.environments import device_name
from bench.report import export
from bench.report.markdown import report_lines
from bench.study.process_spread import spreads_by_machine
from bench.study.ranking import rank_cells, tally
from bench.study.results import Results
from bench.study.statistics import CONFIDENCE, middle_rounds, ratio_intervals


def rankings(records, machines=None):
    """One ranking for each cell and environment; `machines` maps environments to the machine that they were on."""
    cells = defaultdict(list)
    for record in records:
        cells[(record.environment_id, record.cell)].append(record)
    several = [group for group in cells.values() if len({record.process_replicate for record in group}) > 1]
    seen = spreads_by_machine(several, machines or {}) if len(several) < len(cells) else {}
    return rank_cells(cells.values(), seen)


def results_of(records, environments):
    machines = {key: device_name(found) for key, found in environments.items()}
    return Results(tuple(rankings(records, machines)), tally(records), environments)


def report(results, notes=()):
    """The whole report as Markdown."""
    return "\n".join(report_lines(results, notes)).rstrip() + "\n"


def summary(results, notes=()):
    """What `write_summary` writes, as one object."""
    return export._head(results, notes) | {"cells": [export._ranking(ranking) for ranking in results.found]}


def trimmed_mean(log_ratios):
    """The mean of the middle rounds, along the last axis."""
    count = log_ratios.shape[-1]
    cut = (count - middle_rounds(count)) // 2
    return np.sort(log_ratios, axis=-1)[..., cut : count - cut].mean(-1)


def ratio_interval(log_ratios, *, confidence=CONFIDENCE, seed=0):
    """The interval of one competitor, from an array of per-round log ratios for each process."""
    lengths = tuple(map(len, log_ratios))
    return ratio_intervals(np.concatenate(log_ratios)[None], lengths, confidence=confidence, seed=seed)[0]
