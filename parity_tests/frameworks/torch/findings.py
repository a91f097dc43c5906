"""Check for known traps in PyTorch."""

import numpy as np
import torch

from parity_tests.findings import Finding
from parity_tests.frameworks.torch.modes import to_numpy, to_torch
from parity_tests.judge.comparison import compare
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.tolerance import declared_arithmetic, reference

_CPU = torch.device("cpu")


def _weight_gradient_excess(case: Case, forward) -> float:
    """Return largest error of dx and dW over the T1 bound of a bf16 product with an fp32 accumulator."""
    inputs = draw_inputs(case, "bfloat16")
    x, weight = (to_torch(array, _CPU).requires_grad_() for array in (inputs.x, inputs.weight))
    dx, dweight = torch.autograd.grad([forward(x, weight)], [x, weight], [to_torch(inputs.cotangent, _CPU)])
    outputs = {"dx": to_numpy(dx), "dweight": to_numpy(dweight)}
    results = compare(outputs, reference(inputs), declared_arithmetic("bf16"))
    return max(result.bound_fraction for result in results)


def _einsum_of_size_one() -> float:
    case = Case("finding-einsum", (64,), 4, 1, 32, bias=False)
    return _weight_gradient_excess(case, lambda x, weight: torch.einsum("bni,nio->bno", x, weight))


def _grouped_convolution() -> float:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        n, i, o = weight.shape
        kernel = weight.mT.reshape(n * o, i, 1)
        return torch.nn.functional.conv1d(x.reshape(-1, n * i, 1), kernel, groups=n).reshape(-1, n, o)

    return _weight_gradient_excess(Case("finding-conv", (512,), 2, 8, 8, bias=False), forward)


def _kaiming_on_three_dimensions() -> float:
    weight = torch.empty(64, 256, 32)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=torch.Generator().manual_seed(0))
    right = 1 / np.sqrt(3 * 256)
    return float(right / weight.std())


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "torch-einsum-size-one",
        "torch",
        "On a CPU, torch.einsum with a contraction of size 1 becomes a broadcast product: in bf16 and fp16 its "
        "gradients are sums of rounded products.",
        ("2.13.0",),
        _einsum_of_size_one,
        "error over the bound of an fp32 sum",
    ),
    Finding(
        "torch-grouped-conv1d-bf16",
        "torch",
        "On some CPUs, the weight gradient of a grouped conv1d over signals of length 1 is accumulated in bf16 or "
        "fp16.",
        ("2.13.0",),
        _grouped_convolution,
        "error over the bound of an fp32 sum",
        by_processor=True,
    ),
    Finding(
        "torch-kaiming-3d",
        "torch",
        "kaiming_uniform_ on a stacked (n, in, out) weight takes in * out for the fan-in: its std is sqrt(out) too "
        "small.",
        ("2.13.0",),
        _kaiming_on_three_dimensions,
        "right std over drawn std",
    ),
)
