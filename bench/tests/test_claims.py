import csv
import json
import re

import numpy as np
import pytest

from bench.plan.workloads import WORKLOADS
from bench.report.claims import claims_block, measured
from bench.store import Store
from bench.study.claims import (
    CLAIMS,
    DENSE,
    DOES_NOT,
    HOLDS,
    IN_PART,
    LOOP,
    MASKED,
    NOT_HERE,
    Part,
    claim_results,
    judge,
)
from bench.study.statistics import Interval
from bench.tests.synthetic import FINGERPRINT

# What a machine would measure if every claim of the article held: speed over the loop's, by workload.
AS_CLAIMED = {
    # At 11x, one process does not show that another one would not measure less than 10x.
    "article-base": {DENSE: 12.5, MASKED: 12.0},
    "article-batch-1": {DENSE: 14.0, MASKED: 12.0},
    "article-batch-2048": {DENSE: 1.5, MASKED: 1.2},
    "article-n8": {DENSE: 0.6, MASKED: 0.5},
    "article-in8096": {DENSE: 2.5, MASKED: 1.5},
    "article-in256": {DENSE: 18.0, MASKED: 18.0},
    "article-out8096": {DENSE: 2.5, MASKED: 1.5},
    "article-out256": {DENSE: 18.0, MASKED: 18.0},
}


@pytest.fixture
def seed_records(make_record):
    """The records of a seed run in which the speeds over the loop's are as given."""

    def build(speeds, *, device="cuda", bytes_over_loop=4, precisions=("ieee_fp32",), skipped=()):
        rng = np.random.default_rng(0)
        groups = []
        for workload, faster in speeds.items():
            shape = WORKLOADS[workload]
            for direction in ("forward", "forward_backward"):
                for precision in precisions:
                    cell = f"{workload}-{direction}-{precision}"
                    group = []
                    names = {"matmul": 5.0, "loop": 1.0, **faster}
                    for k, name in enumerate((*names, "matmul")):
                        kind = "yardstick" if name == DENSE else "implementation"
                        blocks = tuple((0.02 / names[name] * np.exp(0.002 * rng.standard_normal(20))).tolist())
                        timed = {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10}
                        if name in skipped:
                            timed = {"block_latency_s": (), "latency_s": None, "status": "oom", "reason": "too large"}
                        group.append(
                            make_record(
                                key=f"{cell}-{k}",
                                cell=cell,
                                cell_size=len(names) + 1,
                                workload=workload,
                                batch=shape.batch,
                                num_partitions=shape.num_partitions,
                                in_features=shape.in_features,
                                out_features=shape.out_features,
                                device=device,
                                direction=direction,
                                precision=precision,
                                implementation=name,
                                kind=kind,
                                baseline=name == "matmul",
                                control=k == len(names),
                                peak_memory_bytes=1000 * (bytes_over_loop if name == MASKED else 1),
                                environment_id="e0",
                                **timed,
                            )
                        )
                    groups.append(group)
        return groups

    return build


def verdicts(groups):
    return {result.claim.number: result.verdict for result in claim_results(groups)}


def test_every_claim_of_the_article_is_there_and_its_settings_are_in_the_catalogue():
    assert [claim.number for claim in CLAIMS] == list(range(1, 11))
    needed = {name for claim in CLAIMS for name in claim.workloads}
    assert needed == set(AS_CLAIMED)
    assert needed <= set(WORKLOADS)
    # The article states totals over 32 partitions.
    assert [WORKLOADS[f"article-{name}"].in_features for name in ("base", "in8096", "in256")] == [32, 8096 // 32, 8]
    assert [WORKLOADS[f"article-{name}"].out_features for name in ("base", "out8096", "out256")] == [32, 8096 // 32, 8]
    assert WORKLOADS["article-batch-2048"].batch == 2048


@pytest.mark.parametrize(
    ("part", "interval", "expected"),
    [
        (Part(DENSE, "at least", 10), (11, 10.5, 11.5), HOLDS),
        (Part(DENSE, "at least", 10), (10.2, 9.5, 11), IN_PART),
        (Part(DENSE, "at least", 10), (3, 2.9, 3.1), IN_PART),
        (Part(DENSE, "at least", 10), (1, 0.9, 1.1), DOES_NOT),
        (Part(DENSE, "about", 1.5), (1.4, 1.3, 1.5), HOLDS),
        (Part(DENSE, "about", 1.5), (1.4, 0.9, 1.9), DOES_NOT),
        (Part(DENSE, "about", 2.5), (8.0, 7.9, 8.1), IN_PART),
        (Part(DENSE, "about", 2.5), (0.5, 0.4, 0.6), DOES_NOT),
        (Part(MASKED, "slower", 1), (0.5, 0.4, 0.6), HOLDS),
        (Part(MASKED, "slower", 1), (0.9, 0.8, 1.1), IN_PART),
        (Part(MASKED, "slower", 1), (1.5, 1.4, 1.6), DOES_NOT),
    ],
)
def test_a_part_is_judged_by_its_whole_interval(part, interval, expected):
    assert judge(part, Interval(*interval, 10)) == expected


def test_on_a_gpu_that_does_as_claimed_all_but_the_claim_about_cpus_holds(seed_records):
    found = verdicts(seed_records(AS_CLAIMED))
    assert {number for number, verdict in found.items() if verdict == HOLDS} == {1, 2, 3, 4, 5, 6, 7, 8, 10}
    assert found[9] == NOT_HERE


def test_on_a_gpu_that_does_the_opposite_no_claim_holds(seed_records):
    opposite = {workload: {case: 1 / speed for case, speed in cases.items()} for workload, cases in AS_CLAIMED.items()}
    found = verdicts(seed_records(opposite, bytes_over_loop=1))
    assert {verdict for number, verdict in found.items() if number != 9} == {DOES_NOT}


def test_half_a_claim_holds_in_part(seed_records):
    found = claim_results(seed_records(AS_CLAIMED | {"article-in8096": {DENSE: 2.5, MASKED: 0.5}}))
    assert found[4].verdict == IN_PART
    assert "in 2 of 4 ratios as claimed" in found[4].why
    assert "masked forward ieee_fp32 0.50x" in found[4].why


def test_a_claim_about_a_gpu_is_not_judged_by_a_cpu_but_its_ratios_are_shown(seed_records):
    results = claim_results(seed_records(AS_CLAIMED, device="cpu"))
    assert {result.verdict for result in results[:8]} == {NOT_HERE}
    assert results[0].why.startswith("The claim is about a GPU; on this CPU: dense forward ieee_fp32 12.")
    # The claim about CPUs is judged: here masking pays there too.
    assert (results[8].verdict, results[9].verdict) == (DOES_NOT, HOLDS)
    slower = {name: {DENSE: 0.5, MASKED: 0.2} for name in AS_CLAIMED}
    assert verdicts(seed_records(slower, device="cpu"))[9] == HOLDS


def test_every_precision_and_direction_counts(seed_records):
    results = claim_results(seed_records({"article-batch-2048": {DENSE: 1.5, MASKED: 1}}, precisions=("tf32", "bf16")))
    torch = [found for found in results[2].findings if found.framework == "torch"]
    assert {(f.where.direction, f.where.precision) for f in torch} == {
        (direction, precision) for direction in ("forward", "forward_backward") for precision in ("tf32", "bf16")
    }
    assert results[2].verdict == HOLDS
    assert {found.reason for found in results[2].findings if found.framework == "jax"} == {"loop was not measured"}


def test_what_was_not_measured_is_said(seed_records):
    results = claim_results(seed_records({"article-base": AS_CLAIMED["article-base"]}, skipped=(DENSE,)))
    assert results[2].verdict == NOT_HERE
    assert "Not among these records: article-batch-2048" in results[2].why
    assert results[1].verdict == NOT_HERE
    assert "dense: too large" in results[1].why
    assert "Not among these records: article-batch-1;" in results[0].why


def test_a_cell_without_the_two_that_are_compared_has_no_line(seed_records):
    full = seed_records(AS_CLAIMED)
    alone = [
        [r for r in group if r.implementation != LOOP] for group in full if group[0].workload == "article-batch-2048"
    ]
    (result,) = [found for found in claim_results([*full, *alone]) if found.claim.number == 3]
    assert sum(finding.absent for finding in result.findings) > 0
    assert len(measured(result).rows) == sum(not finding.absent for finding in result.findings)
    (nothing,) = [found for found in claim_results(alone) if found.claim.number == 3]
    assert {line[-1] for line in measured(nothing).rows} == {"loop was not measured"}


def test_our_best_in_the_same_setting_is_shown(seed_records):
    results = claim_results(seed_records({"article-base": {DENSE: 12.5, MASKED: 11}}))
    (forward, _) = results[1].best
    # The dense yardstick is faster and computes another function.
    assert forward.label == "torch masked (eager)"
    assert forward.interval.ratio == pytest.approx(11, rel=0.01)


def test_the_command_writes_the_same_in_every_form(seed_records, tmp_path, call):
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    for group in seed_records(AS_CLAIMED, device="cpu"):
        store.append(group)
    files = {kind: tmp_path / f"claims.{kind}" for kind in ("json", "csv", "markdown")}
    done = call("claims", tmp_path / "run", *(item for kind, file in files.items() for item in (f"--{kind}", file)))
    assert done.exit_code == 0
    for expected in ("not measurable here", "A about 12.5x faster than B", "torch masked (eager) 12"):
        assert expected in done.output
    # Every ratio with its interval, not only the ranges of the verdict.
    assert re.search(r"article-base .*, forward, .* torch .* dense about 12\.5x .* 12\.\d+x \[12\.", done.output)
    written = json.loads(files["json"].read_text())["claims"]
    assert [claim["verdict"] for claim in written] == [NOT_HERE] * 8 + [DOES_NOT, HOLDS]
    first = written[1]["measured"][0]
    assert (first["case"], first["claimed_ratio"], first["direction"]) == (DENSE, 12.5, "forward")
    assert first["measured_ratio"]["low"] < 12.5 < first["measured_ratio"]["high"]
    text = files["markdown"].read_text()
    assert "## Claim 10: masking costs much more memory" in text
    assert "| article-base (B=128, n=32, 32->32), forward, fp32, matched, cpu | torch | dense about 12.5x |" in text
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(claim["measured"]) for claim in written)
    assert LOOP not in {row["case"] for row in rows}


def test_the_block_of_a_page_has_a_line_for_each_claim(seed_records):
    lines = [line.split(" | ") for line in claims_block(claim_results(seed_records(AS_CLAIMED))).splitlines() if line]
    claims = {line[0].strip("| "): line for line in lines[2:]}
    assert list(claims) == [str(number) for number in range(1, 11)]
    forward, both, verdict = claims["2"][3:]
    # Ours is in each direction beside what the article's layers were measured at in it.
    assert [figures.split(", ")[0] for figures in (forward, both)] == ["dense 12.5x"] * 2
    assert all(re.fullmatch(r"ours [\d.]+x", figures.split(", ")[1]) for figures in (forward, both))
    assert verdict.startswith(HOLDS)
    assert "masked " in claims["1"][3]
    # A ratio of bytes is no speed, and nothing was measured on a CPU.
    assert "masked " in claims["10"][3]
    assert "ours" not in claims["10"][3]
    assert claims["9"][3:5] == ["-", "-"]
    assert "these records are of a GPU" in claims["9"][5]
