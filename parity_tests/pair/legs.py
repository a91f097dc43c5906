"""A pair on one set of numbers: what each side was given, and everything that came back in the torch side's names."""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from parity_tests.judge.dtypes import (
    as_stored,
    format_name,
    from_parts,
    is_inexact,
    numpy_dtype,
    parts,
    roundoff,
    widened,
)
from parity_tests.pair.calls import Layouts
from parity_tests.pair.draws import (
    Draw,
    InputSource,
    Scale,
    checked_scale,
    draw_cotangents,
    draw_inputs,
    draw_parameters,
    is_one_signed,
    stored_apart,
)
from parity_tests.pair.layouts import Correspondence, Outputs, both_layouts, rearrangement
from parity_tests.pair.mapping import ParameterMapping, Rule
from parity_tests.pair.patterns import LeftOut, MappingError
from parity_tests.pair.side import (
    Arrays,
    Constants,
    Ensemble,
    ParameterSpec,
    Side,
    is_output,
    named_state,
    state_of,
    updated,
)
from parity_tests.report.text import first_line

Tuple = tuple[np.ndarray, ...]
_OWN_SENTENCE = re.compile(r"^(\w+: )?\w+(\[[^\]]*\])?: expected ")  # of a side, or of one in another interpreter


@dataclass(frozen=True)
class Values:
    """Parameters, inputs and cotangents of both sides, stored in one dtype.

    Attributes:
        dtype: storage dtype.
        parameters: by side.
        inputs: by side.
        cotangents: by side; None before the outputs are known, or if gradients are not compared.
    """

    dtype: str
    parameters: Mapping[str, Arrays]
    inputs: Mapping[str, Tuple]
    cotangents: Mapping[str, Arrays] | None

    def of(self, key: str) -> tuple[Arrays, Tuple, Arrays | None]:
        """Return the arguments of a side's methods: parameters, inputs and cotangents."""
        return self.parameters[key], self.inputs[key], None if self.cotangents is None else self.cotangents[key]


@dataclass
class Pair:
    """Two sides, and how one is to be read as the other.

    Attributes:
        name: shown in rows.
        sides: `torch` and `jax`.
        rules: of the parameters, see `ParameterMapping`.
        source: of the inputs, in the torch side's layout.
        input_patterns: by position or name, torch layout to flax layout; empty for the same.
        output_patterns: by position or name of an output, torch layout to flax layout.
        outputs: those that correspond, see `calls.checked_outputs`; None for all, by equal names.
        draws: of parameters that `draw_like` would draw wrongly.
        scale: of inputs and parameters, see `draws.checked_scale`.
        left_out: what the user consents to leave uncompared.
        announce: called when a leg begins, with its name and how many calls of the sides it will make.
        given: whether parameters have the torch module's own values in place of drawn ones.
    """

    name: str
    sides: Mapping[str, Side]
    rules: Sequence[Rule]
    source: InputSource
    input_patterns: Layouts = field(default_factory=dict)
    output_patterns: Layouts = field(default_factory=dict)
    outputs: Outputs | None = None
    draws: Mapping[str, Draw] = field(default_factory=dict)
    scale: Scale | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    announce: Callable[[str, int], None] = lambda leg, calls: None
    given: bool = False

    def __post_init__(self) -> None:
        """Read both sides and checks the rules."""
        drawn = draw_inputs(self.source, 0)
        self.layout, self._correspondence = drawn.layout, Correspondence(self.outputs, self.output_patterns)
        examples = self._both_inputs(drawn.arrays)
        for key, side in self.sides.items():
            side.arrange(self.layout, self._correspondence.chosen(key))
        self.specs: dict[str, dict[str, ParameterSpec]] = {}
        for key, side in self.sides.items():
            with running(key, examples[key], self.layout.names):
                self.specs[key] = side.parameters(examples[key])
            if both := sorted(set(self.layout.names) & set(self.specs[key])):
                raise ValueError(
                    f"inputs: expected names beside those of parameters, got {both[0]} for both; rename it."
                )
        self.mapping = ParameterMapping(self.rules, self.specs["torch"], self.specs["jax"], self.left_out.covers)
        gradients = [*self.mapping.trained, *self.layout.names]
        unmapped = [name for names in self.mapping.unmapped.values() for name in names]
        self.left_out.check(unmapped, [f"d_{name}" for name in gradients])
        checked_scale(self.scale, drawn, self.mapping.drawn)
        self.updated: dict[str, frozenset[str]] = {}
        self.trained_alone: dict[str, tuple[str, ...]] = {}
        # Unmapped arrays whose own values show in what is compared, see `inspection`.
        self.tables: tuple[tuple[str, str], ...] = ()
        self.notes = set(self.mapping.notes)
        self._signed: dict[int, frozenset[str]] = {}
        if self.output_patterns:
            found = self.outline("torch", self.values("float32", 0))
            self._correspondence.read({name: array.shape for name, array in found.items()})

    def with_given_values(self) -> Self:
        """Return the same pair on the values that the torch module has, mapped through the rules; inputs stay drawn."""
        pair = copy.copy(self)
        pair.given, pair.name = True, f"{self.name}, the torch side's own values,"
        pair.updated, pair.trained_alone, pair._signed, pair.notes = {}, {}, {}, set(self.mapping.notes)
        return pair

    def values(self, dtype: str, seed: int) -> Values:
        """Draw everything but the cotangents, rounded to the storage dtype."""
        if seed not in self._signed:
            self._signed[seed] = frozenset() if self.given else self._with_both_signs(seed)
        return self._values(dtype, seed, self._signed[seed])

    def _values(self, dtype: str, seed: int, signed: frozenset[str], larger: str = "") -> Values:
        target = numpy_dtype(dtype)
        mapped = {name: self.specs["torch"][name] for name in self.mapping.drawn}
        drawn = draw_parameters(mapped, seed, self.draws, self.scale, signed)
        if self.given:
            drawn = {name: widened(spec.value) for name, spec in mapped.items()}
        if larger:
            drawn[larger] = 1.25 * drawn[larger]
        own = {
            key: {name: as_stored(spec.value, target) for name, spec in specs.items()}
            for key, specs in self.specs.items()
        }
        found = draw_inputs(self.source, seed, self.scale)
        if found.layout.names != self.layout.names:
            raise ValueError(
                f"inputs: expected the same arrays for every seed, got {', '.join(self.layout.names)} and "
                f"{', '.join(found.layout.names)}; draw numbers, not the structure."
            )
        inputs = tuple(
            stored_apart(array, target) if k in found.drawn else as_stored(array, target)
            for k, array in enumerate(found.arrays)
        )
        parameters = self.mapping.both({name: as_stored(array, target) for name, array in drawn.items()}, own)
        return Values(dtype, parameters, self._both_inputs(inputs), None)

    def _with_both_signs(self, seed: int) -> frozenset[str]:
        """Name the one-signed parameters whose sign changes: all but those that leave no side finite.

        With a norm's scale that is positive throughout, its absolute value would be the same function. Where only one
        of the sides stays finite the functions differ, which shall be seen.
        """
        specs = self.specs["torch"]
        names = [
            name
            for name in self.mapping.drawn
            if (specs[name].trainable or specs[name].frozen)
            and is_one_signed(specs[name].value)
            and name not in self.draws
        ]
        kept: dict[str, str] = {}
        if names and self._undefined(seed, names):
            kept = {name: "no side is finite" for name in names if self._undefined(seed, [name])}
            if self._undefined(seed, [name for name in names if name not in kept]):
                kept = dict.fromkeys(names, "no side is finite")
        for name in names:
            # A single number cannot have both signs: behind a relu the other one may take all there is away.
            if name not in kept and specs[name].value.size == 1 and not self._matters(seed, name):
                kept[name] = "nothing depends on it"
        for name, reason in kept.items():
            self.notes.add(f"{name} is drawn with the sign of its initial values: {reason} with the other one")
        return frozenset(names) - kept.keys()

    def _undefined(self, seed: int, signed: Sequence[str]) -> bool:
        """Tell whether no side stays finite where it was before these parameters changed their sign."""
        for key in self.sides:
            before, after = (self._outputs(key, seed, names) for names in (frozenset(), frozenset(signed)))
            if not any((np.isfinite(before[name]) & ~np.isfinite(after[name])).any() for name in before):
                return False
        return True

    def _matters(self, seed: int, name: str) -> bool:
        """Tell whether a parameter that has changed its sign still changes the outputs of a side."""
        found = ((self._outputs(key, seed, frozenset([name]), larger) for larger in ("", name)) for key in self.sides)
        return any(any(first[n].tobytes() != second[n].tobytes() for n in first) for first, second in found)

    def _outputs(self, key: str, seed: int, signed: frozenset[str], larger: str = "") -> dict[str, np.ndarray]:
        values = self._values("float32", seed, signed, larger)
        with running(key, values.inputs[key], self.layout.names):
            results = self.sides[key].forward(values.parameters[key], values.inputs[key])
        return {name: array for name, array in results.items() if is_output(name) and is_inexact(array)}

    def with_cotangents(self, values: Values, outputs: Mapping[str, Arrays], seed: int) -> Values:
        """Add random cotangents for the real and complex outputs, in a format that each side's output can hold.

        They are zero where an output is not finite, since no loss that is a number depends on it, and for numbers of
        Python, which have no gradient.
        """
        numbers = {
            self._correspondence.torch_name(key, name) for key, side in self.sides.items() for name in side.numbers()
        }
        like: dict[str, np.ndarray] = {}
        for name, array in (item for found in outputs.values() for item in found.items() if is_output(item[0])):
            if is_inexact(array) and (name not in like or roundoff(array) > roundoff(like[name])):
                like[name] = array
        target = numpy_dtype(values.dtype)
        drawn = {
            name: as_stored(as_stored(array, target), numpy_dtype(format_name(like[name].dtype)))
            for name, array in draw_cotangents(like, seed).items()
        }
        finite = {
            name: np.logical_and.reduce([np.isfinite(found[name]) for found in outputs.values() if name in found])
            for name in drawn
        }
        drawn = {
            name: np.where(finite[name] & (name not in numbers), as_stored(array, target), array.dtype.type(0))
            for name, array in drawn.items()
        }
        self.notes |= {f"{name} is a number of Python's, which has no gradient" for name in numbers if name in drawn}
        return replace(values, cotangents={"torch": drawn, "jax": self._correspondence.to_flax(drawn)})

    def outline(self, key: str, values: Values) -> dict[str, np.ndarray]:
        """Return zeros of the shapes of a side's outputs, in torch names."""
        with running(key, values.inputs[key], self.layout.names):
            found = self.sides[key].outline(values.parameters[key], values.inputs[key])
        return self.as_torch(key, {name: array for name, array in found.items() if is_output(name)})

    def truth(self, key: str, values: Values, variant: str = "") -> dict[str, np.ndarray]:
        """Return a side's float64 truth, in torch names; note in `updated` the buffers that the call changed."""
        arrays = self.sides[key].truth(*values.of(key), variant)
        self.updated[key] = updated(arrays, values.parameters[key])
        self.trained_alone[key] = tuple(
            block.name
            for block in self.mapping.kept_alone(key)
            if np.any(arrays.get(f"d_{block.name}", np.zeros(block.shape))[block.ranges])
        )
        return self.as_torch(key, arrays, values.parameters[key])

    def changed(self, key: str) -> tuple[str, ...]:
        """Return the names, on its own side, of the buffers that the last truth has changed."""
        return tuple(sorted(self.updated.get(key, ())))

    def forward(self, key: str, values: Values) -> dict[str, np.ndarray]:
        """Return a side's outputs without gradients, in torch names."""
        arrays = self.sides[key].forward(values.parameters[key], values.inputs[key])
        return self.as_torch(key, arrays, values.parameters[key])

    def vjp(self, key: str, values: Values) -> dict[str, np.ndarray]:
        """Return a side's outputs and gradients, in torch names."""
        parameters, inputs, cotangents = values.of(key)
        assert cotangents is not None
        arrays = self.sides[key].vjp(parameters, inputs, cotangents)
        return self.as_torch(key, arrays, values.parameters[key])

    def ensemble(self, key: str, values: Values, dtype: str, seed: int) -> Ensemble:
        """Return a side's rounding-noise ensemble, in torch names."""
        found = self.sides[key].ensemble(*values.of(key), dtype, seed)
        fields = {name: self._spread(key, getattr(found, name), values) for name in ("spread", "kinks")}
        return replace(found, centre={}, **fields)  # the centre is another copy of every gradient

    def constants(self, key: str, values: Values, computed: bool) -> Constants:
        """Return how far a side's rounded constants may move results, in torch names; see `Side.constants`."""
        constant = {*self.mapping.constants(key)}
        # A narrow format that a module has stored a buffer in has rounded it, whatever the leg widens it to.
        buffers = {
            name: max((values.parameters[key][name], spec.value), key=roundoff).dtype
            for name, spec in self.specs[key].items()
            if name in constant and is_inexact(spec.value)
        }
        named = {name: format_name(dtype) for name, dtype in buffers.items()}
        found = self.sides[key].constants(*values.of(key), named, computed)
        return replace(found, spread=self._spread(key, found.spread, values) if found.spread else {})

    def _spread(self, key: str, arrays: Arrays, values: Values) -> dict[str, np.ndarray]:
        """Return statistics of a side's results in torch names; what it returns none for did not move."""
        still = {name: np.zeros(array.shape) for name, array in values.parameters[key].items()}
        # A rule may change signs; spreads of numbers that are added up add up at most.
        found = self.as_torch(key, arrays, still)
        return {name: _unsigned(array) for name, array in found.items()}

    def as_torch(self, key: str, arrays: Arrays, given: Arrays | None = None) -> dict[str, np.ndarray]:
        """Rename and rearrange a side's results, without gradients and state of arrays that have no counterpart.

        Args:
            key: the side.
            arrays: its results.
            given: the arrays that it was given: what it returns no state for, a parameter, is as it was. Without them
                the results carry no state.
        """
        gradients = {name.removeprefix("d_"): array for name, array in arrays.items() if name.startswith("d_")}
        outputs = {name: array for name, array in arrays.items() if is_output(name)}
        result = self._correspondence.to_torch(key, outputs)
        if gradients:
            named = self.mapping.gradients("torch" if key == "torch" else "flax", gradients)
            result |= {f"d_{name}": array for name, array in named.items()}
        if given is not None:
            result |= self._state(key, {**given, **state_of(arrays)})
        patterns = self.layout.resolved(self.input_patterns) if key == "jax" else {}
        for k, name in enumerate(self.layout.names):
            if name in gradients:
                axes = rearrangement(patterns[k], self.shapes[k], "input_patterns") if k in patterns else None
                result[f"d_{name}"] = gradients[name] if axes is None else axes.backward(gradients[name])
        return result

    def _state(self, key: str, found: Arrays) -> dict[str, np.ndarray]:
        """Return the buffers of one side under torch names."""
        names = self.mapping.stateful
        if key == "torch":
            return named_state(self.mapping.without_held({name: found[name] for name in names}))
        return named_state(self.mapping.to_torch(found, names))

    def _both_inputs(self, inputs: Tuple) -> dict[str, Tuple]:
        self.shapes = [array.shape for array in inputs]
        return both_layouts(self.layout, inputs, self.input_patterns)


def _unsigned(array: np.ndarray) -> np.ndarray:
    """Return absolute values, of complex numbers part by part, where it can be in place."""
    values = parts(array)
    return from_parts(np.asarray(np.abs(values, out=values if values.flags.writeable else None)), array)


@contextlib.contextmanager
def running(key: str, inputs: Tuple, names: Sequence[str]) -> Iterator[None]:
    """Raise one sentence with the module's own message if it does not run at all."""
    try:
        yield
    except (MappingError, ConnectionError):
        raise
    except Exception as error:
        if _OWN_SENTENCE.match(str(error)):
            raise
        module, side = ("torch_module", "torch") if key == "torch" else ("flax_module", "flax")
        by_position = [f"input{k}" for k in range(len(inputs))] == list(names)
        shapes = ", ".join(
            f"{'' if by_position else name + ' '}{array.dtype} {array.shape}"
            for name, array in zip(names, inputs, strict=True)
        )
        layout = "" if key == "torch" else ", input_patterns= if its layout is another"
        # A refusal by another interpreter names its kind already.
        kind = "" if type(error).__name__ == "RemoteError" else f"{type(error).__name__}: "
        raise ValueError(
            f"{module}: expected a module that runs on its inputs ({shapes}), got {kind}{first_line(error)}; "
            f"check inputs=, {side}_kwargs={layout}."
        ) from error
