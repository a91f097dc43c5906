"""PyTorch subjects: every implementation of the table through the public function, and both layer classes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from parity_tests.harness.cases import Case
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.subjects.base import Subject, check_precision
from parity_tests.harness.subjects.modes import DEFAULT_MODES, MODES
from parity_tests.harness.subjects.torch_arrays import lay_out, to_numpy, to_torch
from parity_tests.harness.subjects.torch_modes import WRAPPERS, Function, Prepare, canonical_gradients, mode_reason
from parity_tests.harness.subjects.torch_sharded import ShardedTorchSubject
from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    export_parameters,
    import_parameters,
    partitioned_linear,
)
from torch_impl.registry import IMPLEMENTATIONS, unsupported_reason


@dataclass(frozen=True)
class TorchSubject:
    """One PyTorch implementation on one device, in one mode; see ``base.Subject``."""

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
            num_partitions=case.num_partitions,
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


def _functional(name: str) -> Prepare:
    def prepare(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        leaves = [to_torch(inputs.weight, device).requires_grad_()]
        if inputs.bias is not None:
            leaves.append(to_torch(inputs.bias, device).requires_grad_())
        return (lambda x, *params: partitioned_linear(x, *params, implementation=name)), leaves

    return prepare


def _layer(layer_class: type[PartitionedLinear] | type[MaskedPartitionedLinear]) -> Prepare:
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


def round_trip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts canonical arrays into the layer and takes them out again."""
    n, i, o = arrays["weight"].shape
    dtype = to_torch(arrays["weight"][:0], torch.device("cpu")).dtype
    layer = PartitionedLinear(n, i, o, bias="bias" in arrays, dtype=dtype)
    import_parameters(layer, dict(arrays))
    return export_parameters(layer)


def resolve_device(device: str) -> torch.device:
    """Turns ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        ValueError: if the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device visible to torch, got none; use --device cpu or auto.")
    return torch.device(device)


def subjects(device: str = "auto", modes: Sequence[str] = (), precision: str | None = None) -> list[Subject]:
    """Returns every PyTorch subject, in every mode that is asked for; in the default mode if none is.

    On a GPU it sets PyTorch's switches for fp32 products and convolutions: what is judged is the formulation, not the
    default of rounding the operands of convolutions to TF32.
    """
    target = resolve_device(device)
    check_precision(precision, has_tf32=target.type == "cuda")
    if target.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    sources = [
        TorchSubject(name, entry.isolates_partitions, target, _functional(name), table_name=name)
        for name, entry in IMPLEMENTATIONS.items()
    ]
    masked = _layer(MaskedPartitionedLinear)
    sources.append(TorchSubject("layer", True, target, _layer(PartitionedLinear), table_name=None))
    sources.append(TorchSubject("masked_layer", False, target, masked, table_name=None, dense_weight=True))
    found: list[Subject] = []
    for mode in modes or (DEFAULT_MODES["torch"],):
        if mode == "sharded":
            found += [
                ShardedTorchSubject(source.implementation, source.isolates_partitions, target) for source in sources
            ]
        else:
            found += [
                dataclasses.replace(source, mode=mode, prepare=WRAPPERS[mode](source.prepare)) for source in sources
            ]
    return found
