"""What is asked about a prepared competitor beside its time: its program, further clocks, and the device's ceilings."""

from dataclasses import asdict

from bench.measure.clocks import measure_single_calls, shortest_call_s
from bench.measure.protocol import Message
from bench.measure.timer import Prepared, Timer
from bench.plan.cells import Cell
from bench.plan.costs import least_product_flops

# The frameworks count differently around the edges (padding, fused additions); a product left out is a third.
_COUNTED_FRACTION = 0.9


def probed(timer: Timer, prepared: Prepared, cell: Cell, budget_s: float) -> Message:
    """Counts the operations of a competitor's program, then runs every other probe.

    Args:
        timer: the framework.
        prepared: what to probe; its program is compiled anew at the end of the further clocks.
        cell: what it computes.
        budget_s: seconds for each of the further clocks; 0 leaves them out.

    Returns:
        The fields of a record, and `doubt`: one sentence if the program does less than the function needs.
    """
    flops, needed = timer.account(prepared), least_product_flops(cell)
    doubt = ""
    # On a GPU libraries do the products, and what their calls count for differs between versions: recorded, not judged.
    if flops is not None and cell.device == "cpu" and flops < _COUNTED_FRACTION * needed:
        doubt = f"the program that runs does {flops:.3g} operations, and the function needs {needed:.3g}"
    found: Message = {"program_flops": flops, "doubt": doubt}
    if budget_s > 0:
        found |= asdict(measure_single_calls(prepared.call, timer.wait, budget_s=budget_s))
        trace = timer.trace(prepared)
        found |= {"kernels": dict(trace.kernels), "device_busy_s": trace.device_busy_s}
        found["compile_warm_s"] = None if prepared.compile_again is None else prepared.compile_again()
    return found


def ceilings_of(timer: Timer) -> dict[str, float]:
    """The rates of a large product and of a large copy in the configured precision."""
    product, flops = timer.large_product()
    copy, moved = timer.large_copy()
    return {
        "ceiling_flops_per_s": flops / shortest_call_s(product, timer.wait),
        "ceiling_bytes_per_s": moved / shortest_call_s(copy, timer.wait),
    }
