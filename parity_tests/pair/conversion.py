"""A trained checkpoint as the other framework's parameters, by the rules of a pair: exactly, and array by array."""

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import exactly, is_inexact, numpy_dtype
from parity_tests.pair.mapping import ParameterMapping
from parity_tests.pair.patterns import LeftOut, MappingError, right_shape
from parity_tests.pair.rules import ENTRY, KEEP, SIDES, TIED, Rule, parsed_ranges, plain, terms_of
from parity_tests.pair.side import ParameterSpec
from parity_tests.pair.templates import expanded
from parity_tests.report.files import output

_OTHER = {"torch": "flax", "flax": "torch"}
_SUFFIX = ".safetensors"
_FORMATS = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BF16": numpy_dtype("bfloat16"),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in _FORMATS.items()}


@dataclass(frozen=True)
class Stored:
    """An array that is read when it is asked for."""

    shape: tuple[int, ...]  # of the array
    dtype: np.dtype  # of the array
    read: Callable[[slice], np.ndarray]  # the rows of a slice of its first axis

    def __getitem__(self, ranges: tuple[slice | int, ...]) -> np.ndarray:
        """Return a box, and read no other rows than its own."""
        if not self.shape or not ranges:
            return self.read(slice(None))[ranges]
        first, rest = ranges[0], ranges[1:]
        if isinstance(first, int):
            return self.read(slice(first, first + 1))[(0, *rest)]
        return self.read(first)[(slice(None), *rest)]


def convert(
    source: Any,
    rules: Sequence[Rule],
    *,
    to: str = "flax",
    like: Any = None,
    out: str | Path | None = None,
    not_compared: Sequence[str] = (),
) -> Any:
    """Turn the parameters of one framework into those of the other, by the rules that `check_pair` has proven.

    Numbers are copied bit for bit, in the format that they are stored in. Only the result of a sum (`"a + b"`,
    `"1 + scale"`) is rounded, once. Back, a sum has no inverse: the first term gets what the constant leaves, the
    others are zero. Arrays are read one by one, and written one by one to a safetensors file.

    Args:
        source: of torch, a module, its state dict, or the path of a safetensors file; of flax, an nnx module or its
            state, a pytree of parameters (linen variables, ...), a safetensors file of paths (`layers.kernel`), or an
            orbax checkpoint.
        rules: as for `check_pair`, a proposal included. Every array must be used, or kept by a rule.
        to: `flax`, or `torch` for the way back.
        like: the parameters that are wanted: a module or pytree with the names and shapes of the result, whose values
            are those of arrays that rules keep. Without it shapes follow from the rules, and paths become nested dicts.
        out: a path to write to, `*.safetensors`, or on the flax side a new folder for an orbax checkpoint.
        not_compared: names or patterns of arrays of either side that need no rule, as for `check_pair`.

    Returns:
        For `flax` a tree of NumPy arrays: of the structure of `like` (for an nnx module a state for `nnx.update`), or
        nested dicts. For `torch` a state dict of tensors. None with `out`.

    Raises:
        MappingError: for an array that no rule uses, or that is missing, and for rules that do not fit.
        ValueError: for a value that would be lost: of a block that a rule holds at zero, or of tied arrays that differ.
    """
    if to not in SIDES:
        raise ValueError(f"to: expected 'flax' or 'torch', got {to!r}; name the framework of the result.")
    rules = getattr(rules, "rules", rules)
    origin, left = _OTHER[to], LeftOut(not_compared)
    stored, _ = _read(source, origin, "source")
    wanted, rebuild = (None, None) if like is None else _read(like, to, "like")
    specs = {origin: {name: _spec(array.shape, array.dtype) for name, array in stored.items()}}
    shapes = _inferred(rules, origin, specs[origin]) if wanted is None else _formats_of(wanted, stored)
    specs[to] = {name: _spec(*found) for name, found in shapes.items()}
    aliases = _aliases(source if origin == "torch" else like)
    also = {name for group in aliases for name in group}
    try:
        mapping = ParameterMapping(rules, specs["torch"], specs["flax"], lambda name: name in also or left.covers(name))
    except MappingError as error:
        more = " An array that needs no rule is named in not_compared=." if "left on" in str(error) else ""
        raise MappingError(f"{error}{more}") from None
    if lost := [group for group in aliases if not set(group) & set(mapping.torch_names)]:
        raise MappingError(f"params: expected every parameter to be mapped; left on the torch side: {lost[0][0]}.")
    _check_zeros(mapping, origin, stored)
    names = mapping.torch_names if to == "torch" else mapping.flax_names
    if wanted is None:
        names = [name for name in names if not _is_kept(mapping, to, name)]
    made = ((name, _made(mapping, to, name, stored, wanted)) for name in names)
    if out is not None and str(out).endswith(_SUFFIX):
        _write(out, {name: (specs[to][name].value.shape, mapping.format_of(to, name, stored)) for name in names}, made)
        return None
    arrays = dict(made)
    if to == "torch":
        if out is not None:
            raise ValueError(f"out: expected a path that ends in {_SUFFIX}, got {str(out)!r}; name such a file.")
        to_torch = importlib.import_module("parity_tests.frameworks.torch.modes").on_host
        state = {name: to_torch(array) for name, array in arrays.items()}
        also_named = {name: state[first] for group in aliases for first in group if first in state for name in group}
        return also_named | state
    tree = _nested(arrays) if rebuild is None else rebuild(arrays)
    if out is None:
        return tree
    importlib.import_module("parity_tests.frameworks.jax.checkpoints").save(out, _nested(arrays))
    return None


def _spec(shape: tuple[int, ...], dtype: np.dtype) -> ParameterSpec:
    # Of no size in memory, and of the kind that must be used unless the caller says otherwise.
    return ParameterSpec(np.broadcast_to(np.zeros((), dtype), shape), False, frozen=True)


def _made(mapping: ParameterMapping, to: str, name: str, stored: Mapping[str, Any], wanted: Any) -> np.ndarray:
    if wanted is not None and _is_kept(mapping, to, name):
        return np.array(wanted[name][()])
    result = mapping.carried(to, name, stored, rounded=True)
    for link in mapping.links:
        here, there = (link.torch, link.flax) if to == "torch" else (link.flax, link.torch)
        if here is None or here.name != name:
            continue
        if there is None and link.keep:
            if wanted is None:
                raise MappingError(f"params: expected like= with the values that {link.text} keeps, got None; pass it.")
            result[here.ranges] = exactly(wanted[name][here.ranges], result.dtype, link.text)
        if link.tied == to and there is not None and link.pattern is not None:
            box = stored[there.name][there.ranges]
            box = link.pattern.forward(box) if to == "flax" else link.pattern.backward(box)
            if box.tobytes() != np.array(result[here.ranges], order="C").tobytes():
                raise ValueError(
                    f"source: expected the values of {there.name} to be those that {name} has by another rule, since "
                    f"{link.text} ties them, got others; the {to} side cannot hold both."
                )
    return result


def _check_zeros(mapping: ParameterMapping, origin: str, stored: Mapping[str, Stored]) -> None:
    for link in mapping.links:
        block = getattr(link, origin)
        if block is not None and link.pattern is None and not link.keep and stored[block.name][block.ranges].any():
            raise ValueError(
                f"source: expected zeros in the block that {link.text} holds at zero, got others, which would be lost. "
                "A rule such as ('bias_ih + bias_hh', 'bias') adds up two biases."
            )


def _is_kept(mapping: ParameterMapping, side: str, name: str) -> bool:
    links = [link for link in mapping.links if (block := getattr(link, side)) is not None and block.name == name]
    return all(link.keep and link.pattern is None for link in links)


def _formats_of(wanted: Mapping[str, Stored], stored: Mapping[str, Stored]) -> dict[str, tuple]:
    """Return shapes, with the format of the source's numbers where they have one."""
    formats = {array.dtype for array in stored.values() if array.dtype.kind in "fV"}
    (one,) = formats if len(formats) == 1 else (None,)
    return {
        name: (array.shape, one if one is not None and array.dtype.kind in "fV" else array.dtype)
        for name, array in wanted.items()
    }


def _aliases(source: Any) -> list[list[str]]:
    """Return the names under which a state dict has one tensor several times."""
    found: dict[tuple, list[str]] = {}
    for name, value in _items(source):
        if hasattr(value, "data_ptr") and value.numel():
            found.setdefault((value.data_ptr(), tuple(value.shape), value.stride()), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _items(source: Any) -> Iterator[tuple[str, Any]]:
    source = source.state_dict() if hasattr(source, "state_dict") else source
    return iter(source.items()) if isinstance(source, Mapping) else iter(())


def _read(source: Any, side: str, argument: str) -> tuple[dict[str, Stored], Callable[[dict], Any] | None]:
    """Return arrays by name, and for a flax tree a function that fills in others."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir() and side == "flax":
            names, load = importlib.import_module("parity_tests.frameworks.jax.checkpoints").opened(path)
            return {name: _loaded(shape, dtype, name, load) for name, (shape, dtype) in names.items()}, None
        if not path.is_file():
            folder = " or an orbax folder" * (side == "flax")
            raise ValueError(f"{argument}: expected the path of a safetensors file{folder}, got {str(source)!r}.")
        return _opened(path, argument), None
    if side == "flax":
        named, rebuild = importlib.import_module("parity_tests.frameworks.jax.modules").named_arrays(source)
        return {name: _of_jax(name, value) for name, value in named.items()}, rebuild
    tensors = dict(_items(source))
    if not tensors:
        raise TypeError(f"{argument}: expected a module, a state dict or a file, got {type(source).__name__}.")
    return {name: _of_torch(name, value, argument) for name, value in tensors.items()}, None


def _of_torch(name: str, value: Any, argument: str) -> Stored:
    if hasattr(value, "detach"):
        to_numpy = importlib.import_module("parity_tests.frameworks.torch.modes").to_numpy
        dtype = to_numpy(value.detach().reshape(-1)[:0]).dtype
        return Stored(tuple(value.shape), dtype, lambda rows: to_numpy(value.detach()[rows] if value.ndim else value))
    if not isinstance(value, np.ndarray | np.generic):
        got = type(value).__name__
        raise TypeError(f"{argument}[{name!r}]: expected a tensor or an array, got {got}; leave it out.")
    return _loaded(value.shape, value.dtype, name, lambda _: np.asarray(value))


def _of_jax(name: str, value: Any) -> Stored:
    array = value if hasattr(value, "dtype") else np.asarray(value)
    return _loaded(tuple(array.shape), np.dtype(array.dtype), name, lambda _: np.asarray(array))


def _loaded(shape: tuple[int, ...], dtype: np.dtype, name: str, load: Callable[[str], np.ndarray]) -> Stored:
    return Stored(shape, dtype, lambda rows: load(name)[rows] if shape else load(name))


def _opened(path: Path, argument: str) -> dict[str, Stored]:
    """Return the arrays of a safetensors file, whose rows are read when they are asked for."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size >= path.stat().st_size:
                raise ValueError
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {name: _in_file(path, 8 + size, name, entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        told = error if isinstance(error, MappingError) else f"{type(error).__name__}"
        raise ValueError(
            f"{argument}: expected a safetensors file, got {path}, which cannot be read ({told})."
        ) from None


def _in_file(path: Path, start: int, name: str, entry: Mapping[str, Any]) -> Stored:
    if entry["dtype"] not in _FORMATS:
        raise MappingError(f"{name} is of format {entry['dtype']}, which NumPy does not hold")
    shape, dtype = tuple(entry["shape"]), _FORMATS[entry["dtype"]]
    begin = start + entry["data_offsets"][0]

    def read(rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        row = math.prod(shape[1:])
        found = np.fromfile(path, dtype, (last - first) * row, offset=begin + first * row * dtype.itemsize)
        return found.reshape((last - first, *shape[1:]) if shape else ())

    return Stored(shape, dtype, read)


def _write(out: str | Path, formats: Mapping[str, tuple], made: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file array by array."""
    header, end = {}, 0
    for name, (shape, dtype) in formats.items():
        if dtype not in _NAMES:
            raise ValueError(f"out: expected formats that a safetensors file holds, got {dtype} for {name}.")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with output("out", out) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in made:
            file.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")


def _nested(arrays: Mapping[str, np.ndarray]) -> dict:
    """Return dotted paths as nested dicts; numbers are places in a list, as in the state of an nnx module."""
    tree: dict = {}
    for name, array in arrays.items():
        *owners, last = (int(part) if part.isdigit() else part for part in name.split("."))
        node = tree
        for owner in owners:
            node = node.setdefault(owner, {})
        node[last] = array
    return tree


def _inferred(rules: Sequence[Rule], origin: str, specs: Mapping[str, ParameterSpec]) -> dict[str, tuple]:
    """Return shapes and formats of the arrays that rules make of those of one side."""
    boxes: dict[str, list[tuple[list, tuple[int, ...]]]] = {}
    formats: dict[str, np.dtype] = {}
    usual = next((spec.value.dtype for spec in specs.values() if is_inexact(spec.value)), np.dtype(np.float32))
    for rule in expanded(rules, {origin: specs}):
        source, target, *rest = rule if origin == "torch" else (rule[1], rule[0], *rule[2:])
        if target is None:
            continue
        shape, dtype = (), usual
        if source is not None:
            block = terms_of(source, origin, specs)[0][0][1]
            pattern = str(next(iter(rest), "") or "") if rest[:1] not in ([KEEP], [TIED]) else ""
            left, arrow, right = pattern.partition("->")
            lengths = next((entry for entry in rest if isinstance(entry, Mapping)), None)
            shape = right_shape(pattern if origin == "torch" else f"{right} {arrow} {left}", block.shape, lengths)
            dtype = specs[block.name].value.dtype
        for word in _names_in(target):
            match = ENTRY.match(word)
            assert match is not None
            name = plain(match["name"]) if "[" in match["name"] else match["name"]
            if source is None and rest[:1] != [KEEP] and not match["ranges"]:
                raise MappingError(f"params: expected like= with the shape of {name}, which {rule!r} holds at zero.")
            boxes.setdefault(name, []).append((parsed_ranges(match["ranges"], word), shape))
            formats.setdefault(name, dtype)
    return {name: (_whole(found), formats[name]) for name, found in boxes.items()}


def _names_in(entry: str) -> Iterator[str]:
    """Yield the names of an expression, with their ranges."""
    words = re.split(r"\s+[+-]\s+", entry.strip())
    for word in words:
        if len(words) == 1 or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", word):
            yield re.sub(r"^(-\s*)?((\d+\.?\d*|\.\d+)\s*\*)?\s*", "", word)


def _whole(boxes: Sequence[tuple[list, tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the shape of an array of which boxes are known."""
    lengths: dict[int, int] = {}
    for ranges, shape in boxes:
        sizes = list(shape)
        for axis, box in enumerate(ranges):
            if isinstance(box, int):
                stop = box + 1
            else:
                size = sizes.pop(0) if sizes else 0
                stop = (box.start or 0) + size if box.stop is None else box.stop
            lengths[axis] = max(lengths.get(axis, 0), stop)
        for axis, size in enumerate(sizes, len(ranges)):
            lengths[axis] = max(lengths.get(axis, 0), size)
    return tuple(lengths[axis] for axis in sorted(lengths))
