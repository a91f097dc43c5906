"""Copy arrays to PyTorch and back bit for bit, let modules hold others, and run calls in each of its modes.

The mode `sharded`, which takes processes, has a file of its own.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parity_tests.judge.inputs import Inputs, Layout
from parity_tests.judge.subjects import EQUAL, MODES, members_of, split_members
from torch_impl.parameters import to_array, to_tensor
from torch_impl.registry import IMPLEMENTATIONS, UNEQUAL_IMPLEMENTATIONS

to_numpy = to_array
Function = Callable[..., torch.Tensor]
Prepare = Callable[[Inputs, torch.device], tuple[Function, list[torch.Tensor]]]
"""From inputs to the function (x, *leaves) -> y and its parameters as leaves."""


def resolve_device(device: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device.

    Raises:
        ValueError: if the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device visible to torch, got none; use --device cpu or auto.")
    return torch.device(device)


class DispatchMode(TorchDispatchMode):
    """A mode that spares `import torch._dynamo`, of seconds, where nothing is compiled.

    PyTorch imports it to keep compilation away from what modes do; there is none to keep away before somebody has.
    """

    _kept = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Self:
        """Become the innermost mode."""
        kind = type(self)
        if "torch._dynamo" in sys.modules and not vars(kind).get("_kept"):
            kind._kept = True
            setattr(kind, "__torch_dispatch__", torch.compiler.disable(kind.__torch_dispatch__))  # noqa: B010
        return super().__enter__()


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a tensor, bit for bit."""
    return to_tensor(np.array(array, order="C", copy=True), device)


def on_host(array: np.ndarray) -> torch.Tensor:
    """Copy an array to a tensor on the CPU, bit for bit."""
    return to_torch(array, torch.device("cpu"))


def lay_out(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and x.ndim > 1:
        # The rows in between are NaN: reading past a stride shows.
        wide = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 0] = x
        return wide[:, 0]
    return x


def _compiled(prepare: Prepare) -> Prepare:
    def ready(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        function, leaves = prepare(inputs, device)
        # Past its limit of recompilations torch.compile quietly runs eagerly; a fresh start cannot reach it.
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False), leaves

    return ready


def _mapped(prepare: Prepare) -> Prepare:
    def ready(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        members = [prepare(member, device) for member in split_members(inputs)]
        function = members[0][0]
        stacks = zip(*(leaves for _, leaves in members), strict=True)

        def ensemble(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            own = x.unflatten(-2, (len(members), x.shape[-2] // len(members))).movedim(-3, 0)
            with warnings.catch_warnings():
                # Operations without a rule of their own are mapped by a loop: slower, with the same result.
                warnings.filterwarnings("ignore", ".*performance drop because we have not yet implemented", UserWarning)
                y = torch.func.vmap(function)(own, *parameters)
            return y.movedim(0, -3).flatten(-3, -2)

        return ensemble, [torch.stack([leaf.detach() for leaf in stack]).requires_grad_() for stack in stacks]

    return ready


def _autocast(prepare: Prepare) -> Prepare:
    def ready(inputs: Inputs, device: torch.device) -> tuple[Function, list[torch.Tensor]]:
        function, leaves = prepare(inputs, device)

        def cast(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return function(x, *parameters)

        return cast, leaves

    return ready


WRAPPERS: Mapping[str, Callable[[Prepare], Prepare]] = MappingProxyType(
    {"eager": lambda prepare: prepare, "compile": _compiled, "vmap": _mapped, "autocast": _autocast}
)


def mode_reason(mode: str, table_name: str | None, dtype: str, sizes: str = EQUAL) -> str | None:
    """Return one sentence if an implementation cannot run in this mode and dtype, else None.

    A layer class has no name in the table.
    """
    if dtype not in MODES[mode].dtypes:
        return f"mode {mode}: expected {', '.join(MODES[mode].dtypes)}, got {dtype}; no other program runs there."
    table = IMPLEMENTATIONS if sizes == EQUAL else UNEQUAL_IMPLEMENTATIONS
    if mode == "compile" and table_name is not None and dtype not in table[table_name].traced_dtypes:
        return f"mode compile: PyTorch cannot trace {table_name} in {dtype} without data."
    return None


def canonical_gradients(
    gradients: Mapping[str, np.ndarray], inputs: Inputs, dense: bool, mode: str
) -> dict[str, np.ndarray]:
    """Bring parameter gradients to `(n, i, o)` and `(n, o)`, whatever the layer and the mode made of them.

    `dense` means the masked layer's `(n*o, n*i)` weight, of which the diagonal blocks count. A mapped ensemble stacks
    the leaves of its members. The packed ones of unequal sizes are as they should be.
    """
    if inputs.sizes is not None:
        return dict(gradients)
    n, i, o = inputs.weight.shape
    found = dict(gradients)
    if dense:
        members = members_of(n) if mode == "vmap" else 1
        size = n // members
        blocks = found["dweight"].reshape(members, size, o, size, i)
        # Picking the same partition on both axes brings that axis to the front.
        picked = blocks[:, np.arange(size), :, np.arange(size), :].swapaxes(0, 1)
        found["dweight"] = picked.reshape(n, o, i).swapaxes(1, 2)
    else:
        found["dweight"] = found["dweight"].reshape(n, i, o)
    if "dbias" in found:
        found["dbias"] = found["dbias"].reshape(n, o)
    return found


@contextlib.contextmanager
def holding(module: torch.jit.ScriptModule, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let a scripted or traced module hold other tensors; what a call puts in their places is in the dict after it."""
    modules = dict(module.named_modules())
    places = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in tensors}
    before = {name: getattr(*place) for name, place in places.items()}
    try:
        for name, (owner, leaf) in places.items():
            setattr(owner, leaf, tensors[name])
        yield
        tensors.update({name: getattr(*place) for name, place in places.items()})
    finally:
        for name, (owner, leaf) in places.items():
            setattr(owner, leaf, before[name])


class Held(torch.nn.Module):
    """Do some work inside a `functional_call`: a backward pass may run a module again (checkpointing)."""

    def __init__(self, module: torch.nn.Module, work: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self._work = module, work

    def forward(self) -> Any:
        """Do it."""
        return self._work()


def registered_children(tree: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a class that is registered with torch, by number."""
    if isinstance(tree, torch.Tensor):
        return None
    children = tree_leaves(tree, is_leaf=lambda node: node is not tree)
    return None if len(children) == 1 and children[0] is tree else list(enumerate(children))
