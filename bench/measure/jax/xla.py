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


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([a-z][a-z0-9\-]*)\(")
_COPIES = frozenset({"copy", "transpose", "concatenate", "pad", "gather", "slice", "dynamic-slice", "reverse"})
_COPIES |= {"dynamic-update-slice", "scatter", "broadcast"}
# They neither compute nor write anything where they stand beside copies in one fusion.
_SILENT = frozenset({"parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element", "iota"})
_ITEM_BITS = re.compile(r"\d+")


def _written(kind: str, dimensions: str) -> int:
    bits = _ITEM_BITS.search(kind)
    return math.prod(_numbers(dimensions)) * (int(bits[0]) if bits else 8) // 8


def copied_bytes(text: str) -> int:
    """Return the bytes that a compiled program writes in instructions that only copy, and in fusions of such.

    A copy that is fused with arithmetic is written once with its result and costs nothing: it does not count. That a
    number is repeated all over an array is no copy.
    """
    computations, entry = _computations(text)

    def copies_only(name: str) -> bool:
        found = {m[3] for line in computations.get(name, []) if (m := _INSTRUCTION.match(line))}
        return bool(found & _COPIES) and found <= _COPIES | _SILENT

    def copied(name: str) -> int:
        total = 0
        for line in computations.get(name, []):
            found, called = _INSTRUCTION.match(line), _CALLED.findall(line)
            if found and found[3] == "fusion":
                total += _written(found[1], found[2]) if copies_only(called[0]) else 0
            elif found and found[3] in _COPIES:
                scalar = found[3] == "broadcast" and "dimensions={}" in line
                total += 0 if scalar else _written(found[1], found[2])
            else:
                trips = _TRIPS.search(line)
                total += sum(map(copied, called)) * (int(trips[1]) if trips else 1)
        return total

    return copied(entry)
