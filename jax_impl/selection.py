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

from jax_impl.implementations import names_algorithm
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
# With several processors, also of more input features, for so many rows: all of them read all weights, which are to be
# near, or else the rows many and the partitions no larger than so.
_FEWEST_SHARED_ROWS, _BYTES_NEAR = 16, 2**20
_MANY_ROWS, _MODERATE_PARTITION = 64, 2**12
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
    the one whose gradients need no transpose of a whole operand. Where the program runs on a single CPU device and is
    not differentiated, a forward pass of few rows of large partitions is `in_turn` if the process has one processor,
    which mostly takes 0.6 to 0.95 of the time (1.0 to 1.2 at 2048 -> 2048, and up to 1.7 where calls follow each other
    that keep a weight of 17 MB in the cache; with two processors 0.7 to 2.7), and one of 2 to 8 features `by_feature`:
    0.2 to 0.6 of the time at 4 -> 4, 0.3 at 5 -> 5. Not so at 4 -> 8, 8 -> 4 and 8 -> 8, where a stack of such layers
    would take 1.1 to 1.4 times as long, on one thread up to twice; nor in training, where `matmul` adds up elements
    beside its gradients, partition-major as these read them (`by_feature` takes 0.9 to 1.1 times as long as the product
    alone, and up to 4 times in a stack). A large y of 9 features or more from 2 to 8 takes 0.1 to 1.0 of the time on
    two threads and 0.2 to 0.9 on one (0.5 in the geometric mean), and 0.3 to 1.1 in a stack; where one dense product of
    the flattened y follows, which XLA would read in another order, 0.3 to 1.4 of the time of both. Where a sum over the
    partitions follows, XLA reads a y of few features slowly: up to 2.8 times as long, both together.

    Not chosen, because it depends on what surrounds the layer: where x and y take 20 MB together and more than the
    weight, and a map has 2,000 weights or more, or one output, `in_turn` takes 0.2 to 1.0 of the time in a layer by
    itself or followed by a function of its elements, 0.5 to 1.1 between dense layers or normalisations, but 0.6 to 1.6
    in stacks of two and three, and 0.8 to 11 where the caller's arrays lie partition-major: there XLA cancels the
    batched product's transposes. Much of the difference is memory that is new in every call, which large pages make
    cheap (`jax_impl/README.md`).
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
    if math.prod(x.shape[:-1]) * sizes[1] < _LARGE_RESULT:
        return False
    if sizes[0] <= _MOST_FEATURES:
        return True
    rows, fits = math.prod(x.shape[:-2]), weight.size * dtype.itemsize <= _BYTES_NEAR
    return rows >= _FEWEST_SHARED_ROWS and (fits or (rows >= _MANY_ROWS and math.prod(sizes) <= _MODERATE_PARTITION))


def _is_whole(x: Array, weight: Array, dtype: np.dtype) -> bool:
    """Say whether several partitions lie on one device, with as many rows as are known, in the dtype of the result.

    Operands of 16 bits stay with the batched product, and so do programs for several devices: taking one partition of
    operands that are divided over the partitions would gather them all.
    """
    # An exported program may have a number of rows that is not known yet.
    rows = math.prod(x.shape[:-2])
    if not isinstance(rows, int) or dtype != x.dtype or dtype.itemsize < 4 or weight.shape[0] == 1:
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
