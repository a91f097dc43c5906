"""What each side of a pair computed on the way: its operations in order, and fingerprints of all their values.

A fingerprint does not depend on the order or the arrangement of the numbers, so that a value of one side is found on
the other whatever the layouts are. Noise of float64's size, as in `calibration`, tells how far equal ones may part.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import FORMATS
from parity_tests.pair.calibration import SEMANTIC_SCALE, confidence

_PARAMETER = "parameter:"
CONSTANT = "constant:"  # before the number of a value that was there before a run, and is not given to it
FEATURES = 5  # sums of v, |v|, v^2, |v|^3, v^3
_SIZES = (1, 1, 2, 3, 3)  # the sums of moduli that errors of these are relative to
_SIZE_FEATURE = {1: 1, 2: 2, 3: 3}
TIMES = "times "  # begins an alternative's name: the result times the number that follows
REVERSED = "parts reversed"  # an alternative's name: what is joined comes in the other order
ARGUMENT = "argument"  # in the place of an alternative's name: what an operation reads, not what it makes
# Operations of torch that rearrange what they read: no value is replaced at them.
# fmt: off
VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "unbind", "detach", "alias", "chunk", "diagonal", "as_strided", "split_with_sizes", "narrow",
    "read", "_reshape_alias", "unfold", "movedim", "flatten",
})
# fmt: on
MEMBERS = 6  # runs with noise behind a limit
LARGEST = 1e8  # what a mask puts in the place of a number would drown all others: left out, as are infinities
MOST_ELEMENTS = 2**24  # of arrays that are kept from one run; beyond, only those that are asked for


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        operation: as the framework names it.
        module: dotted path of the module that it ran in; empty for the top, or if there is none.
        line: the user's, as `port.py:12`; empty if unknown.
        reads: numbers of the values that it used.
        writes: numbers of the values that it made.
    """

    operation: str
    module: str
    line: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What one operation of a torch run does in place of what it does.

    Attributes:
        step: number of the operation.
        alternative: name of another function, from `Trace.alternatives`; empty for none; `ARGUMENT`, see `output`.
        output: which of its results `value` replaces; with `ARGUMENT` which of its operands.
        value: numbers in place of a result; None for none.
    """

    step: int
    alternative: str = ""
    output: int = 0
    value: np.ndarray | None = None


@dataclass(frozen=True)
class Trace:
    """A recorded run.

    Attributes:
        steps: in order of execution.
        sources: names of parameters (`parameter:w`), inputs (`input:0`) and cotangents, with their values' numbers.
        results: numbers of the values of outputs, gradients and buffers.
        features: fingerprints, one line a value.
        limits: how far equal fingerprints may lie apart, likewise.
        shapes: of the values.
        numbers: of the values in `arrays`.
        arrays: the values that were kept.
        outcome: the run's results.
        alternatives: step, name and sentence of what could have been meant by single operations.
    """

    steps: tuple[Step, ...]
    sources: Mapping[str, int]
    results: Mapping[str, int]
    features: np.ndarray
    limits: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...] = ()
    arrays: tuple[np.ndarray, ...] = ()
    outcome: Mapping[str, np.ndarray] = field(default_factory=dict)
    alternatives: tuple[tuple[Any, ...], ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of elements of every value."""
        return np.array([int(np.prod(shape)) for shape in self.shapes])

    def parameter(self, value: int) -> str:
        """Name the parameter that a value is, as it stands or rearranged; empty if it is none."""
        names = {number: name for name, number in self.sources.items() if name.startswith(_PARAMETER)}
        producers = self._producers
        while value not in names:
            reads = self.steps[producers[value]].reads if value in producers else ()
            if len(reads) != 1:
                return ""
            value = reads[0]
        return names[value].removeprefix(_PARAMETER)

    def is_parameter(self, value: int) -> bool:
        """Tell whether a value is a parameter, as it stands or seen otherwise: its rows, in another order, are not."""
        producers, own = self._producers, {n for name, n in self.sources.items() if name.startswith(_PARAMETER)}
        while value not in own and value in producers and self.steps[producers[value]].operation in VIEWS:
            value = self.steps[producers[value]].reads[0]
        return value in own

    @functools.cached_property
    def _producers(self) -> dict[int, int]:
        return self.producers()

    def producers(self) -> dict[int, int]:
        """Return by value the number of the step that made it."""
        return {value: number for number, step in enumerate(self.steps) for value in step.writes}


def limits(members: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return how far a fingerprint may lie from the truth's.

    Args:
        members: fingerprints by run, value and feature; the first run without noise, the others with float32's.
        sizes: number of elements by value.
    """
    centre, others = members[0], members[1:]
    spread = np.sqrt(np.mean((others - centre) ** 2, axis=0)) if len(others) else np.zeros_like(centre)
    # A sum of n numbers in pairs errs by log2(n) roundings of the sum of their moduli.
    moduli = np.stack([centre[:, _SIZE_FEATURE[size]] for size in _SIZES], axis=1)
    summed = FORMATS["float64"].roundoff * (2.0 + np.log2(np.maximum(sizes, 2)))[:, None] * moduli
    explained = SEMANTIC_SCALE * confidence(centre.size, max(len(others), 1)) * spread
    return np.where(np.isfinite(explained), explained, 0.0) + summed


@dataclass(frozen=True)
class Place:
    """Where two models part.

    Attributes:
        torch: name of the module, in the torch side's words, or of the parameters that are used there.
        flax: likewise.
        torch_operations: of the segment, in order.
        flax_operations: likewise.
        torch_line: the user's line of the first operation; empty if unknown.
        flax_line: likewise.
        after: the last place before it whose values agree, on either side; empty at the beginning.
        healed: `all` if with Flax's value in the place of torch's at its end all results agree, `here` if the values
            behind it do up to the next place, else empty.
        cause: what was proven to explain it, or empty.
        backward: whether it lies in the backward pass.
    """

    torch: str
    flax: str
    torch_operations: tuple[str, ...] = ()
    flax_operations: tuple[str, ...] = ()
    torch_line: str = ""
    flax_line: str = ""
    after: tuple[str, str] = ("", "")
    healed: str = ""
    cause: str = ""
    backward: bool = False

    def __str__(self) -> str:
        """Say it in one sentence."""
        names = [
            f"`{name or 'the top module'}`" + (f" ({line})" if line else "")
            for name, line in ((self.torch, self.torch_line), (self.flax, self.flax_line))
        ]
        proof = {
            "all": "with the flax side's value put in at its end, everything after it agrees",
            "here": "with the flax side's value put in at its end, what follows agrees up to the next place",
            "": "not proven by putting in values",
        }[self.healed]
        shown = [", ".join(_shortened(found)) for found in (self.torch_operations, self.flax_operations)]
        operations = f"; operations there: {shown[0] or 'none'} / {shown[1] or 'none'}"
        before = " / ".join(f"`{name or 'the top module'}`" for name in self.after)
        after = f", after {before} (values still agree there)" if any(self.after) else ""
        return f"in {' / '.join(names)}{' in the backward pass' * self.backward}{after}: {proof}{operations}"


def _shortened(operations: Sequence[str], most: int = 8) -> list[str]:
    listed = list(dict.fromkeys(operations))
    return listed[:most] + ["..."] * (len(listed) > most)


def shown(path: str) -> str:
    """Spell a path as Python does: `layers[13].norm`."""
    parts = path.split(".")
    return "".join(
        f"[{part}]" if part.isdigit() else part if part.startswith("[") or not k else f".{part}"
        for k, part in enumerate(parts)
    )


def before_views(trace: Trace, values: Sequence[int]) -> Iterator[int]:
    """Yield the values that some others are views of."""
    producers = trace.producers()
    for value in values:
        while value in producers and trace.steps[producers[value]].operation in VIEWS:
            value = trace.steps[producers[value]].reads[0]
        yield value


def parameters_of(trace: Trace, steps: Sequence[int | Step]) -> list[str]:
    """Name the parameters that some operations use, directly or rearranged."""
    read = [v for step in steps for v in (trace.steps[step] if isinstance(step, int) else step).reads]
    return list(dict.fromkeys(name for value in read if (name := trace.parameter(value))))
