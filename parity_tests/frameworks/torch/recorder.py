"""Record a torch run in float64: its operations with their modules and lines, its values, and what was changed in it.

Gradients are recorded by the same means: an operation of the backward pass belongs to the module of the operation that
it differentiates.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from parity_tests.frameworks.torch.alternatives import offers
from parity_tests.frameworks.torch.modes import to_numpy, to_torch
from parity_tests.frameworks.torch.noise import DoublePrecision
from parity_tests.frameworks.torch.norm_alternatives import NORMS, again, norms_of, put
from parity_tests.frameworks.torch.watch import user_line
from parity_tests.judge.dtypes import is_inexact, widened
from parity_tests.pair.side import Arrays
from parity_tests.pair.trace import (
    ARGUMENT,
    CONSTANT,
    LARGEST,
    MEMBERS,
    MOST_ELEMENTS,
    REVERSED,
    TIMES,
    Change,
    Step,
    Trace,
    limits,
)

Run = Callable[[Callable[..., DoublePrecision]], dict[str, np.ndarray]]


def fingerprint(tensor: torch.Tensor) -> list[float]:
    """Return the features of `trace` of a tensor of real or complex numbers."""
    v = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)
    usable = v.abs() < LARGEST  # NaN is not
    v = v if bool(usable.all()) else v[usable]
    modulus, square = v.abs(), v * v
    sums = v.sum(), modulus.sum(), square.sum(), (square * modulus).sum(), (square * v).sum()
    return torch.stack(sums).tolist()


class Recorder(DoublePrecision):
    """Take note of every operation that a model asks for, and replaces some.

    Args:
        modules: names by id.
        sources: fingerprints by name of what the run was given.
        changes: by number of the operation.
        wanted: numbers of the values to keep; None for all, as long as they are few.
        asked: numbers of the operations whose alternatives are told.
        member: number of the run; 0 has no noise.
        device: of the tensors.
    """

    def __init__(
        self,
        modules: Mapping[int, str],
        sources: Mapping[str, list[float]],
        changes: Mapping[int, Sequence[Change]],
        wanted: frozenset[int] | None,
        asked: frozenset[int] = frozenset(),
        member: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__("float32", member, float(member > 0), device, measure=False)
        self._modules, self._given, self._changes, self._wanted = modules, sources, changes, wanted
        self._asked, self._quiet = asked, member > 0
        self._path, self._depth, self._number = [""], 0, 0
        self._by_sequence: dict[int, tuple[str, str]] = {}
        # Values by place in memory: storages are kept alive so that no other one takes an address.
        self._live: dict[int, dict[tuple, int]] = {}
        self._pieces: dict[int, tuple[int, ...]] = {}
        self._storages: list[Any] = []
        self._norms: dict[int, tuple[str, tuple]] = {}
        self._kept = 0
        self.steps: list[Step] = []
        self.features: list[list[float]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.sources: dict[str, int] = {}
        self.arrays: dict[int, np.ndarray] = {}
        self.alternatives: list[tuple[int, str, str]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Follow the calls of modules."""
        before = register_module_forward_pre_hook(
            lambda module, _: self._path.append(self._modules.get(id(module), self._path[-1]))
        )

        def leave(*_: Any) -> None:
            self._path.pop()

        after = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._live.clear()
            self._storages.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, or what is to take its place."""
        if self._depth:
            return super().__torch_dispatch__(func, types, args, kwargs)
        given = _tensors(args, kwargs)
        read = [self._read(tensor) for tensor in given]
        reads = tuple(dict.fromkeys(read))
        # Reading what was written to through another view is a step of its own.
        number, self._number = len(self.steps), self._number + 1
        self._depth += 1
        for change in self._changes.get(number, ()):
            if change.alternative == ARGUMENT and change.value is not None:
                # An operation may read one value twice.
                positions = {k for k, value in enumerate(read) if value == reads[change.output]}
                args = _with_argument(args, positions, to_torch(change.value, self._device))
        try:
            offered = number in self._asked or any(change.alternative for change in self._changes.get(number, ()))
            held = _copied(func, *self._wide(func, args, dict(kwargs or {}))) if offered else ((), {})
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if offered:
                result = self._altered(number, func.name().partition("::")[2].partition(".")[0], *held, result)
            for change in self._changes.get(number, ()):
                if change.value is not None and change.alternative != ARGUMENT:
                    result = _replaced(result, change.output, to_torch(change.value, self._device))
        finally:
            self._depth -= 1
        written = _written(func, args)
        for tensor in written:
            self._overwrite(tensor)
        made = [leaf for leaf in _tensors(result) if leaf.dtype in (torch.float64, torch.complex128)]
        writes = tuple(self._write(leaf) for leaf in made)
        self.steps.append(Step(func.name().partition("::")[2].partition(".")[0], *self._place(), reads, writes))
        return result

    def _altered(self, number: int, name: str, args: tuple, kwargs: dict, result: Any) -> Any:
        wanted = {change.alternative for change in self._changes.get(number, ())}
        for factor in (title.removeprefix(TIMES) for title in wanted if title.startswith(TIMES)):
            return _filled(result, result * float(factor))
        if REVERSED in wanted:
            return _filled(result, again(name, put(args, 0, args[0][::-1]), kwargs))
        if name in NORMS:
            self._norms[number] = name, args
        norms = {before: held for before, held in self._norms.items() if before in self._asked or self._changes}
        for title, sentence, run in (*offers(name, args, kwargs, result), *norms_of(norms, name, result)):
            if number in self._asked:
                self.alternatives.append((number, title, sentence))
            if title in wanted:
                found = run()
                return _filled(result, found)
        return result

    def _place(self) -> tuple[str, str]:
        if self._quiet:
            return "", ""
        node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
        if node is not None:
            return self._by_sequence.get(node._sequence_nr(), ("", ""))
        place = self._path[-1], user_line()
        # The node of the operation at hand has been made just before.
        last = torch.autograd._get_sequence_nr() - 1  # pyright: ignore[reportPrivateImportUsage]
        self._by_sequence[last] = place
        return place

    def _read(self, tensor: torch.Tensor) -> int:
        storage, key = _where(tensor)
        live = self._live.get(storage)
        if live is not None and key in live:
            return live[key]
        number = self._value(tensor)
        if storage in self._pieces:
            parts = (*self._pieces[storage], *(live or {}).values())
            self.steps.append(Step("read", *self._place(), tuple(dict.fromkeys(parts)), (number,)))
        else:
            # Of the values that were given only the first reading is that of the source.
            self.sources[self._source(number)] = number
            self._storages.append(tensor.untyped_storage())
            self._pieces[storage] = (number,)
        self._live.setdefault(storage, {})[key] = number
        return number

    def _source(self, number: int) -> str:
        found = np.array(self.features[number])
        for name, features in self._given.items():
            if name not in self.sources and np.allclose(found, features, rtol=1e-14, atol=0.0, equal_nan=True):
                return name
        return f"{CONSTANT}{number}"

    def _overwrite(self, tensor: torch.Tensor) -> None:
        storage, _ = _where(tensor)
        known = (*self._pieces.get(storage, ()), *self._live.pop(storage, {}).values())
        self._pieces[storage] = tuple(dict.fromkeys(known))
        self._storages.append(tensor.untyped_storage())

    def _write(self, tensor: torch.Tensor) -> int:
        storage, key = _where(tensor)
        number = self._value(tensor)
        if storage not in self._live and storage not in self._pieces:
            self._storages.append(tensor.untyped_storage())
        self._live.setdefault(storage, {})[key] = number
        self._pieces[storage] = (*self._pieces.get(storage, ()), number)
        return number

    def _value(self, tensor: torch.Tensor) -> int:
        number = len(self.features)
        self.features.append(fingerprint(tensor))
        self.shapes.append(tuple(tensor.shape))
        few = self._wanted is None and self._kept + tensor.numel() <= MOST_ELEMENTS
        if not self._quiet and (few or (self._wanted is not None and number in self._wanted)):
            self._kept += tensor.numel()
            self.arrays[number] = np.array(to_numpy(tensor))
        return number


def record(
    run: Run,
    modules: Mapping[int, str],
    given: Mapping[str, np.ndarray],
    changes: Sequence[Change],
    wanted: Sequence[int] | None,
    asked: Sequence[int],
    noisy: bool,
    device: torch.device,
) -> Trace:
    """Run a model, with noise a few times more, and return what happened.

    Args:
        run: takes a mode for the tensors it is given, and returns results.
        modules: names by id.
        given: parameters, inputs and cotangents by name.
        changes: to be made.
        wanted: numbers of the values to keep.
        asked: numbers of the operations whose alternatives are told.
        noisy: whether limits are wanted.
        device: of the tensors.
    """
    sources = {
        name: fingerprint(to_torch(widened(array), device)) for name, array in given.items() if is_inexact(array)
    }
    by_step: dict[int, list[Change]] = {}
    for change in changes:
        by_step.setdefault(change.step, []).append(change)
    kept = None if wanted is None else frozenset(wanted)

    def once(member: int) -> tuple[Recorder, dict[str, np.ndarray]]:
        recorder = Recorder(modules, sources, by_step, kept, frozenset(asked), member, device)
        with recorder.recording():
            return recorder, run(lambda tensors: recorder)

    recorder, outcome = once(0)
    members = [recorder.features]
    for member in range(1, MEMBERS + 1) if noisy else ():
        found = once(member)[0]
        # A model whose operations depend on its numbers has no common fingerprints.
        if [step.operation for step in found.steps] == [step.operation for step in recorder.steps]:
            members.append(found.features)
    sizes = np.array([int(np.prod(shape)) for shape in recorder.shapes])
    array = np.array(members).reshape(len(members), -1, 5)
    return Trace(
        tuple(recorder.steps),
        recorder.sources,
        _results(outcome, recorder, array[0], limits(array, sizes)),
        array[0],
        limits(array, sizes),
        tuple(recorder.shapes),
        tuple(recorder.arrays),
        tuple(recorder.arrays.values()),
        outcome,
        tuple(recorder.alternatives),
    )


def _results(outcome: Arrays, recorder: Recorder, features: np.ndarray, limit: np.ndarray) -> dict[str, int]:
    """Find results among the values by their fingerprints: the last one is what was returned."""
    found = {}
    for name, array in outcome.items():
        if not is_inexact(array):
            continue
        own = np.array(fingerprint(torch.as_tensor(array)))
        alike = (np.abs(features - own) <= limit).all(axis=1) if len(features) else np.zeros(0, bool)
        alike &= np.array([int(np.prod(shape)) == array.size for shape in recorder.shapes], bool)
        if alike.any():
            found[name] = int(np.flatnonzero(alike)[-1])
    return found


def _tensors(*trees: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]


def _with_argument(args: tuple, positions: set[int], value: torch.Tensor) -> tuple:
    count = itertools.count()

    def each(leaf: Any) -> Any:
        inexact = isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return value.reshape(leaf.shape) if inexact and next(count) in positions else leaf

    return tree_map(each, args)


def _where(tensor: torch.Tensor) -> tuple[int, tuple]:
    return tensor.untyped_storage()._cdata, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _written(func: Any, args: tuple) -> list[torch.Tensor]:
    declared = func._schema.arguments
    return [
        leaf for argument, arg in zip(declared, args, strict=False) if _is_written(argument) for leaf in _tensors(arg)
    ]


def _copied(func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keep the arguments as they are before an operation that works in place, or updates running statistics."""
    declared = func._schema.arguments
    written = {k for k, argument in enumerate(declared) if _is_written(argument)}
    everything = "batch_norm" in func.name()
    copies = [
        arg.clone() if isinstance(arg, torch.Tensor) and (everything or k in written) else arg
        for k, arg in enumerate(args)
    ]
    return tuple(copies), kwargs


def _filled(result: Any, found: Any) -> Any:
    """Put other numbers in the place of an operation's first result, or of all of them."""
    values = found if isinstance(found, tuple | list) else (found,)
    for position, value in enumerate(values):
        # Torch's backward of a batch norm reads moments wherever they are said to be: an empty array ends the process.
        if value.numel():
            result = _replaced(result, position, value)
    return result


def _replaced(result: Any, position: int, value: torch.Tensor) -> Any:
    leaves = list(result) if isinstance(result, tuple | list) else [result]
    old = leaves[position]
    if value.shape == old.shape:
        # The same tensor: it may be an argument that was written to.
        old.copy_(value)
        return result
    leaves[position] = value
    return type(result)(leaves) if isinstance(result, tuple | list) else leaves[0]
