"""The torch halves of ported pairs: convolutions, pools, and blocks of image models. Channels come first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from parity_tests.frameworks.torch.pairs_basic import Half, half, parameter


def strided_conv() -> Half:
    """Pad explicitly, which `SAME` does otherwise where the stride is 2."""
    return {"torch_module": nn.Conv2d(3, 5, 3, stride=2, padding=1)}


def temporal_conv() -> Half:
    """Make two causal layers, the second dilated."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.first(F.pad(x, (2, 0))))
        return F.relu(m.second(F.pad(x, (4, 0))))

    return half(call, first=nn.Conv1d(4, 5, 3), second=nn.Conv1d(5, 6, 3, dilation=2))


def conv3d() -> Half:
    """Make a stock one."""
    return {"torch_module": nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1)}


def separable_conv() -> Half:
    """Make a depthwise convolution with two filters a channel, then a pointwise one."""
    return half(
        lambda m, x: m.point(F.silu(m.depth(x))),
        depth=nn.Conv2d(3, 6, 3, padding=1, groups=3),
        point=nn.Conv2d(6, 4, 1),
    )


def shuffle_block() -> Half:
    """Shuffle channels between two grouped convolutions."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.first(x))
        b, c, h, w = x.shape
        return m.second(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    return half(call, first=nn.Conv2d(4, 6, 1, groups=2), second=nn.Conv2d(6, 4, 3, padding=1, groups=2))


def conv_transpose() -> Half:
    """Make a stock one."""
    return half(lambda m, x: torch.tanh(m.up(x)), up=nn.ConvTranspose2d(3, 5, (3, 4), stride=2, padding=1))


def max_pool() -> Half:
    """Pool overlapping windows of numbers of either sign, some of them padding."""
    return half(lambda m, x: F.max_pool2d(m.conv(x), 3, 2, padding=1), conv=nn.Conv2d(3, 4, 1))


def average_pool() -> Half:
    """Average overlapping windows, the padding included, as torch does."""
    return half(lambda m, x: F.avg_pool2d(m.conv(x), 3, 2, padding=1), conv=nn.Conv2d(3, 4, 1))


def resnet_block() -> Half:
    """Make the basic block with a projection, in inference mode."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.bn1(m.conv1(x)))
        return F.relu(m.bn2(m.conv2(y)) + m.bn3(m.project(x)))

    return half(
        call,
        conv1=nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        conv2=nn.Conv2d(5, 5, 3, padding=1, bias=False),
        project=nn.Conv2d(3, 5, 1, stride=2, bias=False),
        bn1=nn.BatchNorm2d(5),
        bn2=nn.BatchNorm2d(5),
        bn3=nn.BatchNorm2d(5),
    )


def convnext_block() -> Half:
    """Make the block with its layer scale."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(m.depth(x).permute(0, 2, 3, 1))
        return x + (m.gamma * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)

    return half(
        call,
        depth=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        norm=nn.LayerNorm(4, eps=1e-6),
        up=nn.Linear(4, 9),
        down=nn.Linear(9, 4),
        gamma=parameter(4),
    )


def inverted_residual() -> Half:
    """Make MobileNet's block, in inference mode."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(m.bn1(m.expand(x)))
        return x + m.bn3(m.project(F.relu6(m.bn2(m.depth(y)))))

    return half(
        call,
        expand=nn.Conv2d(3, 6, 1, bias=False),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        project=nn.Conv2d(6, 3, 1, bias=False),
        bn1=nn.BatchNorm2d(6),
        bn2=nn.BatchNorm2d(6),
        bn3=nn.BatchNorm2d(3),
    )


def squeeze_excite() -> Half:
    """Weigh channels by what the whole image says."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x * m.expand(F.relu(m.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()

    return half(call, reduce=nn.Conv2d(6, 3, 1), expand=nn.Conv2d(3, 6, 1))


def unet_level() -> Half:
    """Go one level down and up again, beside a skip connection."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(m.enter(x))
        below = F.relu(m.below(F.max_pool2d(skip, 2)))
        return m.leave(torch.cat([skip, F.interpolate(below, scale_factor=2.0, mode="nearest")], 1))

    return half(
        call,
        enter=nn.Conv2d(3, 4, 3, padding=1),
        below=nn.Conv2d(4, 4, 3, padding=1),
        leave=nn.Conv2d(8, 2, 3, padding=1),
    )


def patch_embedding() -> Half:
    """Make the stem of a ViT: patches, a class token, positions."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        patches = m.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.positions

    return half(call, patches=nn.Conv2d(3, 5, 2, stride=2), token=parameter(1, 1, 5), positions=parameter(1, 7, 5))


def flatten_head() -> Half:
    """Flatten an image for a linear layer."""
    return half(
        lambda m, x: m.fc(F.relu(m.conv(x)).flatten(1)), conv=nn.Conv2d(2, 3, 3, padding=1), fc=nn.Linear(3 * 4 * 5, 4)
    )


def pixel_shuffle() -> Half:
    """Make an image twice as large out of four times the channels."""
    return half(lambda m, x: torch.tanh(F.pixel_shuffle(m.conv(x), 2)), conv=nn.Conv2d(3, 2 * 4, 3, padding=1))


def mixer_block() -> Half:
    """Mix tokens, then channels."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + m.tokens2(F.gelu(m.tokens1(m.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + m.channels2(F.gelu(m.channels1(m.norm2(x))))

    return half(
        call,
        norm1=nn.LayerNorm(6),
        norm2=nn.LayerNorm(6),
        tokens1=nn.Linear(5, 7),
        tokens2=nn.Linear(7, 5),
        channels1=nn.Linear(6, 8),
        channels2=nn.Linear(8, 6),
    )
