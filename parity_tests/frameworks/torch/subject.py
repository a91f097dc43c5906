"""A PyTorch subject, and the eager ones: the public function, both layer classes, and `torch.nn.Linear`."""

from dataclasses import dataclass

import numpy as np
import torch

from parity_tests.frameworks.torch.arrays import lay_out, to_numpy, to_torch
from parity_tests.frameworks.torch.modes import Function, Prepare, canonical_gradients, mode_reason
from parity_tests.judge.cases import Case
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.modes import DEFAULT_MODES, MODES
from torch_impl import MaskedPartitionedLinear, PartitionedLinear, import_parameters, partitioned_linear
from torch_impl.registry import IMPLEMENTATIONS, unsupported_reason


@dataclass(frozen=True)
class TorchSubject:
    """One PyTorch implementation on one device, in one mode; see `base.Subject`."""

    implementation: str
    isolates_partitions: bool
    device: torch.device
    prepare: Prepare
    table_name: str | None
    dense_weight: bool = False
    mode: str = DEFAULT_MODES["torch"]
    framework: str = "torch"

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if the table or the mode declares this case unsupported, else None."""
        reason = mode_reason(self.mode, self.table_name, dtype)
        if reason is not None or self.table_name is None:
            return reason
        return unsupported_reason(
            self.table_name,
            dtype=MODES[self.mode].computes_in or dtype,
            device=self.device.type,
            in_features=case.in_features,
            out_features=case.out_features,
        )

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns y."""
        function, leaves = self.prepare(inputs, self.device)
        with torch.no_grad():
            return to_numpy(function(lay_out(to_torch(inputs.x, self.device), inputs.layout), *leaves))

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns y, dx, dweight and dbias."""
        function, leaves = self.prepare(inputs, self.device)
        x = lay_out(to_torch(inputs.x, self.device), inputs.layout).requires_grad_()
        y = function(x, *leaves)
        cotangent = to_torch(inputs.cotangent, self.device).to(y.dtype)
        gradients = torch.autograd.grad([y], [x, *leaves], [cotangent])
        names = ("dx", "dweight", "dbias")[: len(leaves) + 1]
        named: dict[str, np.ndarray] = dict(zip(names, map(to_numpy, gradients), strict=True))
        return {"y": to_numpy(y), **canonical_gradients(named, inputs, self.dense_weight, self.mode)}


def _leaves(inputs: Inputs, device: torch.device) -> list[torch.Tensor]:
    arrays = [inputs.weight] if inputs.bias is None else [inputs.weight, inputs.bias]
    return [to_torch(array, device).requires_grad_() for array in arrays]


def functional(name: str) -> Prepare:
    """Prepares calls of the public function with one implementation of the table."""

    def prepare(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        return (lambda x, *params: partitioned_linear(x, *params, implementation=name)), _leaves(inputs, device)

    return prepare


def layer_call(layer_class: type[PartitionedLinear] | type[MaskedPartitionedLinear]) -> Prepare:
    """Prepares calls of a layer that holds the inputs' parameters."""

    def prepare(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        n, i, o = inputs.weight.shape
        arrays = {"weight": inputs.weight} | ({} if inputs.bias is None else {"bias": inputs.bias})
        dtype = to_torch(inputs.weight[:0], device).dtype
        layer = layer_class(n, i, o, bias=inputs.bias is not None, device=device, dtype=dtype)
        import_parameters(layer, arrays)
        leaves: list[torch.Tensor] = [layer.weight, *([] if layer.bias is None else [layer.bias])]

        def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            if parameters[0] is leaves[0]:
                return layer(x)
            # An ensemble hands in its members' parameters, as torch.func would have a user do it.
            return torch.func.functional_call(layer, dict(zip(arrays, parameters, strict=True)), (x,))

        return call, leaves

    return prepare


def _plain_linear(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
    _, i, o = inputs.weight.shape
    leaves = _leaves(inputs, device)
    linear = torch.nn.Linear(i, o, bias=inputs.bias is not None, device=device, dtype=leaves[0].dtype)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        parameters = {"weight": weight.squeeze(0).T} | ({} if bias is None else {"bias": bias.squeeze(0)})
        return torch.func.functional_call(linear, parameters, (x.squeeze(-2),)).unsqueeze(-2)

    return call, leaves


def plain_linear_subject(device: torch.device) -> TorchSubject:
    """The framework's own `torch.nn.Linear` as a subject, for inputs with one partition."""
    return TorchSubject("nn.Linear", True, device, _plain_linear, table_name=None)


def eager_subjects(device: torch.device) -> list[TorchSubject]:
    """Every PyTorch subject in the default mode: the table's implementations, and both layer classes."""
    found = [
        TorchSubject(name, entry.isolates_partitions, device, functional(name), table_name=name)
        for name, entry in IMPLEMENTATIONS.items()
    ]
    masked = layer_call(MaskedPartitionedLinear)
    found.append(TorchSubject("layer", True, device, layer_call(PartitionedLinear), table_name=None))
    found.append(TorchSubject("masked_layer", False, device, masked, table_name=None, dense_weight=True))
    return found
