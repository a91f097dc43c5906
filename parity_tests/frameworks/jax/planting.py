"""How a defect is planted in the flax side of an example pair; the defects themselves: `jax_defects`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parity_tests.frameworks.jax.modules import Function
from parity_tests.frameworks.jax.pair import JaxSide
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.legs import Pair
from parity_tests.pair.loading import build
from parity_tests.pair.side import Arrays, Side, make_side

Edit = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Defect:
    """One way to be wrong, by exactly one of four means.

    Attributes:
        name: what was planted.
        example: the pair whose flax side is spoiled.
        parameters: what the flax side does to its parameters before it uses them.
        results: what it does to its outputs and gradients.
        function: spoils the flat JAX function.
        module: builds another flax side in place of the example's.
        dtypes: storage dtypes in which the defect changes the function; elsewhere it is equivalent to correct code.
        cause: a part of the likely cause that the report must name; empty where no hypothesis covers the defect.
    """

    name: str
    example: str
    parameters: Edit | None = None
    results: Edit | None = None
    function: Callable[[Function], Function] | None = None
    module: Callable[[], dict[str, Any]] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cause: str = ""


class _Spoiled:
    """A correct side with wrong parameters or wrong results; compiled once, however many defects it is given."""

    def __init__(self, side: Side, parameters: Edit | None, results: Edit | None) -> None:
        self._side, self.framework, self.name = side, side.framework, side.name
        self._parameters, self._results = parameters or _unchanged, results or _unchanged

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._side, name)
        if name not in ("forward", "vjp", "truth", "ensemble"):
            return method

        def call(parameters: Arrays, *arguments: Any) -> Any:
            found = method({**parameters, **self._parameters(parameters)}, *arguments)
            return found if name == "ensemble" else {**found, **self._results(found)}

        return call


def _unchanged(arrays: Arrays) -> Arrays:
    return arrays


@functools.cache
def _healthy(example: str) -> tuple[dict[str, Any], dict[str, Side]]:
    arguments = build(EXAMPLES[example])
    return arguments, {framework: make_side(framework, arguments, "cpu") for framework in ("torch", "jax")}


def healthy(example: str) -> Pair:
    """The example's pair as it is; its sides are the ones that defects are planted in, and are compiled once."""
    return _pair(example, *_healthy(example))


def planted(defect: Defect) -> Pair:
    """The example's pair with the defect in its flax side."""
    arguments, sides = _healthy(defect.example)
    if defect.module is not None:
        spoiled: Any = JaxSide(defect.module()["flax_module"])
    elif defect.function is not None:
        spoiled = JaxSide(arguments["flax_module"], change=defect.function)
    else:
        spoiled = _Spoiled(sides["jax"], defect.parameters, defect.results)
    return _pair(f"{defect.example} with {defect.name}", arguments, {"torch": sides["torch"], "jax": spoiled})


def _pair(name: str, arguments: dict[str, Any], sides: dict[str, Any]) -> Pair:
    return Pair(
        name=name,
        sides=sides,
        rules=arguments["params"],
        source=arguments["inputs"],
        input_patterns=arguments.get("input_patterns", {}),
        output_patterns=arguments.get("output_patterns", {}),
    )
