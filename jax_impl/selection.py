"""What "auto" means: `matmul`, and on a CPU other forms of a forward pass where these were measured to be faster."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.lax import PrecisionLike

from jax_impl.implementations import names_algorithm, sizes_known
from jax_impl.implementations.by_feature import MOST_IN_FEATURES, partitioned_linear_by_feature_apart
from jax_impl.implementations.in_turn import partitioned_linear_in_turn
from jax_impl.implementations.matmul import FULL_VECTOR, partitioned_linear_matmul
from jax_impl.packing import Packing

# Where `in_turn` was measured to be the faster one, on one thread: the weight fits no cache, each partition is worth a
# step of a loop, and the weights far outnumber the features of x and y. Several threads share out the batched product,
# but not the loop. With more rows a call by itself would gain and others lose: see `run_auto`.
_MANY_WEIGHTS, _LARGE_PARTITION = 2**21, 3 * 2**14
_FEWEST_ROWS, _WEIGHTS_A_FEATURE = 4, 4
# Between these sizes `by_feature` was measured to be the faster one, unless the weights are more and both sizes fill
# the vectors of the batched product; and with more output features, from so many entries of y on.
_FEWEST_FEATURES, _MOST_FEATURES, _SMALL_PARTITION = 2, 8, 16
_LARGE_RESULT = 2**16
# With several processors, also of more input features, for so many rows (all of them read all weights) and output
# features, up to so many products for each feature of x and y, and from so many of those on.
_ROWS_OF_MORE, _OUT_OF_MORE = 128, 4
_PRODUCTS_A_FEATURE, _MANY_FEATURES = 16, 2**17
# What a GPU of 2 TB/s moves in the two microseconds or so that starting one more product takes.
_BYTES_A_PRODUCT = 2**22


def _usable_processors() -> int:
    """Count the processors that this thread may use. As a rule XLA starts as many threads on a CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Before anything is pinned: what a thread is kept to later does not change the number of XLA's threads.
_PROCESSORS = _usable_processors()


def run_auto(x: Array, weight: Array, bias: Array | None, precision: PrecisionLike, dtype: np.dtype) -> Array:
    """Run what `implementation="auto"` means for valid operands; arguments and result are those of an implementation.

    That is `matmul`: measured in fp32 on a CPU, forward and forward + backward, the batched product over
    partition-major operands was the fastest formulation or within noise of it at nearly every size tried, because it is
    the one whose gradients need no transpose of a whole operand. Otherwise only where the program runs on a single CPU
    device and is not differentiated (in training `by_feature` takes 0.9 to 1.1 times as long as the product alone, and
    up to 4 times in a stack). The times are relative to those of `matmul`, on a two-core EPYC with jax 0.10.2:

    - Few rows of large partitions are `in_turn` if the process has one processor: mostly 0.6 to 0.95 (1.0 to 1.2 at
      2048 -> 2048, and up to 1.7 where calls follow each other that keep a weight of 17 MB in the cache; with two
      processors 0.7 to 2.7).
    - 2 to 8 features are `by_feature`: 0.2 to 0.6 at 4 -> 4, 0.2 to 0.3 at 5 -> 5, and a large y of 9 features or more
      0.3 to 0.9. Not so at 4 -> 8, 8 -> 4 and 8 -> 8, where a stack of such layers would take up to twice as long.
    - With several processors so are 9 to 32 input features, for 128 rows and more, unless the products outnumber the
      features of x and y by far: 0.7 in the geometric mean of 37 sizes and of 14 surroundings, with two processors. By
      itself 0.2 to 1.0 (1.2 at one size), after or before a dense product, a normalisation or an activation and in
      stacks 0.2 to 1.5 (once 1.9), before a sum over the partitions 0.1 to 1.5; seldom up to 2.5 where x is that of an
      expensive function of few partitions. On one thread 32 -> 32 would take 1.0 to 1.4. To compile a program takes
      0.1 s longer for each size of layer.

    What it costs: where the caller's arrays lie partition-major, XLA cancels the transposes of the batched product, and
    not those of `by_feature`, which takes 0.4 to 2.9 times as long there, and up to 5.4 with 2 to 4 features out. And
    where nothing but a sum or mean of y is used, which XLA computes together with the batched product, without y in
    memory: 0.6 to 1.4, with a y many times larger than x 2 to 8.

    Not chosen, because it depends on what surrounds the layer: where x and y take 20 MB together and more than the
    weight, and a map has 2,000 weights or more, or one output, `in_turn` takes 0.2 to 1.0 of the time in a layer by
    itself or followed by a function of its elements, 0.5 to 1.1 between dense layers or normalisations, but 0.6 to 1.6
    in stacks of two and three, and 0.8 to 11 where the caller's arrays lie partition-major. Much of the difference is
    memory that is new in every call, which large pages make cheap (`jax_impl/README.md`).
    """
    faster = None
    if gains_in_turn(x, weight, dtype):
        faster = partitioned_linear_in_turn
    elif gains_by_feature(x, weight, dtype, precision):
        faster = partitioned_linear_by_feature_apart
    if faster is None:
        return partitioned_linear_matmul(x, weight, bias, precision, dtype)
    y = _forward_on_a_cpu(x.reshape(-1, *x.shape[-2:]), weight, bias, precision, faster)
    return y.reshape(*x.shape[:-1], weight.shape[2])


def gains_in_turn(x: Array, weight: Array, dtype: np.dtype) -> bool:
    """Say whether a forward pass with results of `dtype` is faster by `in_turn` than by `matmul` on a CPU."""
    if _PROCESSORS > 1 or not _is_whole(x, weight, dtype):
        return False
    rows, (_, in_features, out_features) = math.prod(x.shape[:-2]), weight.shape
    partition_size, features = in_features * out_features, rows * (in_features + out_features)
    few = rows >= _FEWEST_ROWS and _WEIGHTS_A_FEATURE * features <= partition_size
    return few and partition_size >= _LARGE_PARTITION and weight.size >= _MANY_WEIGHTS


def gains_by_feature(x: Array, weight: Array, dtype: np.dtype, precision: PrecisionLike) -> bool:
    """Say whether a forward pass with results of `dtype` is faster by `by_feature` than by `matmul` on a CPU."""
    sizes = weight.shape[1:]
    most = _MOST_FEATURES if _PROCESSORS == 1 else MOST_IN_FEATURES
    # Whoever asks for a dot algorithm gets the product that computes in it.
    if min(sizes) < _FEWEST_FEATURES or sizes[0] > most or names_algorithm(precision):
        return False
    if not _is_whole(x, weight, dtype):
        return False
    if max(sizes) <= _MOST_FEATURES:
        return math.prod(sizes) <= _SMALL_PARTITION or any(size % FULL_VECTOR for size in sizes)
    rows, maps = math.prod(x.shape[:-2]), weight.shape[0]
    if sizes[0] <= _MOST_FEATURES:
        return rows * maps * sizes[1] >= _LARGE_RESULT
    few_products = math.prod(sizes) <= _PRODUCTS_A_FEATURE * sum(sizes) and sizes[1] >= _OUT_OF_MORE
    return few_products and rows >= _ROWS_OF_MORE and rows * maps * sum(sizes) >= _MANY_FEATURES


def _is_whole(x: Array, weight: Array, dtype: np.dtype) -> bool:
    """Say whether several partitions lie on one device, all sizes known, in the dtype of the result.

    Operands of 16 bits stay with the batched product, and so do programs for several devices: taking one partition of
    operands that are divided over the partitions would gather them all.
    """
    if not sizes_known(*x.shape, *weight.shape) or dtype != x.dtype or dtype.itemsize < 4 or weight.shape[0] == 1:
        return False
    return jax.device_count() == 1 and all(jax.typeof(array).sharding.mesh.empty for array in (x, weight))


# One jitted function for all calls: a loop that is made anew in each call would be compiled anew as well, wherever the
# caller does not jit.
@partial(jax.jit, static_argnums=(3, 4))
def _compiled_for_the_platform(
    x: Array, weight: Array, bias: Array | None, precision: PrecisionLike, faster: Callable[..., Array]
) -> Array:
    on_a_cpu = partial(faster, precision=precision, dtype=x.dtype)
    batched = partial(partitioned_linear_matmul, precision=precision, dtype=x.dtype)
    return lax.platform_dependent(x, weight, bias, cpu=on_a_cpu, default=batched)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _forward_on_a_cpu(
    x: Array, weight: Array, bias: Array | None, precision: PrecisionLike, faster: Callable[..., Array]
) -> Array:
    """Run `faster` where the program runs on a CPU and is not differentiated, else `matmul`.

    Gradients need partition-major copies of x and of the cotangent in any case, and y shares them.
    """
    return _compiled_for_the_platform(x, weight, bias, precision, faster)


def _tangent(
    precision: PrecisionLike, faster: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Any]:
    still = (type(None), SymbolicZero)
    moving = [place for place, tangent in enumerate(tangents) if not isinstance(tangent, still)]
    if not moving:
        y = _forward_on_a_cpu(*primals, precision, faster)
        return y, jnp.zeros_like(y)

    def of_moving(*operands: Array) -> Array:
        given: dict[int, Any] = dict(zip(moving, operands, strict=True))
        x, weight, bias = (given.get(place, primal) for place, primal in enumerate(primals))
        return partitioned_linear_matmul(x, weight, bias, precision, x.dtype)

    return jax.jvp(of_moving, tuple(primals[place] for place in moving), tuple(tangents[place] for place in moving))


_forward_on_a_cpu.defjvp(_tangent, symbolic_zeros=True)


def auto_of_unequal(packing: Packing, rows: Any, item_bytes: int, device: str, *, shared: bool) -> str:
    """Name what `implementation="auto"` means for partitions of unequal sizes and an x of so many rows.

    That is `bucketed_matmul`, which on a CPU was the faster one or within noise of it, forward and forward + backward:
    fp32 on one thread, 1 to 512 rows, with the sizes of SAINT (1 -> 32, 32 -> cardinalities), of categories (2 to 2000
    -> 16 and 32), of few large segments (64 to 320), and of 40 partitions of nearly one size. `padded_matmul` took 0.9
    to 2.7 times its time where padding added at most 0.7 of the weight, and up to 19 times where it added more.

    Nothing was measured on a GPU. There the rule is arithmetic: padding takes the place of one product for each size,
    at the price of the bytes that it adds.
    """
    if shared or device == "cpu" or not isinstance(rows, int):
        return "bucketed_matmul"
    n, most_in, most_out = packing.num_partitions, max(packing.in_features), max(packing.out_features)
    weights = n * most_in * most_out - packing.weight_size
    features = n * (most_in + most_out) - packing.in_offsets[-1] - packing.out_offsets[-1]
    saved = (len(packing.buckets) - 1) * _BYTES_A_PRODUCT
    return "padded_matmul" if (weights + rows * features) * item_bytes < saved else "bucketed_matmul"
