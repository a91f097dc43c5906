"""Judges an initialiser by what it drew: std, mean, bounds, and that partitions draw their own values.

A statistic of N independent draws has a standard error that follows from the distribution's moments; a sample that lies
more than `STANDARD_ERRORS` of them away is rejected (a correct initialiser meets that once in some ten million).
"""

import math
from dataclasses import dataclass

import numpy as np

STANDARD_ERRORS = 5.5


@dataclass(frozen=True)
class Distribution:
    """A symmetric bounded distribution of mean zero.

    Attributes:
        std: standard deviation.
        limit: no draw lies outside `[-limit, limit]`.
        kurtosis: fourth moment over the squared variance; sets the standard error of a sample's variance.
    """

    std: float
    limit: float
    kurtosis: float


def torch_distribution(in_features: int) -> Distribution:
    """U(-1/sqrt(i), 1/sqrt(i)): what `nn.Linear` draws for weight and bias."""
    limit = 1 / math.sqrt(in_features)
    return Distribution(limit / math.sqrt(3), limit, kurtosis=9 / 5)


def flax_distribution(in_features: int) -> Distribution:
    """Normal truncated at two of its own sigmas, scaled to std 1/sqrt(i): what `nnx.Linear` draws for its kernel."""
    cut = 2.0
    inside = math.erf(cut / math.sqrt(2))
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * cut * density / inside
    fourth = 3 - 2 * cut * (cut * cut + 3) * density / inside
    sigma = 1 / math.sqrt(in_features * variance)
    return Distribution(1 / math.sqrt(in_features), cut * sigma, kurtosis=fourth / variance**2)


def initialization_faults(draws: np.ndarray, expected: Distribution) -> list[str]:
    """Returns what is wrong with the draws, in sentences; empty if nothing is.

    Args:
        draws: `(n, ...)`, the partition axis first; at least 100 numbers a partition say something.
        expected: the distribution per partition.

    Returns:
        Faults of the whole sample and of single partitions.
    """
    faults = []
    values = draws.astype(np.float64).reshape(len(draws), -1)
    # Rounding to the storage dtype may push a draw past the limit by one rounding.
    slack = 1 + 2 * float(np.finfo(draws.dtype).eps) if draws.dtype.kind == "f" else 1 + 2.0**-6
    if np.abs(values).max() > expected.limit * slack:
        faults.append(f"largest magnitude {np.abs(values).max():.6g} exceeds the limit {expected.limit:.6g}")

    def judge(sample: np.ndarray, what: str) -> None:
        count = sample.size
        mean_error = expected.std / math.sqrt(count)
        if abs(sample.mean()) > STANDARD_ERRORS * mean_error:
            faults.append(f"{what}: mean {sample.mean():.6g} is not 0 within {STANDARD_ERRORS} x {mean_error:.3g}")
        variance, relative_error = float(np.mean(sample**2)), math.sqrt((expected.kurtosis - 1) / count)
        if abs(variance / expected.std**2 - 1) > STANDARD_ERRORS * relative_error:
            ratio = math.sqrt(variance) / expected.std
            faults.append(f"{what}: std is {ratio:.4g} times the expected {expected.std:.6g}")

    judge(values.ravel(), "all partitions")
    for index, partition in enumerate(values):
        judge(partition, f"partition {index}")
    return faults + [
        f"partition {index} drew the same values as partition 0"
        for index in range(1, len(values))
        if np.array_equal(values[index], values[0])
    ]


def initialization_cause(draws: np.ndarray, expected: Distribution) -> str:
    """Returns a likely cause of the faults in one clause; empty if there are none.

    Args:
        draws: `(n, ...)`, as for `initialization_faults`.
        expected: the distribution per partition.
    """
    faults = initialization_faults(draws, expected)
    if not faults:
        return ""
    values = draws.astype(np.float64).reshape(len(draws), -1)
    if len(values) > 1 and (values == values[:1]).all():
        return "all partitions drew the same values"
    if (values > 0).all():
        return "only positive values were drawn"
    relative_error = math.sqrt((expected.kurtosis - 1) / values.size)
    if abs(len(values) * float(np.mean(values**2)) / expected.std**2 - 1) <= STANDARD_ERRORS * relative_error:
        return "the fan-in counts all n partitions: the std is sqrt(n) too small"
    return faults[0]
