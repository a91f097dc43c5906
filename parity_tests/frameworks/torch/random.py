"""torch's global random state, set for a while and put back: a check leaves the caller's own draws as they were."""

import contextlib
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seeds torch, and restores the generators on leaving.

    Args:
        seed: non-negative.
        devices: GPUs whose generators are restored beside the CPU's.
    """
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
