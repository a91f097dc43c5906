"""Look at a pair beside its numbers: unmapped buffers, branches never taken, wider formats, arrays not compared.

A buffer at its initial value (a mean of 0, a variance of 1, a counter at 0) hides a port that ignores it. A buffer
that results depend on is therefore refused until a rule maps or keeps it, or `not_compared=` names it. A table (of
positions, of a mask) is only listed: a call leaves it as it is, the other side computes it, its numbers differ from
one another and show in the results, which are compared.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from parity_tests.judge.dtypes import as_stored, format_name, is_inexact, numpy_dtype
from parity_tests.pair.draws import draw_like
from parity_tests.pair.legs import Pair, Values
from parity_tests.pair.mapping import KEEP, SIDES
from parity_tests.pair.patterns import MappingError
from parity_tests.pair.report import PairRow
from parity_tests.pair.side import PREFIX, SHOWN, Arrays
from parity_tests.report.text import first_line

_ONE_BY_ONE = 16  # arrays that are changed one by one; more of them are changed together where they have one last name
_MOST_NAMES = 12  # that a refusal lists
# Exceptions of a side that cannot be watched; it runs, as its results have shown.
_CANNOT = (NotImplementedError, RuntimeError, TypeError, ValueError)

QUICK = (
    "a quick look: it did not watch which branches of clamps and selections no value took, nor which operations work "
    "in another format, and tried no cause; the flax side was judged by the rounding noise of the torch side, and by "
    "its own only if a comparison failed"
)
COMPLEX = (
    "complex tensors are compared by real and imaginary part; their gradients are dL/dRe + i dL/dIm, PyTorch's "
    "convention, to which JAX's are conjugated"
)


def depended_on(run: Callable[[Arrays], Arrays], own: Arrays, names: Sequence[str]) -> tuple[str, ...]:
    """Return the arrays of one side on which its results depend, found by changing them.

    What a call makes of an array itself does not count.

    Args:
        run: a call's results when some of the arrays are others.
        own: the arrays as they are.
        names: of the arrays to try; many of them are changed together where they have one last name.
    """
    if not names:
        return ()
    before = run({})

    def matter(group: Sequence[str]) -> bool:
        try:
            after = run({name: _changed(own[name]) for name in group})
        except Exception:  # an index out of range, an assertion of the module: the array was used
            return True
        hidden = {f"{PREFIX}{name}" for name in group}
        return any(not _same(value, after.get(name)) for name, value in before.items() if name not in hidden)

    if not matter(names):
        return ()
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name if len(names) <= _ONE_BY_ONE else name.rpartition(".")[2], []).append(name)
    found = {name for group in groups.values() if matter(group) for name in group}
    return tuple(name for name in names if name in found)


def _changed(value: np.ndarray) -> np.ndarray:
    """Return other values that the array might hold: of its own signs and magnitude, indices inside their range."""
    if value.dtype == np.bool_:
        return ~value
    if not is_inexact(value):
        rolled = np.roll(value.ravel(), 1).reshape(value.shape)
        return rolled if (rolled != value).any() else value + value.dtype.type(1)
    if not np.isfinite(value).all():  # an additive mask
        return np.where(np.isfinite(value), value, value.dtype.type(0))
    return as_stored(draw_like(value, np.random.default_rng(0)), value.dtype)


def _same(first: np.ndarray, second: np.ndarray | None) -> bool:
    return second is not None and np.array_equal(first, second, equal_nan=is_inexact(first))


def refuse_unmapped(pair: Pair, values: Values, state: bool) -> None:
    """Refuse a pair with unmapped arrays that results depend on, or that a call updates on both sides.

    Raises:
        MappingError: with what to do about them.
    """
    covers, unmapped = pair.left_out.covers, pair.mapping.unmapped
    names = {side: [name for name in unmapped[side] if not covers(name)] for side in unmapped}
    found: list[tuple[str, str]] = []
    for key, side in SHOWN.items():

        def run(changed: Arrays, key: str = key) -> Arrays:
            parameters, inputs, cotangents = values.of(key)
            return pair.sides[key].truth({**parameters, **changed}, inputs, cotangents)

        found += [(side, name) for name in depended_on(run, values.parameters[key], names[side])]
    found, pair.tables = _without_tables(pair, found)
    if state:
        # One that a call updates on one side alone is listed; two may be meant as one, a counter on either side.
        sizes = {side: {name: pair.specs[key][name].value.size for name in names[side]} for key, side in SHOWN.items()}
        updated = {side: [name for name in names[side] if name in pair.updated[key]] for key, side in SHOWN.items()}
        for side, other in (("torch", "flax"), ("flax", "torch")):
            there = {sizes[other][name] for name in updated[other]}
            found += [(side, name) for name in updated[side] if sizes[side][name] in there]
    if found:
        raise MappingError(_refusal(tuple(dict.fromkeys(found))))


def _without_tables(pair: Pair, found: list[tuple[str, str]]) -> tuple[list, tuple]:
    """Split off the tables of one side; with arrays left on both sides, one may be meant as the other."""
    keys = {side: key for key, side in SHOWN.items()}
    if len({side for side, _ in found}) > 1:
        return found, ()
    tables = tuple(
        (side, name)
        for side, name in found
        if name not in pair.updated[keys[side]] and _differ(pair.specs[keys[side]][name].value)
    )
    return [entry for entry in found if entry not in tables], tables


def _refusal(found: Sequence[tuple[str, str]]) -> str:
    names = [f"{side} buffer {name}" for side, name in found]
    shown = ", ".join(names[:_MOST_NAMES]) + f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
    patterns = dict.fromkeys(f"*.{name.rpartition('.')[2]}" if "." in name else name for _, name in found)
    consent = ", ".join(map(repr, patterns)) + "," * (len(patterns) == 1)
    side, name = found[0]
    rule = (name, None, KEEP) if side == "torch" else (None, name, KEEP)
    return (
        "params: expected a rule for every buffer that results depend on, or that a call updates on both sides, got "
        f"none for {shown}; map them (at its initial value a buffer hides a port that ignores it), keep constants by "
        f"rules such as {rule!r}, or consent by not_compared=({consent})."
    )


def _differ(value: np.ndarray) -> bool:
    return bool((value != value.ravel()[0]).any())


class Remarks:
    """Collect the remarks on a pair's runs, and put them on its rows.

    Args:
        pair: as judged.

    Attributes:
        notes: every remark once, for the report.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._branches: dict[str, tuple[str, ...]] = {}
        # By side and dtype, then by tensor: a format that is not the dtype's; and what works in wider ones.
        self._returned: dict[tuple[str, str], dict[str, str]] = {}
        self._wider: dict[tuple[str, str], str] = {}
        self.notes: dict[str, None] = {}

    def on_branches(self, values: Values) -> None:
        """Ask both sides which branches these values never took."""
        for key, side in self._pair.sides.items():
            try:
                found = side.unexercised(*values.of(key))
            except _CANNOT as error:
                self.notes[f"the branches of the {SHOWN[key]} side were not watched: {first_line(error)}"] = None
                continue
            self._branches[key] = tuple(f"{SHOWN[key]}: {sentence}" for sentence in found)
            self.notes |= dict.fromkeys(self._branches[key])

    def on_overflow(self, values: Values, wide: Values) -> None:
        """Look for arrays with numbers beyond a leg's format: they are infinite on both sides and in both truths."""
        named = [
            {**v.parameters["torch"], **dict(zip(self._pair.layout.names, v.inputs["torch"], strict=True))}
            for v in (values, wide)
        ]
        lost = [
            name
            for name, a in named[0].items()
            if is_inexact(a) and (np.isfinite(named[1][name]) > np.isfinite(a)).any()
        ]
        if lost:
            self.notes[f"{values.dtype} cannot hold all numbers of {', '.join(lost)}: they are infinite in it"] = None

    def on_formats(self, key: str, values: Values, *results: Arrays, watched: bool = True) -> None:
        """Look at the formats in which a side returned and, if watched, computed."""
        dtype = values.dtype
        stored = numpy_dtype(dtype)
        formats = {
            name: format_name(array.dtype)
            for found in results
            for name, array in found.items()
            # There are no complex numbers of 16-bit parts; sums of gradients are the judge's own.
            if is_inexact(array)
            and name.removeprefix("d_") not in self._pair.mapping.added_up
            and format_name(array.dtype) != (format_name(as_stored(array, stored).dtype))
        }
        self._returned[key, dtype] = formats
        for name in sorted(set(formats.values())):
            tensors = [tensor for tensor, returned in formats.items() if returned == name]
            self.notes[f"{SHOWN[key]} returns {_listed(tensors)} in {name} where {dtype} is judged"] = None
        if dtype == "float64" or not watched:
            return
        side = self._pair.sides[key]
        try:
            found = side.wider_operations(values.parameters[key], values.inputs[key], dtype)
        except _CANNOT as error:
            self.notes[f"the formats of the {SHOWN[key]} side were not watched: {first_line(error)}"] = None
            return
        if found:
            wider = f"{SHOWN[key]} computes in another format than the {dtype} that is judged: {_listed(found)}"
            self._wider[key, dtype] = wider
            self.notes[wider] = None

    def on_bounds(self, dtype: str, truths: Arrays, bounds: Mapping[str, Arrays]) -> None:
        """Look for tensors of which the compiled flax side shows nothing, though the torch side does.

        Kernels with fused additions leave something where equal products cancel, and a square root, a quotient or a
        comparison with zero may make much of it.
        """

        def drowned(key: str, name: str) -> bool:
            size = np.abs(truths[name]).max(initial=0.0, where=np.isfinite(truths[name]))
            return bool(0 < size <= np.max(np.abs(bounds[key].get(name, 0.0)), initial=0.0))

        if found := [name for name in truths if drowned("jax", name) and not drowned("torch", name)]:
            self.notes[
                f"rounding alone may change {_listed(found)} in {dtype} by more than all of it on the flax side, and "
                "not on the torch side: compiled, equal products need not cancel to zero (a fused multiply-add), so "
                "that a guard that compares with zero may let them pass; a guard by position (jnp.eye) does not"
            ] = None

    def added(self, row: PairRow) -> PairRow:
        """Return the row with what there is to say of it."""
        said = []
        for key in self._pair.sides:
            if row.framework not in (key, "torch+jax"):
                continue
            if row.rung == "forward":
                said += self._branches.get(key, ())
                said += filter(None, [self._wider.get((key, row.dtype))])
            if (returned := self._returned.get((key, row.dtype), {}).get(row.tensor)) and not row.mode:
                said.append(f"{SHOWN[key]} returns {row.tensor} in {returned} where {row.dtype} is judged")
        return dataclasses.replace(row, note="; ".join(said)) if said else row


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def left_out(pair: Pair, never_trained: Sequence[str], gradients: bool, state: bool) -> Iterator[str]:
    """Name the arrays and gradients that are not compared, and say which buffers a call updates."""
    mapping, covers = pair.mapping, pair.left_out.covers
    changed = {side: pair.changed(key) for key, side in (("torch", "torch"), ("jax", "flax"))}
    names = {side: dict.fromkeys((*mapping.unmapped[side], *(() if state else changed[side]))) for side in SIDES}
    for side, key in zip(SIDES, ("torch", "jax"), strict=True):
        for name in names[side]:
            kind = "frozen parameter" if pair.specs[key][name].frozen else "buffer"
            updates = ", which a call updates" if name in changed[side] else ""
            consent = ", left out by not_compared=" if name in mapping.unmapped[side] and covers(name) else ""
            constant = ", a constant whose own values results depend on" if (side, name) in pair.tables else ""
            yield f"{side} {kind} {name}{updates}{constant}{consent}"
    yield from (f"{text} is held at zero" for text in mapping.held_at_zero)
    yield from (f"{text} keeps its own values" for text in mapping.kept)
    if gradients:
        untrained = [name for name in mapping.torch_names if name in {*mapping.untrained, *never_trained}]
        if untrained:
            yield f"the gradients of {', '.join(untrained)}, which neither side trains"
        trained = [name for name in mapping.trained if name not in untrained and covers(f"d_{name}")]
        yield from (f"the gradient of {name}, left out by not_compared=" for name in trained)
        inputs = [name for name in pair.layout.names if covers(f"d_{name}")]
        yield from (f"the gradient of {name}, left out by not_compared=" for name in inputs)
