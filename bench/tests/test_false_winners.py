"""Equal competitors are not named, whatever the noise: simulated cells, judged by the functions that judge records."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from bench.study.cells import Block
from bench.study.process_spread import NOTHING_SEEN
from bench.study.statistics import FASTER, SAME, SLOWER, UNKNOWN, UNRESOLVED, Interval, verdict
from bench.study.verdicts import CONTROL, measure
from bench.tests import simulated_cells as cells

METHOD = Path(__file__).with_name("simulated_cells.md")
# With so many simulated cells, a share is known to three standard errors of a share of 3%.
SOME = 80


@pytest.mark.parametrize("processes", [1, 5])
def test_processes_that_differ_make_no_winners(processes):
    found = cells.shares(cells.OFFSETS, processes, 10, SOME)
    assert found["before"] > (0.9 if processes == 1 else 0.15), "the noise would have named somebody"
    after = found["after" if processes == 5 else cells.UNSEEN]
    assert after <= 0.05
    if processes == 1:
        assert found[cells.SEEN] <= 0.1
        # Without any allowance for processes, the correction alone does not help.
        assert found[cells.ALIKE_] > 0.9


@pytest.mark.parametrize("noise", [cells.GAUSSIAN, cells.MIXED, cells.LOGNORMAL, cells.BIMODAL, cells.RANDOM_WALK])
def test_rounds_that_scatter_make_no_winners(noise):
    assert cells.shares(noise, 1, 20, SOME)[cells.ALIKE_] <= 0.06


def test_true_differences_are_named():
    assert cells.shares(cells.GAUSSIAN, 1, 20, SOME, faster=1.03, wanted=(FASTER,))[cells.ALIKE_] > 0.6
    assert cells.shares(cells.LOGNORMAL, 1, 10, SOME, faster=10.0, wanted=(FASTER,))[cells.ALIKE_] > 0.6
    # Five processes say little about their own scatter, each competitor for itself: 7 standard errors would be asked.
    assert cells.shares(cells.GAUSSIAN, 5, 10, SOME, faster=1.03, wanted=(FASTER,))["after"] > 0.7


def test_what_differs_is_not_called_the_same():
    found = cells.shares(cells.OFFSETS, 1, 40, SOME, faster=1.05, wanted=(SAME,))
    assert found["before"] > 0.02
    assert (found[cells.SEEN], found[cells.UNSEEN]) == (0, 0)
    assert cells.shares(cells.OFFSETS, 5, 40, SOME, faster=1.05, wanted=(SAME,))["after"] == 0


def test_equals_have_no_winner_and_no_faster_framework():
    for processes in (1, 5):
        assert max(cells.firsts(cells.OFFSETS, processes, 10, SOME).values()) <= 0.05


def test_a_control_that_may_be_off_by_more_than_tenfold_hands_out_no_verdict():
    """Five bimodal rounds, as on a busy machine: 34x [21, 50] was called FASTER beside a control of [0.05, 21]."""
    rng, named = np.random.default_rng(0), 0
    for _ in range(150):
        logs = cells.simulated(rng, cells.BIMODAL, 1, 5)
        found = cells.measured(logs)
        if found.floor > UNKNOWN:
            named += bool({FASTER, SLOWER} & set(cells.before(found, 1)))
            assert set(found.verdicts(list(found.intervals), 0.0).values()) == {UNRESOLVED}
    assert named > 0, "estimates against the floor named somebody"
    control = Interval(1.02, 0.05, 21.0, 5, 1)
    for ratio in (Interval(34.0, 21.0, 50.0, 5, 1), Interval(900.0, 800.0, 1000.0, 5, 1), Interval(1, 0.99, 1.01, 5)):
        assert verdict(ratio, math.log(control.high)) == UNRESOLVED
    assert verdict(Interval(34.0, 21.0, 50.0, 5), math.log(9)) == FASTER


def judged(ratios, control, lengths=(20,)):
    """Verdicts on rows of log ratios to the baseline."""
    labels = tuple(str(k) for k in range(len(ratios)))
    block = Block((CONTROL, *labels), np.vstack([control, ratios]), lengths, tuple(range(len(lengths))))
    found = measure([block], 0.95)
    return found, found.verdicts(labels, 0.0)


def test_a_verdict_is_corrected_for_the_number_of_competitors():
    rng = np.random.default_rng(3)
    noise = rng.standard_normal(20)
    noise -= noise.mean()
    control = 0.001 * rng.standard_normal(20)
    # 3 standard errors away from 1: enough for one competitor, not for one of eighteen that scatter alike.
    one = 0.03 * noise + 0.023
    alone = judged(one[None], control)[1]
    assert alone["0"] == FASTER
    others = 0.03 * rng.standard_normal((17, 20))
    found, among = judged(np.vstack([one, others]), control)
    assert among["0"] == UNRESOLVED
    assert found.intervals["0"].low > 1, "its own interval still leaves 1 out"


def test_the_baseline_is_known_by_both_of_its_runs():
    rng = np.random.default_rng(4)
    base, again, other = 0.03 * rng.standard_normal((3, 20))
    found, _ = judged((base - other)[None], base - again)
    assert found.tested["0"].mean == pytest.approx(cells.trimmed_mean((base + again) / 2 - other))
    # A competitor that left early is tested in the rounds that it has.
    blocks = [
        Block((CONTROL,), (base - again)[None], (20,), (0,)),
        Block(("early",), (base - other)[None, :8], (8,), (0,)),
    ]
    early = measure(blocks, 0.95).tested["early"]
    assert early.mean == pytest.approx(((base + again) / 2 - other)[:8].mean())
    # Without a control in its process it is compared with the baseline alone.
    blocks[0] = Block((CONTROL,), (base - again)[None], (20,), (1,))
    assert measure(blocks, 0.95).tested["early"].mean == pytest.approx((base - other)[:8].mean())


def limits(name):
    """The most that a row of equals may show, as shares of 5, 10, 20 and 40 rounds, and what it is known to."""
    return {cells.RANDOM_WALK: 0.024, cells.MIXED: 0.03, cells.OFFSETS: 0.028}.get(name, 0.012)


def test_the_tables_of_the_method(request):
    count = request.config.getoption("--simulated-cells", default=0)
    if not count:
        pytest.skip("takes five minutes of processor: run with --simulated-cells 1000, as for the tables of the method")
    text = METHOD.read_text()
    for table in cells.tables(count):
        equal, one = table.caption.startswith("Of equal competitors any"), table.caption.endswith("one process")
        for name, found in table.rows.items():
            for rule, shares in found.items():
                error = [3 * math.sqrt(max(share, 0.003) * (1 - share) / count) for share in shares]
                if equal and rule != "before" and name != cells.FACTOR and not (one and name == cells.OFFSETS):
                    assert all(s <= limits(name) + e for s, e in zip(shares, error, strict=True)), (name, rule, shares)
        if table.caption.startswith("A faster") and one:
            small, large = (found[cells.ALIKE_] for found in table.rows.values())
            wanted = (0, 0.22, 0.69, 0.98)
            assert all(s >= w - 0.03 for s, w in zip(small, wanted, strict=True)), small
            assert large[1] >= 0.75
        if count == 1000:
            # The same seeds, on a processor whose sums may round differently.
            fresh, shown = (figures(part) for part in (cells.markdown(table), text[text.index(table.caption) :]))
            assert shown[: len(fresh)] == pytest.approx(fresh, abs=0.3), table.caption


def figures(text):
    """Every number of a table of shares, in order."""
    rows = re.findall(r"^\|(?! noise|---)[^|]*\|(.*)\|$", text, flags=re.M)
    return [float(number) for row in rows for number in re.findall(r"\d+\.\d", row)]


def test_the_method_shows_tables_of_the_simulation():
    text = METHOD.read_text()
    assert text.count("in percent of the cells, at") == 8
    for name in cells.DISTRIBUTIONS:
        assert text.count(f"| {name} |") >= 2


def test_nothing_seen_allows_ten_percent_for_two():
    assert math.exp(NOTHING_SEEN.reach(1)) == pytest.approx(1.10)
