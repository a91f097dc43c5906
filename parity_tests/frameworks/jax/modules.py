"""Flax linen modules, nnx modules and plain functions in one form: a function of a flat dict of arrays and inputs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from parity_tests.frameworks.jax.operations import compile_options
from parity_tests.frameworks.jax.recorder import named_calls
from parity_tests.pair.calls import Call, refuse_module
from parity_tests.pair.side import ParameterSpec

Function = Callable[..., Any]


@dataclass(frozen=True)
class FlatModule:
    """A module without state of its own."""

    # Arrays by dotted path; linen collections other than `params` come first in the path
    specs: dict[str, ParameterSpec]
    stateful: Function  # `(arrays, *inputs) -> (outputs, buffers)`, the buffers by name as they are after the call
    reseeded: Function | None  # the same with other random states, or None if there are none

    def function(self, arrays: Mapping[str, Any], *inputs: Any) -> Any:
        """Return the outputs alone."""
        return self.stateful(arrays, *inputs)[0]


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def _named(paths: Iterable[tuple], argument: str) -> dict[str, Any]:
    """Return paths by dotted name; two arrays of one name would be taken for each other."""
    found: dict[str, Any] = {}
    for path in paths:
        name = _dotted(path)
        if name in found:
            raise ValueError(
                f"{argument}: expected a name of its own for every array, got two called {name}; rename a key."
            )
        found[name] = path
    return found


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)


def _spec(value: Any, trainable: bool) -> ParameterSpec:
    # A Python number has 32 bits, as in JAX.
    array = np.asarray(value if isinstance(value, jax.Array | np.ndarray | np.generic) else jnp.asarray(value))
    return ParameterSpec(array, trainable and not np.issubdtype(array.dtype, np.integer) and array.dtype != np.bool_)


def _nnx(module: nnx.Module, made: Call) -> FlatModule:
    graph, state = nnx.split(module)
    variables = dict(nnx.to_flat_state(state))
    # An array that is no variable is a constant of the module, as one that the call computes.
    held = [
        path
        for path, variable in variables.items()
        if isinstance(variable, nnx.Variable)
        and not isinstance(variable, nnx.RngState)
        and _is_array(variable.get_value())
    ]
    names = _named(held, "flax_module")
    specs = {
        name: _spec(variables[path].get_value(), isinstance(variables[path], nnx.Param)) for name, path in names.items()
    }

    def call(arrays: Mapping[str, Any], inputs: tuple, base: Mapping[tuple, Any]) -> Any:
        # New variables for random states too: a module may only update what was made at its own level of tracing.
        fresh = {path: v.replace(v.get_value()) if isinstance(v, nnx.Variable) else v for path, v in base.items()}
        fresh |= {path: base[path].replace(arrays[name]) for name, path in names.items()}
        merged = nnx.merge(graph, nnx.from_flat_state(fresh))
        with named_calls(merged):
            outputs = made(merged, inputs)
        after = dict(nnx.to_flat_state(nnx.state(merged)))
        return outputs, {name: after[path].get_value() for name, path in names.items() if not specs[name].trainable}

    others = {
        path: v.replace(jax.random.fold_in(v.get_value(), 1)) if isinstance(v, nnx.RngKey) else v
        for path, v in variables.items()
    }
    return FlatModule(
        specs,
        lambda arrays, *inputs: call(arrays, inputs, variables),
        (lambda arrays, *inputs: call(arrays, inputs, others))
        if any(isinstance(variable, nnx.RngState) for variable in variables.values())
        else None,
    )


def _linen(
    module: nn.Module, made: Call, initial: Mapping[str, Any] | None, inputs: tuple[np.ndarray, ...]
) -> FlatModule:
    kwargs = dict(made.kwargs)
    rngs = dict(kwargs.pop("rngs", None) or {})
    mutable = kwargs.pop("mutable", False)
    made = dataclasses.replace(made, kwargs=kwargs)
    arguments = [jnp.asarray(array.astype(np.float32) if array.dtype == np.float64 else array) for array in inputs]
    if initial is None:

        def first(arguments: list[Any]) -> dict[str, Any]:
            found: dict[str, Any] = {}

            def init(*given: Any, **named: Any) -> Any:
                outputs, variables = module.init_with_output({"params": jax.random.key(0), **rngs}, *given, **named)
                found.update(variables)
                return outputs

            made(init, arguments)
            return found

        try:
            # One program, without outputs that nothing needs: compiled one by one, initializers take minutes.
            initial = dict(jax.jit(first, compiler_options=compile_options(()))(arguments))
        except Exception:  # a module that looks at its numbers, or holds no arrays; it may be its own, raised again
            initial = first(arguments)
    elif not isinstance(initial, Mapping):
        raise TypeError(f"flax_params: expected a dict of variables for a linen module, got {initial!r:.80}.")
    elif "params" not in initial:
        initial = {"params": initial}
    flat = flatten_dict(meta.unbox(dict(initial)))
    shortened = {path[1:] if path[0] == "params" else path: path for path in flat}
    names = {name: shortened[path] for name, path in _named(shortened, "flax_module").items()}
    specs = {name: _spec(flat[path], path[0] == "params") for name, path in names.items()}

    def call(arrays: Mapping[str, Any], inputs: tuple, keys: Mapping[str, Any]) -> Any:
        tree = unflatten_dict({path: arrays[name] for name, path in names.items()})
        updates: dict[str, Any] = {}

        def run(*given: Any, **named: Any) -> Any:
            result = module.apply({**tree, **updates}, *given, rngs=dict(keys) or None, mutable=mutable, **named)
            if not mutable:
                return result
            # With mutable collections apply returns their updates as well.
            updates.update(result[1])
            return result[0]

        outputs = made(run, inputs)
        after = {_dotted(path): value for path, value in flatten_dict(meta.unbox(updates)).items()}
        return outputs, {name: after.get(name, arrays[name]) for name in names if not specs[name].trainable}

    others = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    return FlatModule(
        specs,
        lambda arrays, *inputs: call(arrays, inputs, rngs),
        (lambda arrays, *inputs: call(arrays, inputs, others)) if rngs else None,
    )


def step(entry: Any) -> str:
    """Spell one step of a path through a pytree."""
    return str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))


def _pytree(call: Callable[..., Any], tree: Any, is_parameter: Callable[[Any], bool]) -> FlatModule:
    """Return a function of any pytree, whose arrays are named by their paths; its other leaves stay what they are.

    Args:
        call: `(tree, inputs) -> outputs`.
        tree: dicts, lists, tuples, dataclasses, Equinox modules, ... with initial values.
        is_parameter: of a leaf.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in found]
    # A Flax variable is a node of its own, with one leaf: its path is the name.
    paths = [
        tuple(step(e) for k, e in enumerate(path) if k < len(path) - 1 or not _is_value_of_a_variable(tree, path))
        for path, _ in found
    ]
    places = {path: k for k, path in enumerate(paths) if is_parameter(leaves[k])}
    if not places and leaves == [tree]:
        raise TypeError(f"flax_params: expected arrays, in a dict or another pytree, got {tree!r:.80}; pass arrays.")
    if len(places) < sum(map(is_parameter, leaves)):
        raise ValueError("flax_params: expected a path of its own for every array, got two that are spelled alike.")
    names = {name: places[path] for name, path in _named(places, "flax_params").items()}
    specs = {name: _spec(leaves[k], True) for name, k in names.items()}

    def stateful(arrays: Mapping[str, Any], *inputs: Any) -> tuple[Any, dict[str, Any]]:
        filled = [*leaves]
        for name, k in names.items():
            filled[k] = arrays[name]
        return call(jax.tree.unflatten(structure, filled), inputs), {}

    return FlatModule(specs, stateful, None)


def named_arrays(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Return the arrays of a module or pytree by name, and a function that returns the same tree with others.

    Names are those of `flatten_module`. Of an nnx module, or its state, the function returns a state, for `nnx.update`;
    arrays that it is not given stay as they are.
    """
    if isinstance(tree, nnx.Module | nnx.State):
        variables = {
            path: variable
            for path, variable in nnx.to_flat_state(tree if isinstance(tree, nnx.State) else nnx.state(tree))
            if isinstance(variable, nnx.Variable) and not isinstance(variable, nnx.RngState)
        }
        paths = _named(variables, "like")

        def state(arrays: Mapping[str, Any]) -> Any:
            return nnx.from_flat_state({paths[name]: variables[paths[name]].replace(a) for name, a in arrays.items()})

        return {name: variables[path].get_value() for name, path in paths.items()}, state
    found, structure = jax.tree_util.tree_flatten_with_path(meta.unbox(tree))
    linen = isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)
    steps = [tuple(map(step, path)) for path, _ in found]
    places = {path[1:] if linen and path[0] == "params" else path: k for k, path in enumerate(steps)}
    places = {path: k for path, k in places.items() if hasattr(found[k][1], "shape")}
    names = {name: places[path] for name, path in _named(places, "source").items()}

    def filled(arrays: Mapping[str, Any]) -> Any:
        leaves = [leaf for _, leaf in found]
        for name, array in arrays.items():
            leaves[names[name]] = array
        return jax.tree.unflatten(structure, leaves)

    return {name: found[k][1] for name, k in names.items()}, filled


def _is_value_of_a_variable(tree: Any, path: tuple) -> bool:
    if getattr(path[-1], "name", "") not in ("value", "raw_value"):
        return False
    for entry in path[:-1]:
        if hasattr(entry, "name") and not hasattr(entry, "key"):
            tree = getattr(tree, entry.name)
        else:
            tree = tree[getattr(entry, "key", getattr(entry, "idx", None))]
    return isinstance(tree, nnx.Variable | meta.AxisMetadata)


def _is_tree_with_arrays(module: Any) -> bool:
    leaves = jax.tree.leaves(module)
    return leaves != [module] and any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


def flatten_module(
    module: Any, made: Call, initial: Mapping[str, Any] | None, inputs: tuple[np.ndarray, ...]
) -> FlatModule:
    """Bring any supported module into the one form.

    Args:
        module: a linen module, an nnx module, a callable pytree with arrays (an Equinox module), or
            `f(parameters, *inputs)` of any pytree.
        made: how it is called; for linen `rngs` and `mutable` among the keyword arguments are those of `apply`.
        initial: initial parameters of a function, or variables of a linen module; None for another module.
        inputs: examples, from which linen infers shapes.

    Raises:
        TypeError: for anything else, or a function without initial parameters.
    """
    refuse_module(module, "flax", "a linen or nnx module or a function")
    if isinstance(module, nn.Module):
        return _linen(module, made, initial, inputs)
    if not callable(module):
        raise TypeError(f"flax_module: expected a linen or nnx module or a function, got {module!r}; create one.")
    held = isinstance(module, nnx.Module) or (not isinstance(module, FunctionType) and _is_tree_with_arrays(module))
    if held and initial is not None:
        raise TypeError("flax_params: expected None beside a module, which holds its own, got a value; leave it out.")
    if isinstance(module, nnx.Module):
        return _nnx(module, made)
    if held:
        return _pytree(made, module, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    if initial is None:
        raise TypeError("flax_params: expected a dict of initial arrays for a function, got None; pass one.")
    return _pytree(lambda tree, inputs: made(functools.partial(module, tree), inputs), initial, _is_initial)


def _is_initial(leaf: Any) -> bool:
    """Tell whether a leaf is a parameter (an array, a fraction) and not a setting (an integer, a text)."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float)
