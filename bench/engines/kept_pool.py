"""Framework processes that outlive a cell: starting them anew costs seconds, often as much as the cell itself."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from bench.measure.pool import WorkerPool

KEEP_S = 60.0


class KeptPool:
    """Keeps the workers of the last cell until another kind is wanted, or nobody wanted them for a while.

    A device has one owner, so that one pool at a time is enough; idle workers hold memory of the device, so that they
    do not stay for good.

    Args:
        keep_s: seconds after which idle workers end.
    """

    def __init__(self, keep_s: float = KEEP_S):
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._idle: tuple[Hashable, WorkerPool] | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def take(self, kind: Hashable, start: Callable[[], WorkerPool]) -> Iterator[WorkerPool]:
        """Lends workers; after a failure they end, since nobody knows what they still do.

        Args:
            kind: whatever tells workers of one sort from those of another.
            start: starts workers of this sort.
        """
        kept = self._taken()
        if kept is not None and kept[0] != kind:
            kept[1].close()
            kept = None
        pool = start() if kept is None else kept[1]
        try:
            yield pool
        except BaseException:
            pool.close()
            raise
        self._keep(kind, pool)

    def close(self) -> None:
        """Ends workers that nobody uses."""
        kept = self._taken()
        if kept is not None:
            kept[1].close()

    def _taken(self) -> tuple[Hashable, WorkerPool] | None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            kept, self._idle, self._timer = self._idle, None, None
        return kept

    def _keep(self, kind: Hashable, pool: WorkerPool) -> None:
        with self._lock:
            before, self._idle = self._idle, (kind, pool)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._keep_s, self._close_if_idle, (pool,))
            # The end of the process ends its workers as well, since they read from it.
            self._timer.daemon = True
            self._timer.start()
        if before is not None:
            before[1].close()

    def _close_if_idle(self, pool: WorkerPool) -> None:
        with self._lock:
            # A timer that was cancelled too late must not end workers that are lent again.
            if self._idle is None or self._idle[1] is not pool:
                return
            self._idle = self._timer = None
        pool.close()
