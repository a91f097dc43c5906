"""Branches that a traced JAX program takes, and its operations in a wide format.

Of JAX's own code only what a user writes down counts (`where`, `clip`, `relu6`): an index that is normalised, or
a softmax that guards against infinities, has branches that do not matter here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parity_tests.frameworks.jax.noise import Interpreter, Mark
from parity_tests.frameworks.jax.operations import EXACT, INLINED, aval_of, inner_programs, names
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair import calls
from parity_tests.pair.side import Branch, Branches, is_bound

_JAX = str(Path(jax.__file__).resolve().parent)
# Files in which this package calls a module: lines further out are not the user's.
_CALLERS = tuple(str(Path(__file__).with_name(name)) for name in ("modules.py", "pair.py"))
_CALLERS += (calls.__file__,)
_RECORDER = str(Path(__file__).with_name("recorder.py"))  # stands between a module and its caller
_LIBRARIES = ("site-packages", "dist-packages")
# Folders of JAX that hold functions for users; the others are its machinery.
_FUNCTIONS = ("numpy", "nn", "lax", "scipy", "random", "image", "ops")
_WRITTEN = names("""
where select select_n clip clamp minimum maximum min max relu relu6 leaky_relu elu selu celu hard_tanh hard_sigmoid
hard_silu hard_swish sign abs absolute fabs mod remainder fmod rem floor_divide floor round rint around round_float
greater less greater_equal less_equal equal not_equal gt lt ge le eq ne cond switch isnan nan_to_num
operator_gt operator_lt operator_ge operator_le operator_eq operator_ne operator_mod operator_floordiv
operator_abs operator_round op meth call call_impl fn wrapper deferring_binary_op cond_with_per_branch_args
standard_insert_pvary pvary insert_pvary reduced_vary_cast core_max core_min broadcast_to
""")
# Of these a sentence names the function beside the operation.
_NAMED = names("""
clip relu relu6 leaky_relu elu selu celu hard_tanh hard_sigmoid hard_silu hard_swish mod remainder fmod floor_divide
around isnan nan_to_num
""")
_REMAINDERS = names("mod remainder fmod floor_divide operator_mod operator_floordiv")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_PASSING_ON = names("broadcast_in_dim convert_element_type reshape squeeze copy expand_dims")
_BRANCHING = names("max min clamp select_n sign abs floor round rem cond") | set(_COMPARISONS)


# JAX's functions, files, and the user's line, through which one came to an operation.
Origin = tuple[tuple[str, ...], tuple[str, ...], str]


@dataclass(frozen=True)
class Site:
    """One operation of a traced program, at one place."""

    equation: JaxprEqn  # the operation
    functions: tuple[str, ...]  # of JAX, through which the user came to it, innermost first
    files: tuple[str, ...]  # where these and a library's functions stand, down to the user's own
    place: str  # the user's line, as `port.py:12`; empty if unknown
    moving: tuple[bool, ...]  # which operands depend on the program's arguments

    def is_of_a_norm(self) -> bool:
        """Return whether a library's code for normalisation asks."""
        return any("norm" in Path(file).name and not file.startswith(_JAX) for file in self.files)


def _frames(equation: JaxprEqn) -> list[tuple[str, str, int]]:
    traceback = equation.source_info.traceback
    frames = traceback.frames if traceback else []
    return [
        (str(Path(f.file_name)), f.function_name, getattr(f, "line_num", None) or getattr(f, "start_line", 0))
        for f in frames
    ]


@functools.cache
def _is_of_jax(file: str) -> bool:
    return file.startswith(_JAX) or Path(file).resolve().as_posix().startswith(_JAX)


def origin_of(equation: JaxprEqn, outer: Origin) -> Origin:
    """Return functions, files and place of an operation, which inherits them where JAX's own code asks."""
    functions, files = [], []
    if equation.primitive.name in ("jit", "pjit") and (name := equation.params.get("name")):
        functions.append(_bare(name))
    for file, function, line in _frames(equation):
        if file == _RECORDER:
            continue
        if _is_of_jax(file):
            if any(f"{folder}/" in file.rpartition("_src/")[2] for folder in _FUNCTIONS):
                functions.append(_bare(function))
                files.append(file)
        else:
            if file in _CALLERS:  # the module is a library's own
                return tuple(functions), tuple(files), ""
            files.append(file)
            if not any(library in file for library in _LIBRARIES):
                return tuple(functions), tuple(files), f"{Path(file).name}:{line}"
    return (*functions, *outer[0]), (*files, *outer[1]), outer[2]


def _bare(name: str) -> str:
    return name.rpartition(".")[2].strip("_")


def sites(closed: ClosedJaxpr) -> dict[tuple[int, ...], Site]:
    """Return every operation of a program, those of inner programs included, by the path to it.

    A path has the inner programs' ids between the numbers of the operations.
    """
    found: dict[tuple[int, ...], Site] = {}

    def walk(jaxpr: Jaxpr, path: tuple[int, ...], outer: Origin, flags: Sequence[bool]) -> list[bool]:
        moving: dict[Var, bool] = dict.fromkeys(jaxpr.constvars, False) | dict(zip(jaxpr.invars, flags, strict=True))
        for index, equation in enumerate(jaxpr.eqns):
            moved = tuple(not isinstance(atom, Literal) and moving[atom] for atom in equation.invars)
            origin, here = origin_of(equation, outer), (*path, id(jaxpr), index)
            found[here] = Site(equation, *origin, moved)
            for program in inner_programs(equation):
                one_to_one = equation.primitive.name in INLINED and len(program.invars) == len(moved)
                walk(program, here, origin, moved if one_to_one else [any(moved)] * len(program.invars))
            moving |= dict.fromkeys(equation.outvars, any(moved))
        return [not isinstance(atom, Literal) and moving[atom] for atom in jaxpr.outvars]

    walk(closed.jaxpr, (), ((), (), ""), [True] * len(closed.jaxpr.invars))
    return found


def branching(found: Mapping[tuple[int, ...], Site]) -> dict[tuple[int, ...], Site]:
    """Return the operations whose branches are worth watching."""
    return {
        path: site
        for path, site in found.items()
        if site.equation.primitive.name in _BRANCHING
        and (site.moving[0] if site.equation.primitive.name in ("select_n", "cond") else any(site.moving))
        and set(site.functions) <= _WRITTEN
        and not site.is_of_a_norm()
        and (site.equation.primitive.name == "rem" or not _REMAINDERS & set(site.functions))
    }


def wide_operations(found: Mapping[tuple[int, ...], Site], dtype: str) -> tuple[str, ...]:
    """Return the operations on wider formats than `dtype`, or on the other one of its width (bfloat16, float16).

    Their lines come with them; casts and choices do not count.

    Sums, norms and attention are meant to be wider than their operands inside, and are left out.
    """
    places: dict[tuple[str, str], dict[str, None]] = {}
    size = numpy_dtype(dtype).itemsize
    for site in found.values():
        name = site.equation.primitive.name
        if name in EXACT | INLINED or name == "convert_element_type" or inner_programs(site.equation):
            continue
        atoms = [*site.equation.outvars, *(a for a in site.equation.invars if aval_of(a).ndim)]
        dtypes = [aval_of(a).dtype for a in atoms]
        wide = [str(d) for d in dtypes if jnp.issubdtype(d, jnp.floating) and d.itemsize >= size and str(d) != dtype]
        inside = any(Path(file).name == "reductions.py" for file in site.files)
        inside = inside or any("dot_product_attention" in function for function in site.functions)
        if wide and not inside and not site.is_of_a_norm():
            places.setdefault((name, wide[0]), {})[site.place] = None
    return tuple(
        f"{name} in {used}" + (f" ({', '.join(filter(None, lines))})" if any(lines) else "")
        for (name, used), lines in places.items()
    )


class BranchWatch(Interpreter):
    """Evaluate a program in float64 and reports the branches of some of its operations, from inside `jit`.

    Args:
        watched: from `branching`.
        see: `(path, numbers)`, called while the program runs: for every branch whether it was taken, then where it
            begins, then the smallest and the largest operand.
    """

    def __init__(self, watched: Mapping[tuple[int, ...], Site], see: Callable[..., None]) -> None:
        super().__init__()
        self._watched, self._see = watched, see
        # The path to the operation at hand, that to the program it stands in, and the numbers of those to come.
        self._path: tuple[int, ...] = ()
        self._within: tuple[int, ...] = ()
        self._numbers: list[Iterator[int]] = []
        # Comparisons by the id of their result, which is kept: what decides a selection is reported by that.
        self._compared: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self.consumed: set[tuple[int, ...]] = set()

    def _jaxpr(
        self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], marks: Sequence[Mark]
    ) -> tuple[list[Any], list[Mark]]:
        outer = self._within
        self._within = (*self._path, id(jaxpr))
        self._numbers.append(iter(range(len(jaxpr.eqns))))
        try:
            return super()._jaxpr(jaxpr, consts, arguments, marks)
        finally:
            self._numbers.pop()
            self._path, self._within = self._within[:-1], outer

    def _equation(
        self, equation: JaxprEqn, operands: list[Any], marks: list[Mark]
    ) -> tuple[Sequence[Any], Sequence[Mark]]:
        name, here = equation.primitive.name, (*self._within, next(self._numbers[-1]))
        if name in ("select_n", "cond", "reduce_or", "reduce_and") and (known := self._compared.get(id(operands[0]))):
            self.consumed.add(known[1])
        if (site := self._watched.get(here)) and (numbers := _numbers(site, operands)) is not None:
            jax.debug.callback(functools.partial(self._see, here), numbers)
        self._path = here
        results, marked = super()._equation(equation, operands, marks)
        if name in _COMPARISONS:
            self._compared[id(results[0])] = results[0], here
        elif name in _PASSING_ON and (known := self._compared.get(id(operands[0]))):
            self._compared[id(results[0])] = results[0], known[1]
        return results, marked


def _numbers(site: Site, operands: Sequence[Any]) -> Any:
    """Return as one vector the branches taken, their bounds (NaN for none) and the extent of the operand."""
    name = site.equation.primitive.name
    if any(value.size == 0 or (jnp.iscomplexobj(value) and name not in ("select_n", "cond")) for value in operands):
        return None
    masks, bounds, operand = _MASKS[name](site, operands)
    low, high = _extent(operand)
    taken = [jnp.any(mask).astype(jnp.float64) for mask in masks]
    return jnp.stack([*taken, *(jnp.asarray(bound, jnp.float64) for bound in bounds), low, high])


def _extent(operand: Any) -> tuple[Any, Any]:
    nan = jnp.asarray(jnp.nan, jnp.float64)
    if operand is None or operand.dtype == jnp.bool_:
        return nan, nan
    finite = jnp.isfinite(operand)
    wide = operand.astype(jnp.float64)
    return jnp.min(wide, initial=jnp.inf, where=finite), jnp.max(wide, initial=-jnp.inf, where=finite)


def _limit(value: Any) -> Any:
    return value.reshape(()) if value.size == 1 else jnp.nan


def _extremum(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    first, second = operands
    if all(site.moving):
        return [first > second, first < second], [jnp.nan, jnp.nan], None
    x, limit = (first, second) if site.moving[0] else (second, first)
    return [x < limit, x > limit], [_limit(limit)] * 2, x


def _clamp(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    low, x, high = operands
    return [x < low, x > high, (x >= low) & (x <= high)], [_limit(low), _limit(high), jnp.nan], x


def _selection(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    which = operands[0]
    if which.dtype == jnp.bool_:
        return [which, ~which], [jnp.nan] * 2, None
    count = len(site.equation.params.get("branches", operands[1:]))
    # Out of range counts as the nearest.
    index = jnp.clip(which, 0, count - 1)
    return [index == k for k in range(count)], [jnp.nan] * count, None


def _comparison(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    result = getattr(lax, site.equation.primitive.name)(*jnp.broadcast_arrays(*operands))
    return [result, ~result], [jnp.nan] * 2, operands[0]


def _remainder(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    x, y = operands
    return [(x != 0) & (jnp.sign(x) != jnp.sign(y))], [jnp.nan], x


def _tie(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    return [operands[0] - jnp.floor(operands[0]) == 0.5], [jnp.nan], operands[0]


def _negative(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    return [operands[0] < 0], [jnp.nan], operands[0]


def _signs(site: Site, operands: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    return [operands[0] < 0, operands[0] > 0], [jnp.nan] * 2, operands[0]


_MASKS: dict[str, Callable[[Site, Sequence[Any]], tuple[list[Any], list[Any], Any]]] = {
    **dict.fromkeys(("max", "min"), _extremum),
    "clamp": _clamp,
    **dict.fromkeys(("select_n", "cond"), _selection),
    **dict.fromkeys(_COMPARISONS, _comparison),
    "rem": _remainder,
    "round": _tie,
    **dict.fromkeys(("abs", "floor"), _negative),
    "sign": _signs,
}


def report(branches: Branches, path: tuple[int, ...], site: Site, numbers: np.ndarray) -> None:
    """Put the numbers of `BranchWatch` into words."""
    count = (len(numbers) - 2) // 2
    taken, bounds, (low, high) = numbers[:count] > 0, numbers[count : 2 * count], numbers[2 * count :]
    if not np.isfinite([low, high]).all():
        low = high = np.nan
    name, text, found = site.equation.primitive.name, site.equation.primitive.name, []
    if (name in ("max", "min") and not all(site.moving)) or name == "clamp":
        words = ("below", "above", "between")[:count]
        for word, was, bound in zip(words, taken, bounds, strict=True):
            shown = "its limits" if word == "between" else "its limit" if np.isnan(bound) else f"{bound:.6g}"
            if np.isnan(bound) or is_bound(bound):
                limit = None if np.isnan(bound) else float(bound)
                found.append(Branch(f"a value {word} {shown}", bool(was), limit, word == "above"))
        limits = ["an array" if np.isnan(bound) else f"{bound:.6g}" for bound in bounds[: 1 if count == 2 else 2]]
        text = f"{name}(x, {', '.join(limits)})"
    else:
        found = [Branch(what, bool(was)) for what, was in zip(_words(site, count), taken, strict=True)]
    if name in _COMPARISONS:
        text = f"comparison {_COMPARISONS[name]}"
    if name == "select_n":
        text = "where" if "where" in site.functions else "select"
    if written := next((function for function in reversed(site.functions) if function in _NAMED), ""):
        text = f"{text} of {written}"
    branches.see(path, text, site.place, found, float(low), float(high))


def _words(site: Site, count: int) -> Iterator[str]:
    name = site.equation.primitive.name
    if name in ("max", "min"):
        return iter(("a first operand above the second", "one below it"))
    if name in _COMPARISONS:
        return iter(("one that is true", "one that is not"))
    if name in ("select_n", "cond"):
        if aval_of(site.equation.invars[0]).dtype == jnp.bool_:
            return iter(("a condition that is true", "a condition that is false"))
        if count == 2:
            return iter(("a condition that is false", "a condition that is true"))
        return (f"case {k}" for k in range(count))
    if name == "rem":
        return iter(("operands of different signs",))
    if name == "round":
        return iter(("a tie (a number and a half)",))
    return iter(("a negative value", "a positive value")[:count])


_VIEWS = frozenset(
    ("transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "copy")
)


def first_uses(closed: ClosedJaxpr, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a program's first arguments in the order in which operations use them, those of inner too."""
    order: dict[str, None] = {}

    def walk(jaxpr: Jaxpr, known: dict[Var, str]) -> None:
        for equation in jaxpr.eqns:
            used = [None if isinstance(atom, Literal) else known.get(atom) for atom in equation.invars]
            if not any(used):
                continue
            if equation.primitive.name in _VIEWS and used[0]:
                known[equation.outvars[0]] = used[0]
                continue
            for program in inner_programs(equation):
                # Operands come last, behind the index of a `cond` or the constants of another program.
                count = min(len(program.invars), len(used))
                inner = zip(program.invars[-count:], used[-count:], strict=True) if count else ()
                walk(program, {variable: name for variable, name in inner if name})
            if not inner_programs(equation):
                order.update(dict.fromkeys(filter(None, used)))

    walk(closed.jaxpr, dict(zip(closed.jaxpr.invars, names, strict=False)))
    return tuple(order)
