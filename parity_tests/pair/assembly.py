"""From `check_pair`'s arguments to two sides and a checked mapping, in this process or in two others."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.pair.buffers import LeftOut
from parity_tests.pair.legs import Pair
from parity_tests.pair.loading import build, load_factory
from parity_tests.pair.remote import RemoteSide
from parity_tests.pair.side import Side, make_side

Tell = Callable[[Any], None]
_BETWEEN = "drawing and comparing values"
_STEPS = {
    "parameters": "reading the parameters of",
    "outline": "tracing",
    "round_trip": "putting parameters into",
    "forward": "running",
    "vjp": "differentiating",
    "truth": "running, in float64,",
    "ensemble": "running, with rounding noise,",
    "constants": "moving the constants of",
    "is_random": "looking for random numbers in",
    "unexercised": "watching the branches of",
    "wider_operations": "looking at the formats of",
}
_REQUIRED = {
    "torch_module": "torch",
    "flax_module": "jax",
    "params": None,
    "inputs": None,
}


def tell_nobody(text: Any) -> None:
    """Takes the place of a listener where nobody listens."""


def merged(
    spec: str, given: Mapping[str, Any], defaults: Mapping[str, Any], tell: Tell = tell_nobody
) -> dict[str, Any]:
    """The arguments of a named pair: defaults, then the factory's, then those given that are not the defaults.

    Args:
        spec: `package.module:factory`.
        given: what the caller passed, complete.
        defaults: of the same arguments.
        tell: is called with what happens next.

    Raises:
        ValueError: if the factory returns an unknown argument or cannot be loaded.
    """
    chosen = {name: value for name, value in given.items() if value is not defaults[name]}
    pythons = {"torch": chosen.get("torch_python"), "jax": chosen.get("jax_python")}
    parts = (*(side for side, python in pythons.items() if python is None), "pair")
    tell(f"importing {spec}")
    factory = load_factory(spec, parts)
    tell(f"calling {spec}")
    built = build(factory, parts)
    if unknown := sorted(map(str, set(built) - set(defaults))):
        raise ValueError(
            f"pair: expected {spec} to return arguments among {', '.join(defaults)}, got {', '.join(unknown)}."
        )
    return {**defaults, **built, **chosen}


class _Told:
    """A side that says what it does before it does it."""

    def __init__(self, side: Side, tell: Tell) -> None:
        self._side, self._tell = side, tell

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._side, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def told(*arguments: Any, **named: Any) -> Any:
            self._tell(f"{_STEPS.get(name, f'asking for {name} of')} the {self._side.framework} side")
            result = value(*arguments, **named)
            self._tell(_BETWEEN)
            return result

        return told


@contextlib.contextmanager
def prepared(arguments: Mapping[str, Any], spec: str | None, tell: Tell = tell_nobody) -> Iterator[Pair]:
    """Makes both sides and the mapping; ends the other interpreters, if there are any, on leaving.

    Args:
        arguments: all of `check_pair`.
        spec: the named pair, which sides in another interpreter are built from.
        tell: is called with what happens next.

    Raises:
        ValueError: if something is missing.
    """
    pythons = {"torch": arguments["torch_python"], "jax": arguments["jax_python"]}
    if spec is None and any(pythons.values()):
        raise ValueError(
            "torch_python, jax_python: expected pair='package.module:factory' beside an interpreter, got None; "
            "only what can be named can be built in another process."
        )
    for name, side in _REQUIRED.items():
        if arguments[name] is None and (side is None or pythons[side] is None):
            raise ValueError(f"{name}: expected a value, got None; pass it, or a pair whose factory returns it.")
    _check_kinds(arguments)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Any] = {}
        for key, python in pythons.items():
            tell(f"making the {key} side")
            if python is None or spec is None:
                made = make_side(key, arguments, arguments["device"])
            else:
                remote = RemoteSide(key, spec, python, arguments["device"], arguments["timeout_s"])
                made = stack.enter_context(remote)
            sides[key] = made if tell is tell_nobody else _Told(made, tell)
        tell(_BETWEEN)
        yield Pair(
            name=arguments["name"] or spec or f"{sides['torch'].name}-{sides['jax'].name}",
            sides=sides,
            # A proposal goes in as it is.
            rules=getattr(arguments["params"], "rules", arguments["params"]),
            source=arguments["inputs"],
            input_patterns=arguments["input_patterns"] or {},
            output_patterns=arguments["output_patterns"] or {},
            draws=arguments["draws"] or {},
            scale=arguments["scale"],
            left_out=LeftOut(arguments["not_compared"] or ()),
        )


_KINDS = {
    "params": (Sequence, "a sequence of rules or a proposal"),
    "dtypes": (Sequence, "a tuple of dtypes"),
    "name": (str, "a string"),
    **dict.fromkeys(("torch_kwargs", "flax_kwargs"), (Mapping, "a dict of keyword arguments")),
    **dict.fromkeys(("torch_params", "draws", "output_patterns"), (Mapping, "a dict by name")),
    "input_patterns": (Mapping, "a dict by position"),
}


def _check_kinds(arguments: Mapping[str, Any]) -> None:
    """Refuses values of another kind, which would fail somewhere below."""
    for name, (kind, expected) in _KINDS.items():
        value = getattr(arguments[name], "rules", arguments[name]) if name == "params" else arguments[name]
        if value is not None and (not isinstance(value, kind) or (isinstance(value, str) and name != "name")):
            hint = f"; for one dtype pass ({value!r},)" if name == "dtypes" else ""
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}{hint}.")
    seed = arguments["seed"]
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed!r}.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(arguments["device"])):
        raise ValueError(f"device: expected cpu, cuda or auto, got {arguments['device']!r}; choose one of these.")
