"""The flax side of a pair: a linen or nnx module as it is, or a function `f(parameters, *inputs)`; jitted."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.frameworks.jax import watch as jax_watch
from parity_tests.frameworks.jax.ensemble import NoisyProgram
from parity_tests.frameworks.jax.modules import FlatModule, Function, flatten_module, step
from parity_tests.frameworks.jax.operations import compile_options
from parity_tests.frameworks.jax.recorder import record, recording
from parity_tests.frameworks.jax.subjects import resolve_device
from parity_tests.frameworks.jax.truth import Truth, see_captured_arrays_anew, traced
from parity_tests.judge.dtypes import is_inexact, storage_format, widened
from parity_tests.pair.calibration import (
    MEMBERS,
    collect_ensemble,
    constants_spread,
    moved_constant,
    was_rounded,
)
from parity_tests.pair.calls import Layout, checked_call, named_outputs, no_array, position
from parity_tests.pair.side import Arrays, Branches, Constants, Ensemble, ParameterSpec, Variant, named_state
from parity_tests.pair.trace import Change, Trace

Program = Callable[..., dict[str, Any]]


class JaxSide:
    """One Flax module or JAX function; see `side.Side`.

    Args:
        module: a linen module, an nnx module, a callable pytree, or a function of a pytree of arrays and the inputs.
        kwargs: keyword arguments of every call.
        initial: initial parameters of a function, variables of a linen module; None for another module.
        adapter: `(call, *inputs) -> outputs`, see `calls.Call`.
        device: `cpu`, `cuda` or `auto`.
        change: spoils the flat function, to plant a defect.
    """

    framework = "jax"

    def __init__(
        self,
        module: Any,
        kwargs: Mapping[str, Any] | None = None,
        initial: Any = None,
        adapter: Callable[..., Any] | None = None,
        device: str = "cpu",
        change: Callable[[Function], Function] | None = None,
    ) -> None:
        self.name = getattr(module, "__name__", type(module).__name__)
        self._module, self._initial, self._change = module, initial, change
        self._call = checked_call(kwargs, adapter, "flax")
        self._device, self._chosen = resolve_device(device), None
        self._notes: set[str] = set()
        self._flat: FlatModule | None = None
        self._programs: dict[tuple, Any] = {}

    def arrange(self, layout: Layout, outputs: tuple[str, ...] | None) -> None:
        """Keep both for every call; what was traced before is void."""
        self._call, self._chosen = self._call.arranged(layout, "flax"), outputs
        self._flat = None
        self._programs.clear()

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """Return variables of the module; inputs are examples for linen, which infers shapes from them."""
        return dict(self._flattened(inputs).specs)

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Evaluate shapes abstractly."""
        with self._types(parameters, inputs):
            shapes = jax.eval_shape(self._program(inputs, False), dict(parameters), inputs, {})
        return {name: np.zeros(value.shape, value.dtype) for name, value in shapes.items()}

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Copy to device arrays and back."""
        with self._types(parameters, ()):
            return {name: np.asarray(jax.device_put(array, self._device)) for name, array in parameters.items()}

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Run jitted, without gradients."""
        return self._jitted("forward", parameters, inputs, None)

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """Run a jitted `jax.vjp`."""
        return self._jitted("vjp", parameters, inputs, cotangents)

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """Trace in float64 and interpret without any cast to a narrower format."""
        if variant:
            raise ValueError(f"variant: expected none on the flax side, got {variant!r}.")
        leaves = jax.tree.leaves([_wide(dict(parameters)), _wide(inputs), _wide(cotangents or {})])
        return self._truth(parameters, inputs, cotangents, None).run(leaves, 0)

    def constants(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        buffers: Mapping[str, str],
        computed: bool,
    ) -> Constants:
        """Run the truth with its rounded constants and its constant buffers moved."""
        truth = self._truth(parameters, inputs, cotangents, buffers if computed else None)
        wide = {name: widened(parameters[name]) for name in buffers}
        moving = [name for name, array in wide.items() if was_rounded(array, buffers[name])]

        def member(number: int) -> dict[str, np.ndarray]:
            moved = {name: moved_constant(wide[name], number, buffers[name]) for name in moving}
            trees = [_wide({**parameters, **moved}), _wide(inputs), _wide(cotangents or {})]
            return truth.run(jax.tree.leaves(trees), number)

        member(0)
        if not (moving or truth.stored or truth.literals or computed):
            return Constants({})
        held = (*(f"buffer {name}" for name in moving), *sorted(truth.stored))
        return Constants(constants_spread(member), held, tuple(sorted(truth.literals)), MEMBERS)

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """Trace in the dtype, interpret in float64 with noise."""
        arguments = [dict(parameters), inputs, dict(cotangents or {})]
        key = ("ensemble", dtype, *_signature(arguments))
        if key not in self._programs:
            with self._types(parameters, inputs), jax.default_device(self._device):
                program = self._program(inputs, cotangents is not None)
                closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)
            # sorted: the order in which a dict is flattened
            self._programs[key] = NoisyProgram(closed, sorted(shapes), dtype, self._device)
        program, leaves = self._programs[key], jax.tree.leaves(_wide(arguments))
        result = collect_ensemble(functools.partial(program.run, leaves), seed)
        return replace(result, notes=tuple(sorted(program.notes)))

    def variants(self) -> tuple[Variant, ...]:
        """Return none: the torch side tries the hypotheses that concern constants."""
        return ()

    def record(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        changes: tuple[Change, ...] = (),
        wanted: tuple[int, ...] | None = None,
        asked: tuple[int, ...] = (),
        noisy: bool = True,
    ) -> Trace:
        """Trace in float64 and interpret, taking note of every value; nothing is changed on this side."""
        if changes:
            raise ValueError(f"changes: expected none on the flax side, got {len(changes)}.")
        arguments = [_wide(dict(parameters)), _wide(inputs), _wide(cotangents or {})]
        leg = storage_format([*parameters.values(), *inputs])
        with jax.enable_x64(True), jax.default_device(self._device):
            with recording():
                closed, names, _ = traced(self._program(inputs, cotangents is not None), arguments, leg, "recorded")
            sources = [f"parameter:{name}" for name in sorted(parameters)]
            sources += [f"input:{k}" for k in range(len(inputs))]
            sources += [f"cotangent:{name}" for name in sorted(cotangents or {})]
            return record(closed, names, sources, jax.tree.leaves(arguments), wanted, noisy)

    def notes(self) -> tuple[str, ...]:
        """Return notes on modules that cannot be traced in float64."""
        return tuple(sorted(self._notes))

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """Compare two random states of the module; a function has none that could be seen."""
        flat = self._flattened(inputs)
        if flat.reseeded is None:
            return False
        results = []
        with self._types(parameters, inputs), jax.default_device(self._device):
            for function in (flat.stateful, flat.reseeded):
                outputs = jax.jit(lambda *given, f=function: self._leaves(f(*given)[0]))(dict(parameters), *inputs)
                results.append([np.asarray(leaf).tobytes() for leaf in outputs.values()])
        return results[0] != results[1]

    def numbers(self) -> tuple[str, ...]:
        """Return none: in a traced program they are constants."""
        return ()

    def unexercised(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None
    ) -> tuple[str, ...]:
        """Watch the program without gradients as traced in the arrays' dtype, evaluated in float64."""
        arguments = [dict(parameters), inputs, {}]
        key = ("branches", *_signature(arguments))
        if key not in self._programs:
            with self._types(parameters, inputs), jax.default_device(self._device):
                closed = jax.make_jaxpr(self._program(inputs, False))(*arguments)
            self._programs[key] = (closed, jax_watch.branching(jax_watch.sites(closed)))
        closed, watched = self._programs[key]
        if not watched:
            return ()
        seen: dict[tuple[int, ...], list[np.ndarray]] = {path: [] for path in watched}
        watch = jax_watch.BranchWatch(watched, lambda path, numbers: seen[path].append(np.asarray(numbers)))
        with jax.enable_x64(True), jax.default_device(self._device):

            def run(leaves: list[Any]) -> None:
                watch.run(closed, leaves)

            jax.jit(run, compiler_options=compile_options(closed.jaxpr.eqns))(jax.tree.leaves(_wide(arguments)))
            jax.effects_barrier()
        branches = Branches()
        for path, numbers in seen.items():
            for found in numbers if path not in watch.consumed else ():
                jax_watch.report(branches, path, watched[path], found)
        return branches.sentences()

    def wider_operations(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], dtype: str) -> tuple[str, ...]:
        """Look at the program as traced in the dtype; without 64-bit types nothing is wider than float32."""
        if dtype == "float32":
            return ()
        with self._types(parameters, inputs), jax.default_device(self._device):
            closed = jax.make_jaxpr(self._program(inputs, False))(dict(parameters), inputs, {})
        return jax_watch.wide_operations(jax_watch.sites(closed), dtype)

    def first_uses(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        """Look at the traced program."""
        with self._types(parameters, inputs), jax.default_device(self._device):
            closed = jax.make_jaxpr(self._program(inputs, False))(dict(parameters), inputs, {})
        return jax_watch.first_uses(closed, sorted(parameters))

    @contextlib.contextmanager
    def _types(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> Iterator[None]:
        """Enable 64-bit types only where the numbers have them: a module's own constants would be float64 with them."""
        arrays = [*parameters.values(), *inputs]
        wide = any(array.dtype in (np.float64, np.complex128) for array in arrays)
        if not wide:
            positions = [f"inputs[{position(name)}]" for name in self._call.names(inputs)]
            _integers_fit({**parameters, **dict(zip(positions, inputs, strict=bool(inputs)))})
        see_captured_arrays_anew()
        with jax.enable_x64(wide):
            yield

    def _flattened(self, inputs: tuple[np.ndarray, ...]) -> FlatModule:
        if self._flat is None:
            self._flat = flatten_module(self._module, self._call, self._initial, inputs)
        return self._flat

    def _leaves(self, outputs: Any) -> dict[str, Any]:
        """Return the arrays and numbers of an output by name."""
        found = named_outputs(outputs, self._chosen, _entries, "flax")
        for name, leaf in found.items():
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                raise no_array(name, leaf, "flax")
            found[name] = jnp.asarray(leaf)
        return found

    def _program(self, inputs: tuple[np.ndarray, ...], with_gradients: bool) -> Program:
        flat = self._flattened(inputs)
        changed = self._change(flat.function) if self._change else None
        trained = {name for name, spec in flat.specs.items() if spec.trainable}

        def outputs(parameters: dict[str, Any], inputs: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
            found, state = (changed(parameters, *inputs), {}) if changed else flat.stateful(parameters, *inputs)
            leaves = self._leaves(found)
            floats = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
            others = {name: leaf for name, leaf in leaves.items() if name not in floats}
            return floats, others | named_state(state)

        def program(parameters: dict[str, Any], inputs: tuple[Any, ...], cotangents: dict[str, Any]) -> dict[str, Any]:
            if not with_gradients:
                floats, others = outputs(parameters, inputs)
                return floats | others
            moving = {f"d_{name}": parameters[name] for name in parameters if name in trained}
            moving |= {f"d_{name}": x for name, x in zip(self._call.names(inputs), inputs, strict=True)}
            moving = {name: value for name, value in moving.items() if jnp.issubdtype(value.dtype, jnp.inexact)}

            def of_moving(moving: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
                held = {name: moving.get(f"d_{name}", value) for name, value in parameters.items()}
                named = zip(self._call.names(inputs), inputs, strict=True)
                return outputs(held, tuple(moving.get(f"d_{name}", x) for name, x in named))

            floats, pullback, others = jax.vjp(of_moving, moving, has_aux=True)
            # JAX's cotangents and gradients of complex numbers are the conjugates of torch's.
            typed = {name: jnp.conj(cotangents[name]).astype(value.dtype) for name, value in floats.items()}
            return floats | others | {name: jnp.conj(value) for name, value in pullback(typed)[0].items()}

        return program

    def _jitted(
        self, kind: str, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None
    ) -> dict[str, np.ndarray]:
        key = (kind,)
        if key not in self._programs:
            self._programs[key] = jax.jit(self._program(inputs, cotangents is not None))
        with self._types(parameters, inputs), jax.default_device(self._device):
            results = self._programs[key](dict(parameters), inputs, dict(cotangents or {}))
            return {name: np.asarray(value) for name, value in results.items()}

    def _truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        constants: Mapping[str, str] | None,
    ) -> Truth:
        """Return the truth's program; with `constants` (buffers), results of constants alone err."""
        leg = storage_format([*parameters.values(), *inputs])
        arguments = [_wide(dict(parameters)), _wide(inputs), _wide(cotangents or {})]
        named = None if constants is None else tuple(sorted(constants))
        key = ("truth", str(leg), named, *_signature(arguments))
        if key not in self._programs:
            with jax.enable_x64(True), jax.default_device(self._device):
                closed, names, why = traced(self._program(inputs, cotangents is not None), arguments, leg)
            if why:
                self._notes.add(
                    "the flax side cannot be traced in float64, so that its constants count as rounded to float32 "
                    f"({why})"
                )
            fixed = [{name: name in (named or ()) or not is_inexact(a) for name, a in parameters.items()}]
            fixed += [[not is_inexact(array) for array in inputs], dict.fromkeys(cotangents or {}, False)]
            self._programs[key] = Truth(closed, names, jax.tree.leaves(fixed), named is not None, self._device)
        return self._programs[key]


def _wide(tree: Any) -> Any:
    return jax.tree.map(widened, tree)


def _signature(arguments: list[Any]) -> tuple:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _integers_fit(named: Arrays) -> None:
    """Refuse integers beyond 32 bits, which jax without x64 would read modulo 2^32."""
    for name, array in named.items():
        narrow = {"i": np.dtype(np.int32), "u": np.dtype(np.uint32)}.get(array.dtype.kind)
        if narrow is not None and array.dtype.itemsize == 8 and not np.array_equal(array.astype(narrow), array):
            raise ValueError(f"{name}: expected integers that fit in 32 bits, got {array.min()} to {array.max()}.")


def _entries(tree: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a class that is registered with JAX."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return None if len(found) == 1 and found[0][1] is tree else [(step(path[0]), child) for path, child in found]
