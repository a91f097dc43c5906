"""The torch halves of ported pairs: attention in its variants, positions, and transformer layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from parity_tests.frameworks.torch.pairs_basic import Half, half, parameter


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """Split (b, t, h d) into (b, h, t, d)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    """Undo `heads`."""
    return x.transpose(1, 2).flatten(2)


def causal_attention() -> Half:
    """Make nanoGPT's attention: one projection for query, key and value, and a mask of -inf."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part, 2) for part in m.qkv(x).chunk(3, -1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return m.out(merged(scores.masked_fill(unseen, float("-inf")).softmax(-1) @ v))

    return half(call, qkv=nn.Linear(6, 18), out=nn.Linear(6, 6))


def cross_attention() -> Half:
    """Make the stock one, of one sequence to another."""
    return half(
        lambda m, x, y: m.attn(x, y, y, need_weights=False)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True)
    )


def grouped_query_attention() -> Half:
    """Make attention in which two query heads share a key and value head."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return m.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

    sizes = {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8)}
    return half(call, **{name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def rotary_attention() -> Half:
    """Make LLaMA's attention, which turns halves of a head."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        frequencies = 10000 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.cat([frequencies, frequencies])
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2)
        return m.o(merged(F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)))

    return half(call, **{name: nn.Linear(8, 8, bias=False) for name in "qkvo"})


def alibi_attention() -> Half:
    """Make causal attention with a linear bias by distance, steeper by head."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part, 4) for part in m.qkv(x).chunk(3, -1))
        t = torch.arange(x.shape[1])
        slopes = 2.0 ** (-8 * torch.arange(1, 5, dtype=x.dtype) / 4)
        bias = slopes[:, None, None] * (t - t[:, None])
        bias = bias.masked_fill(t > t[:, None], float("-inf"))
        return m.out(merged((q @ k.mT / 2**0.5 + bias).softmax(-1) @ v))

    return half(call, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))


def window_attention() -> Half:
    """Make Swin's attention within windows of two by two, with a learned bias by relative position."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        windows = x.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = (heads(part, 2) for part in m.qkv(windows).chunk(3, -1))
        rows, columns = torch.arange(4) // 2, torch.arange(4) % 2
        index = 3 * (rows[:, None] - rows + 1) + columns[:, None] - columns + 1
        scores = q @ k.mT / (c // 2) ** 0.5 + m.table[index].permute(2, 0, 1)
        y = m.out(merged(scores.softmax(-1) @ v))
        return y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)

    return half(call, qkv=nn.Linear(6, 18), out=nn.Linear(6, 6), table=parameter(9, 2))


def linear_attention() -> Half:
    """Make attention by a running sum, with elu + 1 in the place of the exponential."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
        sums = torch.einsum("bti,btj->btij", k, v).cumsum(1)
        norms = (q * k.cumsum(1)).sum(-1, keepdim=True)
        return torch.einsum("bti,btij->btj", q, sums) / norms

    return half(call, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 5))


def attention_pooling() -> Half:
    """Average a padded sequence with learned weights."""

    def call(m: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        scores = m.score(torch.tanh(m.key(x)))[..., 0].masked_fill(~kept, float("-inf"))
        return m.out((scores.softmax(-1)[..., None] * x).sum(1))

    return half(call, key=nn.Linear(6, 5), score=nn.Linear(5, 1, bias=False), out=nn.Linear(6, 4))


def sinusoidal_positions() -> Half:
    """Make the input of the first transformer: scaled embeddings and a table of sines and cosines in turn."""

    def call(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        x = m.embed(tokens) * 6**0.5
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(0, 6, 2, dtype=x.dtype) / 6)
        return m.out(x + torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    return half(call, embed=nn.Embedding(9, 6), out=nn.Linear(6, 4))


def encoder_post() -> Half:
    """Make the stock layer, norms behind, ReLU."""
    return {"torch_module": nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True).eval()}


def encoder_pre() -> Half:
    """Make the stock layer, norms in front, GELU."""
    layer = nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return {"torch_module": layer.eval()}


def decoder_stack() -> Half:
    """Make a small GPT: three layers, a last norm, scores of tokens."""

    def block(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part, 2) for part in m.qkv(m.ln_1(x)).chunk(3, -1))
        x = x + m.proj(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + m.fc2(F.gelu(m.fc1(m.ln_2(x)), approximate="tanh"))

    def call(m: Any, tokens: torch.Tensor) -> torch.Tensor:
        x = m.wte(tokens) + m.wpe.weight
        for layer in m.blocks:
            x = layer(x)
        return m.head(m.ln_f(x))

    def layer() -> nn.Module:
        sizes = {"qkv": (6, 18), "proj": (6, 6), "fc1": (6, 8), "fc2": (8, 6)}
        linears = {name: nn.Linear(*size) for name, size in sizes.items()}
        return half(block, ln_1=nn.LayerNorm(6), ln_2=nn.LayerNorm(6), **linears)["torch_module"]

    return half(
        call,
        wte=nn.Embedding(9, 6),
        wpe=nn.Embedding(5, 6),
        blocks=nn.ModuleList(layer() for _ in range(3)),
        ln_f=nn.LayerNorm(6),
        head=nn.Linear(6, 9, bias=False),
    )
