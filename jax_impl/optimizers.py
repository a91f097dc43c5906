"""Optimisers that read shapes: what they see as n matrices and n vectors, as they would of n `nnx.Linear`."""

from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jax_impl.array_types import kind_of, shown
from jax_impl.implementations.unequal import by_bucket, flat, matrices_by_bucket
from jax_impl.layer import PartitionedLinear
from jax_impl.packing import Packing

# The axes of one partition's share.
_AXES = {"kernel": 2, "bias": 1}

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
    each: dict[Hashable, optax.GradientTransformation] = {"whole": transformation}
    each["partitions"] = _mapped(transformation, lambda leaf: leaf, lambda stacked, like: stacked)
    for kind, axes in _AXES.items():  # of layers that `scan` or `vmap` has stacked: one more axis for each
        ways = partial(_flattened, axes), lambda stacked, like: stacked.reshape(like.shape)
        each[f"stacked {kind}"] = _mapped(transformation, *ways)
    # Named by strings, which JAX can sort.
    sizes = {packing: str(number) for number, packing in enumerate(filter(None, dict.fromkeys(paths.values())))}
    for packing, number in sizes.items():
        for kind in ("kernel", "bias"):
            ways = partial(_cut, kind, packing), partial(_joined, kind, packing)
            each[f"{kind} of sizes {number}"] = _mapped(transformation, *ways)

    def label(kind: str | None, packing: Packing | None, leaf: Any) -> str:
        if kind is None:
            return "whole"
        if packing is not None:
            return f"{kind} of sizes {sizes[packing]}"
        return "partitions" if leaf.ndim == _AXES[kind] + 1 else f"stacked {kind}"

    return optax.partition(each, lambda params: _map_kinds(label, params, paths))


def _mapped(
    transformation: optax.GradientTransformation, cut: Callable[[Any], Any], join: Callable[[Any, Any], Any]
) -> optax.GradientTransformation:
    """Apply an optimiser to each matrix or vector of the stacks that a parameter is cut into."""
    transformation = optax.with_extra_args_support(transformation)

    def init(params: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.tree.map(jax.vmap(transformation.init), cut(leaf)), params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        whole = jax.tree.structure(updates)
        step = jax.vmap(partial(transformation.update, **extra))
        leaves, structure = jax.tree.flatten(jax.tree.map(cut, updates))
        states = structure.flatten_up_to(state)
        stacks = [None] * len(leaves) if params is None else structure.flatten_up_to(jax.tree.map(cut, params))
        done = [step(*stack) for stack in zip(leaves, states, stacks, strict=True)]
        if not done:
            return updates, state
        moved, states = (structure.unflatten(part) for part in zip(*done, strict=True))
        return whole.unflatten(map(join, whole.flatten_up_to(moved), jax.tree.leaves(updates))), states

    return optax.GradientTransformationExtraArgs(init, update)


def _flattened(axes: int, leaf: Any) -> Any:
    return leaf.reshape(-1, *leaf.shape[leaf.ndim - axes :])


def _cut(kind: str, packing: Packing, leaf: Any) -> list[Any]:
    if kind == "kernel":
        return matrices_by_bucket(leaf, packing)
    return [stack[:, 0] for stack in by_bucket(leaf[None], packing.out_features, packing)]


def _joined(kind: str, packing: Packing, stacks: list[Any], like: Any) -> Any:
    del like
    if kind == "kernel":
        return jnp.concatenate([stack.ravel() for stack in stacks])
    return flat([stack[:, None] for stack in stacks], packing)[0]


def muon_dimension_numbers(layers: Layers) -> Callable[[Any], Any]:
    """Return what `optax.contrib.muon` takes as `muon_weight_dimension_numbers`: a layer's kernel is n matrices.

    Biases and whatever else is no matrix go to Muon's Adam, as by its default. `layers` is that of `per_partition`.
    """
    paths = _paths(layers)

    def of_leaf(kind: str | None, packing: Packing | None, leaf: Any) -> MuonDimensionNumbers | None:
        if packing is not None:
            raise ValueError(
                "`layers`: expected layers of one size for all partitions, got unequal sizes, whose packed matrices no "
                "dimension numbers tell apart; use per_partition(optax.contrib.muon(...), model)."
            )
        if kind is None:
            return MuonDimensionNumbers() if leaf.ndim == 2 else None
        if kind != "kernel":
            return None
        return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return lambda params: _map_kinds(of_leaf, params, paths)


def weight_decay_mask(layers: Layers) -> Callable[[Any], Any]:
    """Return a mask for optax: True for matrices, which decay, False for vectors, a layer's (n, out) bias included.

    The rule "decay every parameter with at least two axes", as n `nnx.Linear` would have it. `layers` is that of
    `per_partition`.
    """
    paths = _paths(layers)
    return lambda params: _map_kinds(
        lambda kind, packing, leaf: kind == "kernel" or (kind is None and leaf.ndim > 1), params, paths, by_kind=True
    )


def _paths(layers: Any) -> dict[tuple[str, ...], Packing | None]:
    """Return the paths of layers, each with the layout of a layer of unequal sizes, as far as it is known."""
    if isinstance(layers, nnx.Module):
        modules = nnx.iter_modules(layers)
        found = {tuple(map(str, path)): module for path, module in modules if isinstance(module, PartitionedLinear)}
        return {path: module.packing for path, module in found.items()}
    if isinstance(layers, str) or not isinstance(layers, Collection) or not all(isinstance(at, str) for at in layers):
        raise TypeError(
            f"`layers`: expected an nnx model, or paths such as ['encoder.heads'], got {shown(layers)}; pass one of "
            f"these."
        )
    return {tuple(filter(None, path.split("."))): None for path in layers}


def _map_kinds(
    function: Callable[[str | None, Packing | None, Any], Any],
    params: Any,
    paths: Mapping[tuple[str, ...], Packing | None],
    *,
    by_kind: bool = False,
) -> Any:
    """Map (which parameter of a layer it is, or None; its packing; the leaf) over a tree of parameters.

    Packed parameters of an unknown layout are refused, but where the function asks for the kind alone.
    """
    found = set()

    def of_leaf(path: Any, leaf: Any) -> Any:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        for at, name in enumerate(names):
            if name in ("kernel", "bias") and names[:at] in paths:
                found.add(names[:at])
                packing = paths[names[:at]]
                if packing is not None and not by_kind and getattr(leaf, "ndim", 1) != 1:
                    raise ValueError(
                        f"`layers`: expected layers of unequal sizes one by one, got {shown('.'.join(names))} stacked "
                        f"in shape {leaf.shape}; use a list of layers in place of a scan or vmap over them."
                    )
                # A bias of n vectors has two axes, kernels of nnx and linen three.
                if packing is None and not by_kind and getattr(leaf, "ndim", 2) == 1:
                    raise ValueError(
                        f"`layers`: expected the nnx model, for partitions of unequal sizes, which packed parameters "
                        f"do not say, got the path {shown('.'.join(names[:at]))}; pass the model."
                    )
                return function(name, packing, leaf)
        return function(None, None, leaf)

    mapped = jax.tree_util.tree_map_with_path(of_leaf, params)
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    # A layer may be masked out of the tree that is seen here.
    missing = set() if any(isinstance(node, optax.MaskedNode) for node in nodes) else paths.keys() - found
    if missing:
        raise ValueError(
            f"`layers`: expected paths of layers in the parameters, got {shown('.'.join(min(missing)))}, where none "
            f"is; pass those of the tree, such as 'params.heads' in linen's variables."
        )
    return mapped
