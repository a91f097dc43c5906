"""The arguments and results of a call as trees: taken apart into named arrays, and put together again.

The judge works with tuples of arrays. Here is the border: dicts, lists, tuples, named tuples and dataclasses of
inputs become arrays named `input0`, `input0.mask` or (by keyword) `input.mask`, and those of outputs `y`, `y.0`,
`y.logits`, in the same way on both sides.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from parity_tests.pair.patterns import MappingError

INPUT, OUTPUT = "input", "y"
# An axis pattern from the torch layout to the flax layout, and lengths that the shapes leave open.
Layouts = Mapping[int | str, str | tuple[str, Mapping[str, int]]]
_SETTINGS = (bool, int, float, complex, str, Enum)


def entries_of(tree: Any, others: Callable[[Any], list | None] = lambda tree: None) -> list[tuple[Any, Any]] | None:
    """Return a container's keys and values; None for what is no container.

    Args:
        tree: anything.
        others: the same for containers that only a framework knows.
    """
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple) and (fields := getattr(tree, "_fields", None)) is not None:
        return list(zip(fields, tree, strict=True))
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    if (found := others(tree)) is not None:
        return found
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree) if hasattr(tree, f.name)]
    return None


def _filled(node: tuple, arrays: Sequence[Any]) -> Any:
    """Put arrays into a node of a `Layout`."""
    kind, content = node[0], node[1]
    if kind == "array":
        return arrays[content]
    if kind == "value":
        return content
    values = [(key, _filled(child, arrays)) for key, child in content]
    if kind == "dict":
        return dict(values)
    if kind in ("list", "tuple"):
        return [value for _, value in values] if kind == "list" else tuple(value for _, value in values)
    example = node[2]
    made: Any = type(example)
    if isinstance(example, MutableMapping):  # a defaultdict, which its items alone do not make
        like = copy.copy(example)
        like.update(values)
        return like
    if isinstance(example, Mapping):
        return made(dict(values))
    if isinstance(example, tuple):
        return made(*(value for _, value in values))
    # A dataclass: its __post_init__ has seen the values that the user gave.
    made = copy.copy(example)
    for key, value in values:
        object.__setattr__(made, key, value)
    return made


@dataclass(frozen=True)
class Layout:
    """How a tuple of arrays becomes the arguments of a call."""

    names: tuple[str, ...]  # of the arrays
    # A node for each positional argument: `("array", k)`, `("value", 3)`, or a container's kind, its keys with their
    # nodes, and for a class of its own an example
    positional: tuple = ()
    keywords: Mapping[str, tuple] = field(default_factory=dict)  # likewise, by name

    def filled(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments."""
        named = {name: _filled(node, arrays) for name, node in self.keywords.items()}
        return [_filled(node, arrays) for node in self.positional], named

    def index(self, key: object) -> int | None:
        """Return which array a user means: by position, or by its name with or without `input` before it."""
        known = {name: k for k, name in enumerate(self.names)}
        if isinstance(key, int) and not isinstance(key, bool):
            return known.get(f"{INPUT}{key}")
        spelled = [key, f"{INPUT}{key}", f"{INPUT}.{key}"] if isinstance(key, str) else []
        return next((known[name] for name in spelled if name in known), None)

    def resolved(self, patterns: Layouts) -> dict[int, Any]:
        """Return axis patterns by the arrays' positions.

        Raises:
            MappingError: for a key that names no array.
        """
        if not isinstance(patterns, Mapping):
            raise MappingError(f"input_patterns: expected a dict by position or name, got {patterns!r:.80}.")
        found = {self.index(key): pattern for key, pattern in patterns.items()}
        if unknown := [key for key in patterns if self.index(key) is None]:
            raise MappingError(
                f"input_patterns: expected positions below {len(self.positional)}, got {unknown[0]!r}; choose one, or "
                f"a name among {', '.join(self.names)}."
            )
        if len(found) < len(patterns):
            raise MappingError(f"input_patterns: expected one pattern an input, got {', '.join(map(repr, patterns))}.")
        return {k: pattern for k, pattern in found.items() if k is not None}


def taken_apart(entries: Any, leaf: Callable[[Any, str], Any]) -> tuple[Layout, list[Any]]:
    """Take a call's arguments apart.

    Args:
        entries: one for each positional argument; or a mapping, with positional arguments by number and others by name.
        leaf: returns the array that an entry stands for, or None where it stands for none.

    Raises:
        TypeError: for an entry that is no array, container, number, text or None.
        ValueError: for a mapping whose keys are no arguments.
    """
    names: list[str] = []
    leaves: list[Any] = []

    def node(entry: Any, name: str) -> tuple:
        if (found := leaf(entry, name)) is not None:
            if name in names:
                raise ValueError(f"inputs: expected a name of its own for every array, got two called {name}.")
            names.append(name)
            leaves.append(found)
            return "array", len(leaves) - 1
        inside = entries_of(entry)
        if inside is not None:
            children = tuple((key, node(value, f"{name}.{key}")) for key, value in inside)
            kind = {dict: "dict", list: "list", tuple: "tuple"}.get(type(entry))
            return (kind, children) if kind else ("like", children, entry)
        if entry is None or isinstance(entry, _SETTINGS):
            return "value", entry
        raise TypeError(
            f"inputs[{position(name)}]: expected a shape such as (8, 64) or a NumPy array, or a dict, list, tuple or "
            f"dataclass of these, a number, a text or None, got {outlined(entry)}; inputs is a tuple with one entry "
            "per argument, for one argument ((8, 64),)."
        )

    if not isinstance(entries, Mapping):
        entries = dict(enumerate(entries))
    numbers = sorted(key for key in entries if isinstance(key, int) and not isinstance(key, bool))
    words = [key for key in entries if isinstance(key, str) and key.isidentifier()]
    if len(numbers) + len(words) < len(entries) or numbers != list(range(len(numbers))):
        raise ValueError(
            "inputs: expected a dict with arguments by name, positional ones by the numbers from 0, such as "
            f"{{0: (8, 64), 'mask': mask}}, got the keys {', '.join(map(repr, entries))}."
        )
    positional = tuple(node(entries[k], f"{INPUT}{k}") for k in numbers)
    keywords = {word: node(entries[word], f"{INPUT}.{word}") for word in words}
    return Layout(tuple(names), positional, keywords), leaves


def position(name: str) -> str:
    """Spell an input's name as an index: `0`, `0.mask`, `'mask'`."""
    rest = name.removeprefix(INPUT)
    return repr(rest[1:]) if rest.startswith(".") else rest


def outlined(value: Any) -> str:
    """Describe a value in one line, an array of any framework by its kind, dtype and shape."""
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')} and shape {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, Mapping) else f"{value!r:.200}"


@dataclass(frozen=True)
class Call:
    """How a side calls its module."""

    kwargs: Mapping[str, Any]  # keyword arguments of every call
    # `(call, *inputs, **inputs) -> outputs`, where `call` runs the module; None to run it directly
    adapter: Callable[..., Any] | None = None
    layout: Layout | None = None  # of the arrays; None where each is one positional argument

    def __call__(self, module: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Run a module."""
        positional, named = (list(arrays), {}) if self.layout is None else self.layout.filled(arrays)
        run = functools.partial(module, **self.kwargs)
        return run(*positional, **named) if self.adapter is None else self.adapter(run, *positional, **named)

    def names(self, arrays: Sequence[Any]) -> Sequence[str]:
        """Return the names of the inputs."""
        return [f"{INPUT}{k}" for k in range(len(arrays))] if self.layout is None else self.layout.names

    def arranged(self, layout: Layout, prefix: str) -> "Call":
        """Return the same with a layout.

        Raises:
            ValueError: if a keyword argument is an input as well.
        """
        if self.adapter is None and (both := sorted(set(layout.keywords) & set(self.kwargs))):
            raise ValueError(f"{prefix}_kwargs: expected no input again, got {', '.join(both)}; leave it out there.")
        return dataclasses.replace(self, layout=layout)


def checked_call(kwargs: Mapping[str, Any] | None, adapter: Any, prefix: str) -> Call:
    """Return how a side is called, by its keyword arguments and its adapter.

    Raises:
        ValueError: for keyword arguments that are none.
        TypeError: for an adapter that cannot be called.
    """
    if not isinstance(kwargs or {}, Mapping) or not all(isinstance(name, str) for name in kwargs or {}):
        raise ValueError(f"{prefix}_kwargs: expected a dict of keyword arguments, got {kwargs!r:.80}.")
    if adapter is not None and (not callable(adapter) or isinstance(adapter, type)):
        raise TypeError(
            f"{prefix}_call: expected a function such as lambda call, x, mask: call(x, mask=mask), got {adapter!r:.80}."
        )
    return Call(dict(kwargs or {}), adapter)


def refuse_module(module: Any, prefix: str, expected: str) -> None:
    """Refuse a class in place of an instance, and a module of the other framework.

    Raises:
        TypeError: in one sentence.
    """
    made = module.func if isinstance(module, functools.partial) else module
    if isinstance(made, type):
        raise TypeError(
            f"{prefix}_module: expected {expected}, got the class {made.__name__}; create an instance, with its sizes."
        )
    other, package = ("torch", "torch") if prefix == "flax" else ("flax", "flax")
    if any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__):
        raise TypeError(
            f"{prefix}_module: expected {expected}, got the {other} module {type(module).__name__}; pass it as "
            f"{other}_module."
        )


def named_outputs(
    tree: Any, chosen: Sequence[str] | None, others: Callable[[Any], list | None], side: str
) -> dict[str, Any]:
    """Return the leaves of a module's outputs by name, without None and texts.

    Args:
        tree: what the module returned.
        chosen: names of leaves, or of containers with several, as the judge knows them; None for all.
        others: see `entries_of`.
        side: `torch` or `flax`.

    Raises:
        ValueError: if a chosen name is not there, or two leaves have one name.
    """
    found: dict[str, Any] = {}
    for name, leaf in _leaves(tree, OUTPUT, others):
        if name in found:
            raise ValueError(f"outputs: expected a name of its own for every array, got two called {name} from {side}.")
        found[name] = leaf
    if chosen is None:
        return {OUTPUT: next(iter(found.values()))} if len(found) == 1 else found
    result: dict[str, Any] = {}
    for name in chosen:
        inside = [known for known in found if known == name or known.startswith(f"{name}.")]
        if not inside:
            known = ", ".join(found) or "none"
            raise ValueError(f"outputs: expected names of the {side} side's outputs ({known}), got {name!r}.")
        result |= {name if len(inside) == 1 else known: found[known] for known in inside}
    return result


def _leaves(tree: Any, name: str, others: Callable[[Any], list | None]) -> Iterator[tuple[str, Any]]:
    inside = entries_of(tree, others)
    if inside is None:
        if tree is not None and not isinstance(tree, str):
            yield name, tree
        return
    for key, value in inside:
        yield from _leaves(value, f"{name}.{key}", others)


def no_array(name: str, value: Any, side: str) -> TypeError:
    """Return the refusal of an output that is neither an array nor a container that is known."""
    return TypeError(
        f"outputs: expected arrays, numbers, None, and dicts, lists, tuples or dataclasses of these, got "
        f"{type(value).__name__} at {name} from {side}; leave it out by outputs=, or return its arrays by {side}_call=."
    )
