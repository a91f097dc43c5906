"""Triton kernels of `fused`, and the choice among them. Only `implementations/fused.py` imports this: it takes Triton.

With x of shape (b, n, i), W (n, i, o) and the cotangent dy (b, n, o):

    y[b, n, o] = sum_i x[b, n, i] W[n, i, o] + bias[n, o]      dx[b, n, i] = sum_o dy[b, n, o] W[n, i, o]
    dW[n, i, o] = sum_b x[b, n, i] dy[b, n, o]                 dbias[n, o] = sum_b dy[b, n, o]

Two pairs of kernels compute them. The `tile` kernels give a program one partition and use `tl.dot`, whose sides are 16
or more. The `product` kernels multiply element by element and add up: for a single row, and for i, o <= 8, where a side
of 16 would waste most of the product; neighbouring partitions lie side by side, so that whole memory sectors are read.
dx is the forward kernel on a transposed W, except where one tile holds all of i and o: there one pass over x, dy and W
gives all three gradients.

Every sum is kept in fp32. A program writes its own results and nothing else does, so no atomics are needed and a call
gives the same bits each time. Where rows are split over programs, each writes its partial dW and dbias in fp32, and one
sum over the splits follows. Partitions never share a product, so that a NaN stays where it is. Offsets are 64-bit.

The rows of a tile, warps and stages are tuned by `triton.autotune` among at most three candidates, once for each
(device, dtype, n, i, o, rows to the next power of two), and the choice is kept in Triton's cache on disk.
"""

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Powers of two; `tl.dot` takes none below 16.
_SMALLEST_SIDE, _LARGEST_SIDE = 16, 64
_SMALL = 8
_MOST_PRODUCTS = 4096  # numbers of fp32 that a program of the `product` kernels holds, 32 for each thread
_NEIGHBOURS = 8
_MOST_ROWS_APART = 4096  # calls with more rows share their tuning
_LEAST_ROWS_OF_SPLIT = 32
_PROCESSORS = 132  # for the interpreter, which splits rows as an H100 or H200 does
_INTERPRETED = knobs.runtime.interpret


def _fitting(configs: list[Any], arguments: dict[str, Any], **meta: Any) -> list[Any]:
    """Return at most three candidates, the largest first, that need no more rows and registers than there are."""
    sides = meta["BLOCK_IN"] * meta["BLOCK_OUT"]
    most_rows = max(arguments["rows_class"], configs[0].kwargs["BLOCK_ROWS"])
    numbers = {config: math.prod(config.kwargs.values()) * sides for config in configs}
    fit = [
        config
        for config, number in numbers.items()
        if config.kwargs["BLOCK_ROWS"] <= most_rows
        and (number <= _MOST_PRODUCTS or "BLOCK_PARTITIONS" not in config.kwargs)
    ]
    # Far fewer rows than there could be are slower and not worth the trial.
    largest = max(config.kwargs["BLOCK_ROWS"] for config in fit)
    near = [config for config in fit if 8 * config.kwargs["BLOCK_ROWS"] > largest]
    return sorted(near, key=lambda config: numbers[config], reverse=True)


def _untimed(call: Any, quantiles: tuple[float, ...]) -> list[float]:
    """Make all candidates equal, so that the first is taken: the interpreter has no speed to measure."""
    return [0.0 for _ in quantiles]


def _timed(call: Any, quantiles: tuple[float, ...]) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(configs: list[Any], *further: str) -> Any:
    return triton.autotune(
        configs,
        key=["rows_class", "partitions", "in_features", "out_features", "w_out", *further],
        prune_configs_by={"early_config_prune": _fitting},
        do_bench=_untimed if _INTERPRETED else _timed,
        cache_results=True,
    )


def _tile(rows: int, warps: int, stages: int) -> Any:
    return triton.Config({"BLOCK_ROWS": rows}, num_warps=warps, num_stages=stages)


def _product(rows: int, partitions: int) -> Any:
    return triton.Config({"BLOCK_ROWS": rows, "BLOCK_PARTITIONS": partitions}, num_warps=4, num_stages=2)


_TILES = [_tile(16, 4, 4), _tile(32, 4, 3), _tile(64, 4, 3), _tile(128, 8, 3)]
_PRODUCTS = [_product(1, 1), _product(1, 8), _product(1, 64), _product(8, 8), _product(16, 8), _product(32, 8)]
# Another number of rows or partitions is not compiled anew.
_UNSPECIALISED = ["rows", "partitions", "rows_class", "rows_of_split", "splits"]


@_tuned(_TILES, "PRECISION")
@triton.jit(do_not_specialize=_UNSPECIALISED)
def tile_forward(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    rows, partitions, in_features, out_features, rows_class,
    x_row, x_partition, x_in, w_partition, w_in, w_out, bias_partition, bias_out, y_row, y_partition, y_out,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_ROWS x BLOCK_OUT of y for one partition, BLOCK_IN terms at a time."""
    out_blocks, row_blocks = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0).to(tl.int64)
    o = program % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    b = program // out_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    n = program // out_blocks // row_blocks
    x_ptr += n * x_partition + b * x_row
    w_ptr += n * w_partition + o * w_out
    y = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN).to(tl.int64)
        column, row = i[None, :], i[:, None]
        x = tl.load(x_ptr + column * x_in, mask=(b < rows) & (column < in_features), other=0.0)
        w = tl.load(w_ptr + row * w_in, mask=(row < in_features) & (o < out_features), other=0.0)
        y = tl.dot(x, w, y, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n * bias_partition + o * bias_out, mask=o < out_features, other=0.0)
        y += bias.to(tl.float32)
    y_ptr += n * y_partition + b * y_row + o * y_out
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=(b < rows) & (o < out_features))


@_tuned(_TILES, "PRECISION", "WITH_DX")
@triton.jit(do_not_specialize=_UNSPECIALISED)
def tile_backward(
    dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, dbias_ptr,
    rows, partitions, in_features, out_features, rows_class, rows_of_split, splits,
    dy_row, dy_partition, dy_out, x_row, x_partition, x_in, w_partition, w_in, w_out,
    WITH_DX: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_IN x BLOCK_OUT of dW and its dbias for one partition, from one split of the rows.

    WITH_DX: the tile holds all of i and o, and dx of these rows is written on the way. Results are contiguous.
    """
    out_blocks, in_blocks = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    program = tl.program_id(0).to(tl.int64)
    o = program % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_block = program // out_blocks % in_blocks
    i = in_block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    split = program // out_blocks // in_blocks % splits
    n = program // out_blocks // in_blocks // splits
    if WITH_DX:
        # Transposed as it is read, since dx = dy W^T.
        w_ptr += n * w_partition + i[None, :] * w_in + o[:, None] * w_out
        w = tl.load(w_ptr, mask=(i[None, :] < in_features) & (o[:, None] < out_features), other=0.0)
    x_ptr += n * x_partition + i[None, :] * x_in
    dy_ptr += n * dy_partition + o[None, :] * dy_out
    dw = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    dbias = tl.zeros((BLOCK_OUT,), tl.float32)
    last = tl.minimum((split + 1) * rows_of_split, rows)
    for start in range(split * rows_of_split, last, BLOCK_ROWS):
        b = start + tl.arange(0, BLOCK_ROWS)[:, None]
        x = tl.load(x_ptr + b * x_row, mask=(b < last) & (i[None, :] < in_features), other=0.0)
        dy = tl.load(dy_ptr + b * dy_row, mask=(b < last) & (o[None, :] < out_features), other=0.0)
        if HAS_BIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
        dw = tl.dot(tl.trans(x), dy, dw, input_precision=PRECISION)
        if WITH_DX:
            dx = tl.dot(dy, w, input_precision=PRECISION)  # pyright: ignore[reportPossiblyUnboundVariable]
            at = dx_ptr + (b * partitions + n) * in_features + i[None, :]
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=(b < last) & (i[None, :] < in_features))
    block = split * partitions + n
    at = dw_ptr + (block * in_features + i[:, None]) * out_features + o[None, :]
    whole = (i[:, None] < in_features) & (o[None, :] < out_features)
    tl.store(at, dw.to(dw_ptr.dtype.element_ty), mask=whole)
    if HAS_BIAS:
        at = dbias_ptr + block * out_features + o
        tl.store(at, dbias.to(dbias_ptr.dtype.element_ty), mask=o < tl.where(in_block == 0, out_features, 0))


@_tuned(_PRODUCTS)
@triton.jit(do_not_specialize=_UNSPECIALISED)
def product_forward(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    rows, partitions, in_features, out_features, rows_class,
    x_row, x_partition, x_in, w_partition, w_in, w_out, bias_partition, bias_out, y_row, y_partition, y_out,
    HAS_BIAS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PARTITIONS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_ROWS x BLOCK_PARTITIONS x BLOCK_OUT of y; axes are (b, n, i, o)."""
    n_blocks, out_blocks = tl.cdiv(partitions, BLOCK_PARTITIONS), tl.cdiv(out_features, BLOCK_OUT)
    program = tl.program_id(0).to(tl.int64)
    n = program % n_blocks * BLOCK_PARTITIONS + tl.arange(0, BLOCK_PARTITIONS)
    o = program // n_blocks % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, None, :]
    b = program // n_blocks // out_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
    x_ptr += b * x_row + n[None, :, None] * x_partition
    w_ptr += n[:, None, None] * w_partition + o * w_out
    x_inside = (b < rows) & (n[None, :, None] < partitions)
    w_inside = (n[:, None, None] < partitions) & (o < out_features)
    products = tl.zeros((BLOCK_ROWS, BLOCK_PARTITIONS, BLOCK_IN, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN).to(tl.int64)
        x = tl.load(x_ptr + i[None, None, :] * x_in, mask=x_inside & (i[None, None, :] < in_features), other=0.0)
        w = tl.load(w_ptr + i[None, :, None] * w_in, mask=w_inside & (i[None, :, None] < in_features), other=0.0)
        products += x.to(tl.float32)[:, :, :, None] * w.to(tl.float32)[None, :, :, :]
    y = tl.sum(products, axis=2)
    if HAS_BIAS:
        bias_ptr += n[None, :, None] * bias_partition + o * bias_out
        y += tl.load(bias_ptr, mask=(n[None, :, None] < partitions) & (o < out_features), other=0.0).to(tl.float32)
    y_ptr += b * y_row + n[None, :, None] * y_partition + o * y_out
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=x_inside & (o < out_features))


@_tuned(_PRODUCTS, "WITH_DX")
@triton.jit(do_not_specialize=_UNSPECIALISED)
def product_backward(
    dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, dbias_ptr,
    rows, partitions, in_features, out_features, rows_class, rows_of_split, splits,
    dy_row, dy_partition, dy_out, x_row, x_partition, x_in, w_partition, w_in, w_out,
    WITH_DX: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PARTITIONS: tl.constexpr,
):  # fmt: skip
    """Do as `tile_backward` does for BLOCK_PARTITIONS partitions; axes are (b, n, i, o)."""
    n_blocks = tl.cdiv(partitions, BLOCK_PARTITIONS)
    out_blocks, in_blocks = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    program = tl.program_id(0).to(tl.int64)
    n = program % n_blocks * BLOCK_PARTITIONS + tl.arange(0, BLOCK_PARTITIONS)
    o = program // n_blocks % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_block = program // n_blocks // out_blocks % in_blocks
    i = in_block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    split = program // n_blocks // out_blocks // in_blocks
    whole = (n[:, None, None] < partitions) & (i[None, :, None] < in_features) & (o[None, None, :] < out_features)
    if WITH_DX:
        w_ptr += n[:, None, None] * w_partition + i[None, :, None] * w_in + o[None, None, :] * w_out
        w = tl.load(w_ptr, mask=whole, other=0.0).to(tl.float32)[None, :, :, :]
    dw = tl.zeros((BLOCK_ROWS, BLOCK_PARTITIONS, BLOCK_IN, BLOCK_OUT), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_PARTITIONS, BLOCK_OUT), tl.float32)
    last = tl.minimum((split + 1) * rows_of_split, rows)
    for start in range(split * rows_of_split, last, BLOCK_ROWS):
        b = start + tl.arange(0, BLOCK_ROWS)[:, None, None]
        inside = (b < last) & (n[None, :, None] < partitions)
        x_at = x_ptr + b * x_row + n[None, :, None] * x_partition + i[None, None, :] * x_in
        x_inside = inside & (i[None, None, :] < in_features)
        x = tl.load(x_at, mask=x_inside, other=0.0).to(tl.float32)
        dy_at = dy_ptr + b * dy_row + n[None, :, None] * dy_partition + o[None, None, :] * dy_out
        dy = tl.load(dy_at, mask=inside & (o[None, None, :] < out_features), other=0.0).to(tl.float32)
        dw += x[:, :, :, None] * dy[:, :, None, :]
        dbias += dy
        if WITH_DX:
            dx = tl.sum(dy[:, :, None, :] * w, axis=3)  # pyright: ignore[reportPossiblyUnboundVariable]
            at = dx_ptr + (b * partitions + n[None, :, None]) * in_features + i[None, None, :]
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=x_inside)
    block = split * partitions + n
    at = dw_ptr + (block[:, None, None] * in_features + i[None, :, None]) * out_features + o[None, None, :]
    tl.store(at, tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty), mask=whole)
    if HAS_BIAS:
        at = dbias_ptr + block[:, None] * out_features + o[None, :]
        inside = (n[:, None] < partitions) & (o[None, :] < tl.where(in_block == 0, out_features, 0))
        tl.store(at, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write y (b, n, o), of any strides, from x (b, n, i), weight (n, i, o) and bias (n, o) or None."""
    rows, n, i = x.shape
    o = weight.shape[-1]
    if rows == 0:
        return
    if _misread(x):
        wide = torch.empty_like(y, dtype=torch.float32)
        forward(x.float(), weight.float(), None if bias is None else bias.float(), wide)
        y.copy_(wide)
        return
    bias_strides = (0, 0) if bias is None else bias.stride()
    sizes = (rows, n, i, o, _class_of(rows))
    kernel, options, block_in, block_out = _plan(x, i, o)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        blocks = triton.cdiv(rows, meta["BLOCK_ROWS"]) * triton.cdiv(o, block_out)
        return (blocks * triton.cdiv(n, meta.get("BLOCK_PARTITIONS", 1)),)

    operands = (x, weight, bias, y, *sizes, *x.stride(), *weight.stride(), *bias_strides, *y.stride())
    with _on(x):
        kernel[0][grid](*operands, HAS_BIAS=bias is not None, BLOCK_IN=block_in, BLOCK_OUT=block_out, **options)


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx where the weight is given, dW where x is given, and dbias where it is asked for."""
    rows, n, o = dy.shape
    if _misread(dy):
        wide_x, wide_weight = (None if operand is None else operand.float() for operand in (x, weight))
        found = backward(dy.float(), wide_x, wide_weight, bias)
        dx, dw, dbias = (None if gradient is None else gradient.to(dy.dtype) for gradient in found)
        return dx, dw, dbias
    dx = dw = dbias = None
    if weight is not None:
        dx = dy.new_empty(rows, n, weight.shape[1])
    if x is None:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if bias else None
        if weight is not None and dx is not None:
            forward(dy, weight.transpose(1, 2), None, dx)
        return dx, None, dbias
    i = x.shape[-1]
    if rows == 0:
        return dx, dy.new_zeros(n, i, o), dy.new_zeros(n, o) if bias else None
    kernel, options, block_in, block_out = _plan(x, i, o)
    blocks = triton.cdiv(i, block_in) * triton.cdiv(o, block_out)
    # Without tensor cores a thread holds its part of both products and of W: above 32 x 32 more than its registers.
    in_registers = options.get("PRECISION") != "ieee" or x.element_size() == 2 or max(block_in, block_out) <= 32
    in_one_pass = blocks == 1 and weight is not None and in_registers
    if dx is not None and weight is not None and not in_one_pass:
        forward(dy, weight.transpose(1, 2), None, dx)
    neighbours = _NEIGHBOURS if kernel[1] is product_backward else 1
    rows_of_split, splits = _splits(rows, triton.cdiv(n, neighbours) * blocks, min(i, o), dy.device)
    dtype = dy.dtype if splits == 1 else torch.float32
    dw = dy.new_empty((splits, n, i, o), dtype=dtype)
    dbias = dy.new_empty((splits, n, o), dtype=dtype) if bias else None
    sizes = (rows, n, i, o, _class_of(rows), rows_of_split, splits)
    weight_strides = (0, 0, 0) if weight is None else weight.stride()

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (blocks * splits * triton.cdiv(n, meta.get("BLOCK_PARTITIONS", 1)),)

    operands = (dy, x, weight, dx, dw, dbias, *sizes, *dy.stride(), *x.stride(), *weight_strides)
    options |= {"WITH_DX": in_one_pass, "HAS_BIAS": bias}
    with _on(x):
        kernel[1][grid](*operands, BLOCK_IN=block_in, BLOCK_OUT=block_out, **options)
    return dx, _added(dw, dy.dtype), None if dbias is None else _added(dbias, dy.dtype)


def _plan(x: Tensor, i: int, o: int) -> tuple[tuple[Any, Any], dict[str, Any], int, int]:
    """Return the kernels forward and backward, what they are told besides sizes, and the sides of a tile."""
    options: dict[str, Any] = {"enable_fp_fusion": True}  # Triton's default of today, which it says it will change
    if max(i, o) <= _SMALL or x.shape[0] == 1:
        sides = min(triton.next_power_of_2(i), 32), min(triton.next_power_of_2(o), _LARGEST_SIDE)
        return (product_forward, product_backward), options, *sides
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    options |= {"PRECISION": "tf32" if tf32 else "ieee"}
    return (tile_forward, tile_backward), options, _side(i), _side(o)


def _misread(operand: Tensor) -> bool:
    """Say whether Triton's interpreter has the operand wrong: bf16, of which products are garbage, and it truncates.

    In fp32 products of two bf16 numbers are exact (triton-lang/triton#11584 is about the products).
    """
    return _INTERPRETED and operand.dtype == torch.bfloat16


def _side(size: int) -> int:
    """Return the side of a tile, 16 to 64: one that holds `size` if any does, else the one that pads it less."""
    if size <= _LARGEST_SIDE:
        return max(triton.next_power_of_2(size), _SMALLEST_SIDE)
    return min(_LARGEST_SIDE, 32, key=lambda side: triton.cdiv(size, side) * side)


def _class_of(rows: int) -> int:
    return min(triton.next_power_of_2(rows), _MOST_ROWS_APART)


def _splits(rows: int, programs: int, smaller: int, device: torch.device) -> tuple[int, int]:
    """Return the rows of a split and the number of splits: two programs for every processor, if rows suffice.

    The partial sums together have no more numbers than x or dy.
    """
    wanted = min(2 * _processors(device) // programs, rows // _LEAST_ROWS_OF_SPLIT, rows // smaller)
    rows_of_split = triton.cdiv(rows, max(wanted, 1))
    return rows_of_split, triton.cdiv(rows, rows_of_split)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS


def _added(partial: Tensor, dtype: torch.dtype) -> Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(0).to(dtype)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, where Triton launches."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
