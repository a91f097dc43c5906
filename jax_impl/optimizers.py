"""Optimisers that read shapes: what they see as n matrices and n vectors, as they would of n `nnx.Linear`."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jax_impl.array_types import kind_of, shown
from jax_impl.layer import PartitionedLinear

Layers = nnx.Module | Collection[str]
"""The nnx model whose layers are meant, or the paths of layers in a tree of parameters, such as "encoder.heads"."""


def per_partition(transformation: optax.GradientTransformation, layers: Layers) -> optax.GradientTransformation:
    """Apply an optimiser to each matrix and vector of the layers by itself, as to those of n `nnx.Linear`.

    Muon, Adafactor, LAMB, LARS and other optimisers that read the shape or norm of a parameter then make the steps of n
    separate ones; other parameters get theirs as they are. What reads several parameters together, such as
    `optax.clip_by_global_norm`, belongs outside: `optax.chain(clip, per_partition(...))`.

    Args:
        transformation: The optimiser, for one matrix or vector; it runs under `jax.vmap`.
        layers: The nnx model whose layers are meant, or paths such as "encoder.heads" in the parameters; "" for a
            layer's own parameters. In linen's variables, paths begin with "params.".

    Returns:
        The optimiser for the whole tree of parameters.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the parameters have no layer at one of the paths; raised by `init`.
    """
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(
            f"`transformation`: expected an optax.GradientTransformation, got {kind_of(transformation)}; pass the "
            f"optimiser, such as optax.adafactor(1e-3)."
        )
    paths = _paths(layers)

    def init(params: Any) -> Any:
        return jax.tree.map(lambda stacked: jax.vmap(transformation.init)(stacked), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(updates)
        states = structure.flatten_up_to(state)
        stacked = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        done = [jax.vmap(transformation.update)(*leaf) for leaf in zip(leaves, states, stacked, strict=True)]
        return tuple(structure.unflatten(part) for part in zip(*done, strict=True)) if done else (updates, state)

    def labels(params: Any) -> Any:
        return _map_kinds(lambda kind, leaf: "whole" if kind is None else "partitions", params, paths)

    return optax.partition({"partitions": optax.GradientTransformation(init, update), "whole": transformation}, labels)


def muon_dimension_numbers(layers: Layers) -> Callable[[Any], Any]:
    """Return what `optax.contrib.muon` takes as `muon_weight_dimension_numbers`: a layer's kernel is n matrices.

    Biases and whatever else is no matrix go to Muon's Adam, as by its default. `layers` is that of `per_partition`.
    """
    paths = _paths(layers)

    def of_leaf(kind: str | None, leaf: Any) -> MuonDimensionNumbers | None:
        if kind is None:
            return MuonDimensionNumbers() if leaf.ndim == 2 else None
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2) if kind == "kernel" else None

    return lambda params: _map_kinds(of_leaf, params, paths)


def weight_decay_mask(layers: Layers) -> Callable[[Any], Any]:
    """Return a mask for optax: True for matrices, which decay, False for vectors, a layer's (n, out) bias included.

    The rule "decay every parameter with at least two axes", as n `nnx.Linear` would have it. `layers` is that of
    `per_partition`.
    """
    paths = _paths(layers)
    return lambda params: _map_kinds(lambda kind, leaf: leaf.ndim > 1 and kind != "bias", params, paths)


def _paths(layers: Any) -> set[tuple[str, ...]]:
    if isinstance(layers, nnx.Module):
        modules = nnx.iter_modules(layers)
        return {tuple(map(str, path)) for path, module in modules if isinstance(module, PartitionedLinear)}
    if isinstance(layers, str) or not isinstance(layers, Collection) or not all(isinstance(at, str) for at in layers):
        raise TypeError(
            f"`layers`: expected an nnx model, or paths such as ['encoder.heads'], got {shown(layers)}; pass one of "
            f"these."
        )
    return {tuple(filter(None, path.split("."))) for path in layers}


def _map_kinds(function: Callable[[str | None, Any], Any], params: Any, paths: set[tuple[str, ...]]) -> Any:
    """Map (which parameter of a layer it is, or None; the leaf) over a tree of parameters."""
    found = set()

    def of_leaf(path: Any, leaf: Any) -> Any:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        for at, name in enumerate(names):
            if name in ("kernel", "bias") and names[:at] in paths:
                found.add(names[:at])
                return function(name, leaf)
        return function(None, leaf)

    mapped = jax.tree_util.tree_map_with_path(of_leaf, params)
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    # A layer may be masked out of the tree that is seen here.
    missing = set() if any(isinstance(node, optax.MaskedNode) for node in nodes) else paths - found
    if missing:
        raise ValueError(
            f"`layers`: expected paths of layers in the parameters, got {shown('.'.join(min(missing)))}, where none "
            f"is; pass those of the tree, such as 'params.heads' in linen's variables."
        )
    return mapped
