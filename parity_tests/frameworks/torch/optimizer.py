"""Builds the torch.optim side of a neutral optimiser spec."""

from collections.abc import Mapping

import torch

from parity_tests.training.optimizers import OptimizerSpec


def build_torch(
    spec: OptimizerSpec, parameters: Mapping[str, torch.Tensor], *, foreach: bool | None = None
) -> torch.optim.Optimizer:
    """Returns the torch.optim optimiser of a spec, at the schedule's first rate.

    Args:
        spec: what to build; clipping is not part of a torch optimiser and is left to the caller.
        parameters: leaves by name `...weight` or `...bias`; updated in place.
        foreach: as torch has it; None for torch's own choice.
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
    """A torch optimiser over named parameters, stepped with given gradients.

    Args:
        spec: what to build.
        parameters: leaves by name; updated in place.
        steps: how many steps the schedule must cover.
    """

    def __init__(self, spec: OptimizerSpec, parameters: Mapping[str, torch.Tensor], steps: int) -> None:
        self._spec, self._parameters = spec, dict(parameters)
        self._rates = spec.rates(steps)
        self._step = 0
        # foreach off: one kernel a parameter and operation, the documented update formula.
        self.optimizer = build_torch(spec, self._parameters, foreach=False)

    def update(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Takes one step with the given gradients (clipped here if the spec says so)."""
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
        """Returns every moment as `<parameter>/<first|second>`."""
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
        """Returns the distinct step counts that the optimiser itself keeps; empty if it keeps none."""
        return {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}
