"""What one process cannot know: how much processes differ."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bench.report.text import baseline_line, resolution_line
from bench.store import Store
from bench.study.claims import HOLDS, IN_PART, claim_results
from bench.study.process_spread import GUESS, ProcessSpread, spreads_by_machine
from bench.study.statistics import FASTER, SAME, SLOWER, UNRESOLVED, look_confidence
from bench.tests.in_memory import rankings, results_of
from bench.tests.synthetic import FINGERPRINT

SPEEDS = {"einsum": 1.015, "loop": 1.05, "vmap": 1.4, "masked": 0.5}


@pytest.fixture
def cell(make_record):
    """Records of one process: the competitors are so many times as fast as the baseline; rounds scatter by 0.2%.

    `off` is the standard deviation by which each process is off, as the control's is with its baseline.
    """

    def make(replicate, *, cell="c0", off=0.0, speeds=SPEEDS, environment_id="e0", **baseline):
        rng = np.random.default_rng([replicate, *cell.encode()])

        def timed(name, seconds, **changes):
            blocks = tuple((10 * seconds * np.exp(0.002 * rng.standard_normal(40))).tolist())
            found = {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10} | changes
            place = {"cell": cell, "environment_id": environment_id, "cell_size": len(speeds) + 2}
            return make_record(key=f"{cell}-{name}-{replicate}", process_replicate=replicate, **place, **found)

        base = 1e-3 * np.exp(off * rng.standard_normal())
        return [
            timed("base", base, baseline=True, **baseline),
            timed("control", base, baseline=True, control=True, **baseline),
            *(
                timed(name, 1e-3 / speed * np.exp(off * rng.standard_normal()), implementation=name)
                for name, speed in speeds.items()
            ),
        ]

    return make


def verdicts(ranking):
    return {row.record.implementation: row.verdict for row in ranking.rows}


def test_one_process_names_nobody_within_ten_percent_where_nothing_is_known(cell):
    (ranking,) = rankings(cell(0))
    found = verdicts(ranking)
    # A single comparison would have 10%; among four, the largest of four offsets reaches further.
    assert math.log(1.10) < ranking.resolution < math.log(1.14)
    assert (found["einsum"], found["loop"]) == (UNRESOLVED, UNRESOLVED)
    assert (found["vmap"], found["masked"]) == (FASTER, SLOWER)
    intervals = {row.record.implementation: row.interval for row in ranking.rows}
    assert intervals["loop"].low > 1.04, "the rounds alone would have named it"
    more = "more of them, as with --replicates 5, would tell smaller differences"
    assert baseline_line(ranking).endswith(f"nobody is called faster by less than 12.9% (one process; {more}).")
    assert f"One process measured 1 of the cells, and names nobody there within 12.9%: {more}." in resolution_line(
        [ranking]
    )


def test_processes_that_agree_know_better(cell):
    (ranking,) = rankings([record for replicate in range(4) for record in cell(replicate)])
    found = verdicts(ranking)
    assert ranking.resolution < math.log(1.01)
    assert found["einsum"] in (FASTER, SAME)
    assert found["loop"] == FASTER
    assert "one process" not in baseline_line(ranking)
    assert "One process" not in resolution_line([ranking])


def test_a_process_in_which_the_baseline_failed_does_not_count(cell):
    gone = {"status": "crash", "reason": "gone", "latency_s": None, "block_latency_s": (), "bound_fraction": None}
    (ranking,) = rankings([*cell(0), *cell(1, **gone)])
    assert ranking.resolution > math.log(1.10)
    assert verdicts(ranking)["loop"] == UNRESOLVED


def test_a_competitor_of_one_process_among_several_names_nobody_within_the_spread(cell):
    records = [record for replicate in range(4) for record in cell(replicate)]
    late = [record for record in records if record.implementation != "loop" or record.process_replicate == 0]
    (ranking,) = rankings(late)
    assert verdicts(ranking)["loop"] == UNRESOLVED
    assert verdicts(ranking)["einsum"] in (FASTER, SAME)
    assert verdicts(rankings(records)[0])["loop"] == FASTER


def several(cell, off, cells=4, **options):
    """Cells of five processes each."""
    return [
        record
        for k in range(cells)
        for replicate in range(5)
        for record in cell(replicate, cell=f"s{k}", off=off, **options)
    ]


def test_the_spread_of_processes_is_learned_from_the_same_machine(cell):
    one = cell(0, speeds=SPEEDS | {"matmul-like": 1.3})
    quiet = verdicts(rankings([*one, *several(cell, 0.001)])[0])
    assert (quiet["loop"], quiet["matmul-like"]) == (FASTER, FASTER)
    # Where processes are seen to differ by 12%, the 30% that would be named beyond a guess of 10% are not.
    loud = rankings([*one, *several(cell, 0.12)])[0]
    assert loud.resolution > math.log(1.3)
    assert verdicts(loud)["matmul-like"] == UNRESOLVED
    assert verdicts(loud)["masked"] == SLOWER
    # Another machine tells nothing, and the same one does so by whatever environment.
    elsewhere = several(cell, 0.12, environment_id="e1")
    known = {"e0": FINGERPRINT, "e1": FINGERPRINT | {"cpu_model": "another"}}
    found = results_of([*one, *elsewhere], known).found
    assert verdicts(found[0])["matmul-like"] == FASTER
    found = results_of([*one, *elsewhere], known | {"e1": FINGERPRINT | {"division": "tuned"}}).found
    assert verdicts(found[0])["matmul-like"] == UNRESOLVED


def test_what_was_seen_of_few_processes_is_not_trusted_below_what_it_shows():
    guess = ProcessSpread().reach(18)
    assert ProcessSpread().reach(1) == pytest.approx(GUESS)
    assert guess > ProcessSpread().reach(3) > GUESS
    # A few small deviations allow less than the guess, and a few large ones ask for more.
    assert 0.01 < ProcessSpread((0.001, 0.002) * 5, 4).reach(18) < guess
    assert ProcessSpread((0.001, 0.002, 0.01, 0.05), 1).reach(18) == pytest.approx(guess)
    assert ProcessSpread((0.01, 0.02, 0.4), 2).reach(1) == 0.4
    # Of many, a quantile: a twentieth of the deviations may lie beyond, less one standard error of their count.
    many = tuple(k / 1000 for k in range(1000))
    assert ProcessSpread(many, 400).reach(1) == pytest.approx(0.957, abs=0.002)
    assert ProcessSpread(many, 400).reach(10) > 0.99


def test_only_competitors_near_the_baseline_tell_of_the_spread(cell):
    """What takes ten times as long scatters far more, and no such offset could make it look faster."""
    groups = [[record for k in range(5) for record in cell(k, cell=f"s{c}", off=0.001)] for c in range(4)]
    far = [
        [
            replace(
                record, block_latency_s=tuple(np.array(record.block_latency_s) * 10 ** (1 + 0.2 * k)), latency_s=1e-2
            )
            if record.implementation == "masked"
            else record
            for k in range(5)
            for record in cell(k, cell=f"s{c}", off=0.001)
        ]
        for c in range(4)
    ]
    quiet, loud = (spreads_by_machine(found, {})["e0"].reach(4) for found in (groups, far))
    assert quiet == loud < 0.02


def test_commands_learn_from_all_directories_whatever_cells_are_shown(cell, call, tmp_path):
    def write(name, groups):
        store = Store(tmp_path / name, resume=False)
        store.add_environment("e0", FINGERPRINT)
        for group in groups:
            store.append(group)
        return tmp_path / name

    one = write("one", [cell(0)])
    more = write("more", [cell(k, cell=f"s{c}", off=0.12) for c in range(4) for k in range(5)])

    def shown(*directories):
        done = call("report", *directories, "--json", tmp_path / "f.json", "--where", "workload=article-base")
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "f.json").read_text())["cells"]
        (alone,) = [found_cell for found_cell in found if found_cell["process_replicates"] == 1]
        return alone

    assert shown(one)["spread_of_processes"] == pytest.approx(0.129, abs=0.001)
    assert shown(one, more)["spread_of_processes"] > 0.25
    assert shown(one, more)["resolution"] == shown(one, more)["spread_of_processes"]
    recommended = call(
        "recommend", one, "--num-partitions", 32, "--in-features", 32, "--out-features", 32, "--batch", 128
    )
    assert "One process measured it; more of them, as with --replicates 5, would" not in recommended.output


def test_a_claim_is_judged_with_what_another_process_may_measure(cell):
    def more_than_ten_times(speed, processes):
        speeds = {"loop": 1.0, "masked": speed, "dense": speed}
        (found, *_) = claim_results([[record for k in range(processes) for record in cell(k, speeds=speeds)]])
        return {finding.verdict for finding in found.findings if finding.interval is not None}

    assert more_than_ten_times(12.5, processes=1) == {HOLDS}
    assert more_than_ten_times(10.5, processes=1) == {IN_PART}
    assert more_than_ten_times(10.5, processes=4) == {HOLDS}


def test_the_price_of_looks_is_paid_by_one_process_alone(cell):
    looked = {"stopped": "resolved"}
    (ranking,) = rankings([replace(record, **looked) for record in cell(0)])
    assert ranking.confidence == look_confidence(20) > 0.99
    (ranking,) = rankings([replace(record, **looked) for replicate in (0, 1) for record in cell(replicate)])
    assert ranking.confidence == 0.95
