"""Members of a rounding-noise ensemble: their noise, and how they run together.

The first members run one after the other, under a dispatch mode, which costs far more than the numbers of a small
model. One of them is recorded: which operation ran, on which tensors, with which errors. The others run the record all
at once, mapped over their noise. What cannot be mapped (a branch that Python takes by a number, an operation without a
batching rule that writes in place) and what is large runs one member after the other.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from parity_tests.pair.calibration import BATCH_BYTES, Member
from parity_tests.pair.side import CANNOT_RUN

INEXACT = (torch.float64, torch.complex128)
_POOL_BITS = 16


@functools.cache
def _pool(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0xD1CE)
    pool = torch.randn(1 << _POOL_BITS, dtype=torch.float64, generator=generator)
    return ((pool - pool.mean()) / pool.std()).to(device)


_MASK = (1 << 64) - 1
_MULTIPLIER, _INCREMENT = 0xD1342543DE82EF95, 0x2545F4914F6CDD1D


def _signed(number: int) -> int:
    """Return the number that torch's int64 reads from the same 64 bits."""
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number


def first_state(member: int) -> int:
    """Return the state from which a member's noise starts."""
    return _signed((2 * member + 1) * 0x9E3779B97F4A7C15)


class Noise:
    """Standard normal numbers, looked up by the bits of the value that is rounded.

    Args:
        device: of the values.
        state: from `first_state`; a tensor inside `vmap`, over members.
        amplitude: likewise.
    """

    def __init__(self, device: torch.device, state: Any, amplitude: Any) -> None:
        self._pool, self._state, self._amplitude = _pool(device), state, amplitude

    def perturb(self, value: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """Let a value err by this standard deviation."""
        # Multiplicative hashing: the highest bits of value * odd number depend on all bits of the value. A new odd
        # number for each operation; |value|, because rounding to nearest is odd.
        state = self._state * _signed(_MULTIPLIER) + _signed(_INCREMENT)
        self._state = state if isinstance(state, torch.Tensor) else _signed(state)
        if value.is_complex():
            # Both parts err, by the deviation that belongs to the modulus.
            pairs = torch.view_as_real(value.resolve_conj())
            return torch.view_as_complex(self._moved(pairs, deviation.unsqueeze(-1)).contiguous())
        return self._moved(value, deviation)

    def _moved(self, value: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        bits = value.abs().contiguous().view(torch.int64) * (self._state | 1)
        xi = self._pool[(bits >> (64 - _POOL_BITS)) & ((1 << _POOL_BITS) - 1)]
        # Infinities and NaN are not rounded: -inf is what a mask puts in the place of a score.
        return torch.where(torch.isfinite(value), value + self._amplitude * deviation * xi, value)


# The standard deviations of an operation's results, from its arguments and results.
Deviations = Callable[[tuple, dict, Any], list[torch.Tensor]]


def perform(func: Any, args: tuple, kwargs: dict, noise: Noise | None, deviations: Deviations | None) -> Any:
    """Run one operation on float64 arguments and let its results err."""
    result = mapped(func)(*args, **kwargs)
    if noise is None or deviations is None:
        return result
    left = iter(deviations(args, kwargs, result))
    in_place = is_in_place(func)

    def each(leaf: Any) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.dtype in INEXACT):
            return leaf
        noisy = noise.perturb(leaf, next(left))
        return leaf.copy_(noisy) if in_place else noisy

    return each(result) if isinstance(result, torch.Tensor) else tree_map(each, result)


def name_of(func: Any) -> str:
    """Return an operation's name, without namespace and overload."""
    return func._schema.name.partition("::")[2]


def mapped(func: Any) -> Any:
    """Return what stands for an operation inside `vmap`, which does not know the pieces that others are taken into."""
    return func.impl_aten if getattr(func, "namespace", "") == "prims" else func


def is_in_place(func: Any) -> bool:
    """Tell whether an operation writes its results over its arguments."""
    return isinstance(func, torch._ops.OpOverload) and name_of(func).endswith("_")


@dataclass(frozen=True)
class _Slot:
    """A tensor of a record, by its number."""

    number: int


@dataclass
class _Step:
    func: Any
    args: tuple
    kwargs: dict
    deviations: Deviations | None
    results: list[int | None]
    spent: list[int] = field(default_factory=list)
    overwritten: bool = False  # later, in place


class Unmapped(Exception):
    """Say that a record cannot be run for several members at once."""


class Record:
    """The operations of one run, to be run again for other noise.

    Tensors are known by their place in memory, and held: autograd hands out copies of what it has saved.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._steps: list[_Step] = []
        self._numbers: dict[tuple, int] = {}
        self._held: list[torch.Tensor] = []
        self._given: dict[int, torch.Tensor] = {}  # tensors that no operation has made
        self._makers: dict[int, int] = {}  # steps by the storage that they have made
        self._given_storages: set[int] = set()
        self._rewritten: set[int] = set()  # given tensors that are written to
        self._bytes = 0
        self._refusal = ""

    def __call__(self, func: Any, args: tuple, kwargs: dict, deviations: Deviations | None, run: Callable) -> Any:
        """Run and record one operation."""
        if self._refusal:
            return run()
        read: Any = tree_map(self._read, (args, kwargs))
        self._before_writing(func, args)
        result = run()
        leaves = tree_leaves(result)
        if not all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves):
            self._refuse("Python gets to see a number, which may decide what runs next")
        if isinstance(func, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse("random numbers")
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for storage, tensor in zip(map(_storage, tensors), tensors, strict=True):
            if storage not in self._makers and storage not in self._given_storages:
                self._makers[storage] = len(self._steps)
                self._bytes += tensor.numel() * tensor.itemsize
        if self._bytes > BATCH_BYTES:
            self._refuse("more memory than several members shall take")
        if not self._refusal:
            numbers = [self._number(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
            self._steps.append(_Step(func, read[0], read[1], deviations, numbers))
        return result

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        for kept in (self._steps, self._numbers, self._held, self._given, self._makers):
            kept.clear()

    def _number(self, tensor: torch.Tensor) -> int:
        key = (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (*key, tensor.is_conj(), tensor.is_neg())
        if key not in self._numbers:
            self._numbers[key] = len(self._held)
            self._held.append(tensor)
        return self._numbers[key]

    def _read(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or self._refusal:
            return leaf
        known = len(self._held)
        number = self._number(leaf)
        if number == known:  # not met before
            if _storage(leaf) in self._makers:
                self._refuse("a view that no operation has made")
            else:
                self._given[number] = leaf
                self._given_storages.add(_storage(leaf))
        return _Slot(number)

    def _before_writing(self, func: Any, args: tuple) -> None:
        """Keep a given tensor as it is before it is written to."""
        if not isinstance(func, torch._ops.OpOverload):
            return
        declared = [argument.alias_info for argument in func._schema.arguments]
        written = [arg for arg, alias in zip(args, declared, strict=False) if alias is not None and alias.is_write]
        for tensor in tree_leaves(written):
            if self._refusal or not isinstance(tensor, torch.Tensor):
                continue
            if name_of(func) in ("resize_", "set_"):
                self._refuse("a storage that changes")
            elif (maker := self._makers.get(_storage(tensor))) is not None:
                self._steps[maker].overwritten = True
            else:
                bases = [k for k in self._given if _storage(self._held[k]) == _storage(tensor)]
                if len(bases) != 1:
                    self._refuse("a given tensor that is written to by several names")
                elif bases[0] not in self._rewritten:
                    self._rewritten.add(bases[0])
                    self._given[bases[0]] = self._given[bases[0]].clone()

    def replayed(self, results: Mapping[str, np.ndarray], members: Sequence[Member]) -> Iterator[dict[str, np.ndarray]]:
        """Yield what the operations give for other members.

        Args:
            results: of the recorded run.
            members: to run.

        Raises:
            Unmapped: if the record cannot be run so.
        """
        outputs = self._outputs(results)
        batch = BATCH_BYTES // max(1, self._prepare(set(outputs.values())))
        if self._refusal or batch < 2:
            raise Unmapped(self._refusal or "more memory than several members shall take")
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            with _as_recorded():
                states = torch.tensor([first_state(member.number) for member in chosen])
                amplitudes = torch.tensor([member.amplitude for member in chosen])
                found = torch.vmap(functools.partial(self._run, list(outputs.values())))(states, amplitudes)
            arrays = [tensor.resolve_conj().resolve_neg().numpy() for tensor in found]
            for k in range(len(chosen)):
                yield {name: array[k] for name, array in zip(outputs, arrays, strict=True)}

    def _outputs(self, results: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Return the numbers of results, arrays that share the memory of tensors."""
        by_place = {
            (tensor.data_ptr(), tuple(tensor.shape), tuple(s * tensor.itemsize for s in tensor.stride())): number
            for number, tensor in enumerate(self._held)
            if tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        }
        places = {name: (array.ctypes.data, array.shape, array.strides) for name, array in results.items()}
        if any(place not in by_place for place in places.values()):
            self._refuse(self._refusal or "a result that no operation has made")
            return {}
        return {name: by_place[place] for name, place in places.items()}

    def _prepare(self, needed: set[int]) -> int:
        """Find out when each tensor is needed no more; return the most memory that they take at one time."""
        for step in reversed(self._steps):
            touched = {leaf.number for leaf in tree_leaves((step.args, step.kwargs)) if isinstance(leaf, _Slot)}
            touched |= {number for number in step.results if number is not None}
            step.spent = sorted(touched - needed)
            needed = needed | touched
        sizes = [tensor.numel() * tensor.itemsize for tensor in self._held]
        now = most = 0
        for step in self._steps:
            now += sum(sizes[number] for number in step.results if number is not None)
            most = max(most, now)
            now -= sum(sizes[number] for number in step.spent if number not in self._given)
        self._held.clear()
        return most

    def _run(self, outputs: Sequence[int], state: torch.Tensor, amplitude: torch.Tensor) -> list[torch.Tensor]:
        """Run all operations inside `vmap`."""
        noise, always = Noise(torch.device("cpu"), state, amplitude), amplitude == amplitude
        values = dict(self._given)

        def own(tensor: torch.Tensor) -> torch.Tensor:
            """Return a copy for each member, into which it may write."""
            return torch.where(always, tensor, tensor)

        def read(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, _Slot) else leaf

        for number in self._rewritten:
            values[number] = own(values[number])
        for step in self._steps:
            args, kwargs = tree_map(read, (step.args, step.kwargs))
            leaves = tree_leaves(perform(step.func, args, kwargs, noise, step.deviations))
            for number, leaf in zip(step.results, leaves, strict=True):
                if number is not None:
                    values[number] = own(leaf) if step.overwritten else leaf
            for number in step.spent:
                del values[number]
        return [values[number] for number in outputs]


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    """Let new tensors be float64, and one thread do the work: many small operations keep others waiting only."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        # Operations without a batching rule run one after the other, which matters to nobody here.
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def run_members(
    run: Callable[[Member, Record | None], dict[str, np.ndarray]], members: Sequence[Member]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the results of each member in turn.

    Args:
        run: runs one member, and records it where there is a record.
        members: the first without noise, the second with it.
    """
    yield run(members[0], None)
    record = Record()
    first = run(members[1], record)
    yield first
    done = 2
    try:
        for found in record.replayed(first, members[2:]):
            done += 1
            yield found
    except (Unmapped, *CANNOT_RUN):
        pass  # the same numbers come more slowly
    del record, first  # of a large model, as large as all that it computes
    for member in members[done:]:
        yield run(member, None)
