"""Check for known traps in JAX, Flax and einops' Flax layers."""

import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parity_tests.findings import Finding
from parity_tests.interpreters.interpreter import Channel, Interpreter
from parity_tests.judge.comparison import compare
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.tolerance import declared_arithmetic, reference

_N, _IN, _OUT = 64, 32, 48
_CHILD = "parity_tests.frameworks.jax.findings"


def _too_small(kernel: jax.Array) -> float:
    """Return right standard deviation per partition over the one that was drawn."""
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
    """Return the share of positive weights over the largest that a symmetric distribution shows."""
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


def _on_a_cpu(measure: Callable[[], float]) -> Callable[[], float]:
    """Run a check on the CPU that it is about, also where JAX would take a GPU."""

    def on_a_cpu() -> float:
        with jax.default_device(jax.devices("cpu")[0]):
            return measure()

    return on_a_cpu


@_on_a_cpu
def _batched_product() -> float:
    """Return right over returned for 4096 ones, a sum that bf16 holds and a bf16 accumulator never reaches."""
    x, weight = jnp.ones((4, 2, 4096), jnp.bfloat16), jnp.ones((2, 4096, 16), jnp.bfloat16)
    y = jax.jit(lambda x, w: jnp.einsum("bni,nio->bno", x, w))(x, weight)
    return 4096 / float(y.min())


@_on_a_cpu
def _weight_gradient() -> float:
    x, weight = jnp.ones((64, 64, 2, 16), jnp.bfloat16), jnp.ones((2, 16, 16), jnp.bfloat16)

    def gradient(x, weight):
        y, pullback = jax.vjp(lambda w: jnp.einsum("abni,nio->abno", x, w), weight)
        return pullback(jnp.ones_like(y))[0]

    return 4096 / float(jax.jit(gradient)(x, weight).min())


@_on_a_cpu
def _wide_result() -> float:
    """Return 1 if the product works, infinity if it raises."""
    x, weight = jnp.ones((4, 2, 8), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    try:
        y = jnp.einsum("bni,nio->bno", x, weight, preferred_element_type=jnp.float32)
        return 8 / float(y.min())
    except jax.errors.JaxRuntimeError:
        return math.inf


def _no_gpu() -> str:
    return "" if "gpu" in {device.platform for device in jax.devices()} else "JAX sees no GPU"


def _product_with_a_vector() -> float:
    """Return right over returned for pairs of terms that leave 2**-14 each, which bf16 rounds away from a square."""
    pairs, remainder = 15, 2.0**-14
    root = 1 + 2.0**-7
    x = jnp.asarray([root, -1.0] * pairs + [remainder], jnp.bfloat16)
    column = jnp.asarray([root, root**2 - remainder] * pairs + [1.0], jnp.bfloat16)
    weight = jnp.broadcast_to(column[:, None], (len(column), 16))
    y = jax.jit(lambda x, w: jnp.einsum("bni,nio->nbo", x, w))(x[None, None], weight[None])
    return (pairs + 1) * remainder / float(y.min())


_PROCESS_S = 300.0


def main(channel: Channel) -> None:
    """Compare a grouped convolution on one device with the same divided over eight, and send the share that differs."""
    mesh = jax.make_mesh((8,), ("p",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, kernel = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((4, 8 * 16, 1), (8 * 8, 16, 1)))

    @jax.jit
    def run(x, kernel):
        names = ("NCH", "OIH", "NCH")
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=names, feature_group_count=8)

    def placed(array: np.ndarray, *axes: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    one, many = np.asarray(run(x, kernel)), np.asarray(run(placed(x, None, "p"), placed(kernel, "p")))
    channel.send({"share": float(np.mean(one != many))})


def _divided_convolution() -> float:
    """Return 1 plus the share of wrong values, from a process of its own: it needs eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with Interpreter(_CHILD, who="its process", timeout_s=_PROCESS_S, environment=environment) as child:
        return 1 + child.receive()["share"]


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
        ("0.8.1", "0.8.2"),
        _einmix,
        "share of positive weights over the largest that a symmetric draw shows",
        needs="einops",
    ),
    Finding(
        "jax-bf16-bias-gradient",
        "jax",
        "The gradient of a broadcast add sums a bf16 bias gradient in bf16.",
        ("0.10.2", "0.11.2"),
        _bias_gradient,
        "error over the bound of an fp32 sum",
    ),
    Finding(
        "jax-cpu-bf16-batched-product",
        "jax",
        "On a CPU, a bf16 product that is batched over a middle axis, as jnp.einsum('bni,nio->bno', x, w) is, adds up "
        "in bf16: 4096 ones make 1536. Operands that are laid partition-major are summed in fp32.",
        ("0.11.2",),
        _batched_product,
        "right sum over returned sum",
    ),
    Finding(
        "jax-cpu-bf16-weight-gradient",
        "jax",
        "On a CPU, the jitted weight gradient of a batched bf16 product adds up in bf16: 4096 ones make 1536.",
        ("0.11.2",),
        _weight_gradient,
        "right sum over returned sum",
    ),
    Finding(
        "jax-cpu-bf16-wide-result",
        "jax",
        "On a CPU, jnp.einsum('bni,nio->bno', x, w, preferred_element_type=float32) on bf16 raises an internal error.",
        ("0.10.2", "0.11.2"),
        _wide_result,
        "infinite if it raises",
    ),
    Finding(
        "jax-gpu-bf16-product-with-a-vector",
        "jax",
        "On a GPU, a batched 16-bit product with a vector, such as that of a single row, rounds every term to 16 bits "
        "before it is added.",
        ("0.11.2",),
        _product_with_a_vector,
        "right sum over returned sum",
        lacks=_no_gpu,
        by_processor=True,
    ),
    Finding(
        "jax-sharded-grouped-convolution",
        "jax",
        "A grouped convolution whose kernel is divided over devices along its output features returns wrong values "
        "without an error: each device keeps the number of groups and gets fewer features.",
        ("0.10.2", "0.11.2"),
        _divided_convolution,
        "1 plus the share of wrong values",
    ),
)
