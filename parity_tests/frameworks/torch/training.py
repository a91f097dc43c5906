"""Train a task in PyTorch with this project's layers: free-running, or step by step from given states."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from parity_tests.frameworks.torch.modes import to_numpy, to_torch
from parity_tests.training.tasks import LayerTap, MaskedRun, OptimizerSpec, StepGradients, TrainingTask, Trajectory
from torch_impl import MaskedPartitionedLinear, partitioned_linear


def build_torch(
    spec: OptimizerSpec, parameters: Mapping[str, torch.Tensor], *, foreach: bool | None = None
) -> torch.optim.Optimizer:
    """Return the torch.optim optimiser of a spec, at the schedule's first rate.

    Clipping is left to the caller. The leaves, named `...weight` or `...bias`, are updated in place.
    """
    groups = [
        {"params": [leaf], "weight_decay": spec.weight_decay if spec.decays(name) else 0.0}
        for name, leaf in parameters.items()
    ]
    rate, betas = float(spec.rates(1)[0]), (spec.beta1, spec.beta2)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=spec.momentum, nesterov=spec.nesterov, foreach=foreach)
    if spec.name == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=betas, eps=spec.epsilon, foreach=foreach)
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=spec.epsilon, foreach=foreach)
    if spec.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate, alpha=spec.beta2, eps=spec.epsilon, foreach=foreach)
    return torch.optim.Adagrad(groups, lr=rate, eps=spec.epsilon, foreach=foreach)


class TorchOptimizer:
    """A torch optimiser over named parameters, stepped with given gradients."""

    def __init__(self, spec: OptimizerSpec, parameters: Mapping[str, torch.Tensor], steps: int) -> None:
        self._spec, self._parameters = spec, dict(parameters)
        self._rates = spec.rates(steps)
        self._step = 0
        # foreach off: one kernel a parameter and operation, the documented update formula.
        self.optimizer = build_torch(spec, self._parameters, foreach=False)

    def update(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take one step with the given gradients (clipped here if the spec says so)."""
        for name, leaf in self._parameters.items():
            # A copy, because clipping scales in place and the caller's record of its gradients must stay.
            leaf.grad = gradients[name].clone()
        if self._spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._spec.clip_norm, foreach=False)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self._rates[self._step])
        self.optimizer.step()
        self._step += 1

    def moments(self) -> dict[str, torch.Tensor]:
        """Return every moment as `<parameter>/<first|second>`."""
        names = {
            "momentum_buffer": "first",
            "exp_avg": "first",
            "exp_avg_sq": "second",
            "square_avg": "second",
            "sum": "second",
        }
        return {
            f"{name}/{names[key]}": value
            for name, leaf in self._parameters.items()
            for key, value in self.optimizer.state.get(leaf, {}).items()
            if key in names and isinstance(value, torch.Tensor)
        }

    def step_counts(self) -> set[int]:
        """Return the distinct step counts that the optimiser itself keeps; empty if it keeps none."""
        return {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}


Tensors = dict[str, torch.Tensor]
Layer = Callable[[str, torch.Tensor], torch.Tensor]


class TorchTraining:
    """The torch side of training parity; see `training.tasks.TrainingSubject`."""

    framework = "torch"

    def __init__(
        self,
        implementation: str = "auto",
        device: torch.device | None = None,
        masked_layer: type[MaskedPartitionedLinear] = MaskedPartitionedLinear,
    ) -> None:
        """Train with one implementation of the partitioned linear map, or one masked layer, on one device."""
        self.implementation = implementation
        self.masked_layer = masked_layer
        self._device = device or torch.device("cpu")

    def _layer(self, parameters: Tensors, taps: dict | None = None) -> Layer:
        def layer(name: str, x: torch.Tensor) -> torch.Tensor:
            if taps is not None and not x.requires_grad:
                # The data itself: its gradient is none of training's, but the layer's dx is judged.
                x = x.detach().requires_grad_()
            weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
            y = partitioned_linear(x, weight, bias, implementation=self.implementation)
            if taps is not None:
                taps[name] = (x, y)
            return y

        return layer

    @staticmethod
    def _loss(task: TrainingTask, layer: Layer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if task.model == "mlp":
            y = layer("output", torch.tanh(layer("hidden", x)))
        else:
            last = x[:, -1:, :]
            y = layer("head", (x - last).transpose(1, 2)).transpose(1, 2) + last
        return torch.mean((y - target) ** 2)

    def _place(self, array: np.ndarray, dtype: str) -> torch.Tensor:
        return to_torch(array, self._device).to(getattr(torch, dtype))

    def _leaves(self, arrays: Mapping[str, np.ndarray], dtype: str) -> Tensors:
        return {name: self._place(array, dtype).requires_grad_() for name, array in arrays.items()}

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Return loss and gradients at one state, with what went into and came out of each layer."""
        leaves = self._leaves(parameters, dtype)
        batch = step % len(task.inputs)
        taps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        x, target = self._place(task.inputs[batch], dtype), self._place(task.targets[batch], dtype)
        loss = self._loss(task, self._layer(leaves, taps), x, target)
        ends = [tensor for pair in taps.values() for tensor in pair]
        found = list(map(to_numpy, torch.autograd.grad(loss, [*leaves.values(), *ends])))
        named, ends = dict(zip(leaves, found, strict=False)), found[len(leaves) :]
        return StepGradients(
            loss=float(loss.detach()),
            gradients=named,
            taps={
                name: LayerTap(x=to_numpy(x), y=to_numpy(y), cotangent=cotangent, dx=dx)
                for (name, (x, y)), dx, cotangent in zip(taps.items(), ends[::2], ends[1::2], strict=True)
            },
        )

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Train freely; with `members` > 0, that many runs with a random rounding error after every step."""
        return [
            self._run(task, spec, dtype, steps, torch.Generator().manual_seed(seed + member) if members else None)
            for member in range(max(members, 1))
        ]

    def _run(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, noise: torch.Generator | None
    ) -> Trajectory:
        leaves = self._leaves(task.parameters, dtype)
        optimizer, layer = TorchOptimizer(spec, leaves, steps), self._layer(leaves)
        inputs, targets = self._place(task.inputs, dtype), self._place(task.targets, dtype)
        losses, states = [], []
        for step in range(steps):
            batch = step % len(inputs)
            loss = self._loss(task, layer, inputs[batch], targets[batch])
            optimizer.update(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
            if noise is not None:
                with torch.no_grad():
                    for leaf in leaves.values():
                        sign = torch.rand(leaf.shape, generator=noise, dtype=torch.float64).to(leaf) * 2 - 1
                        leaf += leaf * sign * (torch.finfo(leaf.dtype).eps / 2)
            losses.append(float(loss.detach()))
            states.append({name: to_numpy(leaf).copy() for name, leaf in leaves.items()})
        return Trajectory(np.array(losses), states, self._moments(optimizer), optimizer.step_counts())

    def replay(
        self,
        parameters: Mapping[str, np.ndarray],
        spec: OptimizerSpec,
        gradients: list[dict[str, np.ndarray]],
        dtype: str,
    ) -> Trajectory:
        """Feed recorded gradients to the optimiser alone."""
        leaves = self._leaves(parameters, dtype)
        optimizer = TorchOptimizer(spec, leaves, len(gradients))
        states, history = [], []
        for step in gradients:
            optimizer.update({name: self._place(array, dtype) for name, array in step.items()})
            states.append({name: to_numpy(leaf).copy() for name, leaf in leaves.items()})
            history.append(self._moments(optimizer))
        losses = np.zeros(len(gradients))
        return Trajectory(losses, states, self._moments(optimizer), optimizer.step_counts(), history)

    @staticmethod
    def _moments(optimizer: TorchOptimizer) -> dict[str, np.ndarray]:
        # Copies, because the optimiser updates its moments in place.
        return {name: to_numpy(value).copy() for name, value in optimizer.moments().items()}

    def train_masked(self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int) -> MaskedRun:
        """Train with one dense masked layer for each partitioned one, from the same parameters."""
        layers = {name: self._masked(name, task, dtype) for name in sorted({n.split(".")[0] for n in task.parameters})}
        leaves: Tensors = {
            f"{name}.{kind}": parameter
            for name, layer in layers.items()
            for kind, parameter in layer.named_parameters()
        }
        optimizer = TorchOptimizer(spec, leaves, steps)
        inputs, targets = self._place(task.inputs, dtype), self._place(task.targets, dtype)
        outside = [(f"{name}.weight", ~layer.mask) for name, layer in layers.items()]
        states, off_block = [], []
        for step in range(steps):
            batch = step % len(inputs)
            loss = self._loss(task, lambda name, x: layers[name](x), inputs[batch], targets[batch])
            found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            optimizer.update(found)
            leaks = [array[mask] for key, mask in outside for array in (leaves[key].detach(), found[key])]
            off_block.append(float(torch.cat(leaks).abs().max()))
            views = {name: layer.partition_views() for name, layer in layers.items()}
            states.append({name: self._view(views, name) for name in task.parameters})
        return MaskedRun(states, np.array(off_block))

    def _masked(self, name: str, task: TrainingTask, dtype: str) -> MaskedPartitionedLinear:
        weight = task.parameters[f"{name}.weight"]
        layer = self.masked_layer(*weight.shape, device=self._device, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for kind, view in layer.partition_views().items():
                view.copy_(self._place(task.parameters[f"{name}.{kind}"], dtype))
        return layer

    @staticmethod
    def _view(views: Mapping[str, Tensors], name: str) -> np.ndarray:
        layer, kind = name.split(".")
        return to_numpy(views[layer][kind]).copy()


def training() -> TorchTraining:
    """Return the side that the ladder climbs with."""
    return TorchTraining()
