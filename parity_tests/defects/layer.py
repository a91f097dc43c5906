"""Planted defects of whole layers: what their initialisers draw, and the masked layer's weights outside the blocks."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.defects.planting import Killing
from parity_tests.judge.initialization import flax_distribution, initialization_cause, torch_distribution

# Sixteen partitions of two thousand numbers: enough that a std half or twice what it should be cannot be chance.
NUM_PARTITIONS, IN_FEATURES, OUT_FEATURES = 16, 64, 32
DISTRIBUTIONS = {"torch": torch_distribution, "flax": flax_distribution}
DTYPES = ("float32", "bfloat16")
STEPS = 3  # AdamW with weight decay; a leak shows after the first


@dataclass(frozen=True)
class InitialDefect:
    """One way for an initialiser to be wrong.

    Attributes:
        name: what was planted.
        spoil: turns what the healthy initialiser drew, `(n, in, out)`, into what the wrong one would have drawn.
        cause: what `initialization_cause` must say.
    """

    name: str
    spoil: Callable[[np.ndarray], np.ndarray]
    cause: str


@dataclass(frozen=True)
class OffBlockDefect:
    """One way for the masked layer to let weights outside the blocks take effect.

    Attributes:
        name: what was planted, a name of `PLANTS` in the subject's room.
        cause: what `off_block_cause` must say.
    """

    name: str
    cause: str


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
    """Returns what is wrong outside the blocks of the masked layer in one clause; empty if everything there is zero.

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
    return importlib.import_module(f"parity_tests.frameworks.{framework}.layers")


def layers_of(framework: str) -> tuple[str, ...]:
    """Names of the framework's layer classes whose initialisers are judged."""
    return tuple(_room(framework).LAYERS)


def has_masked_layer(framework: str) -> bool:
    """True if the framework has a layer with a dense, masked parameter."""
    return hasattr(_room(framework), "masked_training")


def observe_initial(defect: InitialDefect, framework: str, layer: str, init: str, dtype: str, seed: int = 0) -> Killing:
    """Plants a defect in what a layer's initialiser drew and judges it.

    Args:
        defect: what is planted.
        framework: whose layer.
        layer: a name of `layers_of`.
        init: a name of `DISTRIBUTIONS`.
        dtype: storage dtype of the parameters.
        seed: of the draw.
    """
    drawn = _room(framework).initial_weight(layer, init, (NUM_PARTITIONS, IN_FEATURES, OUT_FEATURES), dtype, seed)
    expected = DISTRIBUTIONS[init](IN_FEATURES)
    cause = initialization_cause(defect.spoil(drawn), expected)
    return Killing(bool(cause) and not initialization_cause(drawn, expected), cause)


def observe_off_block(defect: OffBlockDefect, framework: str, dtype: str, seed: int = 0) -> Killing:
    """Plants a defect in the masked layer, trains it for `STEPS` steps and looks outside the blocks.

    Args:
        defect: what is planted.
        framework: one that has such a layer.
        dtype: storage dtype of the parameter.
        seed: of the data.
    """
    n, sizes = 3, (3, 4, 5)
    room = _room(framework)
    cause = off_block_cause(room.masked_training(sizes, dtype, STEPS, seed, defect.name), n)
    healthy = off_block_cause(room.masked_training(sizes, dtype, STEPS, seed), n)
    return Killing(bool(cause) and not healthy, cause)
