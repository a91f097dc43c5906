"""Record a JAX program in float64: its operations with their modules and lines, and its values.

The names of modules come from the name stack: linen's own, and for nnx scopes that are opened around the calls of
submodules while a program is traced to be recorded. Scans are unrolled here, and only here.
"""

import contextlib
import contextvars
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from parity_tests.frameworks.jax.noise import Interpreter, Mark, normal_pool
from parity_tests.frameworks.jax.operations import INLINED, aval_of, is_inexact, widened
from parity_tests.frameworks.jax.watch import origin_of
from parity_tests.judge.dtypes import from_parts, parts
from parity_tests.pair.trace import CONSTANT, FEATURES, LARGEST, MEMBERS, MOST_ELEMENTS, Step, Trace, limits

_SCOPE = "module:"
_TURN = "#"  # stands, in a path, for the turn of a scan over stacked modules
_RECORDING: contextvars.ContextVar[bool] = contextvars.ContextVar("recording", default=False)
_WRAPPED = re.compile(r"\b\w+\(")  # jvp(...), transpose(...)
_MOST_STEPS = 20_000  # of an unrolled program; longer scans stay single operations


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let what is traced here carry the names of nnx modules."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)


@contextlib.contextmanager
def named_calls(module: nnx.Module) -> Iterator[None]:
    """Open a scope around every call of a submodule, if a program is traced to be recorded."""
    if not _RECORDING.get():
        yield
        return
    paths, kinds = {}, {}
    for path, part in nnx.iter_modules(module):
        paths[id(part)] = ".".join(map(str, path))
        kinds.setdefault(type(part), paths[id(part)])
    patched: dict[type, Any] = {}

    def named(call: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths:
                # A transformation such as nnx.scan has made it anew, from the module of its kind.
                base = kinds.get(type(self), type(self).__name__)
                for path, part in nnx.iter_modules(self):
                    paths.setdefault(id(part), ".".join((base + _TURN, *map(str, path))))
                known.append(self)
            if not (path := paths[id(self)]):
                return call(self, *args, **kwargs)
            with jax.named_scope(_SCOPE + path):
                return call(self, *args, **kwargs)

        return __call__

    known: list[Any] = []  # alive, so that no other module takes an id
    try:
        for kind in dict.fromkeys(base for found in kinds for base in found.__mro__):
            if "__call__" in vars(kind) and issubclass(kind, nnx.Module):
                patched[kind] = vars(kind)["__call__"]
                kind.__call__ = named(patched[kind])
        yield
    finally:
        for kind, call in patched.items():
            kind.__call__ = call


def _module(stack: str) -> str:
    """Return a module's dotted path from a name stack such as `transpose(jvp(Net))/layers_3/norm`."""
    parts = _WRAPPED.sub("", stack).replace(")", "").split("/")
    scopes = [part.removeprefix(_SCOPE) for part in parts if part.startswith(_SCOPE)]
    turns = [part for part in parts if part.startswith("[")]
    if scopes:
        return scopes[-1].replace(_TURN, f".{turns[-1]}" if turns else "")
    path = [part for part in parts[1:] if part]
    for k in range(len(path) - 1):
        if path[k].startswith("["):  # linen names the stacked module inside the scan
            path[k : k + 2] = path[k + 1], path[k]
    return ".".join(path)


def _fingerprint(value: Any) -> list[float]:
    """Return the features of `trace` of an array of real or complex numbers."""
    v = parts(np.asarray(value)).ravel()
    usable = np.abs(v) < LARGEST  # NaN is not
    v = v if usable.all() else v[usable]
    modulus, square = np.abs(v), v * v
    return [v.sum(), modulus.sum(), square.sum(), (square * modulus).sum(), (square * v).sum()]


class Recorder(Interpreter):
    """Take note of every operation of a program, which runs operation by operation: it would take long to compile.

    Args:
        member: number of the run; 0 has no noise.
        wanted: numbers of the values to keep; None for all, as long as they are few.
    """

    def __init__(self, member: int, wanted: frozenset[int] | None) -> None:
        # The pool is for loops too long to be unrolled, which are compiled with their noise.
        pool = jnp.asarray(normal_pool()) if member else None
        super().__init__("float32", np.int64(member), np.float64(1.0) if member else None, pool)
        self._run = member
        self._wanted, self._kept = wanted, 0
        self._numbers: dict[int, tuple[Any, int]] = {}  # the values are kept, so that no other has the same id
        self._scope, self._origin = "", ((), (), "")
        self._hidden = 0
        self.steps: list[Step] = []
        self.features: list[list[float]] = []
        self.arrays: dict[int, np.ndarray] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.constants: list[int] = []

    def recorded(self, closed: ClosedJaxpr, leaves: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Evaluate a program; return the numbers of its arguments and of its results, -1 for what has none."""
        given = [widened(leaf) for leaf in leaves]
        given = [
            value if is_inexact(value) else value.astype(aval_of(atom).dtype)
            for value, atom in zip(given, closed.jaxpr.invars, strict=True)
        ]
        numbers = [self._number(value) for value in given]
        marks = [Mark(False, 0.0)] * len(given)
        results, _ = self._jaxpr(closed.jaxpr, [self._const(const) for const in closed.consts], given, marks)
        return numbers, [self._known(value) for value in results]

    def _const(self, const: Any) -> jax.Array:
        value = super()._const(const)
        if is_inexact(value) and value.size > 1 and not self._hidden and self._known(value) < 0:
            self.constants.append(self._number(value))
        return value

    def _known(self, value: Any) -> int:
        return self._numbers.get(id(value), (None, -1))[1]

    def _number(self, value: Any) -> int:
        if not is_inexact(value):
            return -1
        number = len(self.shapes)
        self._numbers[id(value)] = value, number
        self.features.append(_fingerprint(value))
        self.shapes.append(tuple(value.shape))
        if number in self._wanted if self._wanted is not None else self._kept + value.size <= MOST_ELEMENTS:
            self._kept += value.size
            self.arrays[number] = np.asarray(value)
        return number

    def _equation(
        self, equation: JaxprEqn, operands: list[Any], marks: list[Mark]
    ) -> tuple[Sequence[Any], Sequence[Mark]]:
        if self._hidden:
            return super()._equation(equation, operands, marks)
        name, outer = equation.primitive.name, (self._scope, self._origin)
        # What a jitted function has traced before knows neither its caller's module nor its line.
        stack = str(equation.source_info.name_stack)
        self._scope = "/".join(filter(None, (outer[0], stack)))
        self._origin = outer[1] if self._run else origin_of(equation, outer[1])
        try:
            if name in INLINED:
                return super()._equation(equation, operands, marks)
            if name == "scan" and (length := equation.params["length"]) and self._is_short(equation, length):
                return self._unrolled(equation, operands, marks)
            if name == "cond":
                branches = equation.params["branches"]
                taken = branches[min(max(int(operands[0]), 0), len(branches) - 1)]
                return self._program(taken, operands[1:], marks[1:])
            if name == "while" and (results := self._turned(equation, operands)) is not None:
                return results, [Mark(False, 0.0)] * len(results)
            self._hidden += 1
            try:
                results, found = super()._equation(equation, operands, marks)
            finally:
                self._hidden -= 1
            # An operation that returns its operand makes no value.
            results = [jnp.copy(v) if self._known(v) >= 0 else v for v in results]
            self._step(name, operands, results)
            return results, found
        finally:
            self._scope, self._origin = outer

    def _program(self, closed: ClosedJaxpr, operands: Sequence[Any], marks: Sequence[Mark]) -> tuple[list, list]:
        return self._jaxpr(closed.jaxpr, [self._const(const) for const in closed.consts], list(operands), list(marks))

    def _turned(self, equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
        """Run a loop turn by turn; None if there are too many turns, or steps in them."""
        conditions, bodies = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        fixed, carry = operands[:conditions], operands[conditions + bodies :]
        state, scope = (len(self.steps), len(self.shapes), self._operation), self._scope
        for turn in itertools.count():
            self._scope = f"{scope}/[{turn}]"
            given = [*fixed, *carry]
            if not bool(self._program(equation.params["cond_jaxpr"], given, [Mark(False, 0.0)] * len(given))[0][0]):
                return carry
            if len(self.steps) > _MOST_STEPS:
                self._forget(*state)
                return None
            given = [*operands[conditions : conditions + bodies], *carry]
            carry = self._program(equation.params["body_jaxpr"], given, [Mark(False, 0.0)] * len(given))[0]
        return None

    def _forget(self, steps: int, values: int, operation: int) -> None:
        """Go back to before a loop."""
        del self.steps[steps:], self.features[values:], self.shapes[values:]
        self._numbers = {key: found for key, found in self._numbers.items() if found[1] < values}
        self.arrays = {number: array for number, array in self.arrays.items() if number < values}
        self.constants = [number for number in self.constants if number < values]
        self._operation = operation

    def _summed(self, value: Any, square: Any, terms: Any, u_acc: float, dtype: str) -> Any:
        if isinstance(value, Tracer):
            return super()._summed(value, square, terms, u_acc, dtype)
        modulus, square, terms = np.abs(np.asarray(value)), np.abs(np.asarray(square)), np.abs(np.asarray(terms))
        summation = u_acc**2 * (terms * modulus**2 / 3 + terms * square / 6 + square)
        deviation = np.sqrt(summation + (self._roundoff(dtype) * modulus) ** 2) + self._tiny(dtype) * (square != 0)
        return self._noised(np.asarray(value), deviation)

    def _round(self, value: Any, dtype: str, factor: Any = 1.0) -> Any:
        if isinstance(value, Tracer):
            return super()._round(value, dtype, factor)
        value = np.asarray(value)
        u = np.asarray(factor) * self._roundoff(dtype) * (math.sqrt(2.0) if np.iscomplexobj(value) else 1.0)
        return self._noised(value, u * np.abs(value) + self._tiny(dtype) * (value != 0))

    def _noised(self, value: np.ndarray, deviation: np.ndarray) -> Any:
        """Move a value as `noise` does, without compiling anything."""
        self._operation += 1
        odd = (self._operation * 0x9E3779B97F4A7C15 | 1) & ((1 << 64) - 1)
        key = np.uint64(((2 * self._run + 1) * odd) & ((1 << 64) - 1))

        def moved(part: np.ndarray) -> np.ndarray:
            bits = np.ascontiguousarray(np.abs(part)).view(np.uint64).reshape(part.shape) * key
            noise = deviation * normal_pool()[(bits >> np.uint64(48)).astype(np.int64)]
            return np.where(np.isfinite(part), part + np.where(np.isfinite(noise), noise, 0.0), part)

        deviation = deviation[..., None] if np.iscomplexobj(value) else deviation
        with np.errstate(invalid="ignore", over="ignore"):
            return jnp.asarray(from_parts(moved(parts(value)), value))

    def _step(self, name: str, operands: Sequence[Any], results: Sequence[Any]) -> None:
        reads = tuple(dict.fromkeys(k for k in map(self._known, operands) if k >= 0))
        writes = tuple(k for k in map(self._number, results) if k >= 0)
        self.steps.append(Step(name, _module(self._scope), self._origin[2], reads, writes))

    def _is_short(self, equation: JaxprEqn, length: int) -> bool:
        return len(self.steps) + length * _count(equation.params["jaxpr"].jaxpr) <= _MOST_STEPS

    def _unrolled(
        self, equation: JaxprEqn, operands: list[Any], marks: list[Mark]
    ) -> tuple[Sequence[Any], Sequence[Mark]]:
        params, scope = equation.params, self._scope
        if "ft_in" in params:  # since JAX 0.11: trees of constants, carries and slices
            consts, carries, _ = map(len, params["ft_in"].unpack())
        else:
            consts, carries = params["num_consts"], params["num_carry"]
        closed, length = params["jaxpr"], params["length"]
        carry, rows = operands[consts : consts + carries], []
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        for k in order:
            slices = []
            self._scope = scope
            for operand in operands[consts + carries :]:
                slices.append(lax.index_in_dim(operand, k, keepdims=False))
                self._step("slice", [operand], slices[-1:])
            self._scope = f"{scope}/[{k}]"
            inner = [self._const(const) for const in closed.consts]
            results, _ = self._jaxpr(closed.jaxpr, inner, [*operands[:consts], *carry, *slices], marks)
            carry = results[:carries]
            rows.append(results[carries:])
        self._scope = scope
        rows = rows[::-1] if params["reverse"] else rows
        stacked = [jnp.stack(list(column)) for column in zip(*rows, strict=True)]
        for column, whole in zip(zip(*rows, strict=True), stacked, strict=True):
            self._step("stack", column, [whole])
        results = [*carry, *stacked]
        return results, [Mark(False, 0.0)] * len(results)


def _count(jaxpr: Jaxpr) -> int:
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if isinstance(v, ClosedJaxpr | Jaxpr)]
    return len(jaxpr.eqns) + sum(_count(v.jaxpr if isinstance(v, ClosedJaxpr) else v) for v in inner)


def record(
    closed: ClosedJaxpr,
    names: Sequence[str],
    sources: Sequence[str],
    leaves: Sequence[Any],
    wanted: Sequence[int] | None,
    noisy: bool,
) -> Trace:
    """Run a traced program, with noise a few times more, and return what happened; 64-bit types are to be enabled.

    Args:
        closed: traced in `recording`.
        names: of its results.
        sources: names of its arguments.
        leaves: arguments.
        wanted: numbers of the values to keep; None for all, as long as they are few.
        noisy: whether limits are wanted.
    """
    kept = None if wanted is None else frozenset(wanted)
    runs = []
    for member in range(MEMBERS + 1 if noisy else 1):
        recorder = Recorder(member, kept if member == 0 else frozenset())
        runs.append((recorder, *recorder.recorded(closed, leaves)))
    recorder, given, results = runs[0]
    # A loop whose turns depend on its numbers has no common fingerprints.
    runs = [run for run in runs if [s.operation for s in run[0].steps] == [s.operation for s in recorder.steps]]
    members = np.array([run[0].features for run in runs]).reshape(len(runs), -1, FEATURES)
    sizes = np.array([int(np.prod(shape)) for shape in recorder.shapes])
    named = {name: number for name, number in zip(sources, given, strict=True) if number >= 0}
    return Trace(
        tuple(recorder.steps),
        named | {f"{CONSTANT}{number}": number for number in recorder.constants},
        {name: number for name, number in zip(names, results, strict=True) if number >= 0},
        members[0],
        limits(members, sizes),
        tuple(recorder.shapes),
        tuple(recorder.arrays),
        tuple(recorder.arrays.values()),
    )
