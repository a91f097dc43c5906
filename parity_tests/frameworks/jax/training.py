"""Train a task in JAX with this project's layers: free-running, or step by step from given states."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_impl import partitioned_linear
from parity_tests.training.tasks import CLIP_EPSILON, LayerTap, OptimizerSpec, StepGradients, TrainingTask, Trajectory


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Scale by `min(1, max_norm / (norm + 1e-6))`; optax's own clip leaves the 1e-6 out."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _SumOfSquares(NamedTuple):
    sum: Any


def _scale_by_adagrad(epsilon: float) -> optax.GradientTransformation:
    """Scale to `g / (sqrt(sum g^2) + eps)`, sum from 0; optax.scale_by_rss starts at 0.1, eps inside the root."""

    def update(updates, state, params=None):
        del params
        total = jax.tree.map(lambda s, g: s + g * g, state.sum, updates)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + epsilon), updates, total), _SumOfSquares(total)

    return optax.GradientTransformation(lambda params: _SumOfSquares(jax.tree.map(jnp.zeros_like, params)), update)


def build_optax(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation of a spec, over a flat dict of arrays named `...weight` and `...bias`."""
    rates = spec.rates(steps)

    def rate(count):
        return jnp.asarray(rates)[count]

    def decay_mask(params: Mapping[str, Any]) -> Mapping[str, Any]:
        # By the path, since an nnx optimiser gives a State where others give a dict.
        return jax.tree.map_with_path(lambda path, _: spec.decays(path[0].key), params)

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
    """Return every moment in an optax state as `<parameter>/<first|second>`."""
    fields = {"trace": "first", "mu": "first", "nu": "second", "sum": "second"}
    found: dict[str, np.ndarray] = {}
    for part in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields")):
        for field, kind in fields.items():
            values = getattr(part, field, None)
            if isinstance(values, Mapping):
                found |= {f"{name}/{kind}": np.asarray(value) for name, value in values.items()}
    return found


def step_counts(state: Any) -> set[int]:
    """Return the distinct step counts in an optax state."""
    return {
        int(part.count)
        for part in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields"))
        if hasattr(part, "_fields") and "count" in part._fields
    }


Arrays = dict[str, jax.Array]
# Added, by layer, to its input and to its output.
Offsets = dict[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class JaxTraining:
    """The JAX side of training parity; see `training.tasks.TrainingSubject`.

    Frozen, so that equal sides are the same static argument and share what was compiled.
    """

    implementation: str = "auto"
    framework: ClassVar[str] = "jax"

    def _layer(self, name: str, x: jax.Array, parameters: Arrays, offsets: Offsets, taps: dict) -> jax.Array:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        # The offsets are zero: their gradients are the layer's dx and the cotangent that reaches its output.
        if name in offsets:
            x = x + offsets[name][0]
        y = partitioned_linear(x, weight, bias, implementation=self.implementation, precision=jax.lax.Precision.HIGHEST)
        taps[name] = (x, y)
        return y + offsets[name][1] if name in offsets else y

    def _loss(self, model: str, parameters: Arrays, x, target, offsets: Offsets) -> tuple[jax.Array, dict]:
        taps: dict[str, tuple[jax.Array, jax.Array]] = {}
        if model == "mlp":
            hidden = jnp.tanh(self._layer("hidden", x, parameters, offsets, taps))
            y = self._layer("output", hidden, parameters, offsets, taps)
        else:
            last = x[:, -1:, :]
            y = jnp.swapaxes(self._layer("head", jnp.swapaxes(x - last, 1, 2), parameters, offsets, taps), 1, 2) + last
        return jnp.mean((y - target) ** 2), taps

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _gradients(self, model: str, parameters: Arrays, x: jax.Array, target: jax.Array):
        outputs = jax.eval_shape(lambda: self._loss(model, parameters, x, target, {})[1])
        offsets = jax.tree.map(lambda end: jnp.zeros(end.shape, end.dtype), outputs)
        return jax.value_and_grad(
            lambda params, offsets: self._loss(model, params, x, target, offsets), argnums=(0, 1), has_aux=True
        )(parameters, offsets)

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Return loss and gradients at one state, with what went into and came out of each layer."""
        with jax.enable_x64(dtype == "float64"):
            placed = {name: jnp.asarray(array, dtype) for name, array in parameters.items()}
            batch = step % len(task.inputs)
            x, target = jnp.asarray(task.inputs[batch], dtype), jnp.asarray(task.targets[batch], dtype)
            (loss, taps), (found, ends) = self._gradients(task.model, placed, x, target)
            return StepGradients(
                loss=float(loss),
                gradients={name: np.asarray(value) for name, value in found.items()},
                taps={
                    name: LayerTap(*map(np.asarray, (x, y, ends[name][1], ends[name][0])))
                    for name, (x, y) in taps.items()
                },
            )

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Train freely; with `members` > 0, that many runs with a random rounding error after every step."""
        with jax.enable_x64(dtype == "float64"):
            placed = {name: jnp.asarray(array, dtype) for name, array in task.parameters.items()}
            inputs, targets = jnp.asarray(task.inputs, dtype), jnp.asarray(task.targets, dtype)
            optimizer = build_optax(spec, steps)
            noise = jnp.finfo(dtype).eps / 2 if members else 0.0

            def run(key):
                def step(carry, index):
                    params, state = carry
                    batch = index % len(inputs)
                    (loss, _), gradients = jax.value_and_grad(
                        lambda p: self._loss(task.model, p, inputs[batch], targets[batch], {}), has_aux=True
                    )(params)
                    updates, state = optimizer.update(gradients, state, params)
                    params = cast(Arrays, optax.apply_updates(params, updates))
                    if members:
                        keys = jax.random.split(jax.random.fold_in(key, index), len(params))
                        params = {
                            # Not value * (1 + ...): near 1 only the noise below it survives, a drift instead of noise.
                            name: value + value * (noise * jax.random.uniform(k, value.shape, value.dtype, -1.0, 1.0))
                            for k, (name, value) in zip(keys, params.items(), strict=True)
                        }
                    return (params, state), (loss, params)

                return jax.lax.scan(step, (placed, optimizer.init(placed)), jnp.arange(steps))

            keys = jax.random.split(jax.random.key(seed), max(members, 1))
            # One member after the other: a batched product may sum in another order than the one that is judged.
            (_, state), (losses, states) = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
            return [
                Trajectory(
                    np.asarray(losses[member], np.float64),
                    [{name: np.asarray(value[member, k]) for name, value in host.items()} for k in range(steps)],
                    moments(jax.tree.map(lambda leaf, member=member: leaf[member], state)),
                    step_counts(jax.tree.map(lambda leaf, member=member: leaf[member], state)),
                )
                for host in [{name: np.asarray(value) for name, value in states.items()}]
                for member in range(max(members, 1))
            ]

    def replay(
        self,
        parameters: Mapping[str, np.ndarray],
        spec: OptimizerSpec,
        gradients: list[dict[str, np.ndarray]],
        dtype: str,
    ) -> Trajectory:
        """Feed recorded gradients to the optimiser alone."""
        with jax.enable_x64(dtype == "float64"):
            params = {name: jnp.asarray(array, dtype) for name, array in parameters.items()}
            optimizer = build_optax(spec, len(gradients))
            state = optimizer.init(params)

            def step(carry, gradient):
                updates, state = optimizer.update(gradient, carry[1], carry[0])
                params = cast(Arrays, optax.apply_updates(carry[0], updates))
                return (params, state), (params, state)

            placed = {name: jnp.asarray(np.stack([gradient[name] for gradient in gradients]), dtype) for name in params}
            (_, state), (states, history) = jax.jit(functools.partial(jax.lax.scan, step))((params, state), placed)
            by_step = [
                [{name: array[k] for name, array in host.items()} for k in range(len(gradients))]
                for host in ({name: np.asarray(value) for name, value in states.items()}, moments(history))
            ]
            losses = np.zeros(len(gradients))
            return Trajectory(losses, by_step[0], moments(state), step_counts(state), by_step[1])

    def train_masked(self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int) -> None:
        """Return None: JAX builds the dense matrix from the blocks, so nothing outside them is trained."""
        del task, spec, dtype, steps


def training() -> JaxTraining:
    """Return the side that the ladder climbs with."""
    return JaxTraining()
