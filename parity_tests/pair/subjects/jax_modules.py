"""Flax linen modules, nnx modules and plain functions in one form: a function of a flat dict of arrays and inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from parity_tests.pair.side import ParameterSpec

Function = Callable[..., Any]


@dataclass(frozen=True)
class FlatModule:
    """A module without state of its own.

    Attributes:
        specs: arrays by dotted path; linen collections other than ``params`` come first in the path.
        stateful: ``(arrays, *inputs) -> (outputs, buffers)``, the buffers by name as they are after the call.
        reseeded: the same with other random states, or None if there are none.
    """

    specs: dict[str, ParameterSpec]
    stateful: Function
    reseeded: Function | None

    def function(self, arrays: Mapping[str, Any], *inputs: Any) -> Any:
        """The outputs alone."""
        return self.stateful(arrays, *inputs)[0]


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def _nnx(module: nnx.Module, kwargs: Mapping[str, Any]) -> FlatModule:
    graph, state = nnx.split(module)
    variables = dict(nnx.to_flat_state(state))
    names = {_dotted(path): path for path, variable in variables.items() if not isinstance(variable, nnx.RngState)}
    specs = {
        name: ParameterSpec(np.asarray(variables[path][...]), isinstance(variables[path], nnx.Param))
        for name, path in names.items()
    }

    def call(arrays: Mapping[str, Any], inputs: tuple, base: Mapping[tuple, Any]) -> Any:
        # New variables for random states too: a module may only update what was made at its own level of tracing.
        fresh = {path: variable.replace(variable[...]) for path, variable in base.items()}
        fresh |= {path: base[path].replace(arrays[name]) for name, path in names.items()}
        merged = nnx.merge(graph, nnx.from_flat_state(fresh))
        outputs = merged(*inputs, **kwargs)
        after = dict(nnx.to_flat_state(nnx.state(merged)))
        return outputs, {name: after[path][...] for name, path in names.items() if not specs[name].trainable}

    others = {
        path: variable.replace(jax.random.fold_in(variable[...], 1)) if isinstance(variable, nnx.RngKey) else variable
        for path, variable in variables.items()
    }
    return FlatModule(
        specs,
        lambda arrays, *inputs: call(arrays, inputs, variables),
        (lambda arrays, *inputs: call(arrays, inputs, others)) if len(names) < len(variables) else None,
    )


def _linen(module: nn.Module, kwargs: Mapping[str, Any], inputs: tuple[np.ndarray, ...]) -> FlatModule:
    kwargs = dict(kwargs)
    rngs = dict(kwargs.pop("rngs", None) or {})
    mutable = kwargs.pop("mutable", False)
    arguments = [jnp.asarray(array.astype(np.float32) if array.dtype == np.float64 else array) for array in inputs]
    variables = meta.unbox(module.init({"params": jax.random.key(0), **rngs}, *arguments, **kwargs))
    flat = flatten_dict(variables)
    names = {_dotted(path[1:] if path[0] == "params" else path): path for path in flat}
    specs = {name: ParameterSpec(np.asarray(flat[path]), path[0] == "params") for name, path in names.items()}

    def call(arrays: Mapping[str, Any], inputs: tuple, keys: Mapping[str, Any]) -> Any:
        tree = unflatten_dict({path: arrays[name] for name, path in names.items()})
        result = module.apply(tree, *inputs, rngs=dict(keys) or None, mutable=mutable, **kwargs)
        # With mutable collections apply returns their updates as well.
        outputs, updates = result if mutable else (result, {})
        after = {_dotted(path): value for path, value in flatten_dict(meta.unbox(updates)).items()}
        return outputs, {name: after.get(name, arrays[name]) for name in names if not specs[name].trainable}

    others = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    return FlatModule(
        specs,
        lambda arrays, *inputs: call(arrays, inputs, rngs),
        (lambda arrays, *inputs: call(arrays, inputs, others)) if rngs else None,
    )


def _function(function: Function, kwargs: Mapping[str, Any], initial: Mapping[str, Any]) -> FlatModule:
    paths = {_dotted(path): path for path in flatten_dict(dict(initial))}
    flat = flatten_dict(dict(initial))
    specs = {name: ParameterSpec(np.asarray(flat[path]), True) for name, path in paths.items()}
    return FlatModule(
        specs,
        lambda arrays, *inputs: (
            function(unflatten_dict({path: arrays[name] for name, path in paths.items()}), *inputs, **kwargs),
            {},
        ),
        None,
    )


def flatten_module(
    module: Any, kwargs: Mapping[str, Any], initial: Mapping[str, Any] | None, inputs: tuple[np.ndarray, ...]
) -> FlatModule:
    """Brings any supported module into the one form.

    Args:
        module: a linen module, an nnx module, or ``f(parameters, *inputs)`` of a nested dict.
        kwargs: keyword arguments of every call; for linen ``rngs`` and ``mutable`` mean what they mean to ``apply``.
        initial: initial parameters of a function, nested or with dotted names; None for a module.
        inputs: examples, from which linen infers shapes.

    Raises:
        TypeError: for anything else, or a function without initial parameters.
    """
    if isinstance(module, nnx.Module):
        return _nnx(module, kwargs)
    if isinstance(module, nn.Module):
        return _linen(module, kwargs, inputs)
    if not callable(module) or isinstance(module, type):
        raise TypeError(f"flax_module: expected a linen or nnx module or a function, got {module!r}; create one.")
    if initial is None:
        raise TypeError("flax_params: expected a dict of initial arrays for a function, got None; pass one.")
    return _function(module, kwargs, initial)
