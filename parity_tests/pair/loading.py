"""Pairs named as `package.module:factory`.

A factory returns `check_pair`'s keyword arguments. It takes no argument and returns all of them, or it takes
`"torch"`, `"jax"` or `"pair"` and returns that part: `torch_*` arguments, `flax_*` arguments, all others.
Only the second kind can be built in two interpreters. torch is seeded while a module is imported and a factory called:
parameters are drawn around the scale of the initial ones, and the same name shall give the same numbers in every run.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from parity_tests.judge.failures import located
from parity_tests.judge.subjects import framework_available

Factory = Callable[..., Any]
_PARTS = ("torch", "jax", "pair")


def _seeded_initialisation(parts: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    """Seeds torch, whose modules initialise themselves from a global state; Flax takes keys from the factory."""
    if "torch" not in parts or not framework_available("torch"):
        return contextlib.nullcontext()
    return importlib.import_module("parity_tests.frameworks.torch.pair").seeded(0)


def names_in(spec: str) -> tuple[str, str]:
    """Returns the module and the factory that a spec names.

    Raises:
        ValueError: if it does not name both.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"pair: expected package.module:factory, got {spec!r}; name a function that returns the pair.")
    return module_name, attribute


def load_factory(spec: str, parts: tuple[str, ...] = _PARTS) -> Factory:
    """Imports a factory.

    Args:
        spec: `package.module:factory`.
        parts: which parts will be built here; without torch's, torch is not imported.

    Raises:
        ValueError: if there is none of that name, or importing its module fails; one sentence.
    """
    module_name, attribute = names_in(spec)
    try:
        with _seeded_initialisation(parts):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"pair: expected a module that can be imported, got {module_name!r} ({error}); check the name and the path."
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"pair: expected a module that can be imported, got one that raised {located(error)}."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        known = ", ".join(name for name in own if not name.startswith("_")) or "none"
        raise ValueError(f"pair: expected a function of {module_name}, got {attribute!r}; it has {known}.")
    return factory


def _required(factory: Factory) -> int:
    """How many arguments a call needs; what has a default is the factory's own affair."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"pair: expected a function whose arguments can be counted, got {type(factory).__name__}; wrap it in one."
        ) from None
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)


def build(factory: Factory, parts: tuple[str, ...] = _PARTS) -> dict[str, Any]:
    """Calls a factory.

    Args:
        factory: as loaded.
        parts: which parts are wanted; a factory without argument builds all.

    Raises:
        ValueError: if the factory cannot build single parts, raises, or returns something else than a dict.
    """
    count = _required(factory)
    if count > 1:
        raise ValueError(
            f"pair: expected a factory of no argument, or of one ('torch', 'jax' or 'pair'), got one of {count}; "
            "give the others a value, for example with functools.partial."
        )
    if count == 0:
        if parts != _PARTS:
            raise ValueError(
                "pair: expected a factory that takes 'torch', 'jax' or 'pair' and builds that part, got one without "
                "argument; two interpreters need the parts apart."
            )
        calls = [factory]
    else:
        calls = [functools.partial(factory, part) for part in parts]
    try:
        with _seeded_initialisation(parts):
            built = [call() for call in calls]
    except (Exception, SystemExit) as error:
        raise ValueError(f"pair: expected a factory that returns, got one that raised {located(error)}.") from error
    for result in built:
        if not isinstance(result, dict):
            raise ValueError(
                f"pair: expected a dict of check_pair's arguments, got {type(result).__name__}; return one."
            )
    return {name: value for result in built for name, value in result.items()}
