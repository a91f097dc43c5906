"""The torch halves of ported pairs: linear layers, norms, embeddings, losses, and what is built of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as with_weight_norm
from torch.utils.checkpoint import checkpoint

Half = dict[str, Any]


class Net(nn.Module):
    """Hold named modules, parameters and buffers, and say in one function what they compute."""

    def __init__(self, call: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._call = call
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Compute it."""
        return self._call(self, *inputs)


def half(call: Callable[..., Any], **parts: Any) -> Half:
    """Return the half of a `Net`, in eval mode."""
    return {"torch_module": Net(call, **parts).eval()}


def parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """Return a parameter of normal numbers."""
    return nn.Parameter(scale * torch.randn(*shape))


def linear() -> Half:
    """Make a square layer, whose kernel fits both ways round."""
    return {"torch_module": nn.Linear(7, 7)}


def mlp() -> Half:
    """Make two layers with a GELU between them."""
    return {"torch_module": nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 5))}


def residual_mlp() -> Half:
    """Make x + W2 silu(W1 norm(x))."""
    return half(
        lambda m, x: x + m.down(F.silu(m.up(m.norm(x)))),
        norm=nn.LayerNorm(6),
        up=nn.Linear(6, 11),
        down=nn.Linear(11, 6),
    )


def swiglu() -> Half:
    """Make LLaMA's feed-forward layer with a fused gate and value."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, value = m.gate_up(x).chunk(2, -1)
        return m.down(F.silu(gate) * value)

    return half(call, gate_up=nn.Linear(6, 2 * 9, bias=False), down=nn.Linear(9, 6, bias=False))


def layer_norm() -> Half:
    """Make the stock one."""
    return {"torch_module": nn.LayerNorm(10)}


def rms_norm() -> Half:
    """Make the stock one with LLaMA's epsilon."""
    return {"torch_module": nn.RMSNorm(10, eps=1e-6)}


def group_norm() -> Half:
    """Make the stock one, three groups of four channels."""
    return {"torch_module": nn.GroupNorm(3, 12)}


def instance_norm() -> Half:
    """Make the stock one, with scale and shift."""
    return {"torch_module": nn.InstanceNorm2d(5, affine=True)}


def batch_norm_train() -> Half:
    """Make the stock one in training mode."""
    return {"torch_module": nn.BatchNorm1d(6)}


def batch_norm_eval() -> Half:
    """Make the stock one in inference mode, behind a layer."""
    return half(lambda m, x: torch.relu(m.bn(m.fc(x))), fc=nn.Linear(5, 7), bn=nn.BatchNorm1d(7))


def weight_norm() -> Half:
    """Make a layer whose weight is a length times a direction, by output."""
    return half(lambda m, x: torch.tanh(m.fc(x)), fc=with_weight_norm(nn.Linear(6, 5)))


def film() -> Half:
    """Scale and shift channels by what a condition says."""

    def call(m: Any, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gamma, beta = m.film(condition).chunk(2, -1)
        return F.relu((1 + gamma[:, None]) * m.norm(x) + beta[:, None])

    return half(call, film=nn.Linear(5, 2 * 7), norm=nn.LayerNorm(7))


def hypernetwork() -> Half:
    """Make a network that makes the weights of a square layer."""

    def call(m: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(m.inner(z))
        weight = m.weights(hidden).view(-1, 4, 4)
        return torch.einsum("boi,bti->bto", weight, x) / 4**0.5 + m.bias(hidden)[:, None]

    return half(call, inner=nn.Linear(3, 8), weights=nn.Linear(8, 16), bias=nn.Linear(8, 4))


def partitioned() -> Half:
    """Make a list of layers, one for each partition."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(torch.stack([layer(x[:, k]) for k, layer in enumerate(m.layers)], 1))

    return half(call, layers=nn.ModuleList([nn.Linear(5, 5) for _ in range(3)]))


def mixture_of_experts() -> Half:
    """Route each token to two of four experts."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = m.router(x).topk(2, -1)
        weights = weights.softmax(-1)
        outputs = torch.stack([expert(x) for expert in m.experts], 1)
        picked = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))
        return (weights[..., None] * picked).sum(1)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(4))
    return half(call, router=nn.Linear(6, 4, bias=False), experts=experts)


def remat() -> Half:
    """Make two residual layers whose activations are computed again for the gradient."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in (m.first, m.second):
            x = checkpoint(lambda h, layer=layer: h + torch.tanh(layer(h)), x, use_reentrant=False)
        return x

    return half(call, first=nn.Linear(6, 6), second=nn.Linear(6, 6))


def embedding_padding() -> Half:
    """Average the embeddings of the tokens that are no padding."""

    def call(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        kept = (tokens != 0)[..., None]
        return m.head((m.embed(tokens) * kept).sum(1) / kept.sum(1)) + m.embed(tokens).sum(1)

    return half(call, embed=nn.Embedding(11, 6, padding_idx=0), head=nn.Linear(6, 6))


def tied_embedding() -> Half:
    """Use the embedding twice: tokens in, scores out."""

    def call(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(m.fc(m.embed(tokens) * 6**0.5))
        return F.linear(hidden, m.embed.weight)

    return half(call, embed=nn.Embedding(11, 6), fc=nn.Linear(6, 6))


def time_embedding() -> Half:
    """Make the time embedding of a diffusion model."""

    def call(m: Any, t: torch.Tensor) -> torch.Tensor:
        frequencies = 10000 ** (-torch.arange(4, dtype=t.dtype) / 4)
        angles = t[:, None] * frequencies
        return m.out(F.silu(m.hidden(torch.cat([angles.cos(), angles.sin()], -1))))

    return half(call, hidden=nn.Linear(8, 9), out=nn.Linear(9, 5))


def cross_entropy() -> Half:
    """Make a classifier's loss with smoothed labels, some of which are left out."""

    def call(m: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(m.head(x), labels, label_smoothing=0.1, ignore_index=-100)

    return half(call, head=nn.Linear(6, 5))


def focal_loss() -> Half:
    """Make torchvision's focal loss."""

    def call(m: Any, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = m.head(x)
        p = scores.sigmoid()
        right = p * target + (1 - p) * (1 - target)
        loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * (1 - right) ** 2
        return ((0.25 * target + 0.75 * (1 - target)) * loss).mean()

    return half(call, head=nn.Linear(6, 3))


def contrastive() -> Half:
    """Make CLIP's loss of two views."""

    def call(m: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scores = F.normalize(m.left(a), dim=-1) @ F.normalize(m.right(b), dim=-1).T * m.log_scale.exp()
        labels = torch.arange(len(a))
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2

    return half(call, left=nn.Linear(6, 4), right=nn.Linear(5, 4), log_scale=nn.Parameter(torch.tensor([0.7])))


def vae() -> Half:
    """Make a variational autoencoder that is given its noise: the reconstruction and the divergence."""

    def call(m: Any, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = m.encoder(x).chunk(2, -1)
        z = mean + (0.5 * log_variance).exp() * noise
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(-1)
        return m.decoder(z), divergence.mean()

    return half(call, encoder=nn.Linear(7, 2 * 3), decoder=nn.Linear(3, 7))


def vector_quantiser() -> Half:
    """Take the nearest code, with a straight-through gradient and both losses."""

    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = m.encoder(x)
        codes = m.codes[torch.cdist(z, m.codes).argmin(-1)]
        loss = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        return z + (codes - z).detach(), loss

    return half(call, encoder=nn.Linear(6, 4), codes=parameter(5, 4))


def deep_sets() -> Half:
    """Sum over a set between two networks."""
    return half(lambda m, x: m.rho(F.relu(m.phi(x)).sum(1)), phi=nn.Linear(5, 7), rho=nn.Linear(7, 4))


def graph_convolution() -> Half:
    """Make a graph convolution over a list of edges, normalised by both degrees."""

    def call(m: Any, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        loops = torch.arange(len(x))
        source, target = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
        degree = torch.zeros(len(x), dtype=x.dtype).index_add(0, target, torch.ones_like(x[target, 0]))
        weight = degree[source] ** -0.5 * degree[target] ** -0.5
        messages = m.fc(x)[source] * weight[:, None]
        return F.elu(torch.zeros_like(m.fc(x)).index_add(0, target, messages) + m.bias)

    return half(call, fc=nn.Linear(5, 4, bias=False), bias=parameter(4))
