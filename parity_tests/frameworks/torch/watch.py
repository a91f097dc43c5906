"""Modes that watch a torch run: which branches its operations take, and which operations work in a wide format."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from parity_tests.frameworks.torch.modes import DispatchMode
from parity_tests.frameworks.torch.operations import EXACT, names
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair import calls
from parity_tests.pair.side import Branch, Branches, is_bound, softplus_parts
from torch_impl import parameters

# An operation as text, the operand whose extent is told, and its branches: what takes them, a mask, where they begin.
Found = tuple[str, Any, list[tuple]]
_LIBRARY = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_COPIES = parameters.__file__  # of arrays, to torch and back
# Of torch, what stands between a line of Python and the mode.
_MACHINERY = tuple(
    f"{_LIBRARY}/{name}"
    for name in ("_dynamo/", "_compile.py", "_ops.py", "_tensor.py", "overrides.py", "utils/_python_dispatch.py")
)
_CALLERS = (str(Path(__file__).with_name("pair.py")), calls.__file__)
# Their results do not depend on the values of their operands.
_CREATORS = names("""
zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty
""")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CONSUMERS = names("where masked_fill any all")  # of a comparison that they, or Python, take care of
# The argument that decides which branch is taken; elsewhere all of them do.
_DECIDING = {"where": 0, "masked_fill": 1, "index": 1, "index_put": 1}
_ONE_KINK = names("leaky_relu elu celu selu _prelu_kernel rrelu_with_noise")


def _frames() -> Iterator[FrameType]:
    """Yield the frames of torch and of the user, from the operation outwards to this package's call of the module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path in _CALLERS:
            return
        if not path.startswith((_HERE, _COPIES, *_MACHINERY)):
            yield frame
        frame = frame.f_back


def user_line() -> str:
    """Return the innermost line outside torch, as `port.py:12`; empty if the module is torch's own."""
    for frame in _frames():
        path = frame.f_code.co_filename
        if not path.startswith((_LIBRARY, "<")):
            return f"{Path(path).name}:{frame.f_lineno}"
    return ""


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def _bare(func: Any) -> str:
    """Return the operation's name, in place or not."""
    name = func._schema.name.partition("::")[2]
    return name if name.startswith("__") else name.removesuffix("_")


class BranchWatch(DispatchMode):
    """Record the branches of what depends on parameters or inputs; what is constant no draw could change."""

    def __init__(self, modules: Mapping[int, str]) -> None:
        super().__init__()
        self.branches = Branches()
        self._modules, self._path = modules, [""]
        # Storages by address, kept alive so that no other one takes the address; views and in-place results share one.
        self._moving: dict[int, Any] = {}
        self._compared: dict[int, tuple[Any, tuple]] = {}

    @contextlib.contextmanager
    def of(self, moving: Sequence[torch.Tensor]) -> Iterator[None]:
        """Watch what is done with these tensors."""
        for tensor in moving:
            self._move(tensor)
        before = register_module_forward_pre_hook(
            lambda module, _: self._path.append(self._modules.get(id(module), self._path[-1]))
        )

        def leave(*_: Any) -> None:
            self._path.pop()

        after = register_module_forward_hook(leave, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()
            self._moving.clear()
            self._compared.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Look at one operation before it runs."""
        node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
        if node is not None and not isinstance(node, BackwardCFunction):
            return func(*args, **(kwargs or {}))  # a derivative of torch's own
        kwargs = dict(kwargs or {})
        name, moving = _bare(func), any(map(self._moves, _tensors(args, kwargs)))
        decides = _tensors(args[_DECIDING[name]]) if name in _DECIDING else _tensors(args, kwargs)
        if name in _CONSUMERS:
            for tensor in _tensors(args):
                if known := self._compared.get(_address(tensor)):
                    self.branches.forget(known[1])
        # The turns of a loop are one call: what one of them reaches is reached.
        call = (self._path[-1], *((frame.f_code, frame.f_lasti) for frame in _frames()))
        if any(map(self._moves, decides)) and (found := self._branches(name, func, args, kwargs)):
            operation, operand, conditions = found
            low, high = _extent(operand)
            taken = [Branch(what, bool(mask.any()), *where) for what, mask, *where in conditions]
            self.branches.see(call, operation, self._place(), taken, low, high)
        result = func(*args, **kwargs)
        if moving and name not in _CREATORS:
            for tensor in _tensors(result):
                self._move(tensor)
        if name in _COMPARISONS and not _checks():
            self._compared[_address(result)] = result, call
            if moving:
                text = f"comparison {_COMPARISONS[name]} {_text(args[1])}"
                branches = [Branch("one that is true", bool(result.any())), Branch("one that is not", not result.all())]
                self.branches.see(call, text, self._place(), branches, *_extent(args[0]))
        return result

    def _place(self) -> str:
        path, line = self._path[-1], user_line()
        return f"{path} ({line})" if path and line else path or line

    def _move(self, tensor: torch.Tensor) -> None:
        self._moving[_address(tensor)] = _storage(tensor)

    def _moves(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._moving

    def _branches(self, name: str, func: Any, args: Sequence[Any], kwargs: dict) -> Found | None:
        """Return the operation as text, the operand whose range is told, and its branches' names, masks, bounds."""
        if name in ("max", "min") and func._overloadname == "other":
            name = f"{name}imum"
        if name in ("maximum", "minimum", "fmax", "fmin"):
            return self._extremum(name, *args[:2])
        if name == "mul" and not all(map(self._moves, _tensors(args))):
            return None  # by a number, or a mask that no draw could change
        known = _TABLE.get(name)
        return known(name, args, kwargs) if known and args else None

    def _extremum(self, name: str, first: torch.Tensor, second: torch.Tensor) -> Found | None:
        for operand, limit in ((first, second), (second, first)):
            if limit.numel() == 1 and not self._moves(limit):
                bound = float(limit)
                return (f"{name}(x, {bound:.6g})", operand, _beside(operand, bound)) if is_bound(bound) else None
        conditions = [("a first operand above the second", first > second), ("one below it", first < second)]
        return f"{name} of two arrays", None, conditions


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # no storage of its own: sparse, nested
        return tensor


def _address(tensor: torch.Tensor) -> int:
    storage = _storage(tensor)
    return storage._cdata if isinstance(storage, torch.UntypedStorage) else id(storage)


def _checks() -> bool:
    """Tell whether torch's own Python code asks, as in the validation of arguments."""
    frame = next(_frames(), None)
    return frame is not None and frame.f_code.co_filename.startswith(_LIBRARY)


def _extent(operand: Any) -> tuple[float, float]:
    if not isinstance(operand, torch.Tensor) or operand.dtype == torch.bool or operand.is_complex():
        return math.nan, math.nan
    finite = operand[torch.isfinite(operand)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (math.nan, math.nan)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{float(value):.6g}" if value.numel() == 1 and not value.is_complex() else "an array"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _beside(x: torch.Tensor, bound: float) -> list[tuple]:
    return [
        (f"a value below {bound:.6g}", x < bound, bound, False),
        (f"a value above {bound:.6g}", x > bound, bound, True),
    ]


def _signs(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    x = args[0]
    return None if x.is_complex() else (name, x, [("a negative value", x < 0), ("a positive value", x > 0)])


def _negative(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    x = args[0]
    return None if x.is_complex() else (name, x, [("a negative value", x < 0)])


def _between(x: torch.Tensor, low: Any, high: Any) -> list[tuple]:
    """Return branches below, between and above the limits that there are; a limit may be an array."""
    inside, conditions = torch.ones_like(x, dtype=torch.bool), []
    for limit, word, above in ((low, "below", False), (high, "above", True)):
        number = None if isinstance(limit, torch.Tensor) and limit.numel() != 1 else limit
        number = None if number is None else float(number)
        if limit is None or (number is not None and not is_bound(number)):
            continue
        mask = x > limit if above else x < limit
        inside = inside & ~mask
        text = "its limit" if number is None else f"{number:.6g}"
        conditions.append((f"a value {word} {text}", mask, number, above))
    return [*conditions, ("a value between its limits", inside)] if conditions else []


def _clamp(name: str, args: Sequence[Any], kwargs: dict) -> Found:
    defaults = (-1.0, 1.0) if name == "hardtanh" else (None, None)
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    low, high = (_argument(args, kwargs, k + 1, key, defaults[k]) for k, key in enumerate(keys))
    if name == "clamp_max":
        low, high = None, low if low is not None else high
    shown = [f"{word}={_text(limit)}" for word, limit in (("min", low), ("max", high)) if limit is not None]
    return f"{name}({', '.join(shown)})", args[0], _between(args[0], low, high)


def _fixed(low: float, high: float) -> Callable[[str, Sequence[Any], dict], Found]:
    return lambda name, args, kwargs: (name, args[0], _between(args[0], low, high))


def _argument(args: Sequence[Any], kwargs: dict, position: int, key: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(key, default)


def _shrink(name: str, args: Sequence[Any], kwargs: dict) -> Found:
    limit = float(_argument(args, kwargs, 1, "lambd", 0.5))
    return f"{name}({limit:.6g})", args[0], _between(args[0], -limit, limit)


def _threshold(name: str, args: Sequence[Any], kwargs: dict) -> Found:
    limit = float(_argument(args, kwargs, 1, "threshold", 0.0))
    return f"{name}({limit:.6g})", args[0], _beside(args[0], limit)


def _softplus(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    beta, threshold = (float(_argument(args, kwargs, *a)) for a in ((1, "beta", 1.0), (2, "threshold", 20.0)))
    limit = softplus_parts(beta, threshold)
    return None if limit is None else (f"{name}(threshold={threshold:.6g})", args[0], _beside(args[0], limit))


def _condition(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    mask = args[0] if name == "where" else args[1]
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return None
    return name, None, [("a condition that is true", mask), ("a condition that is false", ~mask)]


def _masked_index(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    masks = [index for index in args[1] if isinstance(index, torch.Tensor) and index.dtype == torch.bool]
    if not masks:
        return None
    return f"{name} with a mask", None, [("a mask that is true", masks[0]), ("a mask that is false", ~masks[0])]


def _loss(name: str, args: Sequence[Any], kwargs: dict) -> Found:
    key = "delta" if name == "huber_loss" else "beta"
    limit = float(_argument(args, kwargs, 3, key, 1.0))
    error = (args[0] - args[1]).abs()
    return f"{name}({key}={limit:.6g})", error, _beside(error, limit) if limit else []


def _round(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    x = args[0] * 10.0 ** kwargs.get("decimals", 0)
    return (name, args[0], [("a tie (a number and a half)", x - x.floor() == 0.5)]) if x.is_floating_point() else None


def _division(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    if name == "div" and kwargs.get("rounding_mode") is None:
        return None
    x, y = args[0], torch.as_tensor(args[1])
    return name, x, [("operands of different signs", (x != 0) & (x.sign() != y.sign()))]


def _product(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    """Widths and heights of intersections, each positive somewhere and never both: what is done with their product."""
    factors = args[:2] if name == "mul" else args[:1]
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.any()) for x in factors):
        return None  # zeros that something starts from
    result = torch.mul(*factors) if name == "mul" else args[0].prod(*args[1:], **kwargs)
    return name, None, [("a product other than zero", result != 0)] if result.numel() else []


def _index(name: str, args: Sequence[Any], kwargs: dict) -> Found | None:
    of_rows = (2, "padding_idx", -1, "this index")
    position, key, default, what = of_rows if name == "embedding" else (4, "ignore_index", -100, "this target")
    index = _argument(args, kwargs, position, key, default)  # the default is what no user asked for
    return None if index in (None, default) else (f"{name}({key}={index})", None, [(what, args[1] == index)])


def _not_a_number(name: str, args: Sequence[Any], kwargs: dict) -> Found:
    return name, args[0], [("a value that is not finite", ~torch.isfinite(args[0]))]


_TABLE: dict[str, Callable[[str, Sequence[Any], dict], Found | None]] = {
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    **dict.fromkeys(("relu", "sign", "sgn", *_ONE_KINK), _signs),
    **dict.fromkeys(("abs", "floor", "trunc"), _negative),
    **dict.fromkeys(("hardswish", "hardsigmoid"), _fixed(-3.0, 3.0)),
    **dict.fromkeys(("hardshrink", "softshrink"), _shrink),
    "threshold": _threshold,
    "softplus": _softplus,
    **dict.fromkeys(("where", "masked_fill"), _condition),
    **dict.fromkeys(("index_put", "index"), _masked_index),
    **dict.fromkeys(("huber_loss", "smooth_l1_loss"), _loss),
    "round": _round,
    **dict.fromkeys(("fmod", "remainder", "floor_divide", "div"), _division),
    **dict.fromkeys(("mul", "prod"), _product),
    **dict.fromkeys(("embedding", "nll_loss_forward", "nll_loss2d_forward"), _index),
    "nan_to_num": _not_a_number,
}


class FormatWatch(DispatchMode):
    """Record operations on wider formats than `dtype`, that of all arrays, or on the other one of its width.

    Copies, choices and casts do not count.
    """

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype, self._size = dtype, numpy_dtype(dtype).itemsize
        self._found: dict[tuple[str, str], dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation and looks at its formats."""
        result = func(*args, **(kwargs or {}))
        name = _bare(func)
        if name in EXACT or any(ret.alias_info and not ret.alias_info.is_write for ret in func._schema.returns):
            return result
        # Beside an array, a single number leaves the format as it is; further results are for the gradient's sake.
        wide = [t for t in _tensors(result)[:1] if self._is_wide(t)]
        wide += [t for t in _tensors(args) if t.ndim and self._is_wide(t)]
        if wide and not _of_a_norm():
            place = user_line()
            self._found.setdefault((name, str(wide[0].dtype).removeprefix("torch.")), {})[place] = None
        return result

    def _is_wide(self, tensor: torch.Tensor) -> bool:
        other = str(tensor.dtype) != f"torch.{self._dtype}"
        return tensor.is_floating_point() and tensor.itemsize >= self._size and other

    def found(self) -> tuple[str, ...]:
        """Return operations with their formats and lines."""
        return tuple(
            f"{name} in {dtype}" + (f" ({', '.join(filter(None, places))})" if any(places) else "")
            for (name, dtype), places in self._found.items()
        )


def _of_a_norm() -> bool:
    """Tell whether torch's own code for a norm asks: its statistics are meant to be wider."""
    for frame in _frames():
        path = frame.f_code.co_filename
        if not path.startswith(_LIBRARY):
            return False
        if "norm" in Path(path).name or "norm" in frame.f_code.co_name:
            return True
    return False


class FirstUses(DispatchMode):
    """Record the order in which operations use parameters; a view of one is no use of it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {_address(tensor): name for name, tensor in tensors.items()}
        self.order: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note what one operation uses."""
        if not func.is_view:
            found = (self._names.get(_address(tensor)) for tensor in _tensors(args, kwargs or {}))
            self.order |= dict.fromkeys(filter(None, found))
        return func(*args, **(kwargs or {}))
