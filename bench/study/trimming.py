"""Means that a few disturbed rounds cannot move: a fifth of the rounds is left out of the mean at either end.

On a host that is shared, some rounds tell what another guest did. Their log ratios lie far outside the rest, in both
directions alike, and a plain mean spends most of its rounds on averaging them out. The mean of the middle three fifths
does not, and loses a few percent of precision where nothing disturbs. No sample is deleted: the records hold all, and
a round counts by its rank, whoever is ahead in it.

The interval of a trimmed mean follows from values that are pulled in to the ends of the middle part ("winsorised"),
with as many degrees of freedom as rounds in it (Tukey and McLaughlin, Less vulnerable confidence and significance
procedures for location, 1963; Yuen, The two-sample trimmed t for unequal population variances, 1974). Pseudo-values
carry this over to anything that averages rounds, such as a bootstrap.
"""

import numpy as np

TRIMMED = 0.2  # at either end; the share that the literature settled on
# With fewer, what is left says too little about its own scatter: the mean of all is taken.
LEAST_ROUNDS = 10


def _trimmed_rounds(rounds: int) -> int:
    # A product such as 0.2 * 15 is exact enough only after rounding.
    return int(round(TRIMMED * rounds, 9)) if rounds >= LEAST_ROUNDS else 0


def middle_rounds(rounds: int) -> int:
    """How many of so many rounds enter a trimmed mean."""
    return rounds - 2 * _trimmed_rounds(rounds)


def trimmed_mean(log_ratios: np.ndarray) -> np.ndarray:
    """Mean of the middle rounds, along the last axis."""
    cut = _trimmed_rounds(log_ratios.shape[-1])
    ordered = np.sort(log_ratios, axis=-1)
    return ordered[..., cut : log_ratios.shape[-1] - cut].mean(-1)


def pseudo_values(log_ratios: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """One value for each round, whose mean over a process is the trimmed mean and whose scatter is that of it.

    Args:
        log_ratios: rows of rounds, the processes behind one another.
        lengths: number of rounds of each process.
    """
    parts, start = [], 0
    for length in lengths:
        rounds = log_ratios[..., start : start + length]
        start += length
        cut = _trimmed_rounds(length)
        if cut == 0:
            parts.append(rounds)
            continue
        ordered = np.sort(rounds, axis=-1)
        pulled_in = np.clip(rounds, ordered[..., cut, None], ordered[..., length - 1 - cut, None])
        middle = ordered[..., cut : length - cut].mean(-1, keepdims=True)
        share = (length - 2 * cut) / length
        parts.append(middle + (pulled_in - pulled_in.mean(-1, keepdims=True)) / share)
    return np.concatenate(parts, axis=-1)
