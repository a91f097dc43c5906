"""The sides of a pair: from `package.module:factory` to a wrapped module, here or in another interpreter.

A factory returns `check_pair`'s keyword arguments. It takes no argument and returns all of them, or it takes
`"torch"`, `"jax"` or `"pair"` and returns that part: `torch_*` arguments, `flax_*` arguments, all others. Only the
second kind can be built in two interpreters, for frameworks that cannot be imported together. torch is seeded while a
module is imported and a factory called: parameters are drawn around the scale of the initial ones, and the same name
must give the same numbers in every run.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S, Channel, Interpreter
from parity_tests.interpreters.process import ProcessError
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.judge.records import environment
from parity_tests.judge.subjects import framework_available
from parity_tests.pair.calls import Layout
from parity_tests.pair.side import CANNOT_RUN, Constants, Ensemble, ParameterSpec, Side, Variant
from parity_tests.pair.trace import Change, Step, Trace
from parity_tests.report.text import first_line, located

Factory = Callable[..., Any]
_PARTS = ("torch", "jax", "pair")
# By framework: the prefix of its arguments, and the class that wraps its modules.
_WRAPPERS = {"torch": ("torch", "TorchSide"), "jax": ("flax", "JaxSide")}
_LACKS = re.compile(r"No module named '(torch|jax|jaxlib|flax|numpy|ml_dtypes|safetensors|einops|scipy)\b")
_EXTRAS = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "flax": "jax", "einops": "pair", "scipy": "pair"}
_METHODS = {name for name, value in vars(Side).items() if callable(value) and not name.startswith("_")}
_RECORDS = {
    record.__name__: record for record in (ParameterSpec, Ensemble, Constants, Variant, Layout, Step, Change, Trace)
}
_DTYPES = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BF16": numpy_dtype("bfloat16"),
    "BOOL": np.dtype(np.bool_),
}
_SEPARATOR = " "
# The file format has no complex numbers of 64-bit parts: they are written as pairs of parts, and marked so.
_COMPLEX = {np.dtype(np.complex64): np.dtype(np.float32), np.dtype(np.complex128): np.dtype(np.float64)}


def _seeded_initialisation(parts: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    """Seed torch, whose modules initialise themselves from a global state; Flax takes keys from the factory."""
    if "torch" not in parts or not framework_available("torch"):
        return contextlib.nullcontext()
    return importlib.import_module("parity_tests.frameworks.torch.pair").seeded(0)


def names_in(spec: str) -> tuple[str, str]:
    """Return the module and the factory that a spec names.

    Raises:
        ValueError: if it does not name both.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"pair: expected package.module:factory, got {spec!r}; name a function that returns the pair.")
    return module_name, attribute


def _lacked(error: BaseException) -> str:
    """Say which extra brings the package that an import did not find; nothing of other packages and errors."""
    found = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    extra = _EXTRAS.get(str(found).partition(".")[0])
    return f"; install the extra: pip install 'partitioned-linear[{extra}]'" if extra else ""


def load_factory(spec: str, parts: tuple[str, ...] = _PARTS) -> Factory:
    """Import a factory.

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
            f"pair: expected a module that can be imported, got {module_name!r} ({error})"
            f"{_lacked(error) or '; check the name and the path'}."
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"pair: expected a module that can be imported, got one that raised {located(error)}{_lacked(error)}."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        known = ", ".join(name for name in own if not name.startswith("_")) or "none"
        raise ValueError(f"pair: expected a function of {module_name}, got {attribute!r}; it has {known}.")
    return factory


def _required(factory: Factory) -> int:
    """Count the arguments that a call needs; an argument with a default is the factory's own affair."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"pair: expected a function whose arguments can be counted, got {type(factory).__name__}; wrap it in one."
        ) from None
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)


def build(factory: Factory, parts: tuple[str, ...] = _PARTS) -> dict[str, Any]:
    """Call a factory.

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
        raise ValueError(
            f"pair: expected a factory that returns, got one that raised {located(error)}{_lacked(error)}."
        ) from error
    for result in built:
        if not isinstance(result, dict):
            raise ValueError(
                f"pair: expected a dict of check_pair's arguments, got {type(result).__name__}; return one."
            )
    return {name: value for result in built for name, value in result.items()}


def make_side(framework: str, arguments: Mapping[str, Any], device: str) -> Side:
    """Import one framework and wrap its part of a pair.

    Raises:
        ValueError: for another framework, or without a module.
        TypeError: for a module of another kind.
    """
    if framework not in _WRAPPERS:
        raise ValueError(f"framework: expected torch or jax, got {framework!r}; choose one of these.")
    prefix, wrapper = _WRAPPERS[framework]
    module = arguments.get(f"{prefix}_module")
    if module is None:
        raise ValueError(f"{prefix}_module: expected a module or a function, got None; pass one.")
    if not framework_available(framework):
        raise ModuleNotFoundError(
            f"{prefix}_module: expected {framework} for this side, got none in this interpreter; "
            f"install the extra: pip install 'partitioned-linear[{framework}]'.",
            name=framework,
        )
    wrap = getattr(importlib.import_module(f"parity_tests.frameworks.{framework}.pair"), wrapper)
    return wrap(module, *(arguments.get(f"{prefix}_{name}") for name in ("kwargs", "params", "call")), device)


class RemoteError(RuntimeError):
    """The other interpreter refused a call; carries its one sentence."""


class RemoteSide:
    """Offer the methods of `side.Side` by asking another interpreter. Use as a context, which ends the process.

    Args:
        framework: `torch` or `jax`.
        spec: `package.module:factory`, where the factory builds single parts.
        python: the interpreter, which needs that framework, numpy, ml_dtypes, safetensors, einops and scipy.
        device: `cpu`, `cuda` or `auto`.
        timeout_s: seconds that one answer may take.

    Raises:
        ValueError: if the interpreter cannot be started, or cannot build the side; one sentence.
    """

    def __init__(
        self, framework: str, spec: str, python: str, device: str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self.framework = framework
        try:
            self._process = Interpreter(
                __name__,
                [framework, spec, device],
                who=f"the {framework} interpreter",
                python=python,
                timeout_s=timeout_s,
            )
        except ProcessError as error:
            raise ValueError(
                f"{framework}_python: expected an interpreter, got {python!r}: {error}; check the path."
            ) from None
        try:
            self.name, environment = self._received()
        except (ProcessError, RemoteError) as error:
            self._process.end()
            hint = f"; install it there: {python} -m pip install 'partitioned-linear[{framework},pair]'"
            hint = hint if _LACKS.search(str(error)) else ""
            raise ValueError(
                f"pair: the {framework} side of {spec} cannot be built in {python}: {error}{hint}"
            ) from None
        except BaseException:
            self._process.end()
            raise
        side, packages = _WRAPPERS[framework][0], environment["packages"]
        versions = [f"{name} {packages[name]}" for name in dict.fromkeys((framework, side)) if packages[name]]
        told = f"the {side} side ran in an interpreter of its own: Python {environment['python']}"
        self._runs_in = f"{told}, {', '.join(versions)}"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._process.end()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return one of the methods of `side.Side`."""
        if method not in _METHODS:
            raise AttributeError(method)

        def call(*arguments: Any, **named: Any) -> Any:
            message, payload = _packed((arguments, named))
            self._process.send({"method": method, **message}, payload)
            return self._received()

        return call

    def notes(self) -> tuple[str, ...]:
        """Say where the side ran, beside its own notes."""
        return (self._runs_in, *self.__getattr__("notes")())

    def _received(self) -> Any:
        # A ProcessError is no RemoteError: a refusal skips a dtype, a dead interpreter must end the check.
        message = self._process.receive()
        if "error" in message:
            raise RemoteError(f"{message['kind']}: {message['error']}")
        return _unpacked(message)


def main(channel: Channel, framework: str, spec: str, device: str) -> None:
    """Build a side in this interpreter and answer requests until the connection ends."""

    def refuse(error: Exception) -> None:
        channel.send({"error": first_line(error), "kind": type(error).__name__})

    try:
        side = make_side(framework, build(load_factory(spec, (framework,)), (framework,)), device)
    except (ImportError, TypeError, ValueError) as error:
        return refuse(error)
    channel.send(*_packed((side.name, environment())))
    while (request := channel.receive()) is not None:
        try:
            arguments, named = _unpacked(request)
            answer = _packed(getattr(side, request["method"])(*arguments, **named))
        except CANNOT_RUN as error:
            # The caller decides what a refusal means; this process stays there for the next request.
            refuse(error)
        else:
            channel.send(*answer)
    return None


def _packed(value: Any) -> tuple[dict[str, Any], bytes]:
    """Return a value as a message and the bytes of a safetensors file with its arrays, bit for bit. Never pickle.

    Raises:
        ValueError: for a dtype that safetensors does not have.
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any, name: str = "") -> Any:
        if isinstance(value, np.ndarray | np.generic):
            array = np.array(value, order="C")
            key = f"{len(arrays)}{_SEPARATOR}{array.dtype if array.dtype in _COMPLEX else ''}"
            array = array[..., None].view(_COMPLEX[array.dtype]) if array.dtype in _COMPLEX else array
            if array.dtype not in _DTYPES.values():
                raise ValueError(f"{name}: expected an array of numbers or booleans, got {array.dtype}; convert it.")
            arrays[key] = array
            return {"array": key}
        if isinstance(value, Mapping):
            return {"dict": {key: plain(entry, key) for key, entry in value.items()}}
        if type(value) in _RECORDS.values():
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {"record": type(value).__name__, "fields": plain(fields)}
        if isinstance(value, tuple) and type(value) is tuple:
            return {"tuple": [plain(entry, name) for entry in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(
            "inputs: expected arrays, numbers, texts, dicts, lists and tuples beside another interpreter, got "
            f"{type(value).__name__}; make it there, by torch_call= or flax_call=."
        )

    return {"value": plain(value)}, safetensors.numpy.save(arrays)


def _unpacked(message: Mapping[str, Any]) -> Any:
    """Return what `_packed` was given."""
    arrays: dict[str, np.ndarray] = {}
    for key, tensor in safetensors.deserialize(message["payload"]):
        array = np.frombuffer(bytearray(tensor["data"]), _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        of_parts = key.partition(_SEPARATOR)[2]
        arrays[key] = array.view(np.dtype(of_parts))[..., 0] if of_parts else array

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return arrays[value["array"]]
        if "dict" in value:
            return {key: whole(entry) for key, entry in value["dict"].items()}
        if "record" in value:
            return _RECORDS[value["record"]](**whole(value["fields"]))
        return tuple(map(whole, value["tuple"]))

    return whole(message["value"])
