"""Analytic costs of a cell, the caps that keep a preset within its time, and the peak rates of hardware.

For a product over b rows, n partitions, i inputs and o outputs, the useful work of one direction is::

    forward           2 b n i o + b n o                       (multiply-adds and the bias)
    forward_backward  3 * 2 b n i o + b n o + b n o           (y, dx and dW; the bias and its gradient)
    train_step        the same; the parameters are written as well, the optimiser's state is not counted

A dense form multiplies n times as much, for which it earns no credit: that factor is its waste. Unequal partitions
need the sums over their own sizes; padding them to the largest wastes too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench.plan.cells import Cell
from bench.plan.competitors import COMPILED_MODES, Competitor

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2})
# A cold cell's buffers fill the last cache this many times, so that none is still there when its turn comes again.
_COLD_CACHES = 4
# Forms that materialise the whole (n*i, n*o) matrix, and forms that become one product per partition when traced.
DENSE_FORMS: frozenset[str] = frozenset({"masked", "dense"})
PADDED_FORMS: frozenset[str] = frozenset({"padded_matmul"})
UNROLLED_FORMS: frozenset[str] = frozenset({"loop", "stock:nn.Linear", "stock:nnx.Linear"})
# Gradients of it hold two products of the size of y for each feature of a partition; XLA on a CPU fuses none of them.
_SUMS_OF_TERMS: frozenset[str] = frozenset({"by_feature"})
# XLA expands a ragged product on a CPU into one masked product of all rows with every partition's matrix.
_EXPANDED_RAGGED = ("jax", "grouped_matmul", "cpu")


@dataclass(frozen=True)
class Limits:
    """Caps of a preset; a competitor over a cap is recorded as skipped, with the figure."""

    executed_flops: float  # most floating-point operations in one call
    unrolled_products: int  # most products that a compiler may be asked to unroll
    memory_fraction: float  # largest part of the free memory that one competitor may need
    call_s: float  # longest single call, measured, in seconds, unless the fastest is nearly as slow:
    slowdown: float  # a call this many times as long as the fastest one's is allowed as well
    prepare_s: float  # time limit of one build and compilation, in seconds
    request_s: float  # time limit of any other request to a worker, in seconds


def products(cell: Cell) -> int:
    """Return the matrix products per partition in one call: 1 forward, 3 with the gradients."""
    return 1 if cell.direction == "forward" else 3


def useful_flops(cell: Cell) -> int:
    """Return the floating-point operations that the function needs."""
    w = cell.workload
    product, bias = 2 * w.batch * w.weights, w.batch * w.outputs
    # The optimiser's few operations a parameter are left out: they differ from one to the next.
    return products(cell) * product + (bias if cell.direction == "forward" else 2 * bias)


def useful_product_flops(cell: Cell) -> int:
    """Return the part of `useful_flops` that the products take."""
    return products(cell) * 2 * cell.workload.batch * cell.workload.weights


def least_product_flops(cell: Cell) -> int:
    """Return the operations of any program of products: K multiplications and K - 1 additions for each sum of K.

    Compilers drop the addition to nothing, so that with one row dW takes one operation for each element and not two.
    """
    w = cell.workload
    b, weights = w.batch, w.weights
    forward = b * (2 * weights - w.outputs)
    return forward if cell.direction == "forward" else forward + b * (2 * weights - w.inputs) + weights * (2 * b - 1)


def buffer_sets(cell: Cell, cache_bytes: int) -> int:
    """Return the number of sets of x, W, b and dy: one if warm, else enough to fill the last cache four times."""
    if cell.cache == "warm":
        return 1
    return max(2, -(-_COLD_CACHES * cache_bytes // (cell.workload.elements * ITEM_BYTES[cell.dtype])))


def compulsory_bytes(cell: Cell) -> int:
    """Return the bytes that must cross the memory interface: every argument read once, every result written once."""
    return cell.workload.elements * (1 if cell.direction == "forward" else 2) * ITEM_BYTES[cell.dtype]


def waste_factor(competitor: Competitor, cell: Cell) -> float:
    """Return how many times the useful products are carried out: n for a dense form, else 1; of unequal sizes a share.

    A dense form of these multiplies all inputs with all outputs, a padded one n of the largest matrices.
    """
    w = cell.workload
    expanded = (competitor.framework, competitor.implementation, cell.device) == _EXPANDED_RAGGED
    dense = expanded or competitor.implementation in DENSE_FORMS
    if w.unequal and dense:
        return w.inputs * w.outputs / w.weights
    if w.unequal and competitor.implementation in PADDED_FORMS:
        return w.num_partitions * math.prod(w.case_of_sizes.largest) / w.weights
    return w.num_partitions if dense else 1


def executed_flops(competitor: Competitor, cell: Cell) -> int:
    """Return the floating-point operations that the form carries out."""
    return round(useful_flops(cell) * waste_factor(competitor, cell))


def working_bytes(competitor: Competitor, cell: Cell) -> int:
    """Return the bytes alive at the peak, roughly: arguments, results, dense matrices, and terms of a sum."""
    w = cell.workload
    dense = w.inputs * w.outputs * ITEM_BYTES[cell.dtype]
    matrices = 0 if competitor.implementation not in DENSE_FORMS else products(cell) * dense
    summed = competitor.implementation in _SUMS_OF_TERMS and cell.direction != "forward" and cell.device == "cpu"
    # There are as many weights as features of a partition for each output.
    terms = 2 * w.batch * w.weights * ITEM_BYTES[cell.dtype] if summed else 0
    return 2 * compulsory_bytes(cell) + matrices + terms


def planned_skip(competitor: Competitor, cell: Cell, limits: Limits, free_bytes: int) -> str | None:
    """Return why a competitor is not worth starting: one sentence with the estimate and the cap, or None."""
    flops = executed_flops(competitor, cell)
    if flops > limits.executed_flops:
        return f"{flops:.2g} operations a call, over the preset's cap of {limits.executed_flops:.2g}"
    needed = working_bytes(competitor, cell)
    if needed > limits.memory_fraction * free_bytes:
        return f"needs about {needed / 2**30:.1f} GiB, over {limits.memory_fraction:.0%} of the free memory"
    traced = competitor.mode in COMPILED_MODES and competitor.implementation in UNROLLED_FORMS
    unrolled = cell.workload.num_partitions * products(cell)
    if traced and unrolled > limits.unrolled_products:
        return f"{unrolled} products to unroll and compile, over the preset's cap of {limits.unrolled_products}"
    return None


# How far over the measured rate of a large product no product can be, where no data sheet tells: a large one reaches
# most of the peak, unless the device was disturbed just then.
OVER_THE_CEILING = 4.0


@dataclass(frozen=True)
class DataSheet:
    """Peak rates of a device."""

    flops_per_s: Mapping[str, float]  # precision class to operations a second, a multiply-add counting as two
    bytes_per_s: float  # memory bandwidth
    source: str  # where the figures come from


def _sheet(fp64: float, fp32: float, tf32: float, half: float, terabytes_per_s: float, source: str) -> DataSheet:
    rates = {"fp64": fp64, "ieee_fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half}
    tera = {name: rate * 1e12 for name, rate in rates.items()}
    return DataSheet(MappingProxyType(tera), terabytes_per_s * 1e12, source)


# By a part of the name that the driver reports; the longest part that fits decides.
_SHEETS: Mapping[str, DataSheet] = MappingProxyType(
    {
        "H200": _sheet(67, 67, 494.7, 989.4, 4.8, "NVIDIA H200 SXM data sheet"),
        "H100 80GB HBM3": _sheet(67, 67, 494.7, 989.4, 3.35, "NVIDIA H100 SXM data sheet"),
        "H100 PCIe": _sheet(51, 51, 378, 756, 2.0, "NVIDIA H100 PCIe data sheet"),
        "A100-SXM4-80GB": _sheet(19.5, 19.5, 156, 312, 2.039, "NVIDIA A100 80GB SXM data sheet"),
        "A100-SXM4-40GB": _sheet(19.5, 19.5, 156, 312, 1.555, "NVIDIA A100 40GB SXM data sheet"),
    }
)


def data_sheet(device_name: str) -> DataSheet | None:
    """Return the data sheet of a device by the name that its driver reports, or None for an unknown one.

    No CPU is listed: its rate depends on a clock that it does not report.
    """
    fitting = [part for part in _SHEETS if part.lower() in device_name.lower()]
    return _SHEETS[max(fitting, key=len)] if fitting else None


def peak_rates(device_name: str, precision: str, observed: str | None = None) -> dict[str, float]:
    """Return `flops_per_s` and `bytes_per_s` of a device; empty for an unknown one.

    Args:
        device_name: as its driver reports it.
        precision: the class that was asked for.
        observed: the class that was seen. Where it is a faster one, as with a framework whose default is TF32, its rate
            is what bounds the products.
    """
    sheet = data_sheet(device_name)
    if sheet is None:
        return {}
    rates = sheet.flops_per_s
    return {"flops_per_s": max(rates[precision], rates.get(observed or "", 0.0)), "bytes_per_s": sheet.bytes_per_s}
