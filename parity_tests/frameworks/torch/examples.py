"""The torch sides of the examples, and what torch's modules do by default, measured."""

import inspect
from typing import Any

import torch
from torch import nn


def linear() -> dict[str, Any]:
    """Make `nn.Linear`."""
    return {"torch_module": nn.Linear(24, 16)}


def conv() -> dict[str, Any]:
    """Make `nn.Conv2d` with the padding that Flax calls `SAME`."""
    return {"torch_module": nn.Conv2d(3, 8, 3, padding=1)}


def layer_norm() -> dict[str, Any]:
    """Make `nn.LayerNorm` with Flax's epsilon."""
    return {"torch_module": nn.LayerNorm(16, eps=1e-6)}


def attention() -> dict[str, Any]:
    """Make `nn.MultiheadAttention`, batch first; the averaged attention weights are not asked for."""
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    return {"torch_module": module, "torch_kwargs": {"need_weights": False}}


def gru_cell() -> dict[str, Any]:
    """Make `nn.GRUCell`."""
    return {"torch_module": nn.GRUCell(4, 8)}


def conv_defaults() -> dict[str, Any]:
    """Make `nn.Conv2d` without padding."""
    return {"torch_module": nn.Conv2d(3, 8, 3)}


def layer_norm_defaults() -> dict[str, Any]:
    """Make `nn.LayerNorm` with its own epsilon."""
    return {"torch_module": nn.LayerNorm(16)}


def attention_defaults() -> dict[str, Any]:
    """Make `nn.MultiheadAttention`, batch second."""
    return {"torch_module": nn.MultiheadAttention(16, 4), "torch_kwargs": {"need_weights": False}}


def gru_cell_defaults() -> dict[str, Any]:
    """Make `nn.GRUCell`, called with the input, then the state."""
    return {"torch_module": nn.GRUCell(8, 8)}


@torch.no_grad()
def measure_defaults() -> dict[tuple[str, str], str]:
    """Measure modules as they are created by default, by pair and aspect; the JAX side measures the same."""
    torch.manual_seed(0)
    dense, plain_conv, attention = nn.Linear(400, 300), nn.Conv2d(16, 200, 3), nn.MultiheadAttention(256, 4)
    small = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    normalised = float(nn.LayerNorm(2, dtype=torch.float64)(small)[0, 0])
    cell = nn.GRUCell(64, 64)
    gates = nn.GRUCell(2, 3)
    kept = []
    for block in range(3):
        for parameter in gates.parameters():
            parameter.zero_()
        gates.bias_ih.view(3, 3)[block] = 50.0
        hidden = torch.full((1, 3), 0.7)
        kept.append(bool(torch.allclose(gates(torch.zeros(1, 2), hidden), hidden)))
    small_attention, tokens = nn.MultiheadAttention(8, 2), torch.randn(2, 2, 8)
    attended = small_attention(tokens, tokens, tokens)
    moved = tokens.clone()
    moved[0, 1] += 1.0  # reaches what shares the second axis' position if the batch comes second
    reached = (small_attention(moved, moved, moved)[0] - attended[0]).abs().sum(-1) > 0
    recurrent = cell.weight_hh[:64]
    return {
        ("linear", "kernel std times sqrt(fan-in)"): f"{float(dense.weight.std()) * 400**0.5:.1f}",
        ("linear", "bias at zero"): str(not dense.bias.any()),
        ("linear", "kernel shape of 400 -> 300"): str(tuple(dense.weight.shape)),
        ("conv", "kernel std times sqrt(fan-in)"): f"{float(plain_conv.weight.std()) * 144**0.5:.1f}",
        ("conv", "kernel shape of 16 -> 200, 3 x 3"): str(tuple(plain_conv.weight.shape)),
        ("conv", "height of the output, input of 8, kernel of 3"): str(plain_conv(torch.zeros(1, 16, 8, 8)).shape[2]),
        ("conv", "axis of the channels"): str(plain_conv(torch.zeros(1, 16, 8, 8)).shape.index(200)),
        ("layer_norm", "epsilon"): f"{(1e-3 / normalised) ** 2 - 1e-6:.1e}",
        ("attention", "query kernel std times sqrt(fan-in)"): f"{float(attention.in_proj_weight[:256].std()) * 16:.1f}",
        ("attention", "axis of the batch"): str(0 if bool(reached[0].all()) else 1),
        ("attention", "outputs of a call"): str(len(attended)),
        ("attention", "arrays of the input projections"): str(
            sum("in_proj" in n for n, _ in attention.named_parameters())
        ),
        ("gru_cell", "arguments of a call"): ", ".join(list(inspect.signature(cell.forward).parameters)[:2]),
        ("gru_cell", "outputs of a call"): str(len(_tuple(gates(torch.zeros(1, 2), torch.zeros(1, 3))))),
        ("gru_cell", "elements of biases per hidden unit"): str((cell.bias_ih.numel() + cell.bias_hh.numel()) // 64),
        ("gru_cell", "update gate among r, z, n (ir, iz, in)"): str(kept.index(True)),
        ("gru_cell", "recurrent kernel orthogonal"): str(
            bool(torch.allclose(recurrent @ recurrent.T, torch.eye(64), atol=1e-4))
        ),
    }


def _tuple(outputs: Any) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)
