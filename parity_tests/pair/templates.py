"""Templates over repeated layers: from `layers.{k}.weight` to one rule for each layer that both sides have."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parity_tests.pair.patterns import MappingError
from parity_tests.pair.rules import ENTRY, SIDES, Rule, Specs, plain

_PLACE = re.compile(r"\{\s*(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)\s*(?:([+-])\s*(\d+))?\s*\}")


def expanded(rules: Sequence[Rule], specs: Mapping[str, Specs]) -> Iterator[Rule]:
    """Yield every rule, a template over repeated layers once for each of its layers.

    `("layers.{k}.weight", "layers.kernel[{k}]", "o i -> i o")` stands for as many rules as there are numbers k; numbers
    may be written as `{2*k+1}`.

    Args:
        rules: as the user writes them.
        specs: arrays by side; a side that is not there decides no numbers.

    Raises:
        MappingError: if the two sides have other numbers.
    """
    for rule in rules:
        entries = list(rule[:2]) if isinstance(rule, tuple | list) else []
        variables = {match[2] for e in entries if isinstance(e, str) for match in _PLACE.finditer(e)}
        known = [
            name for e, side in zip(entries, SIDES, strict=False) if isinstance(e, str) for name in specs.get(side, ())
        ]
        if not variables or any("{" in name for name in known):
            yield rule
            continue
        found = [
            _numbers(entry, side, specs[side])
            for entry, side in zip(entries, SIDES, strict=True)
            if isinstance(entry, str) and side in specs
        ]
        for numbers in _joined(found, variables, rule):
            yield (*(_filled(entry, numbers, rule) for entry in entries), *rule[2:])


def _filled(entry: Any, numbers: Mapping[str, int], rule: Rule) -> Any:
    def number(match: re.Match) -> str:
        value = int(match[1] or 1) * numbers[match[2]] + int(f"{match[3] or '+'}{match[4] or 0}")
        if value < 0:
            raise MappingError(f"params: expected numbers of at least 0, got {value} for {match[0]} in {rule!r}.")
        return str(value)

    return _PLACE.sub(number, entry) if isinstance(entry, str) else entry


def _numbers(entry: str, side: str, specs: Specs) -> list[dict[str, int]]:
    """Return the numbers for which one side has the arrays of a template; those only in its ranges stay open."""
    result: list[dict[str, int]] | None = None
    entry = _PLACE.sub(lambda place: "".join(place[0].split()), entry)
    for word in re.split(r"\s+[+-]\s+", entry.strip()):
        if not _PLACE.search(word):
            continue
        found = list(_numbers_of_term(word.lstrip("- "), specs))
        if not found:
            raise MappingError(
                f"params: expected {side} parameters named like {word!r} with numbers in the place of "
                f"{', '.join(match[0] for match in _PLACE.finditer(word))}, got none among {', '.join(list(specs)[:8])}"
                f"{', ...' * (len(specs) > 8)}; write a number that names skip as {{2*k}} or {{k+1}}."
            )
        result = found if result is None else [numbers for numbers in result if numbers in found]
    if result == []:
        raise MappingError(f"params: expected numbers that all terms of {entry!r} have, got none on the {side} side.")
    return [{}] if result is None else result


def _numbers_of_term(word: str, specs: Specs) -> Iterator[dict[str, int]]:
    match = ENTRY.match(word)
    assert match is not None
    names = {name: plain(name) for name in specs}
    # Flax's own spelling has its collection in front, which the names of parameters lack.
    spellings = ((word, None), (match["name"], match["ranges"]))
    bare = [(plain(template).removeprefix("params."), ranges) for template, ranges in spellings]
    for template, ranges in (*spellings, *bare):
        places, pattern = [], ""
        end = 0
        for place in _PLACE.finditer(dotted := plain(template)):
            places.append(place)
            pattern += re.escape(dotted[end : place.start()]) + r"(\d+)"
            end = place.end()
        pattern += re.escape(dotted[end:])
        hits = [(name, hit) for name, text in names.items() if (hit := re.fullmatch(pattern, text))]
        for name, hit in hits:
            options = [_solutions(place, [int(text)]) for place, text in zip(places, hit.groups(), strict=True)]
            for axis, text in enumerate(ranges.split(",") if ranges else ()):
                if (place := _PLACE.fullmatch(text.strip())) and axis < specs[name].value.ndim:
                    options.append(_solutions(place, range(specs[name].value.shape[axis])))
            for choice in itertools.product(*options):
                numbers: dict[str, int] = {}
                if all(numbers.setdefault(variable, value) == value for variable, value in choice):
                    yield numbers
        if hits:
            return


def _solutions(place: re.Match, values: Sequence[int] | range) -> list[tuple[str, int]]:
    factor, shift = int(place[1] or 1), int(f"{place[3] or '+'}{place[4] or 0}")
    return [(place[2], (v - shift) // factor) for v in values if v >= shift and (v - shift) % factor == 0]


def _joined(found: Sequence[list[dict[str, int]]], variables: set[str], rule: Rule) -> list[dict[str, int]]:
    """Return the numbers on which both sides agree; each side must have them all."""
    first, second = found[0] if found else [{}], found[-1] if found else [{}]
    shared = sorted(set(first[0]) & set(second[0]))
    if first[0] and second[0] and not shared:
        raise MappingError(
            f"params: expected one name for the numbers on both sides of {tuple(rule)!r}, got "
            f"{', '.join(sorted(first[0]))} and {', '.join(sorted(second[0]))}; nothing says which belong together."
        )
    keys = [
        list(dict.fromkeys(tuple(numbers[name] for name in shared) for numbers in side)) for side in (first, second)
    ]
    if set(keys[0]) != set(keys[1]):

        def shown(values: list[tuple[int, ...]]) -> str:
            return ", ".join(str(value[0]) if len(value) == 1 else str(value) for value in sorted(values))

        raise MappingError(
            f"params: expected the same numbers {', '.join(shared)} on both sides of {tuple(rule)!r}, got "
            f"{shown(keys[0])} on the torch side and {shown(keys[1])} on the flax side; where names skip numbers, "
            f"write {{2*{shared[0]}}} or {{{shared[0]}+1}}."
        )
    if open_ := variables - set(first[0]) - set(second[0]):
        raise MappingError(
            f"params: expected {', '.join(sorted(open_))} in a name or as an index such as [{{k}}], got it only in "
            f"ranges of {tuple(rule)!r}; nothing says how far it counts."
        )
    by_key: dict[tuple[int, ...], list[dict[str, int]]] = {}
    for numbers in second:
        by_key.setdefault(tuple(numbers[name] for name in shared), []).append(numbers)
    return [a | b for a in first for b in by_key[tuple(a[name] for name in shared)]]
