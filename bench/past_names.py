"""The names of implementations in records of earlier commits, where a name did not say what ran."""

from collections.abc import Mapping
from typing import Any

# Between these moments (UTC, of two commits) JAX's `matmul` became a loop over the partitions by itself, where that was
# measured to be faster: on a single CPU device, forward, with few rows of large partitions. Now that loop is `in_turn`.
_SINCE, _UNTIL = "2026-11-24T19:03:37", "2026-11-28T19:31:00"
_FEWEST_ROWS, _WEIGHTS_A_FEATURE, _LARGE_PARTITION, _MANY_WEIGHTS = 4, 4, 2**14, 2**21


def implementation_that_ran(record: Mapping[str, Any]) -> str:
    """Return the present name of what a record measured, by the rule of its commit; records on disk stay as they are.

    A derivative was that of the batched product, so that only the forward pass is concerned.
    """
    name = record["implementation"]
    if (record["framework"], name, record["device"], record["direction"]) != ("jax", "matmul", "cpu", "forward"):
        return name
    if not (isinstance(record["in_features"], int) and isinstance(record["out_features"], int)):
        return name  # no record of unequal sizes is as old
    rows, partitions = record["batch"], record["num_partitions"]
    features, partition = record["in_features"] + record["out_features"], record["in_features"] * record["out_features"]
    looped = (
        _SINCE <= record["started_at"] < _UNTIL
        and record["dtype"] in ("float32", "float64")
        and partitions > 1
        and rows >= _FEWEST_ROWS
        and _WEIGHTS_A_FEATURE * rows * features <= partition
        and partition >= _LARGE_PARTITION
        and partitions * partition >= _MANY_WEIGHTS
    )
    return "in_turn" if looped else name
