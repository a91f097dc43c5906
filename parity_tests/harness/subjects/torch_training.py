"""Trains a task in PyTorch with our layer's function: free-running, or step by step from given states."""

from collections.abc import Mapping

import numpy as np
import torch

from parity_tests.harness.optimizers import OptimizerSpec
from parity_tests.harness.subjects.base import LayerTap, StepGradients, Trajectory
from parity_tests.harness.subjects.torch_arrays import to_numpy, to_torch
from parity_tests.harness.subjects.torch_optimizer import TorchOptimizer
from parity_tests.harness.tasks import TrainingTask
from torch_impl import partitioned_linear

Tensors = dict[str, torch.Tensor]


class TorchTraining:
    """The torch side of training parity; see ``base.TrainingSubject``."""

    framework = "torch"

    def __init__(self, implementation: str = "auto", device: torch.device | None = None) -> None:
        """Trains with one implementation of the partitioned linear map on one device."""
        self.implementation = implementation
        self._device = device or torch.device("cpu")

    def _layer(self, name: str, x: torch.Tensor, parameters: Tensors, taps: dict | None) -> torch.Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        y = partitioned_linear(x, weight, bias, implementation=self.implementation)
        if taps is not None:
            taps[name] = (x, y)
        return y

    def _loss(self, task: TrainingTask, parameters: Tensors, x, target, taps: dict | None = None) -> torch.Tensor:
        if task.model == "mlp":
            hidden = torch.tanh(self._layer("hidden", x, parameters, taps))
            y = self._layer("output", hidden, parameters, taps)
        else:
            last = x[:, -1:, :]
            y = self._layer("head", (x - last).transpose(1, 2), parameters, taps).transpose(1, 2) + last
        return torch.mean((y - target) ** 2)

    def _place(self, array: np.ndarray, dtype: str) -> torch.Tensor:
        return to_torch(array, self._device).to(getattr(torch, dtype))

    def _leaves(self, arrays: Mapping[str, np.ndarray], dtype: str) -> Tensors:
        return {name: self._place(array, dtype).requires_grad_() for name, array in arrays.items()}

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Loss and gradients at one state, with what went into and came out of each layer."""
        leaves = self._leaves(parameters, dtype)
        batch = step % len(task.inputs)
        taps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        loss = self._loss(
            task, leaves, self._place(task.inputs[batch], dtype), self._place(task.targets[batch], dtype), taps
        )
        outputs = [y for _, y in taps.values()]
        found = torch.autograd.grad(loss, [*leaves.values(), *outputs])
        named = dict(zip(leaves, map(to_numpy, found), strict=False))
        cotangents = dict(zip(taps, found[len(leaves) :], strict=True))
        return StepGradients(
            loss=float(loss.detach()),
            gradients=named,
            taps={
                name: LayerTap(x=to_numpy(x), y=to_numpy(y), cotangent=to_numpy(cotangents[name]))
                for name, (x, y) in taps.items()
            },
        )

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Trains freely; with ``members`` > 0, that many runs with a random rounding error after every step."""
        return [
            self._run(task, spec, dtype, steps, torch.Generator().manual_seed(seed + member) if members else None)
            for member in range(max(members, 1))
        ]

    def _run(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, noise: torch.Generator | None
    ) -> Trajectory:
        leaves = self._leaves(task.parameters, dtype)
        optimizer = TorchOptimizer(spec, leaves, steps)
        inputs, targets = self._place(task.inputs, dtype), self._place(task.targets, dtype)
        losses, states = [], []
        for step in range(steps):
            batch = step % len(inputs)
            loss = self._loss(task, leaves, inputs[batch], targets[batch])
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
        """Feeds recorded gradients to the optimiser alone."""
        leaves = self._leaves(parameters, dtype)
        optimizer = TorchOptimizer(spec, leaves, len(gradients))
        states = []
        for step in gradients:
            optimizer.update({name: self._place(array, dtype) for name, array in step.items()})
            states.append({name: to_numpy(leaf).copy() for name, leaf in leaves.items()})
        return Trajectory(np.zeros(len(gradients)), states, self._moments(optimizer), optimizer.step_counts())

    @staticmethod
    def _moments(optimizer: TorchOptimizer) -> dict[str, np.ndarray]:
        return {name: to_numpy(value) for name, value in optimizer.moments().items()}


def training() -> TorchTraining:
    """Returns the side that the ladder climbs with."""
    return TorchTraining()
