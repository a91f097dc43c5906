"""Search for the likely cause of a pair's mismatch: try changes to one side that make both agree in float64."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from parity_tests.causes.place import Findings, explained, place_of_shapes
from parity_tests.causes.search import block_orders, borrowed, exchanges, first_confirmed, head_orders
from parity_tests.judge.comparison import UNDECIDED, within
from parity_tests.judge.dtypes import FORMATS, as_stored, is_complex, is_float, is_inexact, parts, widened
from parity_tests.pair.judge import INFERENCE, KEYS, Evidence
from parity_tests.pair.legs import Pair, Values
from parity_tests.pair.report import RUNGS, PairRow
from parity_tests.pair.side import CANNOT_RUN, PREFIX, SHOWN, Arrays, is_output
from parity_tests.pair.trace import Place, shown

_OTHER = {"torch": "flax", "jax": "torch"}
_OTHER_KEY = {"torch": "jax", "jax": "torch"}
_MOST_NEAR = 100  # at a place
_MOST_TRIED = 500  # runs of a module; a model of many equal layers has millions of pairs to exchange
# A sentence, and a run that returns a side's key and its outputs under that change.
Hypothesis = tuple[str, Callable[[], tuple[str, Arrays]]]


def diagnosis(pair: Pair, evidence: Evidence, rows: Sequence[PairRow], tell: Callable[[str], None]) -> Findings:
    """Return the places of the first failing rung, and a sentence about its cause: the one at its place comes first."""
    rung = next((rung for rung in RUNGS if any(row.rung == rung for row in _failed(rows))), "")
    names = [row.tensor for row in _in_truth(_failed(rows)) if row.rung == rung]
    tell("looking for the cause")
    known = likely_cause(pair, evidence, rows) if rung == "gradients" else ""

    def general(near: Collection[str]) -> str:
        return known or likely_cause(pair, evidence, rows, near)

    if rung == "state" and names:
        return Findings(general(()), tuple(_place_of_buffer(pair, name) for name in names[:1]))
    if rung == "forward" and evidence.values is not None and not evidence.bounds and not evidence.random:
        names = [row.tensor for row in _failed(rows) if row.rung == rung]
        try:
            return Findings(general(()), place_of_shapes(pair, evidence, names))
        except CANNOT_RUN:
            return Findings(general(()))
    if rung not in ("forward", "gradients") or not names or not evidence.bounds or evidence.random:
        return Findings(general(()))
    tell("looking for the place")
    try:
        found = explained(pair, evidence, names, general)
        return dataclasses.replace(found, cause=known or found.cause)
    except CANNOT_RUN:  # a module that does not run one operation at a time
        return Findings(general(()))


def _place_of_buffer(pair: Pair, row: str) -> Place:
    """Name the modules that hold a buffer."""
    name = row.removeprefix(PREFIX)
    flax = next(
        (link.flax.name for link in pair.mapping.links if link.torch and link.flax and link.torch.name == name), ""
    )
    return Place(name.rpartition(".")[0], shown(flax.rpartition(".")[0]))


def _failed(rows: Sequence[PairRow]) -> list[PairRow]:
    return [row for row in rows if row.status == "mismatch" and row.bound != UNDECIDED]


def likely_cause(pair: Pair, evidence: Evidence, rows: Sequence[PairRow], near: Collection[str] = frozenset()) -> str:
    """Return one sentence about the first failing rung, or an empty string; `near` names parameters to try first."""
    failed = _failed(rows)
    causes = {"weights": _weights, "forward": _forward, "gradients": _gradients, "state": _state}
    for rung, cause in causes.items():
        if found := [row for row in failed if row.rung == rung]:
            return cause(pair, evidence, found, near)
    return ""


def _in_truth(failed: Sequence[PairRow]) -> list[PairRow]:
    """Return the rows in which the two functions differ; without any, one side computes its own function badly."""
    return [row for row in failed if row.mode == "truth"]


def _weights(pair: Pair, evidence: Evidence, failed: Sequence[PairRow], near: Collection[str]) -> str:
    if failed[0].tensor in pair.mapping.kept_by_both:
        return f"the values of {failed[0].tensor} that both sides keep are not the same"
    return f"{failed[0].tensor} does not keep its {failed[0].dtype} bits in the {failed[0].framework} module"


def _forward(pair: Pair, evidence: Evidence, failed: Sequence[PairRow], near: Collection[str]) -> str:
    if evidence.random:
        sides = " and ".join(SHOWN[key] for key in evidence.random)
        return f"the {sides} side draws random numbers: dropout is active; switch it off (eval mode, deterministic)"
    if not evidence.bounds:
        return _shapes(evidence)
    if not _in_truth(failed):
        return _precision(evidence, failed)

    def agrees(run: Callable[[], tuple[str, Arrays]]) -> bool:
        key, outputs = run()
        return all(
            within(name, value, evidence.truths[_OTHER_KEY[key]][name], evidence.limit(name)).status == "ok"
            for name, value in outputs.items()
            if is_output(name)
        )

    # A change that the side cannot even run is no difference from the other side.
    cannot = (IndexError, RuntimeError, TypeError, ValueError)
    hypotheses = ((sentence, functools.partial(agrees, run)) for sentence, run in _hypotheses(pair, evidence, near))
    if found := first_confirmed(hypotheses, _MOST_TRIED, cannot):
        return found
    return _scaled(evidence, [row.tensor for row in _in_truth(failed)])


def _gradients(pair: Pair, evidence: Evidence, failed: Sequence[PairRow], near: Collection[str]) -> str:
    if not _in_truth(failed):
        return _precision(evidence, failed)
    alone = [name for names in pair.trained_alone.values() for name in names]
    if alone:
        return f"{', '.join(alone)}: kept as a constant, and trained on the side that has it"
    names = [row.tensor for row in _in_truth(failed)]
    frozen = [name for name in pair.mapping.half_trained if f"d_{name}" in names]
    if frozen:
        names = ", ".join(frozen)
        return f"{names}: frozen on the torch side (requires_grad=False, or a buffer), trained on the flax side"
    for key in KEYS:
        own, other = evidence.truths[key], evidence.truths[_OTHER_KEY[key]]
        stopped = [name for name in names if not own[name].any() and other[name].any()]
        if stopped:
            shown = ", ".join(name.removeprefix("d_") for name in stopped)
            return f"the gradient of {shown} is stopped on the {SHOWN[key]} side"
    return _scaled(evidence, names, every=True)


def _state(pair: Pair, evidence: Evidence, failed: Sequence[PairRow], near: Collection[str]) -> str:
    if not _in_truth(failed):
        return _precision(evidence, failed)
    return next(filter(None, (_of_buffer(row.tensor, evidence) for row in failed)), "")


def _of_buffer(row: str, evidence: Evidence) -> str:
    """Say how a buffer that a call updates comes out differently, or nothing.

    With `s' = (1 - m) s + m v` and another m, or v times a factor, on one side: `s'_flax = a s'_torch + b s`, where
    `a + b = 1` if only m differs.
    """
    assert evidence.values is not None
    name = row.removeprefix(PREFIX)
    old = widened(evidence.values.parameters["torch"][name])
    torch, jax = evidence.truths["torch"][row], evidence.truths["jax"][row]
    for side, after in (("torch", torch), ("flax", jax)):
        if (after == old).all():
            return f"a call updates {name}, but not on the {side} side"
    if old.size < 3 or not is_float(torch):
        return ""
    columns = np.stack([torch.ravel(), old.ravel()], axis=1)
    (a, b), _, rank, _ = np.linalg.lstsq(columns, jax.ravel(), rcond=None)
    # The fit errs where the values do: tight enough to tell a momentum from a factor, not a proof.
    slack = 16 * float(np.max(evidence.limit(row))) + 1e-9 * float(np.abs(jax).max())
    if rank < 2 or not np.abs(columns @ [a, b] - jax.ravel()).max() <= slack:
        return ""
    if abs(a + b - 1) < 1e-6:
        return (
            f"momentum: a call moves {name} {a:.6g} times as far on the flax side (torch's momentum is the weight of "
            "the new value, Flax's that of the old one)"
        )
    return (
        f"the value that a call adds to {name} is {a:.6g} times as large on the flax side, if the momentum is the same "
        "(torch's BatchNorm keeps a variance divided by n - 1, Flax's one divided by n)"
    )


def _shapes(evidence: Evidence) -> str:
    for name, value in evidence.truths["torch"].items():
        other = evidence.truths["jax"][name].shape
        if value.shape == other:
            continue
        if sorted(value.shape) == sorted(other):
            return (
                f"layout: {name} has shape {value.shape} on the torch side and {other} on the flax side; "
                f"give output_patterns={{{name!r}: ...}}"
            )
        if value.ndim == len(other):
            axes = ", ".join(str(k) for k, (a, b) in enumerate(zip(value.shape, other, strict=True)) if a != b)
            return (
                f"sizes: {name} has shape {value.shape} on the torch side and {other} on the flax side, which differ "
                f"in axis {axes}: padding, stride, dilation or a number of features"
            )
        return f"axes: {name} has shape {value.shape} on the torch side and {other} on the flax side"
    return ""


def _hypotheses(pair: Pair, evidence: Evidence, near: Collection[str]) -> Iterator[Hypothesis]:
    """Yield everything worth trying, what concerns a place first."""
    there = {link.flax.name for link in pair.mapping.links if link.torch and link.flax and link.torch.name in near}
    if near:
        yield from itertools.islice(_changes(pair, evidence, {"torch": near, "jax": there}), _MOST_NEAR)
    yield from _changes(pair, evidence, None)


def _changes(pair: Pair, evidence: Evidence, only: Mapping[str, Collection[str]] | None) -> Iterator[Hypothesis]:
    """Yield changes of all parameters, or only of some; cheap and common ones first."""
    assert evidence.values is not None
    values = Values(evidence.values.dtype, evidence.values.parameters, evidence.values.inputs, None)

    def changed(key: str, parameters: Arrays) -> Callable[[], tuple[str, Arrays]]:
        def run() -> tuple[str, Arrays]:
            both = {**values.parameters, key: {**values.parameters[key], **parameters}}
            return key, pair.truth(key, Values(values.dtype, both, values.inputs, None))

        return run

    mapped = {"torch": pair.mapping.torch_names, "jax": pair.mapping.flax_names}
    own = {
        key: {name: values.parameters[key][name] for name in mapped[key] if only is None or name in only[key]}
        for key in KEYS
    }
    for key, arrays in own.items():
        for name, array in arrays.items():
            if array.ndim >= 2 and array.shape[-1] == array.shape[-2]:
                sentence = f"the kernel {name} is transposed: transposing it on the {SHOWN[key]} side makes both agree"
                yield sentence, changed(key, {name: array.swapaxes(-1, -2).copy()})
    for name, array in own["torch"].items():
        for first, second in itertools.combinations(range(array.ndim), 2):
            if 1 < array.shape[first] == array.shape[second] and second - first < array.ndim - 1 > 1:
                sentence = f"axes {first} and {second} of {name} are exchanged (transposed) between the two sides"
                yield sentence, changed("torch", {name: array.swapaxes(first, second).copy()})
    if only is None:
        # All variants of one kind at once: an epsilon usually has one value throughout a model.
        pair.sides["torch"].truth(values.parameters["torch"], values.inputs["torch"])
        for variant in pair.sides["torch"].variants():
            yield variant.sentence, lambda name=variant.name: ("torch", pair.truth("torch", values, name))
        yield from _calls(pair, values)
        yield from _held_at_zero(pair, values, changed)
    for name, array in own["torch"].items():
        window = tuple(range(2, array.ndim))
        if window and any(array.shape[axis] > 1 for axis in window):
            axes = ", ".join(map(str, window))
            sentence = (
                f"the kernel {name} is flipped: reversing its window (axes {axes} on the torch side) makes both agree "
                "(Flax's ConvTranspose flips it unless transpose_kernel=True)"
            )
            yield sentence, changed("torch", {name: np.flip(array, window).copy()})
    for key, arrays in own.items():
        for name, array in arrays.items():
            sentence = f"{name} has no effect on the {_OTHER[key]} side (a missing bias, a weight that is not used)"
            yield sentence, changed(key, {name: np.zeros_like(array)})
            if array.ndim < 2:  # a kernel that counts twice is a scale
                sentence = f"{name} takes effect twice on the {_OTHER[key]} side"
                yield sentence, changed(key, {name: array + array})
    for key, arrays in own.items():
        for first, second, exchanged in exchanges(arrays):
            yield f"{first} and {second} are exchanged between the two sides", changed(key, exchanged)
    if only is not None:
        everything = {name: values.parameters["torch"][name] for name in mapped["torch"]}
        for first, second, taken in borrowed(everything, only["torch"]):
            sentence = f"{first} is not used on the flax side, which takes the parameters of {second} in its place"
            yield sentence, changed("torch", taken)
        yield from ((sentence, changed("torch", arrays)) for sentence, arrays in head_orders(own["torch"]))
    for order, names, arrays in block_orders(own["torch"]):
        shown = ", ".join(map(str, order))
        sentence = f"the blocks (gates, or query, key and value) of {names} come in the order {shown} on the flax side"
        yield sentence, changed("torch", arrays)


def _held_at_zero(
    pair: Pair, values: Values, changed: Callable[..., Callable[[], tuple[str, Arrays]]]
) -> Iterator[Hypothesis]:
    """Give blocks without counterpart the values that they have by themselves."""
    for link in pair.mapping.links:
        key, block = ("torch", link.torch) if link.flax is None else ("jax", link.flax)
        if link.pattern is not None or link.keep or block is None:
            continue
        array = np.array(values.parameters[key][block.name])
        array[block.ranges] = as_stored(pair.specs[key][block.name].value, array.dtype)[block.ranges]
        if array[block.ranges].any():
            sentence = (
                f"{link.text} holds at zero what the {_OTHER[key]} side has: with its own values ('keep') both agree"
            )
            yield sentence, changed(key, {block.name: array})


def _calls(pair: Pair, values: Values) -> Iterator[Hypothesis]:
    """Call the torch side in other ways: inputs in another order, batches on another axis."""

    def called(inputs: Sequence[np.ndarray]) -> tuple[str, Arrays]:
        return "torch", pair.truth("torch", Values(values.dtype, values.parameters, {"torch": tuple(inputs)}, None))

    def second_axis_first() -> tuple[str, Arrays]:
        key, outputs = called([array.swapaxes(0, 1).copy() for array in own])
        return key, {name: array.swapaxes(0, 1) if array.ndim > 1 else array for name, array in outputs.items()}

    own = values.inputs["torch"]
    for a, b in itertools.combinations(range(len(own)), 2):
        if (own[a].shape, own[a].dtype) == (own[b].shape, own[b].dtype):
            order = [*own]
            order[a], order[b] = own[b], own[a]
            yield f"inputs {a} and {b} are exchanged between the two sides", lambda order=order: called(order)
    for k, array in enumerate(own):
        for axis in (
            axis for axis, size in enumerate(array.shape) if size == 2 and np.issubdtype(array.dtype, np.integer)
        ):
            reverse = [*own[:k], np.flip(array, axis).copy(), *own[k + 1 :]]
            sentence = f"the two rows of input {k} (along axis {axis}) are exchanged between the two sides"
            yield f"{sentence}, such as the sources and targets of edges", lambda reverse=reverse: called(reverse)
    if all(array.ndim > 1 for array in own):
        sentence = "the batch is the first axis on one side and the second on the other (torch: batch_first)"
        yield sentence, second_axis_first


def _scaled(evidence: Evidence, names: Sequence[str], every: bool = False) -> str:
    """Find a constant factor, a conjugate, other places that are not finite, or a difference of float32's size.

    Args:
        evidence: of the semantic leg.
        names: of what differs.
        every: whether a factor has to explain all that differs.
    """
    found = []
    for name in names:
        first, second = evidence.truths["torch"][name].ravel(), evidence.truths["jax"][name].ravel()
        if not is_inexact(first) or not first.any():
            continue
        limit = parts(np.asarray(evidence.limit(name))).reshape(parts(first).shape)
        if is_complex(first) and (np.abs(parts(second.conj()) - parts(first)) <= limit).all():
            return f"{name}: the flax side is the complex conjugate (another sign of a Fourier transform, or of i)"
        first, second, limit = parts(first).ravel(), parts(second).ravel(), limit.ravel()
        same = (first == second) | (np.isnan(first) & np.isnan(second))
        if (np.isfinite(first) | same).all() and (np.isfinite(second) | same).all():
            keep = np.isfinite(first)
            first, second, limit = first[keep], second[keep], limit[keep]
        else:
            return f"{name} is not finite in other places, or in another way, on the flax side: a mask, a division"
        if not first.any():
            continue
        factor = float(second @ first / (first @ first))
        enough = limit * max(abs(factor), 1.0)
        # A single number is always some multiple of another; of a factor its gradients would have the same one.
        told = np.count_nonzero(first) > 1 or (is_output(name) and _scales_gradients(evidence, factor))
        if told and abs(factor - 1) > FORMATS["float32"].roundoff and (np.abs(second - factor * first) <= enough).all():
            found.append((name, factor))
        if np.abs(second - first).max() <= FORMATS["float32"].roundoff * np.abs(first).max():
            return (
                f"{name} differs by less than float32's roundoff: one side rounds a constant or a table to float32, or "
                "has a small term that the other lacks (an epsilon such as 1e-12, a threshold)"
            )
    if found and (len(found) == len(names) or not every):
        name, factor = found[0]
        return f"{', '.join(n for n, _ in found)}: the flax side is {factor:.6g} times the torch side"
    return ""


def _scales_gradients(evidence: Evidence, factor: float) -> bool:
    """Return True if every gradient on the flax side is this many times the torch side's."""
    names = [name for name, value in evidence.truths["torch"].items() if name.startswith("d_") and is_inexact(value)]
    several = False
    for name in names:
        first, second = (parts(evidence.truths[key][name]) for key in KEYS)
        limit = parts(evidence.bounds["torch"][name] + evidence.bounds["jax"][name]) * max(abs(factor), 1.0)
        if not (np.abs(second - factor * first) <= limit).all():
            return False
        several = several or bool(np.count_nonzero(first) > 1)
    return several


def _precision(evidence: Evidence, failed: Sequence[PairRow]) -> str:
    """Name the side that computes in less than it was asked for, where both functions agree in float64."""
    if formats := [row.reason for row in failed if row.bound == "exact"]:
        return formats[0]
    row = next((row for row in failed if row.framework in KEYS), None)
    if row is None or row.subject_value is None:
        return ""
    side = SHOWN[row.framework]
    if row.reason.startswith(INFERENCE):
        return f"{row.tensor} is another function on the {side} side where no gradient is asked for (a fast path)"
    if not np.isfinite(row.subject_value):
        return f"{row.tensor} overflows in {row.dtype} on the {side} side, or divides by zero"
    shortfall = f"the {side} side computes {row.tensor} with less precision than {row.dtype} promises"
    if row.dtype == "float64":
        return f"{shortfall}: a narrower format is fixed in it (dtype=jnp.float32, .float())"
    if row.dtype != "float32":
        return f"{shortfall}; in float64 it agrees"
    value, spread = evidence.results[row.framework][row.tensor], evidence.ensembles[row.framework].spread[row.tensor]
    error, spread = parts(value) - parts(evidence.truths[row.framework][row.tensor]), parts(spread)
    # Elsewhere nothing is rounded.
    usable = np.isfinite(error) & np.isfinite(spread) & (spread > 0)
    if not usable.any():
        return shortfall
    ratio = float(np.sqrt(np.mean(error[usable] ** 2) / np.mean(spread[usable] ** 2)))
    return f"{shortfall} (errors {ratio:.0f} times float32's: TF32 or 16-bit operands or sums); in float64 it agrees"
