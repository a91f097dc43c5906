"""Climbs the ladder for a pair: weights bit for bit, outputs, gradients, state; in float64 and in each dtype."""

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity_tests.judge.comparison import UNDECIDED, TensorResult, refused, same_bits, within
from parity_tests.judge.dtypes import is_complex, is_inexact
from parity_tests.judge.records import row_from_result
from parity_tests.pair.calibration import SEMANTIC_SCALE, calibrated_bound, constants_bound
from parity_tests.pair.inspection import COMPLEX, QUICK, Remarks, refuse_unmapped
from parity_tests.pair.layouts import example_of_outputs
from parity_tests.pair.legs import Pair, Values, running
from parity_tests.pair.report import PairRow
from parity_tests.pair.side import CANNOT_RUN, PREFIX, SHOWN, Ensemble, is_output, updated
from parity_tests.report.text import first_line

KEYS = ("torch", "jax")
_BOTH = "torch+jax"
_MOST_SHOWN = 6
INFERENCE = "without gradients, as in inference: "


@dataclass
class Evidence:
    """Values of the semantic leg, from which the search for a cause starts."""

    values: Values | None = None  # stored in float32
    truths: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by side, in torch names
    # Of float64 evaluations, by side and tensor; what rounded constants may move is part of them
    bounds: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    ensembles: dict[str, Ensemble] = field(default_factory=dict)  # by side, of float32 noise
    results: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by side, what came out in float32
    random: tuple[str, ...] = ()  # sides whose output depends on a random state

    def limit(self, name: str) -> Any:
        """Return how far the two sides may lie apart in float64."""
        return self.bounds["torch"].get(name, 0.0) + self.bounds["jax"].get(name, 0.0)


class Judge:
    """Judge one pair for one seed."""

    def __init__(
        self,
        pair: Pair,
        seed: int,
        gradients: bool = True,
        semantic: bool = True,
        state: bool = True,
        dtypes_equal: bool = False,
        effort: str = "full",
    ) -> None:
        self._pair, self._seed = pair, seed
        self._gradients, self._semantic, self._state = gradients, semantic, state
        self._dtypes_equal, self._watched = dtypes_equal, effort == "full"
        self._borrows, self._lent = False, None  # the rounding noise of the torch side, for the flax side
        # Buffers that are compared, by their rows' names: known when the first calls have returned.
        self._updated: frozenset[str] = frozenset()
        # Gradients that neither side has, though one of them could: known likewise.
        self.untrained: tuple[str, ...] = ()
        self.remarks = Remarks(pair)
        self.evidence = Evidence()
        self.notes: set[str] = set() if self._watched else {QUICK}
        # Why a dtype was not compared whole on both sides, by dtype.
        self._missing: dict[str, list[str]] = {}

    def rows(self, dtypes: Sequence[str]) -> Iterator[PairRow]:
        """Yield every comparison, lowest rung first within a leg."""
        self._pair.announce("weights", 4 + 2 * len(dtypes))
        for dtype in dtypes:
            yield from self._weights(dtype)
        values = self._pair.values("float32", self._seed)
        random = []
        for key in KEYS:
            with running(key, values.inputs[key], self._pair.layout.names):
                if self._pair.sides[key].is_random(values.parameters[key], values.inputs[key]):
                    random.append(key)
        self.evidence.random = tuple(random)
        for key in random:
            side, evaluate = SHOWN[key], "module.eval()" + ", deterministic=True" * (key == "jax")
            reason = (
                "the output depends on a random state: dropout is active, or the module draws numbers; evaluate it "
                f"({evaluate}), or feed the mask or the noise to both sides as an input (inputs=, {side}_call=)"
            )
            yield self._row(refused("y", reason), key, "float32", "forward")
        if random:
            return
        yield from self._climbed(values, dtypes)

    def _climbed(self, values: Values, dtypes: Sequence[str]) -> Iterator[PairRow]:
        """Yield the rungs above the weights; where a borrowed bound does not hold, go on with the side's own."""
        self._borrows = not self._watched
        held = 0
        for row in self._rungs(values, dtypes):
            if row.status == "mismatch" and self._borrows:
                break
            held += 1
            yield row
        else:
            return
        self._borrows = False
        yield from itertools.islice(self._rungs(values, dtypes), held, None)

    def _rungs(self, values: Values, dtypes: Sequence[str]) -> Iterator[PairRow]:
        comparable = yield from self._semantic_leg(values)
        if not comparable:
            return
        for dtype in dtypes:
            yield from self._leg(dtype)
        if dtypes and all(self._missing.get(dtype) for dtype in dtypes):
            reasons = "; ".join(dict.fromkeys(reason for found in self._missing.values() for reason in found))
            reason = f"no dtype that was asked for ({', '.join(dtypes)}) could be compared on both sides: {reasons}"
            yield self._row(refused("y", reason, UNDECIDED), _BOTH, dtypes[0], "forward")

    def _weights(self, dtype: str) -> Iterator[PairRow]:
        values, mapping = self._pair.values(dtype, self._seed), self._pair.mapping
        returned = {key: self._pair.sides[key].round_trip(values.parameters[key]) for key in KEYS}
        through_flax = mapping.to_torch(returned["jax"], beside=values.parameters["torch"])
        for name in mapping.torch_names:
            expected = values.parameters["torch"][name]
            yield self._row(same_bits(name, returned["torch"][name], expected), "torch", dtype, "weights", "exact")
            if mapping.compared(name).any():
                expected = mapping.without_held({name: expected})[name]
                yield self._row(same_bits(name, through_flax[name], expected), "jax", dtype, "weights", "exact")

    def _semantic_leg(self, values: Values) -> Generator[PairRow, None, bool]:
        """Compare both sides in float64 on the same float32 numbers; return whether their outputs have equal shapes."""
        self._pair.announce("semantic leg in float64", 8 + 2 * self._watched)
        shapes = {"torch": self._pair.forward("torch", values), "jax": self._pair.outline("jax", values)}
        shapes["torch"] = {name: array for name, array in shapes["torch"].items() if is_output(name)}
        if set(shapes["torch"]) != set(shapes["jax"]):
            raise ValueError(
                f"outputs: expected the same names on both sides, got {', '.join(shapes['torch']) or 'none'} from "
                f"torch and {', '.join(shapes['jax']) or 'none'} from flax; say which correspond by outputs=, such as "
                f"{example_of_outputs(list(shapes['torch']), list(shapes['jax']))}."
            )
        self.evidence.values, self.evidence.truths = values, shapes
        compared = [within(name, shapes["jax"][name], np.zeros_like(y), 0.0) for name, y in shapes["torch"].items()]
        if wrong := [result for result in compared if result.status != "ok"]:
            for result in wrong:
                yield self._row(result, _BOTH, "float64", "forward")
            return False
        if any(is_complex(found) for found in shapes["torch"].values()):
            self.notes.add(COMPLEX)
        if self._gradients:
            values = self._pair.with_cotangents(values, shapes, self._seed)
        outputs: dict[str, dict[str, np.ndarray]] = {}
        ensembles: dict[str, Ensemble] = {}
        for key in KEYS:
            try:
                outputs[key] = self._pair.truth(key, values)
                ensembles[key] = self._ensemble(key, values, "float32", outputs[key])
            except CANNOT_RUN as error:
                # The module runs in float32, as its outline has shown.
                yield self._without_truth(error, key, "float64")
                return False
        refuse_unmapped(self._pair, values, self._state)
        self.untrained = tuple(
            name
            for name in self._pair.mapping.half_trained
            if self._gradients and not any(found.get(f"d_{name}", np.zeros(1)).any() for found in outputs.values())
        )
        if self._state:
            changed = frozenset().union(*(updated(found, values.parameters["torch"]) for found in outputs.values()))
            self._updated = frozenset(f"{PREFIX}{name}" for name in changed)
        outputs = {key: self._compared(found) for key, found in outputs.items()}
        moved = self._moved_by_constants(values)
        bounds = {key: self._bounds(outputs[key], ensembles[key], "float32", SEMANTIC_SCALE) for key in KEYS}
        bounds = {key: {name: b + moved[key].get(name, 0.0) for name, b in bounds[key].items()} for key in KEYS}
        self.evidence = Evidence(values, outputs, bounds, ensembles)
        if self._watched:
            self.remarks.on_branches(values)
        yield from self._trained_alone()
        yield from self._says_nothing(outputs["torch"], outputs["jax"])
        if self._semantic:
            for name, expected in outputs["torch"].items():
                result = within(name, outputs["jax"][name], expected, self.evidence.limit(name))
                yield self._row(result, _BOTH, "float64", self._rung(name), mode="truth")
        return True

    def _trained_alone(self) -> Iterator[PairRow]:
        """Fail arrays that are kept as constants on one side, without counterpart, and have a gradient there."""
        for key, side in SHOWN.items():
            for name in self._pair.trained_alone[key]:
                reason = f"{name} is kept as it is, without counterpart, but the {side} side trains it; freeze it there"
                yield self._row(refused(f"d_{name}", reason), _BOTH, "float64", "gradients", mode="truth")

    def _says_nothing(self, torch: Mapping[str, np.ndarray], jax: Mapping[str, np.ndarray]) -> Iterator[PairRow]:
        """Fail a pair whose outputs are empty, zero or not finite on both sides: any two modules agree on that."""
        shown = [name for name in torch if _is_informative(torch[name]) or _is_informative(jax[name])]
        if not any(self._rung(name) == "forward" for name in shown):
            reason = (
                "every output is empty, zero or not finite on both sides, as that of any other pair could be; give "
                "inputs, or draws of the parameters, for which the function has values"
            )
            if self._pair.given:  # a module may begin at zero; the drawn values are what shows its function
                self.notes.add(f"with the torch side's own values {reason}")
            else:
                yield self._row(refused("y", reason), _BOTH, "float64", "forward")
            return
        silent = [name for name in torch if name not in shown]
        if silent:
            self.notes.add(f"empty, zero or not finite on both sides, so that nothing is shown: {', '.join(silent)}")
        partly = [name for name in shown if not (np.isfinite(torch[name]) & np.isfinite(jax[name])).all()]
        if partly:
            self.notes.add(f"not finite in places: {', '.join(partly)}")

    def _leg(self, dtype: str) -> Iterator[PairRow]:
        """Compare both sides as they are, in one dtype, with their truths and with each other."""
        calls = 2 + 2 * self._gradients + (self._watched and dtype != "float64") + 2 * (dtype != "float32")
        self._pair.announce(f"{dtype} leg", 2 * calls)
        evidence = self.evidence
        values = evidence.values if dtype == "float32" else self._pair.values(dtype, self._seed)
        assert values is not None
        alone: dict[str, dict[str, np.ndarray]] = {}
        for key in KEYS:
            try:
                alone[key] = self._pair.forward(key, values)
            except CANNOT_RUN as error:
                yield self._cannot(error, key, dtype, "forward")
        if dtype != "float32" and evidence.values is not None:
            self.remarks.on_overflow(values, evidence.values)
        if self._gradients and dtype != "float32":
            values = self._pair.with_cotangents(values, alone, self._seed)
        results = dict(alone)
        for key in alone if self._gradients else ():
            try:
                results[key] = self._pair.vjp(key, values)
            except CANNOT_RUN as error:
                yield self._cannot(error, key, dtype, "gradients")
        if dtype == "float32":
            evidence.results = results
        if self._dtypes_equal and len(alone) == len(KEYS):
            yield from self._other_formats(dtype, alone)
        bounds: dict[str, dict[str, np.ndarray]] = {}
        truths: dict[str, np.ndarray] = {}
        for key in results:
            self.remarks.on_formats(key, values, {**alone[key], **results[key]}, alone[key], watched=self._watched)
            try:
                truths, bounds[key] = self._truths_and_bounds(key, values)
            except CANNOT_RUN as error:
                yield self._without_truth(error, key, dtype)
                continue
            for name, expected in truths.items():
                if name not in results[key]:
                    continue
                # In float64 the truth itself errs as much as what it judges.
                limit = bounds[key].get(name, 0.0) * (2.0 if dtype == "float64" else 1.0)
                result = within(name, results[key][name], expected, limit)
                if self._gradients and name in alone[key]:
                    without = within(name, alone[key][name], expected, limit)
                    if _badness(without) > _badness(result):
                        # Where both fail, they fail alike.
                        told = "" if result.status != "ok" or without.status == "ok" else INFERENCE
                        result = dataclasses.replace(without, reason=told + without.reason)
                yield self._row(result, key, dtype, self._rung(name))
        if len(bounds) < len(KEYS):
            return
        self.remarks.on_bounds(dtype, {name: a for name, a in truths.items() if is_inexact(a)}, bounds)
        moved = self._moved_by_constants(values)
        for name, expected in self._compared(results["torch"]).items():
            if name in results["jax"]:
                limit = sum(found.get(name, 0.0) for key in KEYS for found in (bounds[key], moved[key]))
                yield self._row(within(name, results["jax"][name], expected, limit), _BOTH, dtype, self._rung(name))

    def _other_formats(self, dtype: str, outputs: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[PairRow]:
        """Fail outputs whose dtype is another on the other side; without 64-bit types JAX's integers have 32 bits."""
        for name, array in outputs["torch"].items():
            first, second = (str(found.dtype) for found in (array, outputs["jax"][name]))
            if is_output(name) and first.replace("int64", "int32") != second.replace("int64", "int32"):
                reason = f"{name} is {first} on the torch side and {second} on the flax side where {dtype} is judged"
                yield self._row(
                    refused(name, f"{reason}; dtypes_equal asks for one dtype"), _BOTH, dtype, "forward", "exact"
                )

    def _cannot(self, error: Exception, key: str, dtype: str, rung: str) -> PairRow:
        """Skip a format that fails here: the function runs in float64, as the semantic leg has shown."""
        reason = f"{type(error).__name__}: {first_line(error)}"
        self._missing.setdefault(dtype, []).append(f"{key} {rung}: {reason}")
        return self._row(refused("", reason), key, dtype, rung, "skipped")

    def _without_truth(self, error: Exception, key: str, dtype: str) -> PairRow:
        reason = (
            f"the {SHOWN[key]} side has no float64 truth, so that there is nothing to judge by: "
            f"{type(error).__name__}: {first_line(error)}"
        )
        return self._row(refused("y", reason, UNDECIDED), key, dtype, "forward")

    def _truths_and_bounds(self, key: str, values: Values) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        dtype, evidence = values.dtype, self.evidence
        if dtype == "float32":
            truths, ensemble = evidence.truths[key], evidence.ensembles[key]
        else:
            truths = self._compared(self._pair.truth(key, values))
            # Noise in float64 would drown in float64's own rounding: fp32 noise is scaled down instead.
            ensemble = self._ensemble(key, values, "float32" if dtype == "float64" else dtype, truths)
        self.notes |= {*ensemble.notes, *self._pair.sides[key].notes()}
        scale = SEMANTIC_SCALE if dtype == "float64" else 1.0
        return truths, self._bounds(truths, ensemble, dtype, scale)

    def _ensemble(self, key: str, values: Values, dtype: str, truths: Mapping[str, np.ndarray]) -> Ensemble:
        """Return a side's rounding noise, or, for a quick look at the flax side, the torch side's."""
        lent = self._lent if key == "jax" and self._borrows else None
        if lent and {name for name, truth in truths.items() if is_inexact(truth)} <= set(lent.spread):
            return lent
        found = self._pair.ensemble(key, values, dtype, self._seed)
        self._lent = found if key == "torch" else None
        return found

    def _bounds(
        self, truths: Mapping[str, np.ndarray], ensemble: Ensemble, dtype: str, scale: float
    ) -> dict[str, np.ndarray]:
        return {
            name: calibrated_bound(
                truth,
                ensemble.spread[name],
                ensemble.kinks[name],
                ensemble.members,
                # There are no complex numbers of 16-bit parts.
                "float32" if is_complex(truth) and dtype != "float64" else dtype,
                scale,
            )
            for name, truth in truths.items()
            if is_inexact(truth)
        }

    def _moved_by_constants(self, values: Values) -> dict[str, dict[str, np.ndarray]]:
        """Return by side and tensor how far constants rounded before the call may move results.

        Where one side has stored what the other computes (a rotary table), the computation counts as float32's.
        """
        found = {key: self._pair.constants(key, values, computed=False) for key in KEYS}
        for key, other in (KEYS, KEYS[::-1]):
            if found[other].stored:
                found[key] = self._pair.constants(key, values, computed=True)
        for key in KEYS:
            if found[key].spread and (shown := (*found[key].stored, *found[key].literals)):
                listed = ", ".join(shown[:_MOST_SHOWN]) + ", ..." * (len(shown) > _MOST_SHOWN)
                self.notes.add(f"constants of the {SHOWN[key]} side that count as rounded, in float64 too: {listed}")
        return {
            key: {
                name: constants_bound(spread, constants.members)
                for name, spread in self._compared(constants.spread).items()
            }
            for key, constants in found.items()
        }

    def _rung(self, name: str) -> str:
        return "forward" if is_output(name) else "gradients" if name.startswith("d_") else "state"

    def _compared(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Leave out the buffers that no call updates (the weights' rung has them), and what is not compared."""
        left_out = {f"d_{name}" for name in self.untrained}
        return {
            name: array
            for name, array in arrays.items()
            if (not name.startswith(PREFIX) or name in self._updated)
            and name not in left_out
            and not (name.startswith("d_") and self._pair.left_out.covers(name))
        }

    def _row(
        self, result: TensorResult, key: str, dtype: str, rung: str, bound: str = "calibrated", *, mode: str = ""
    ) -> PairRow:
        names = {key: side.name for key, side in self._pair.sides.items()}
        where: dict[str, Any] = {
            "kind": "pair" if key == _BOTH else "oracle",
            "framework": key,
            "implementation": names.get(key, f"{names['torch']}+{names['jax']}"),
            "dtype": dtype,
            "case": f"{self._pair.name} seed {self._seed}",
            "mode": mode,
            "rung": rung,
            "bound": bound,
        }
        if result.status == UNDECIDED:
            where |= {"status": "mismatch", "bound": UNDECIDED}
        if bound == "skipped":
            where |= {"status": "skipped", "max_abs_error": None, "bound_fraction": None}
        return self.remarks.added(row_from_result(result, PairRow, **where))


def _is_informative(value: np.ndarray) -> bool:
    return bool((np.isfinite(value) & (value != 0)).any())


def _badness(result: TensorResult) -> tuple[int, float]:
    return ("ok", UNDECIDED, "mismatch").index(result.status), result.bound_fraction
