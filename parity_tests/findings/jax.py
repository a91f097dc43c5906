"""Findings in JAX, Flax and einops' Flax layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from parity_tests.findings import Finding
from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import compare
from parity_tests.harness.inputs import draw_inputs
from parity_tests.harness.oracle import reference
from parity_tests.harness.tolerance import declared_arithmetic

_N, _IN, _OUT = 64, 32, 48


def _too_small(kernel: jax.Array) -> float:
    """Right standard deviation per partition over the one that was drawn."""
    return float(1 / math.sqrt(_IN) / np.asarray(kernel, np.float64).std())


def _nnx_einsum() -> float:
    layer = nnx.Einsum("bni,nio->bno", (_N, _IN, _OUT), (_N, _OUT), rngs=nnx.Rngs(0))
    return _too_small(layer.kernel[...])


def _nnx_linear_general() -> float:
    layer = nnx.LinearGeneral(_IN, _OUT, axis=-1, batch_axis={0: _N}, rngs=nnx.Rngs(0))
    return _too_small(layer.kernel[...])


def _linen_dense_general() -> float:
    layer = linen.DenseGeneral(_OUT, axis=-1, batch_dims=(0,))
    variables = layer.init(jax.random.key(0), jnp.ones((_N, 4, _IN)))
    return _too_small(jnp.asarray(variables["params"]["kernel"]))


def _einmix() -> float:
    """Share of positive weights over the share that a symmetric distribution has, to be above 1 only if it is all."""
    from einops.layers.flax import EinMix

    layer = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", sizes={"n": _N, "i": _IN, "o": _OUT})
    weight = np.asarray(layer.init(jax.random.key(0), jnp.ones((2, _N, _IN)))["params"]["weight"])
    # Five standard errors around one half: a symmetric draw stays below 1.
    return float((weight > 0).mean() / (0.5 + 2.5 / math.sqrt(weight.size)))


def _bias_gradient() -> float:
    inputs = draw_inputs(Case("finding-bias", (4096,), 2, 8, 8), "bfloat16")
    bias, product = jnp.asarray(inputs.bias), jnp.asarray(inputs.x)

    def add(bias):
        return product + bias

    (dbias,) = jax.jit(lambda b, g: jax.vjp(add, b)[1](g))(bias, jnp.asarray(inputs.cotangent))
    (result,) = compare({"dbias": np.asarray(dbias)}, reference(inputs), declared_arithmetic("bf16"))
    return result.bound_fraction


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "flax-nnx-einsum-init",
        "flax",
        "nnx.Einsum counts the partitions into the fan-in: the std is sqrt(n) too small.",
        ("0.12.8", "0.12.12"),
        _nnx_einsum,
        "right std over drawn std, n = 64",
    ),
    Finding(
        "flax-nnx-linear-general-init",
        "flax",
        "nnx.LinearGeneral with a batch axis counts it into the fan-in: the std is sqrt(n) too small.",
        ("0.12.8", "0.12.12"),
        _nnx_linear_general,
        "right std over drawn std, n = 64",
    ),
    Finding(
        "flax-linen-dense-general-init",
        "flax",
        "linen.DenseGeneral with batch_dims counts them into the fan-in: the std is sqrt(n) too small.",
        ("0.12.8", "0.12.12"),
        _linen_dense_general,
        "right std over drawn std, n = 64",
    ),
    Finding(
        "einops-einmix-flax-positive",
        "einops",
        "EinMix for Flax draws U[0, b) where EinMix for torch draws U(-b, b): every weight is positive.",
        ("0.8.1",),
        _einmix,
        "share of positive weights over the largest that a symmetric draw shows",
    ),
    Finding(
        "jax-bf16-bias-gradient",
        "jax",
        "The gradient of a broadcast add sums a bf16 bias gradient in bf16.",
        ("0.10.2", "0.11.2"),
        _bias_gradient,
        "error over the bound of an fp32 sum",
    ),
)
