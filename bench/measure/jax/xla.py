"""XLA's programs: JAX's compilation cache in a folder, the products that a program repeats, and what it copies."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_FOLDER = "jax_compilation_cache_dir"
# However quickly it was compiled and however small it is; and without caches of XLA's own, whose options would make the
# program another one than the user's.
_EVERYTHING: Mapping[str, Any] = MappingProxyType(
    {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
)


@contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Keep compiled programs in a folder, and take them from there; the user's own cache is put back afterwards.

    Args:
        folder: an existing folder; an empty one makes the compilation a cold one.
    """
    wanted = {**_EVERYTHING, _FOLDER: folder}
    before = {name: getattr(jax.config, name) for name in wanted}
    _configure(wanted)
    try:
        yield
    finally:
        _configure(before)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    # JAX decides once whether it uses a cache, and which.
    compilation_cache.reset_cache()


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\(([^)]*)\).*lhs_contracting_dims=\{([\d,]*)\}")
_MULTIPLY = re.compile(r" = (?:f|bf)\d+\[[\d,]*\]\S* multiply\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCH = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """Return the lines of every computation by its name, and the name of the one that runs first."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return found, entry


def _dot_flops(line: str, shapes: Mapping[str, list[int]]) -> int:
    """Return the operations of a product: two for each element of the result and each term of its sum.

    XLA turns one with a vector into a multiplication of elements, which is one operation for each, and a sum.
    """
    dot, result = _DOT.search(line), _SHAPE.match(line)
    if result and _MULTIPLY.search(line):
        return math.prod(_numbers(result[2]))
    if not (dot and result):
        return 0
    left = shapes[_OPERAND.findall(dot[1])[0]]
    return 2 * math.prod(_numbers(result[2])) * math.prod(left[axis] for axis in _numbers(dot[2]))


def repeated_product_flops(text: str) -> int:
    """Count the operations of the products in loops beyond the first pass of each loop.

    Returns:
        What is to be added to `cost_analysis()["flops"]`; 0 without a loop. A loop whose number of passes the
        compiler does not know counts as one pass.
    """
    computations, entry = _computations(text)

    def flops(name: str, *, repeated: bool) -> int:
        lines = computations.get(name, [])
        shapes = {shape[1]: _numbers(shape[2]) for line in lines if (shape := _SHAPE.match(line))}
        total = 0
        for line in lines:
            trips = _TRIPS.search(line) if repeated else None
            called = sum(flops(other, repeated=repeated) for other in _CALLED.findall(line))
            # One of them runs; XLA's own account takes the longest.
            branches = [name for some, one in _BRANCH.findall(line) for name in _OPERAND.findall(some) or [one] if name]
            called += max((flops(branch, repeated=repeated) for branch in branches), default=0)
            total += _dot_flops(line, shapes) + called * (int(trips[1]) if trips else 1)
        return total

    return flops(entry, repeated=True) - flops(entry, repeated=False)


_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\w+)\[(?P<shape>[\d,]*)\]\S* (?P<what>[a-z][a-z0-9\-]*)\((?P<of>.*)"
)
_IN_PLACE = "dynamic-update-slice"
_COPIES = frozenset({"copy", "transpose", "concatenate", "pad", "gather", "slice", "dynamic-slice", "reverse"})
_COPIES |= {"scatter", "broadcast", _IN_PLACE}
# They neither compute nor write anything where they stand beside copies in one fusion.
_SILENT = frozenset({"parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element", "iota"})
_BITS = re.compile(r"\d+")


def copied_bytes(text: str) -> int:
    """Return the bytes that a compiled program writes in instructions that only copy, and in fusions of such.

    A copy that is fused with arithmetic is written once with its result and costs nothing: it does not count. Of an
    array that is updated in place, as in loops, the update counts alone; one number in every place is no copy.
    """
    computations, entry = _computations(text)
    found = {
        name: [(match, line) for line in lines if (match := _INSTRUCTION.match(line))]
        for name, lines in computations.items()
    }

    def written(name: str, match: re.Match[str], line: str) -> int:
        """Return the bytes that an instruction of a computation writes by copying."""
        if match["what"] == "fusion":
            inner = found.get(_CALLED.findall(line)[0], [])
            kinds = {one["what"] for one, text in inner if not _filled(one, text)}
            if not kinds & _COPIES or kinds - _COPIES - _SILENT:
                return 0
            updates = [(one, text) for one, text in inner if one["what"] == _IN_PLACE]
            if updates:
                return sum(written(_CALLED.findall(line)[0], one, text) for one, text in updates)
        elif match["what"] not in _COPIES or _filled(match, line):
            return 0
        elif match["what"] == _IN_PLACE:
            update = _OPERAND.findall(match["of"])[1]
            return next((_size(one) for one, _ in found[name] if one["name"] == update), 0)
        return _size(match)

    def copied(name: str) -> int:
        total = sum(written(name, match, line) for match, line in found.get(name, []))
        for line in computations.get(name, []):
            if " fusion(" not in line:
                trips = _TRIPS.search(line)
                total += sum(map(copied, _CALLED.findall(line))) * (int(trips[1]) if trips else 1)
        return total

    return copied(entry)


def _filled(match: re.Match[str], line: str) -> bool:
    """Tell an array with one number in every place."""
    return match["what"] == "broadcast" and "dimensions={}" in line


def _size(match: re.Match[str]) -> int:
    """Return the bytes of an instruction's result; truth values, which have no number of bits, take one each."""
    bits = _BITS.search(match["type"])
    return math.prod(_numbers(match["shape"])) * (int(bits[0]) if bits else 8) // 8
