"""What one side of a pair must offer: NumPy in, NumPy out, whatever the framework and the kind of module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from parity_tests.judge.casts import from_parts, is_inexact, parts

Arrays = Mapping[str, np.ndarray]
# What a framework or a module raises where it cannot run in a format; a refusal of the judge's own is among them. Not
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
    """One array of a module.

    Attributes:
        value: as the module holds it before anything is drawn; gives the shape, the dtype and the scale.
        trainable: True for a parameter that gradients are taken of, False for a frozen one and for a buffer (a running
            statistic, a mask).
        frozen: True for a parameter that the module itself keeps out of training (`requires_grad=False`).
    """

    value: np.ndarray
    trainable: bool
    frozen: bool = False

    @property
    def kind(self) -> str:
        """What the array is, as messages say it."""
        return "a parameter" if self.trainable else "a frozen parameter" if self.frozen else "a buffer"


@dataclass(frozen=True)
class Ensemble:
    """A rounding-noise ensemble around a float64 run, tensor by tensor.

    Attributes:
        centre: the run without noise.
        spread: root mean square of the deviations of `members` runs from the centre.
        kinks: largest deviation of the runs with `KINK_AMPLITUDE` times the noise, see `calibration`.
        members: how many runs `spread` is estimated from.
        notes: operations that got a generic rounding model, or a coarse accumulator because they were measured to.
    """

    centre: Arrays
    spread: Arrays
    kinks: Arrays
    members: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constants:
    """What a side takes from constants that were rounded before the call, and how far that may move its results.

    Attributes:
        spread: root mean square of the results' deviations when every such constant moves by its roundoff; empty where
            there are none.
        stored: arrays of unknown history: a module's buffers, what its code has captured.
        literals: numbers in code that a narrow format has rounded.
        members: how many runs `spread` is estimated from.
    """

    spread: Arrays
    stored: tuple[str, ...] = ()
    literals: tuple[str, ...] = ()
    members: int = 0


@dataclass(frozen=True)
class Variant:
    """A hypothesis that a side can try on itself.

    Attributes:
        name: passed back to `Side.truth`.
        sentence: what is true if the variant agrees with the other side.
    """

    name: str
    sentence: str


class Side(Protocol):
    """A module or function of one framework.

    Outputs are named `y` (one array) or `y.<path>`; gradients `d_<parameter>` and `d_input<k>`, for every
    trainable parameter and every input of real or complex numbers; buffers, as they are after the call,
    `state:<buffer>`. `cotangents` has one array per real or complex output; without it no gradients are returned.
    The gradient for a complex number z is torch's, `dL/dRe(z) + i dL/dIm(z)`, and so are cotangents; JAX's own are
    the conjugates.
    """

    framework: str
    name: str

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """Parameters and buffers by name; inputs are examples, for modules that infer shapes from them."""
        ...

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Zeros of the outputs' shapes and dtypes."""
        ...

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Puts arrays into the module and reads them back."""
        ...

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Runs the module as it is, without gradients, in the dtype of the arrays."""
        ...

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """Runs the module as it is, in the dtype of the arrays: outputs and gradients."""
        ...

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """The same function in float64 on the same stored values, casts to narrower formats left out."""
        ...

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """Float64 runs in which every operation errs as it may in `dtype`."""
        ...

    def constants(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        buffers: Mapping[str, str],
        computed: bool,
    ) -> Constants:
        """Truths with the side's rounded constants moved.

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
        """Hypotheses about this side for the likely cause of a mismatch."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a reader of the verdicts must know about how this side was evaluated."""
        ...

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """True if the outputs depend on a random state (dropout that is active)."""
        ...

    def unexercised(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        """Branches of clamps, selections and comparisons that no value takes in float64, see `ranges`."""
        ...

    def wider_operations(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], dtype: str) -> tuple[str, ...]:
        """Operations of a call that work in a wider format than `dtype`, in which all arrays are stored."""
        ...


def leaf_name(path: tuple) -> str:
    """Names a leaf of a framework's tree: `y` for a single array, else `y.0`, `y.hidden.1`, ..."""
    # torch and jax call the parts of a key path alike: idx in a sequence, key in a mapping, name of an attribute.
    parts = (next(getattr(entry, kind) for kind in ("idx", "key", "name") if hasattr(entry, kind)) for entry in path)
    return ".".join(("y", *map(str, parts)))


def collect_ensemble(
    run: Callable[[int, float], Arrays], members: int, kink_members: int, kink_amplitude: float
) -> Ensemble:
    """Runs an ensemble and keeps its statistics of the real and complex tensors, of these part by part.

    A deviation is infinite where a run is not finite and the centre is, or is not finite in another way.

    Args:
        run: one run, of a member's number and the noise's amplitude (0 for none).
        members: runs with amplitude 1.
        kink_members: runs with `kink_amplitude`.
        kink_amplitude: see `calibration`.
    """
    centre = {name: value for name, value in run(0, 0.0).items() if is_inexact(value)}
    squares = {name: np.zeros(parts(value).shape) for name, value in centre.items()}
    kinks = {name: np.zeros(parts(value).shape) for name, value in centre.items()}
    for member in range(members + kink_members):
        amplitude = 1.0 if member < members else kink_amplitude
        for name, value in run(member + 1, amplitude).items():
            if name in centre and amplitude == 1.0:
                squares[name] += _deviation(value, centre[name]) ** 2
            elif name in centre:
                np.maximum(kinks[name], _deviation(value, centre[name]), out=kinks[name])
    spread = {name: from_parts(np.sqrt(total / members), centre[name]) for name, total in squares.items()}
    return Ensemble(centre, spread, {name: from_parts(kink, centre[name]) for name, kink in kinks.items()}, members)


def constants_spread(run: Callable[[int], Arrays], members: int) -> dict[str, np.ndarray]:
    """Root mean square of the deviations of runs with moved constants; part by part for complex numbers.

    Args:
        run: of a member's number; 0 moves nothing.
        members: runs.
    """
    found = collect_ensemble(lambda member, _: run(member), members, 0, 0.0)
    return dict(found.spread)


def _deviation(value: np.ndarray, centre: np.ndarray) -> np.ndarray:
    value, centre = parts(value), parts(centre)
    same = (value == centre) | (np.isnan(value) & np.isnan(centre))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(value - centre)
    # Beyond the square root of the largest number its square, and so the spread, would be infinite anyway.
    return np.where(same, 0.0, np.where(difference < 1e154, difference, np.inf))
