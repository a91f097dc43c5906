"""Inductor's programs: its caches in a folder, and the products in the graphs that it turns into code.

A profiler does not see a product that Inductor writes as a loop of its own, and a function before it is compiled does
not show the work that the compiler left. Imports Inductor, which takes seconds: only where something compiles.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import clear_caches
from torch.fx import Graph, Node
from torch.utils.flop_counter import flop_registry


@contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Keep compiled programs in a folder, and take them from there; nothing comes from the process's own memory.

    Args:
        folder: an existing folder; an empty one makes the compilation a cold one.
    """
    wanted = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
    before = {name: os.environ.get(name) for name in wanted}
    # Loaded modules stay loaded for the callables that hold them.
    clear_caches()
    _set_variables(wanted)
    try:
        yield
    finally:
        _set_variables(before)
        clear_caches()


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


_aten = torch.ops.aten
_SUMS = (_aten.sum.dim_IntList, _aten.sum.default)


class ProductsSeen(CustomGraphPass):
    """A pass that changes nothing and adds up the products of every graph that it is shown.

    Attributes:
        graphs: how many graphs were seen; none where the compiler took them from its cache.
    """

    def __init__(self) -> None:
        self.graphs, self._flops = 0, 0
        self._breaks_before = _graph_breaks()

    def __call__(self, graph: Graph) -> None:
        """Read a graph after Inductor's last changes to it."""
        self.graphs += 1
        self._flops += sum(_operations(node) for node in graph.nodes if node.op == "call_function")

    def uuid(self) -> str:
        """Return the same for all, so that programs can be found in the cache again."""
        return "partitioned-linear-products-seen"

    @property
    def flops(self) -> int | None:
        """Operations of all products; None if no graph was seen, or if a part of the function was not compiled."""
        return self._flops if self.graphs and _graph_breaks() == self._breaks_before else None


@contextmanager
def products_seen() -> Iterator[ProductsSeen]:
    """Count the products of everything that is compiled inside the block, its backward passes included."""
    seen = ProductsSeen()
    with inductor_config.patch(post_grad_custom_post_pass=seen):
        yield seen


def _graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def _operations(node: Node) -> int:
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is not None:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), _value)
        return int(formula(*args, **kwargs, out_val=_value(node)))
    if node.target is _aten.mul.Tensor and _is_product(node):
        return 2 * _value(node).numel()
    return 0


def _is_product(node: Node) -> bool:
    """Return True if an elementwise multiplication stands for a product with an inner or an outer size of one.

    It is one whose terms are summed, or whose factors are repeated; a mask has the size of what it masks.
    """
    factors = [_value(factor) for factor in node.args if isinstance(factor, Node)]
    if len(factors) != 2 or not all(isinstance(factor, torch.Tensor) for factor in factors):
        return False
    is_outer = any(factor.numel() < _value(node).numel() for factor in factors)
    return is_outer or any(user.target in _SUMS for user in node.users)


def _value(node: Node) -> Any:
    """Return the tensor without data that stands for a node's result."""
    return node.meta["val"]
