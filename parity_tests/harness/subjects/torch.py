"""PyTorch subjects: every implementation of the table through the public function, and both layer classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from parity_tests.harness.cases import Case, Layout
from parity_tests.harness.inputs import Inputs
from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    export_parameters,
    import_parameters,
    partitioned_linear,
)
from torch_impl.registry import IMPLEMENTATIONS, unsupported_reason

_Forward = Callable[..., torch.Tensor]
_Prepare = Callable[[Inputs, torch.device], tuple[_Forward, list[torch.Tensor]]]


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a tensor, bit for bit (bfloat16 through its 16-bit pattern)."""
    array = np.array(array, order="C", copy=True)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of ``to_torch``."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def lay_out(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns the same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and x.ndim > 2:
        # The rows in between are NaN: reading past a stride shows.
        wide = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 0] = x
        return wide[:, 0]
    return x


@dataclass(frozen=True)
class TorchSubject:
    """One PyTorch implementation on one device; see ``base.Subject``."""

    implementation: str
    isolates_partitions: bool
    device: torch.device
    prepare: _Prepare
    table_name: str | None
    framework: str = "torch"

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if the table declares this case unsupported, else None."""
        if self.table_name is None:
            return None
        return unsupported_reason(
            self.table_name,
            dtype=dtype,
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
        gradients = torch.autograd.grad([y], [x, *leaves], [to_torch(inputs.cotangent, self.device)])
        names = ("dx", "dweight", "dbias")[: len(leaves) + 1]
        named = dict(zip(names, map(to_numpy, gradients), strict=True))
        n, i, o = inputs.weight.shape
        if named["dweight"].ndim == 2:  # the masked layer's dense (n*o, n*i): read its diagonal blocks, as (n, i, o)
            blocks = named["dweight"].reshape(n, o, n, i)[np.arange(n), :, np.arange(n), :]
            named["dweight"] = blocks.swapaxes(1, 2)
            if "dbias" in named:
                named["dbias"] = named["dbias"].reshape(n, o)
        return {"y": to_numpy(y), **named}


def _functional(name: str) -> _Prepare:
    def prepare(inputs: Inputs, device: torch.device) -> tuple[_Forward, list[torch.Tensor]]:
        leaves = [to_torch(inputs.weight, device).requires_grad_()]
        if inputs.bias is not None:
            leaves.append(to_torch(inputs.bias, device).requires_grad_())
        return (lambda x, *params: partitioned_linear(x, *params, implementation=name)), leaves

    return prepare


def _layer(layer_class: type[PartitionedLinear] | type[MaskedPartitionedLinear]) -> _Prepare:
    def prepare(inputs: Inputs, device: torch.device) -> tuple[_Forward, list[torch.Tensor]]:
        n, i, o = inputs.weight.shape
        arrays = {"weight": inputs.weight} | ({} if inputs.bias is None else {"bias": inputs.bias})
        dtype = to_torch(inputs.weight[:0], device).dtype
        layer = layer_class(n, i, o, bias=inputs.bias is not None, device=device, dtype=dtype)
        import_parameters(layer, arrays)
        leaves: list[torch.Tensor] = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        return (lambda x, *params: layer(x)), leaves

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


def subjects(device: str = "auto") -> list[TorchSubject]:
    """Returns every PyTorch subject."""
    target = resolve_device(device)
    found = [
        TorchSubject(name, entry.isolates_partitions, target, _functional(name), table_name=name)
        for name, entry in IMPLEMENTATIONS.items()
    ]
    found.append(TorchSubject("layer", True, target, _layer(PartitionedLinear), table_name=None))
    found.append(TorchSubject("masked_layer", False, target, _layer(MaskedPartitionedLinear), table_name=None))
    return found
