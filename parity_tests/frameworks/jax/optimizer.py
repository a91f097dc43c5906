"""Builds the optax side of a neutral optimiser spec."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity_tests.training.optimizers import CLIP_EPSILON, OptimizerSpec

Arrays = Mapping[str, jax.Array]


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Scales by `min(1, max_norm / (norm + 1e-6))`; optax's own clip leaves the 1e-6 out."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _SumOfSquares(NamedTuple):
    sum: Any


def _scale_by_adagrad(epsilon: float) -> optax.GradientTransformation:
    """`g / (sqrt(sum g^2) + eps)`, accumulator from 0; optax.scale_by_rss starts at 0.1 with eps inside the root."""

    def update(updates, state, params=None):
        del params
        total = jax.tree.map(lambda s, g: s + g * g, state.sum, updates)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + epsilon), updates, total), _SumOfSquares(total)

    return optax.GradientTransformation(lambda params: _SumOfSquares(jax.tree.map(jnp.zeros_like, params)), update)


def build_optax(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """Returns the optax transformation of a spec, over a flat dict of arrays named `...weight` and `...bias`.

    Args:
        spec: what to build.
        steps: how many steps the schedule must cover.
    """
    rates = spec.rates(steps)

    def rate(count):
        return jnp.asarray(rates)[count]

    def decay_mask(params: Arrays) -> dict[str, bool]:
        return {name: spec.decays(name) for name in params}

    decay = optax.add_decayed_weights(spec.weight_decay, mask=decay_mask) if spec.weight_decay else optax.identity()
    if spec.name == "sgd":
        algorithm = optax.trace(spec.momentum, nesterov=spec.nesterov) if spec.momentum else optax.identity()
    elif spec.name in ("adam", "adamw"):
        algorithm = optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2, eps=spec.epsilon, eps_root=0.0)
    elif spec.name == "rmsprop":
        algorithm = optax.scale_by_rms(decay=spec.beta2, eps=spec.epsilon, initial_scale=0.0, eps_in_sqrt=False)
    else:
        algorithm = _scale_by_adagrad(spec.epsilon)
    clip = optax.identity() if spec.clip_norm is None else _clip(spec.clip_norm)
    # Decoupled decay joins after the algorithm, coupled decay is part of the gradient that the algorithm sees.
    inner = (algorithm, decay) if spec.name == "adamw" else (decay, algorithm)
    return optax.chain(clip, *inner, optax.scale_by_learning_rate(rate))


def moments(state: Any) -> dict[str, np.ndarray]:
    """Returns every moment in an optax state as `<parameter>/<first|second>`."""
    fields = {"trace": "first", "mu": "first", "nu": "second", "sum": "second"}
    found: dict[str, np.ndarray] = {}
    for part in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields")):
        for field, kind in fields.items():
            values = getattr(part, field, None)
            if isinstance(values, Mapping):
                found |= {f"{name}/{kind}": np.asarray(value) for name, value in values.items()}
    return found


def step_counts(state: Any) -> set[int]:
    """Returns the distinct step counts in an optax state."""
    return {
        int(part.count)
        for part in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields"))
        if hasattr(part, "_fields") and "count" in part._fields
    }
