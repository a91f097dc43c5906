"""Run PyTorch subjects: the table's implementations through the public function, and both layer classes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parity_tests.frameworks.torch.modes import (
    WRAPPERS,
    Function,
    Prepare,
    canonical_gradients,
    lay_out,
    mode_reason,
    resolve_device,
    to_numpy,
    to_torch,
)
from parity_tests.frameworks.torch.sharded import ShardedTorchSubject, serve
from parity_tests.frameworks.torch.training import TorchOptimizer
from parity_tests.interpreters.interpreter import Channel
from parity_tests.judge.inputs import Case, Inputs
from parity_tests.judge.subjects import DEFAULT_MODES, EQUAL, MODES, UNEQUAL, Subject, check_precision, sizes_reason
from parity_tests.training.tasks import OPTIMIZERS
from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    export_parameters,
    import_parameters,
    partitioned_linear,
)
from torch_impl.registry import IMPLEMENTATIONS, UNEQUAL_IMPLEMENTATIONS, implementation_names, unsupported_reason


@dataclass(frozen=True)
class TorchSubject:
    """One PyTorch implementation on one device, in one mode; see `judge.subjects.Subject`."""

    implementation: str
    isolates_partitions: bool
    device: torch.device
    prepare: Prepare
    table_name: str | None
    dense_weight: bool = False
    mode: str = DEFAULT_MODES["torch"]
    framework: str = "torch"
    sizes: str = EQUAL

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """Return one sentence if the table or the mode declares this case unsupported, else None."""
        reason = sizes_reason(self.mode, self.sizes) or mode_reason(self.mode, self.table_name, dtype, self.sizes)
        if reason is not None or self.table_name is None:
            return reason
        return unsupported_reason(
            self.table_name,
            dtype=MODES[self.mode].computes_in or dtype,
            device=self.device.type,
            in_features=case.largest[0],
            out_features=case.largest[1],
            unequal=self.sizes == UNEQUAL,
        )

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Return y."""
        function, leaves = self.prepare(inputs, self.device)
        with torch.no_grad():
            return to_numpy(function(lay_out(to_torch(inputs.x, self.device), inputs.layout), *leaves))

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return y, dx, dweight and dbias."""
        function, leaves = self.prepare(inputs, self.device)
        x = lay_out(to_torch(inputs.x, self.device), inputs.layout).requires_grad_()
        y = function(x, *leaves)
        cotangent = to_torch(inputs.cotangent, self.device).to(y.dtype)
        gradients = torch.autograd.grad([y], [x, *leaves], [cotangent])
        names = ("dx", "dweight", "dbias")[: len(leaves) + 1]
        named: dict[str, np.ndarray] = dict(zip(names, map(to_numpy, gradients), strict=True))
        return {"y": to_numpy(y), **canonical_gradients(named, inputs, self.dense_weight, self.mode)}


def _leaves(inputs: Inputs, device: torch.device) -> list[torch.Tensor]:
    return [to_torch(array, device).requires_grad_() for array in inputs.parameters.values()]


def functional(name: str) -> Prepare:
    """Prepare calls of the public function with one implementation of the table."""

    def prepare(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        sizes: dict[str, Any] = {} if inputs.sizes is None else dataclasses.asdict(inputs.sizes)
        return (
            lambda x, *params: partitioned_linear(x, *params, implementation=name, **sizes),
            _leaves(inputs, device),
        )

    return prepare


def layer_call(layer_class: type[PartitionedLinear] | type[MaskedPartitionedLinear]) -> Prepare:
    """Prepare calls of a layer that holds the inputs' parameters."""

    def prepare(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        case: Any = inputs.case
        dtype = to_torch(inputs.weight[:0], device).dtype
        sizes = (case.num_partitions, case.in_features, case.out_features)
        layer = layer_class(*sizes, bias=case.bias, device=device, dtype=dtype)
        import_parameters(layer, inputs.parameters)
        leaves: list[torch.Tensor] = [layer.weight, *([] if layer.bias is None else [layer.bias])]

        def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            if parameters[0] is leaves[0]:
                return layer(x)
            # An ensemble hands in its members' parameters, as torch.func would have a user do it.
            return torch.func.functional_call(layer, dict(zip(inputs.parameters, parameters, strict=True)), (x,))

        return call, leaves

    return prepare


def eager_subjects(device: torch.device) -> list[TorchSubject]:
    """Return every PyTorch subject in the default mode: the table's implementations, and both layer classes."""
    found = [
        TorchSubject(name, IMPLEMENTATIONS[name].isolates_partitions, device, functional(name), table_name=name)
        for name in implementation_names(device=device.type)
    ]
    masked = layer_call(MaskedPartitionedLinear)
    found.append(TorchSubject("layer", True, device, layer_call(PartitionedLinear), table_name=None))
    found.append(TorchSubject("masked_layer", False, device, masked, table_name=None, dense_weight=True))
    return found


def absent(device: str) -> dict[str, str]:
    """Return the implementations that are no subjects on a device, each with what it needs."""
    target = resolve_device(device).type
    interpreter = "; with TRITON_INTERPRET=1 in the environment Triton's interpreter runs it on a CPU, slowly"
    return {
        name: f"expected a GPU (--device cuda), got {target}{interpreter if name == 'fused' else ''}."
        for name in implementation_names()
        if name not in implementation_names(device=target)
    }


def unequal_subjects(device: torch.device) -> list[TorchSubject]:
    """Return every PyTorch subject for partitions of unequal sizes in the default mode."""
    found = [
        TorchSubject(name, entry.isolates_partitions, device, functional(name), table_name=name, sizes=UNEQUAL)
        for name, entry in UNEQUAL_IMPLEMENTATIONS.items()
    ]
    layer = layer_call(PartitionedLinear)
    return [*found, TorchSubject("layer", True, device, layer, table_name=None, sizes=UNEQUAL)]


def round_trip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put canonical arrays into the layer and take them out again."""
    n, i, o = arrays["weight"].shape
    dtype = to_torch(arrays["weight"][:0], torch.device("cpu")).dtype
    layer = PartitionedLinear(n, i, o, bias="bias" in arrays, dtype=dtype)
    import_parameters(layer, dict(arrays))
    return export_parameters(layer)


def subjects(
    device: str = "auto", modes: Sequence[str] = (), precision: str | None = None, sizes: str = EQUAL
) -> list[Subject]:
    """Return every PyTorch subject, in every mode that is asked for; in the default mode if none is.

    On a GPU, set PyTorch's switches for fp32 products and convolutions: the formulation is judged, not the default of
    rounding the operands of convolutions to TF32.
    """
    target = resolve_device(device)
    check_precision(precision, has_tf32=target.type == "cuda")
    if target.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    sources = eager_subjects(target) if sizes == EQUAL else unequal_subjects(target)
    found: list[Subject] = []
    for mode in modes or (DEFAULT_MODES["torch"],):
        if sizes_reason(mode, sizes):
            found += [dataclasses.replace(source, mode=mode) for source in sources]
        elif mode == "sharded":
            found += [ShardedTorchSubject(source, target) for source in sources]
        else:
            found += [
                dataclasses.replace(source, mode=mode, prepare=WRAPPERS[mode](source.prepare)) for source in sources
            ]
    return found


def release_programs() -> None:
    """Drop all compiled programs, if any was compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


LAYERS: dict[str, type[PartitionedLinear] | type[MaskedPartitionedLinear]] = {
    "layer": PartitionedLinear,
    "masked_layer": MaskedPartitionedLinear,
}


def initial_weight(layer: str, init: str, sizes: tuple[int, int, int], dtype: str) -> np.ndarray:
    """Return the weight `(n, in, out)` that a new layer drew.

    The generator's state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return to_numpy(LAYERS[layer](*sizes, init=init, dtype=getattr(torch, dtype)).partition_views()["weight"])


def _drop_mask(layer: MaskedPartitionedLinear) -> None:
    layer.mask.fill_(True)


# When the mask is lost: before the first step, as if it had been applied to the initial weights only (the first output
# is right, all weights then receive gradients); or after it, with weights outside the blocks that a step had moved.
PLANTS = ("off-block leak after a step", "off-block weights unmasked after a step")


def masked_training(sizes: tuple[int, int, int], dtype: str, steps: int, defect: str = "") -> dict[str, np.ndarray]:
    """Train the masked layer with AdamW and return the matrices that show weights outside its blocks.

    They are dense `(n * out, n * in)`: the map `before`, the parameter's first `gradient`, the map `after`. The defect
    is a name of `PLANTS`, none for the healthy layer.
    """
    if defect and defect not in PLANTS:
        raise ValueError(f"defect: expected one of {', '.join(PLANTS)}, got {defect!r}; choose one of these.")
    generator = torch.Generator().manual_seed(0)
    number = getattr(torch, dtype)
    # No bias: a leak would vanish in its rounding. Weights everywhere, since any may be there after a step.
    layer = MaskedPartitionedLinear(*sizes, bias=False, dtype=number)
    unit = torch.eye(sizes[0] * sizes[1], dtype=number)

    def computed_map() -> np.ndarray:
        with torch.no_grad():
            return to_numpy(layer(unit).T)

    with torch.no_grad():
        drawn = torch.randn(layer.weight.shape, generator=generator).to(number)
        # A mask that is lost at once goes unnoticed at first only where the weights outside the blocks are zero.
        layer.weight.copy_(torch.where(layer.mask, drawn, 0) if defect == PLANTS[0] else drawn)
    if defect == PLANTS[0]:
        _drop_mask(layer)
    before = computed_map()
    optimizer = TorchOptimizer(OPTIMIZERS["adamw"], {"weight": layer.weight}, steps)
    gradients = []
    for step in range(steps):
        x = torch.randn((8, *sizes[:2]), generator=generator).to(number)
        layer.weight.grad = None
        layer(x).float().square().sum().backward()
        assert layer.weight.grad is not None  # the one parameter of the layer
        gradients.append(to_numpy(layer.weight.grad))
        optimizer.update({"weight": layer.weight.grad})
        if step == 0 and defect == PLANTS[1]:
            _drop_mask(layer)
    return {"before": before, "gradient": gradients[0], "after": computed_map()}


def main(channel: Channel, rank: str, size: str, store: str) -> None:
    """Serve as one process of sharded subjects; see `sharded.serve`."""
    alone = {subject.implementation: subject for subject in eager_subjects(torch.device("cpu"))}
    serve(channel, alone, int(rank), int(size), store)
