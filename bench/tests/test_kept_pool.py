"""Workers that outlive a cell: lent to one user at a time, ended when nobody wants them."""

import threading

import pytest

from bench.measure.workers import KeptPool


class Pool:
    """Stands in for a pool of framework processes."""

    def __init__(self):
        self.closed = threading.Event()

    def close(self, **_):
        self.closed.set()


def used(kept, kind):
    with kept.take(kind, Pool) as pool:
        assert not pool.closed.is_set()
    return pool


def test_the_same_kind_gets_the_same_workers():
    kept = KeptPool()
    first = used(kept, "matched")
    assert used(kept, "matched") is first
    assert not first.closed.is_set()
    kept.close()
    assert first.closed.is_set()
    assert used(kept, "matched") is not first
    kept.close()


def test_another_kind_ends_the_workers_before():
    kept = KeptPool()
    first = used(kept, "matched")
    with kept.take("tuned", Pool) as second:
        assert second is not first
        assert first.closed.is_set()
    kept.close()


def test_workers_end_after_a_failure():
    kept = KeptPool()
    first = used(kept, "matched")
    with pytest.raises(RuntimeError), kept.take("matched", Pool):
        raise RuntimeError
    assert first.closed.is_set()
    assert used(kept, "matched") is not first
    kept.close()


def test_idle_workers_end_by_themselves_and_lent_ones_do_not():
    kept = KeptPool(keep_s=0.05)
    idle = used(kept, "matched")
    assert idle.closed.wait(30)
    with kept.take("matched", Pool) as lent:
        assert not lent.closed.wait(0.2)
    assert lent.closed.wait(30)


def test_two_users_at_once_have_workers_of_their_own():
    kept = KeptPool()
    with kept.take("matched", Pool) as first, kept.take("matched", Pool) as second:
        assert first is not second
    # One of them stays.
    assert first.closed.is_set() != second.closed.is_set()
    kept.close()
    assert first.closed.is_set()
    assert second.closed.is_set()
