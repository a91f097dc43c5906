"""The float64 truth of a torch function, its rounded constants moved, and variants of it that explain a mismatch."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from parity_tests.frameworks.torch.modes import to_numpy, to_torch
from parity_tests.frameworks.torch.noise import DoublePrecision
from parity_tests.judge.dtypes import format_name, widened
from parity_tests.pair.calibration import moved_constant, was_rounded
from parity_tests.pair.side import Variant

_RMS_NORMS = (torch.rms_norm, torch.nn.functional.rms_norm)
_EPSILON_POSITION = {
    "native_layer_norm": 4,
    "_fused_rms_norm": 3,
    "native_group_norm": 7,
    "native_batch_norm": 7,
    "_native_batch_norm_legit": 7,
    "_native_batch_norm_legit_no_training": 6,
}
_EPSILONS = (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
_LARGEST_EPSILON = 1e-2  # a constant that is added and is at most this can be meant as an epsilon
_OTHER_GELU = {"none": "tanh", "tanh": "none"}
_GELU_NAME = {"none": "the exact gelu (erf)", "tanh": "the tanh approximation of gelu"}
Rewrite = Callable[[str, tuple, dict], tuple[tuple, dict]]


class _Limits(TorchFunctionMode):
    """Give `rms_norm` the epsilon that it would choose for the leg's dtype: of float32 at least."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _RMS_NORMS and len(args) < 4 and kwargs.get("eps") is None:
            kwargs["eps"] = self._epsilon
        elif func in _RMS_NORMS and len(args) > 3 and args[3] is None:
            args = (*args[:3], self._epsilon, *args[4:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def double_default() -> Iterator[None]:
    """Let constants that a module creates on the way (`torch.tensor(0.1)`) be float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def machine_limits(leg: torch.dtype) -> Iterator[None]:
    """Let modules that ask for the limits of float64 (`torch.finfo(x.dtype).min`) see those of the leg's dtype.

    The truth is the leg's function without roundings, and an epsilon that follows the dtype belongs to the function.
    """
    if not leg.is_floating_point or leg == torch.float64:
        yield
        return
    original = torch.finfo

    def of_the_leg(*dtype: torch.dtype) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_wide = not caller.startswith("torch._") and (dtype or (torch.get_default_dtype(),))[0] == torch.float64
        return original(leg) if is_wide else original(*dtype)

    torch.finfo = of_the_leg  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _Limits(original(torch.float32).eps):
            yield
    finally:
        torch.finfo = original


class MovedConstants(DoublePrecision):
    """Evaluate in float64 with rounded constants moved, by `moved_constant`.

    Args:
        member: number of the run; 0 moves nothing.
        computed: whether what is computed from constants alone errs too, as in float32.
        constants: tensors that are constants; what the code has captured is one as well.
        device: of the tensors.
    """

    def __init__(
        self, member: int, computed: bool, constants: Sequence[torch.Tensor], device: torch.device | None = None
    ) -> None:
        super().__init__("float32", member, float(computed and member > 0), device, measure=False)
        self._member = member
        # By storage, which views share; held, so that no other tensor gets the same address.
        self._constants = {_storage(tensor): tensor for tensor in constants}
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.stored: set[str] = set()

    def _captured(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._moved:
            array, name = widened(to_numpy(tensor)), format_name(str(tensor.dtype).removeprefix("torch."))
            if was_rounded(array, name):
                self.stored.add(f"a tensor of {name} and shape {tuple(tensor.shape)}")
            moved = to_torch(moved_constant(array, self._member, name), self._device)
            self._moved[id(tensor)] = tensor, moved
            self._constants[_storage(moved)] = moved
        return self._moved[id(tensor)][1]

    def _run(self, name: str, func: Any, args: tuple, kwargs: dict, noisy: bool) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        constant = all(_storage(tensor) in self._constants for tensor in tensors)
        result = super()._run(name, func, args, kwargs, noisy and constant)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and constant:
                self._constants[_storage(leaf)] = leaf
            elif isinstance(leaf, torch.Tensor):
                self._constants.pop(_storage(leaf), None)  # written to in place
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder:
    """Note the epsilons and gelus that a run used, and rewrites them for a variant."""

    def __init__(self) -> None:
        """Start empty."""
        self._epsilons: set[float] = set()
        self._gelus: set[str] = set()

    def rewrite(self, variant: str) -> Rewrite:
        """Return the rewriting of operations that `variant` names, or one that only records."""
        kind, _, value = variant.partition("=")

        def apply(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            position = _EPSILON_POSITION.get(name)
            if position is None and name == "add" and len(args) == 2 and _may_be_epsilon(args[1]):
                position = 1
            if position is not None:
                if not variant:
                    self._epsilons.add(args[position])
                if kind == "epsilon":
                    args = (*args[:position], float(value), *args[position + 1 :])
            if name == "gelu":
                approximate = kwargs.get("approximate", "none")
                if not variant:
                    self._gelus.add(approximate)
                if kind == "gelu":
                    kwargs = kwargs | {"approximate": _OTHER_GELU[approximate]}
            return args, kwargs

        return apply

    def variants(self) -> tuple[Variant, ...]:
        """Return everything that can be tried after a recorded run."""
        used = ", ".join(f"{value:g}" for value in sorted(self._epsilons))
        found = [
            Variant(f"epsilon={value!r}", f"epsilon: the torch side uses {used}, the flax side behaves like {value:g}")
            for value in _EPSILONS
            if self._epsilons and value not in self._epsilons
        ]
        if len(self._gelus) == 1:
            (approximate,) = self._gelus
            found.append(
                Variant(
                    "gelu=other",
                    f"gelu: the torch side uses {_GELU_NAME[approximate]}, the flax side behaves like "
                    f"{_GELU_NAME[_OTHER_GELU[approximate]]}",
                )
            )
        return tuple(found)


def _may_be_epsilon(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= _LARGEST_EPSILON
