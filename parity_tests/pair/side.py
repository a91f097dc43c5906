"""The two sides of a pair: NumPy in, NumPy out, whatever the framework and the kind of module.

A side returns every buffer (running statistics, caches, counters) as it is after a call, beside its outputs: two
modules with equal outputs and gradients may still part after one training step. Each framework watches one run of its
own for branches that no value took, and reports them to `Branches`: two functions that part only there look equal.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from parity_tests.judge.dtypes import FORMATS, is_inexact, widened
from parity_tests.pair.calls import Layout

Arrays = Mapping[str, np.ndarray]
SHOWN = {"torch": "torch", "jax": "flax"}  # the sides as messages name them
Array = TypeVar("Array")  # NumPy's, or of a framework
PREFIX = "state:"  # of a buffer as it is after a call
_MOST_PLACES = 4  # that one sentence lists
_LARGEST_BOUND = 2.0**127  # float32 holds nothing beyond: such a bound is none
_WIDER = 2.0  # how far beyond a bound the values are to reach by the scale that is proposed
# Exceptions of a framework or a module that cannot run in a format; refusals of the judge are among them. Not
# an OSError: an interpreter that has died ends the check.
CANNOT_RUN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ParameterSpec:
    """One array of a module."""

    value: np.ndarray  # as the module holds it before anything is drawn; gives the shape, the dtype and the scale
    # True for a parameter that gradients are taken of, False for a frozen one and for a buffer (a running statistic, a
    # mask)
    trainable: bool
    frozen: bool = False  # True for a parameter that the module itself keeps out of training (`requires_grad=False`)

    @property
    def kind(self) -> str:
        """Describe the array, for messages."""
        return "a parameter" if self.trainable else "a frozen parameter" if self.frozen else "a buffer"


@dataclass(frozen=True)
class Ensemble:
    """A rounding-noise ensemble around a float64 run, tensor by tensor."""

    centre: Arrays  # the run without noise
    spread: Arrays  # root mean square of the deviations of `members` runs from the centre
    kinks: Arrays  # largest deviation of the runs with `KINK_AMPLITUDE` times the noise, see `calibration`
    members: int  # how many runs `spread` is estimated from
    # Operations that got a generic rounding model, or a coarse accumulator because they were measured to
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constants:
    """Constants that were rounded before a call, and the distance by which they may move a side's results."""

    # Root mean square of the results' deviations when every such constant moves by its roundoff; empty where there are
    # none
    spread: Arrays
    stored: tuple[str, ...] = ()  # arrays of unknown history: a module's buffers, what its code has captured
    literals: tuple[str, ...] = ()  # numbers in code that a narrow format has rounded
    members: int = 0  # how many runs `spread` is estimated from


@dataclass(frozen=True)
class Variant:
    """A hypothesis that a side can try on itself."""

    name: str  # passed back to `Side.truth`
    sentence: str  # what is true if the variant agrees with the other side


class Side(Protocol):
    """A module or function of one framework.

    Outputs are named `y` (one array) or `y.<path>`; gradients `d_<parameter>` and `d_<input>`, for every
    trainable parameter and every input of real or complex numbers; buffers, as they are after the call,
    `state:<buffer>`. `cotangents` has one array per real or complex output; without it no gradients are returned.
    The gradient for a complex number z is torch's, `dL/dRe(z) + i dL/dIm(z)`, and so are cotangents; JAX's own are
    the conjugates.
    """

    framework: str
    name: str

    def arrange(self, layout: Layout, outputs: tuple[str, ...] | None) -> None:
        """Say, before anything else is asked, how inputs become arguments and which outputs are wanted."""
        ...

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """Return parameters and buffers by name; inputs are examples, for modules that infer shapes from them."""
        ...

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Return zeros of the outputs' shapes and dtypes."""
        ...

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Put arrays into the module and reads them back."""
        ...

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Run the module as it is, without gradients, in the dtype of the arrays."""
        ...

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """Run the module as it is, in the dtype of the arrays: outputs and gradients."""
        ...

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """Run the same function in float64 on the same stored values, without casts to narrower formats."""
        ...

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """Run in float64 with every operation erring as it may in `dtype`."""
        ...

    def constants(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        buffers: Mapping[str, str],
        computed: bool,
    ) -> Constants:
        """Return truths with the side's rounded constants moved.

        Args:
            parameters: as for `truth`.
            inputs: as for `truth`.
            cotangents: as for `truth`.
            buffers: those that are constants of the module, each with the format that has rounded it.
            computed: whether what is computed from constants alone errs too, as in float32: where the other side has
                stored it.
        """
        ...

    def variants(self) -> tuple[Variant, ...]:
        """Return hypotheses about this side for the likely cause of a mismatch."""
        ...

    def record(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        changes: tuple[Any, ...] = (),
        wanted: tuple[int, ...] | None = None,
        asked: tuple[int, ...] = (),
        noisy: bool = True,
    ) -> Any:
        """Run as for `truth` and return the operations and values of the run, a `trace.Trace`.

        Args:
            parameters: as for `truth`.
            inputs: as for `truth`.
            cotangents: as for `truth`; with them the backward pass is recorded too.
            changes: `trace.Change`s that are made on the way, on the torch side.
            wanted: numbers of the values to keep; None for all, as long as they are few.
            asked: numbers of the operations whose alternatives are told.
            noisy: whether limits are wanted, from a few more runs with noise.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """Return notes on the evaluation of this side, for a reader of the verdicts."""
        ...

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """Tell whether the outputs depend on a random state (dropout that is active)."""
        ...

    def numbers(self) -> tuple[str, ...]:
        """Return the outputs that the last call has returned as numbers of Python, which have no gradient."""
        ...

    def unexercised(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None
    ) -> tuple[str, ...]:
        """Return branches of clamps, selections and comparisons that no value takes in float64, as sentences."""
        ...

    def wider_operations(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], dtype: str) -> tuple[str, ...]:
        """Return operations in a wider format than `dtype`, that of all arrays, or in the other one of its width."""
        ...

    def first_uses(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        """Return the names of the arrays that a call uses, in the order of their first use by an operation."""
        ...


def named_state(buffers: Mapping[str, Array]) -> dict[str, Array]:
    """Return buffers under the names that a side returns them by."""
    return {f"{PREFIX}{name}": value for name, value in buffers.items()}


def is_output(name: str) -> bool:
    """Tell whether a side's result is an output, and neither a gradient nor state."""
    return not name.startswith(("d_", PREFIX))


def state_of(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the buffers among a side's results, by their own names."""
    return {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}


def updated(arrays: Arrays, before: Arrays) -> frozenset[str]:
    """Return the names of the buffers that a call has changed."""

    def same(name: str, after: np.ndarray) -> bool:
        # A NaN that stayed one is not changed; integers and booleans have none.
        return np.array_equal(widened(after), widened(before[name]), equal_nan=is_inexact(after))

    return frozenset(name for name, after in state_of(arrays).items() if not same(name, after))


@dataclass(frozen=True)
class Branch:
    """One branch of an operation."""

    what: str  # that takes it, as "a value above 20"
    taken: bool  # whether anything did
    bound: float | None = None  # where it begins, or None where it is no matter of size
    above: bool = True  # whether it lies above its bound


@dataclass
class _Seen:
    operation: str
    place: str
    low: float
    high: float
    branches: dict[str, Branch] = field(default_factory=dict)


def is_bound(value: float | None) -> bool:
    """Return whether a clamp's limit is one that float32 values can reach."""
    return value is not None and abs(value) < _LARGEST_BOUND


def softplus_parts(beta: float, threshold: float) -> float | None:
    """Return where torch's softplus becomes linear, or None where float32 could not tell it from the smooth one."""
    return threshold / beta if math.exp(-threshold) > FORMATS["float32"].roundoff else None


class Branches:
    """The branches that every operation took, over all its calls."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._seen: dict[object, _Seen] = {}

    def see(
        self, call: object, operation: str, place: str, branches: Iterable[Branch], low: float, high: float
    ) -> None:
        """Take note of one evaluation."""
        seen = self._seen.setdefault(call, _Seen(operation, place, low, high))
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        for branch in branches:
            known = seen.branches.get(branch.what)
            if known is None or branch.taken:
                seen.branches[branch.what] = branch

    def forget(self, call: object) -> None:
        """Leave out a call that another one reports, as the comparison behind a selection."""
        self._seen.pop(call, None)

    def sentences(self) -> tuple[str, ...]:
        """Return a sentence for every branch that was never taken, equal ones of several places as one."""
        groups: dict[tuple[str, str], list[_Seen]] = {}
        for seen in self._seen.values():
            for branch in seen.branches.values():
                if not branch.taken:
                    groups.setdefault((seen.operation, branch.what), []).append(seen)
        return tuple(_sentence(operation, what, group) for (operation, what), group in groups.items())


def _sentence(operation: str, what: str, group: Sequence[_Seen]) -> str:
    places = list(dict.fromkeys(seen.place for seen in group if seen.place))
    more = f" and {len(places) - _MOST_PLACES} more" * (len(places) > _MOST_PLACES)
    where = f" in {', '.join(places[:_MOST_PLACES])}{more}" if places else ""
    low, high = min(seen.low for seen in group), max(seen.high for seen in group)
    values = "" if math.isnan(low) or math.isnan(high) else f" (its values went from {low:.3g} to {high:.3g})"
    return f"{operation}{where} never met {what}{values}; {_advice(group[0].branches[what], low, high)}"


def _advice(branch: Branch, low: float, high: float) -> str:
    reached = high if branch.above else low
    if branch.bound and math.isfinite(reached) and reached * branch.bound > 0:
        # Beyond a large bound by wider draws, below a small one by narrower ones.
        outwards = (branch.bound > 0) == branch.above
        factor = branch.bound / reached * (_WIDER if outwards else 1 / _WIDER)
        text = f"{float(f'{factor:.2g}'):g}"
        return f"draws {text} times as large may reach it (scale=)"
    return "inputs= or draws= that reach it would show whether the sides agree there"
