"""The PyTorch layer classes as users build and train them: what they draw, and what the masked one computes."""

import numpy as np
import torch

from parity_tests.frameworks.torch.arrays import to_numpy
from parity_tests.frameworks.torch.optimizer import TorchOptimizer
from parity_tests.training.optimizers import OPTIMIZERS
from torch_impl import MaskedPartitionedLinear, PartitionedLinear

LAYERS: dict[str, type[PartitionedLinear] | type[MaskedPartitionedLinear]] = {
    "layer": PartitionedLinear,
    "masked_layer": MaskedPartitionedLinear,
}


def initial_weight(layer: str, init: str, sizes: tuple[int, int, int], dtype: str, seed: int) -> np.ndarray:
    """Returns the weight `(n, in, out)` that a new layer drew.

    Args:
        layer: a name of `LAYERS`.
        init: `torch` or `flax`.
        sizes: n, in, out.
        dtype: of the parameters.
        seed: of the generator, whose state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return to_numpy(LAYERS[layer](*sizes, init=init, dtype=getattr(torch, dtype)).partition_views()["weight"])


def _drop_mask(layer: MaskedPartitionedLinear) -> None:
    layer.mask.fill_(True)


# When the mask is lost: before the first step, as if it had been applied to the initial weights only (the first output
# is right, all weights then receive gradients); or after it, with weights outside the blocks that a step had moved.
PLANTS = ("off-block leak after a step", "off-block weights unmasked after a step")


def masked_training(
    sizes: tuple[int, int, int], dtype: str, steps: int, seed: int, defect: str = ""
) -> dict[str, np.ndarray]:
    """Trains the masked layer with AdamW and returns what concerns the weights outside its blocks.

    Args:
        sizes: n, in, out.
        dtype: of the parameter.
        steps: of the optimiser.
        seed: of data and parameters.
        defect: a name of `PLANTS`; none for the healthy layer.

    Returns:
        Dense `(n * out, n * in)` matrices: the map `before`, the parameter's first `gradient`, the map `after`.
    """
    if defect and defect not in PLANTS:
        raise ValueError(f"defect: expected one of {', '.join(PLANTS)}, got {defect!r}; choose one of these.")
    generator = torch.Generator().manual_seed(seed)
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
