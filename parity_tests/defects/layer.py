"""Plant defects in whole layers: in what their initialisers draw, and outside the masked layer's blocks.

An initialiser is judged by standard deviation, mean, limits, and values that differ between partitions. A statistic of
N independent draws has a standard error that follows from the moments of the distribution. A sample more than
`STANDARD_ERRORS` of them away is rejected: a correct initialiser meets that once in some ten million draws.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.defects.subject import Killing

STANDARD_ERRORS = 5.5


@dataclass(frozen=True)
class Distribution:
    """A symmetric bounded distribution of mean zero."""

    std: float  # standard deviation
    limit: float  # no draw lies outside `[-limit, limit]`
    kurtosis: float  # fourth moment over the squared variance; sets the standard error of a sample's variance


def torch_distribution(in_features: int) -> Distribution:
    """Return U(-1/sqrt(i), 1/sqrt(i)), which `nn.Linear` draws for weight and bias."""
    limit = 1 / math.sqrt(in_features)
    return Distribution(limit / math.sqrt(3), limit, kurtosis=9 / 5)


def flax_distribution(in_features: int) -> Distribution:
    """Return the normal truncated at two of its own sigmas, std 1/sqrt(i), which `nnx.Linear` draws for its kernel."""
    cut = 2.0
    inside = math.erf(cut / math.sqrt(2))
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * cut * density / inside
    fourth = 3 - 2 * cut * (cut * cut + 3) * density / inside
    sigma = 1 / math.sqrt(in_features * variance)
    return Distribution(1 / math.sqrt(in_features), cut * sigma, kurtosis=fourth / variance**2)


def initialization_faults(draws: np.ndarray, expected: Distribution) -> list[str]:
    """List the faults of the draws, of the whole sample and of single partitions, in sentences.

    The draws are `(n, ...)`, partition axis first; at least 100 numbers a partition say something.
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
    """Return a likely cause of the faults in one clause; empty if there are none."""
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


# --- the defects ---

# Sixteen partitions of two thousand numbers: enough that a std half or twice what it should be cannot be chance.
NUM_PARTITIONS, IN_FEATURES, OUT_FEATURES = 16, 64, 32
DISTRIBUTIONS = {"torch": torch_distribution, "flax": flax_distribution}
DTYPES = ("float32", "bfloat16")
STEPS = 3  # AdamW with weight decay; a leak shows after the first


@dataclass(frozen=True)
class InitialDefect:
    """One way for an initialiser to be wrong."""

    name: str  # the planted mistake
    # Turns the draws of the healthy initialiser, `(n, in, out)`, into those of the wrong one
    spoil: Callable[[np.ndarray], np.ndarray]
    cause: str  # must be in the answer of `initialization_cause`


@dataclass(frozen=True)
class OffBlockDefect:
    """One way for the masked layer to let weights outside the blocks take effect."""

    name: str  # the planted defect, a name of `PLANTS` in the framework's `subjects.py`
    cause: str  # must be in the answer of `off_block_cause`


INITIAL_DEFECTS: tuple[InitialDefect, ...] = (
    InitialDefect(
        "identical partitions at init", lambda w: np.broadcast_to(w[:1], w.shape), "all partitions drew the same"
    ),
    InitialDefect(
        "sqrt(n) too small init",
        lambda w: (w.astype(np.float64) / np.sqrt(len(w))).astype(w.dtype),
        "sqrt(n) too small",
    ),
    InitialDefect("only positive weights at init", np.abs, "only positive"),
)
OFF_BLOCK_DEFECTS: tuple[OffBlockDefect, ...] = (
    OffBlockDefect("off-block leak after a step", "weights outside the blocks receive gradients"),
    OffBlockDefect("off-block weights unmasked after a step", "weights outside the blocks take effect after 3 steps"),
)


def off_block_cause(trace: Mapping[str, np.ndarray], num_partitions: int) -> str:
    """Name the fault outside the blocks of the masked layer in one clause; empty if everything there is zero.

    No tolerance: those entries are exact zeros in any dtype and after any number of steps, weight decay included.

    Args:
        trace: dense `(n * out, n * in)` matrices: `before`, the map that the layer computes at first;
            `gradient`, of its parameter; `after`, the map after `STEPS` optimiser steps.
        num_partitions: n.
    """
    sentences = {
        "before": "weights outside the blocks take effect from the start",
        "gradient": "weights outside the blocks receive gradients",
        "after": f"weights outside the blocks take effect after {STEPS} steps",
    }
    for name, sentence in sentences.items():
        rows, columns = trace[name].shape
        block = np.ones((rows // num_partitions, columns // num_partitions))
        outside = np.kron(np.eye(num_partitions), block) == 0
        if np.any(trace[name][outside] != 0):
            return sentence
    return ""


def _room(framework: str):
    return importlib.import_module(f"parity_tests.frameworks.{framework}.subjects")


def layers_of(framework: str) -> tuple[str, ...]:
    """Name of the framework's layer classes whose initialisers are judged."""
    return tuple(_room(framework).LAYERS)


def has_masked_layer(framework: str) -> bool:
    """Return True if the framework has a layer with a dense, masked parameter."""
    return hasattr(_room(framework), "masked_training")


def observe_initial(defect: InitialDefect, framework: str, layer: str, init: str, dtype: str) -> Killing:
    """Plant a defect in the draws of a layer's initialiser and judge it."""
    drawn = _room(framework).initial_weight(layer, init, (NUM_PARTITIONS, IN_FEATURES, OUT_FEATURES), dtype)
    expected = DISTRIBUTIONS[init](IN_FEATURES)
    cause = initialization_cause(defect.spoil(drawn), expected)
    return Killing(bool(cause) and not initialization_cause(drawn, expected), cause)


def observe_off_block(defect: OffBlockDefect, framework: str, dtype: str) -> Killing:
    """Plant a defect in the masked layer, train it for `STEPS` steps and look outside the blocks."""
    n, sizes = 3, (3, 4, 5)
    room = _room(framework)
    cause = off_block_cause(room.masked_training(sizes, dtype, STEPS, defect.name), n)
    healthy = off_block_cause(room.masked_training(sizes, dtype, STEPS), n)
    return Killing(bool(cause) and not healthy, cause)
