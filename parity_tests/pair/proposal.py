"""A first version of a parameter mapping, by shape, name and order of execution, for a person to confirm."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity_tests.judge.dtypes import as_stored, storage_format
from parity_tests.pair.calls import Layouts
from parity_tests.pair.candidates import Candidate, Unit, candidates, leaf, same_leaf, units
from parity_tests.pair.draws import InputSource, draw_inputs
from parity_tests.pair.layouts import both_layouts
from parity_tests.pair.legs import running
from parity_tests.pair.loading import make_side
from parity_tests.pair.rules import KEEP, ZERO, Rule
from parity_tests.pair.side import CANNOT_RUN, ParameterSpec

Orders = Mapping[str, Sequence[str]]
_DECIDE = "decide by the order in which both modules use them, or try modules of distinct sizes"


@dataclass(frozen=True)
class Proposal:
    """Rules to look at, correct and pass to `check_pair`, as they are or as they are printed."""

    rules: tuple[Rule, ...]  # complete if nothing is left
    ambiguities: tuple[str, ...]  # sentences about choices that shapes and names do not decide
    left: tuple[str, ...]  # parameters for which no counterpart was found, by side
    by_execution: tuple[Rule, ...] = ()  # those of the rules that only the order of execution decided

    def __str__(self) -> str:
        """Return the rules as Python, with the doubts as comments."""
        lines = ["params = ["]
        lines += [f"    {rule!r},{'  # by order of execution' * (rule in self.by_execution)}" for rule in self.rules]
        lines += ["]"]
        lines += [f"# ambiguous: {sentence}" for sentence in self.ambiguities]
        lines += [f"# left over: {what}" for what in self.left]
        return "\n".join(lines)


class _Choice:
    """Candidates that were chosen, and what can be said about them."""

    def __init__(self, orders: Orders) -> None:
        self._ranks = {side: {name: k for k, name in enumerate(names)} for side, names in orders.items()}
        self.chosen: list[Candidate] = []
        self.by_execution: set[int] = set()
        self.used: set[str] = set()
        self.doubts: list[str] = []
        self._owners: dict[str, tuple[str, bool]] = {}

    def _follows(self, candidate: Candidate) -> bool:
        owner = self._owners.get(_owner_of(candidate.torch[0]), (None, False))[0]
        same = all(same_leaf(t.entry, f.entry) for t, f in zip(candidate.torch, candidate.flax, strict=True))
        return same and owner == _owner_of(candidate.flax[0])

    def take(self, candidate: Candidate, by_execution: bool = False) -> None:
        self.chosen.append(candidate)
        self.used |= candidate.members
        if by_execution:
            self.by_execution.add(id(candidate))
        if not candidate.fused:
            self._owners[_owner_of(candidate.torch[0])] = _owner_of(candidate.flax[0]), by_execution
        names = ", ".join(unit.entry for unit in (candidate.flax if candidate.fused == "torch" else candidate.torch))
        if candidate.fused:
            whole = (candidate.torch if candidate.fused == "torch" else candidate.flax)[0].entry
            self.doubts.append(f"the order of {names} in {whole} is a guess; check_pair finds a wrong one")
        if len(candidate.patterns) > 1:
            shown = ", ".join(repr(pattern) for pattern in candidate.patterns[1:4])
            self.doubts.append(
                f"{candidate.entries[0][0]}: the shapes also allow the axis pattern {shown}; the one above is usual"
            )

    def choose(self, found: Sequence[Candidate]) -> None:
        """Take what names decide, then what is alone, then what the order of execution decides, then the likeliest."""
        found = [candidate for candidate in found if candidate.certain or not self._is_in_another_order(candidate)]
        for certain in (True, False):
            while True:
                open_ = [c for c in found if not self.used & c.members and (c.certain or not certain)]
                if not open_:
                    break
                open_ = _of_one_kind(open_)
                shared = Counter(member for candidate in open_ for member in candidate.members)
                alone = [c for c in open_ if all(shared[member] == 1 for member in c.members)]
                # A bias goes where the weight of its layer went.
                following = [c for c in open_ if not c.fused and self._follows(c)]
                for candidate in following or alone:
                    if not self.used & candidate.members:
                        owner = self._owners.get(_owner_of(candidate.torch[0]), ("", False))
                        self.take(candidate, bool(following) and owner[1])
                if not following and not alone:
                    self._decide(open_)

    def _decide(self, found: list[Candidate]) -> None:
        """Take one of several that fit equally well."""
        first = max(found, key=lambda candidate: (len(candidate.torch[0].shape), candidate.score))
        group = _component(first, [c for c in found if c.fused == first.fused])
        ranks = {
            side: {one: self._rank(side, one) for c in group for one in [getattr(c, side)]}
            for side in ("torch", "flax")
        }
        names = {side: sorted({unit.entry for one in ranks[side] for unit in one}) for side in ranks}
        shown = " and ".join(", ".join(found) for found in names.values())
        if any(rank is None for by_unit in ranks.values() for rank in by_unit.values()):
            rivals = "; ".join(_entries(c.flax) for c in group if c is not first and c.members & first.members)
            self.doubts.append(
                f"{_entries(first.torch)} fits {_entries(first.flax)} no better than {rivals}: equal shapes, and "
                f"the order of execution is not known; {_DECIDE}"
            )
            self.take(first)
            return
        if not first.fused and len(names["torch"]) != len(names["flax"]):
            self.doubts.append(f"{shown} have equal shapes and are not equally many; {_DECIDE}")
        else:
            self.doubts.append(
                f"{shown} have equal shapes: mapped in the order of their first use in a call; check_pair shows "
                "whether it is right"
            )
        for taken in sorted(ranks["torch"], key=lambda found: ranks["torch"][found] or ()):
            fitting = [c for c in group if c.torch == taken and not self.used & c.members]
            if fitting:
                self.take(min(fitting, key=lambda c: ranks["flax"][c.flax] or ()), by_execution=True)

    def _is_in_another_order(self, candidate: Candidate) -> bool:
        """Tell whether the two sides use the layers of a template in different orders."""
        orders = []
        for side, unit in (("torch", candidate.torch[0]), ("flax", candidate.flax[0])):
            ranks = [self._ranks.get(side, {}).get(name) for name in unit.members]
            if len(ranks) == 1 or None in ranks:
                return False
            orders.append(sorted(range(len(ranks)), key=lambda k: ranks[k] or 0))
        return orders[0] != orders[1]

    def _rank(self, side: str, chosen: Sequence[Unit]) -> tuple[int, ...] | None:
        found = [self._ranks.get(side, {}).get(name) for unit in chosen for name in unit.members]
        return None if None in found else tuple(sorted(rank for rank in found if rank is not None))


def _entries(chosen: Sequence[Unit]) -> str:
    return " + ".join(unit.entry for unit in chosen)


def _owner_of(unit: Unit) -> str:
    """Return what the weight and the bias of one layer have in common: `fc1.`, `lstm._ih_l0`."""
    owner, dot, last = unit.entry.replace("/", ".").rpartition(".")
    return owner + dot + re.sub(r"weight|bias|kernel|scale|embedding", "", last)


def _of_one_kind(found: list[Candidate]) -> list[Candidate]:
    """Leave a kernel out for a bias where a unit has a bias to be mapped to."""

    def alike(candidate: Candidate) -> bool:
        return all(same_leaf(t.entry, f.entry) for t in candidate.torch for f in candidate.flax)

    kept = {member for candidate in found if alike(candidate) for member in candidate.members}
    return [candidate for candidate in found if alike(candidate) or not kept & candidate.members]


def _component(first: Candidate, found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that are connected to one by arrays that they share."""
    by_member: dict[str, list[Candidate]] = {}
    for candidate in found:
        for member in candidate.members:
            by_member.setdefault(member, []).append(candidate)
    group, waiting = {id(first): first}, [first]
    while waiting:
        for member in waiting.pop().members & by_member.keys():
            more = {id(candidate): candidate for candidate in by_member.pop(member)}
            waiting += [candidate for key, candidate in more.items() if key not in group]
            group |= more
    return list(group.values())


def propose_rules(
    torch: Mapping[str, ParameterSpec], flax: Mapping[str, ParameterSpec], orders: Orders | None = None
) -> Proposal:
    """Match arrays by shape and name, those that are left by the order of execution.

    Args:
        torch: arrays by name.
        flax: arrays by path.
        orders: names by side (`torch`, `flax`), in the order of their first use in a call.
    """
    choice = _Choice(orders or {})
    sums = _second_biases(torch)
    rest = {name: spec for name, spec in torch.items() if name not in sums.values()}
    for joined in (units, _apart):
        open_ = (
            {name: spec for name, spec in specs.items() if f"{side} {name}" not in choice.used}
            for side, specs in (("torch", rest), ("flax", flax))
        )
        choice.choose(list(candidates(*map(joined, open_))))
    places = {name: k for k, name in enumerate(torch)}
    chosen = sorted(choice.chosen, key=lambda candidate: places[candidate.torch[0].members[0]])
    rules: list[Rule] = []
    by_execution: list[Rule] = []
    for candidate in chosen:
        found = [(left, right, candidate.patterns[0]) for left, right in candidate.entries]
        found = [
            rule for left, right, pattern in found for rule in _with_second_bias(left, right, pattern, torch, sums)
        ]
        by_execution += found if id(candidate) in choice.by_execution else []
        rules += found
    used, doubts = set(choice.used), list(choice.doubts)
    for first, second in sums.items():
        if f"torch {first}" in used:
            rules += _rest_of_second_bias(second, rules, torch, flax, used)
    # A counter, which the other framework has not, and what is frozen.
    kept = [
        name
        for name, spec in torch.items()
        if f"torch {name}" not in used and (spec.frozen or leaf(name) == "num_batches_tracked")
    ]
    rules += [(name, None, KEEP) for name in kept]
    doubts += [
        f"{n} is frozen and has no counterpart: kept, if the flax side computes it" for n in kept if torch[n].frozen
    ]
    used |= {f"torch {name}" for name in kept}
    left = [
        f"{side} {name} {spec.value.shape}"
        for side, specs in (("torch", torch), ("flax", flax))
        for name, spec in specs.items()
        if f"{side} {name}" not in used
    ]
    return Proposal(tuple(rules), tuple(dict.fromkeys(doubts)), tuple(left), tuple(by_execution))


def _apart(specs: Mapping[str, ParameterSpec]) -> list[Unit]:
    return [Unit(name, (name,), spec.value.shape, spec) for name, spec in specs.items()]


def _second_biases(torch: Mapping[str, ParameterSpec]) -> dict[str, str]:
    """Return the second bias of each recurrent cell by the first: torch adds them up, Flax has one."""
    pairs = {name: re.sub(r"bias_ih(?=\w*$)", "bias_hh", name) for name in torch if re.search(r"bias_ih\w*$", name)}
    return {first: second for first, second in pairs.items() if second in torch}


def _gates(bias: str, torch: Mapping[str, ParameterSpec]) -> tuple[int, int]:
    """Return the number of gates of a recurrent cell, and the hidden units."""
    hidden = torch[bias.replace("bias_", "weight_")].value.shape[1]
    return torch[bias].value.shape[0] // hidden, hidden


def _with_second_bias(
    left: str, right: str, pattern: str, torch: Mapping[str, ParameterSpec], sums: Mapping[str, str]
) -> Iterator[Rule]:
    """Yield the rule of a first bias, with the second one added where the cell adds them."""
    name = left.partition("[")[0]
    if name not in sums:
        yield left, right, pattern
        return
    second = sums[name]
    gates, hidden = _gates(second, torch)
    summed = 2 * hidden if gates == 3 else gates * hidden  # a GRU's third is multiplied before it is added
    if left == name and gates == 3:
        yield f"{name}[0:{summed}] + {second}[0:{summed}]", f"{right}[0:{summed}]", pattern
        yield f"{name}[{summed}:{3 * hidden}]", f"{right}[{summed}:{3 * hidden}]", pattern
        return
    box = left[len(name) :]
    start = int(box[1:].partition(":")[0]) if box else 0
    yield f"{left} + {second}{box}" if start < summed else left, right, pattern


def _rest_of_second_bias(
    second: str,
    rules: Sequence[Rule],
    torch: Mapping[str, ParameterSpec],
    flax: Mapping[str, ParameterSpec],
    used: set[str],
) -> Iterator[Rule]:
    """Yield the rule of the part of a second bias that is not added to the first one."""
    used.add(f"torch {second}")
    gates, hidden = _gates(second, torch)
    if gates != 3:
        return
    box = f"{second}[{2 * hidden}:{3 * hidden}]"
    weights = [rule for rule in rules if str(rule[0]).startswith(second.replace("bias_", "weight_"))]
    owners = {str(rule[1]).partition("[")[0].rpartition(".")[0] for rule in weights[-1:]}
    for path, spec in flax.items():
        if f"flax {path}" not in used and spec.value.shape == (hidden,) and path.rpartition(".")[0] in owners:
            used.add(f"flax {path}")
            yield box, path, ""
            return
    yield box, None, ZERO


def propose_mapping(
    torch_module: Any,
    flax_module: Any,
    inputs: InputSource,
    *,
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
    torch_params: Mapping[str, Any] | None = None,
    flax_params: Mapping[str, Any] | None = None,
    torch_call: Callable[..., Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    input_patterns: Layouts | None = None,
) -> Proposal:
    """Propose `check_pair`'s `params` by shape, name and order of execution; print it, correct it, pass it back.

    Nothing is applied: a shape that fits may still be the wrong order of gates, or a square kernel the wrong way round.
    Where arrays of equal shape have no names in common, both modules are traced on `inputs`, and arrays are mapped in
    the order of their first use; such rules are marked. All arguments are those of `check_pair`; linen modules infer
    shapes from `inputs`.

    Returns:
        The rules, what is ambiguous about them, and what is left over; `str` of it can be pasted.
    """
    arguments = {
        "torch_module": torch_module,
        "torch_kwargs": torch_kwargs,
        "torch_params": torch_params,
        "flax_module": flax_module,
        "flax_kwargs": flax_kwargs,
        "flax_params": flax_params,
        "torch_call": torch_call,
        "flax_call": flax_call,
    }
    sides = {framework: make_side(framework, arguments, "cpu") for framework in ("torch", "jax")}
    drawn = draw_inputs(inputs, 0)
    examples = both_layouts(drawn.layout, drawn.arrays, input_patterns or {})
    for side in sides.values():
        side.arrange(drawn.layout, None)
    specs: dict[str, dict[str, ParameterSpec]] = {}
    for key, side in sides.items():
        with running(key, examples[key], drawn.layout.names):
            specs[key] = side.parameters(examples[key])
    orders: dict[str, Sequence[str]] = {}
    for key, side in (("torch", "torch"), ("jax", "flax")):
        # Drawn inputs are float64; modules are traced in their own format.
        arrays = {name: spec.value for name, spec in specs[key].items()}
        stored = tuple(as_stored(array, storage_format([*arrays.values()])) for array in examples[key])
        try:
            orders[side] = sides[key].first_uses(arrays, stored)
        except CANNOT_RUN:  # a module that does not run on these inputs: names and shapes are left
            continue
    return propose_rules(specs["torch"], specs["jax"], orders)
