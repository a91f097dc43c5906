"""A first version of a parameter mapping, by shape and name, for a person to confirm: it is never applied by itself."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity_tests.pair.calls import Layouts
from parity_tests.pair.draws import InputSource, draw_inputs
from parity_tests.pair.layouts import both_layouts
from parity_tests.pair.legs import running
from parity_tests.pair.loading import make_side
from parity_tests.pair.mapping import KEEP, Rule
from parity_tests.pair.side import ParameterSpec

_SAME_LEAF = (
    {"weight", "kernel", "scale", "embedding", "w"},
    {"bias", "b"},
    {"running_mean", "mean"},
    {"running_var", "var"},
)
_KERNELS = ("kernel", "w")  # inputs first; Equinox's "weight" is laid out as torch's
_SYNONYMS = {"q": "query", "k": "key", "v": "value", "proj": "", "norm": "layernorm", "fc": "dense", "linear": "dense"}
_AXES = "abcdefg"
# In the order in which torch stores them one after the other.
_BLOCKS = (("query", "key", "value"), ("r", "z", "n"), ("i", "f", "g", "o"))


@dataclass(frozen=True)
class Proposal:
    """Rules to look at, correct and pass to `check_pair`.

    Attributes:
        rules: complete if nothing is left.
        ambiguities: sentences about choices that shapes and names do not decide.
        left: parameters for which no counterpart was found, by side.
    """

    rules: tuple[Rule, ...]
    ambiguities: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        """Return the rules as Python, with the doubts as comments."""
        lines = ["params = ["]
        lines += [f"    {rule!r}," for rule in self.rules]
        lines += ["]"]
        lines += [f"# ambiguous: {sentence}" for sentence in self.ambiguities]
        lines += [f"# left over: {what}" for what in self.left]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Candidate:
    score: float
    torch: str
    flax: tuple[str, ...]
    patterns: tuple[str, ...]


def _words(name: str) -> str:
    parts = re.split(r"[._\d]+", name.lower())
    return " ".join(filter(None, (_SYNONYMS.get(part, part) for part in parts[:-1])))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_called(leaf: str, kind: str) -> bool:
    """Tell whether a name such as `weight_ih` or `in_proj_bias` is of a kind; single letters are whole names."""
    return kind in leaf if len(kind) > 1 else kind == leaf


def _fit(torch: ParameterSpec, flax: ParameterSpec) -> bool:
    """Tell whether the one may be the other: a frozen parameter may be a buffer elsewhere."""
    numbers = [spec.value.dtype.kind in "iub" for spec in (torch, flax)]
    return numbers[0] == numbers[1] and (torch.frozen or torch.trainable == flax.trainable)


def _likeness(torch: str, flax: str) -> float:
    first, second = _leaf(torch), _leaf(flax)
    same = any(any(_is_called(first, kind) for kind in kinds) and second in kinds for kinds in _SAME_LEAF)
    letters = difflib.SequenceMatcher(None, _words(torch), _words(flax)).ratio()
    numbers = re.findall(r"\d+", torch) == re.findall(r"\d+", flax)
    return 2.0 * same + letters + 0.5 * numbers


def _patterns(source: tuple[int, ...], target: tuple[int, ...], flax: str) -> list[str]:
    """Return patterns that take one shape to the other, the conventional one first."""
    found: list[tuple[bool, str]] = []
    axes = list(range(len(target)))
    # Flax kernels begin with the window, then the inputs, and end with the outputs; torch weights begin with the
    # outputs, then the inputs: a rotation, or with a window of its own this order.
    usual = [axes[-1:] + axes[-2:-1] + axes[:-2], *(axes[k:] + axes[:k] for k in range(1, len(axes)))]
    if len(source) == len(target) > 2:
        usual = usual[:1]
    for permutation in itertools.permutations(range(len(target))):
        # The torch axes, in order, made of runs of the permuted flax axes.
        for groups in _grouped([target[k] for k in permutation], source):
            names = iter(permutation)
            members = [[_AXES[next(names)] for _ in group] for group in groups]
            left = " ".join(axes[0] if len(axes) == 1 else f"({' '.join(axes)})" for axes in members)
            unusual = _leaf(flax) in _KERNELS and list(permutation) not in usual
            found.append((unusual, f"{left} -> {' '.join(_AXES[: len(target)])}"))
    found.sort(key=lambda entry: entry[0])
    same = f"{' '.join(_AXES[: len(target)])} -> {' '.join(_AXES[: len(target)])}"
    return ["" if pattern == same else pattern for _, pattern in found]


def _grouped(sizes: Sequence[int], source: Sequence[int]) -> Iterator[list[list[int]]]:
    """Split `sizes` into consecutive runs whose products are `source`."""
    if not source:
        if not sizes:
            yield []
        return
    product = 1
    for count in range(1, len(sizes) - len(source) + 2):
        product *= sizes[count - 1]
        if product == source[0]:
            for rest in _grouped(sizes[count:], source[1:]):
                yield [list(sizes[:count]), *rest]


def _candidates(torch: Mapping[str, ParameterSpec], flax: Mapping[str, ParameterSpec]) -> Iterator[_Candidate]:
    for name, spec in torch.items():
        shape = spec.value.shape
        for path, other in flax.items():
            if _fit(spec, other) and (patterns := _patterns(shape, other.value.shape, path)):
                yield _Candidate(_likeness(name, path), name, (path,), tuple(patterns))
        # One torch array that holds several flax arrays of one shape, one after the other along its first axis.
        families: dict[tuple, list[str]] = {}
        for path, other in flax.items():
            if _fit(spec, other):
                families.setdefault((_leaf(path), other.value.shape), []).append(path)
        for (_, part), paths in families.items():
            for count in range(2, min(len(paths), 4) + 1):
                if not shape or shape[0] % count:
                    continue
                patterns = _patterns((shape[0] // count, *shape[1:]), part, paths[0])
                for combination in itertools.combinations(paths, count) if patterns else ():
                    chosen = _in_order(combination)
                    score = sum(_likeness(name, path) for path in chosen) / count
                    yield _Candidate(score, name, chosen, tuple(patterns))


def propose_rules(torch: Mapping[str, ParameterSpec], flax: Mapping[str, ParameterSpec]) -> Proposal:
    """Match arrays greedily by the likeness of their names among those whose shapes fit."""
    candidates = sorted(_candidates(torch, flax), key=lambda candidate: -candidate.score)
    chosen: dict[str, _Candidate] = {}
    used: set[str] = set()
    doubts = []
    for candidate in candidates:
        if candidate.torch in chosen or used & set(candidate.flax):
            continue
        chosen[candidate.torch] = candidate
        rivals = [
            other.flax
            for other in candidates
            if other.torch == candidate.torch
            and other.flax != candidate.flax
            and other.score == candidate.score
            and not used & set(other.flax)
        ]
        used |= set(candidate.flax)
        if rivals:
            others = "; ".join(" + ".join(paths) for paths in rivals[:4])
            doubts.append(f"{candidate.torch} fits {' + '.join(candidate.flax)} no better than {others}")
        if len(candidate.flax) > 1:
            doubts.append(f"the order of {', '.join(candidate.flax)} in {candidate.torch} is a guess")
        if len(candidate.patterns) > 1:
            shown = ", ".join(repr(pattern) for pattern in candidate.patterns[1:4])
            doubts.append(f"{candidate.torch}: the shapes also allow the axis pattern {shown}")
    rules = [rule for name in torch if name in chosen for rule in _rules(chosen[name], torch[name].value.shape)]
    kept = [name for name, spec in torch.items() if spec.frozen and name not in chosen]
    rules += [(name, None, KEEP) for name in kept]
    doubts += [f"{name} is frozen and has no counterpart: kept, if the flax side computes it" for name in kept]
    left = [f"torch {n} {spec.value.shape}" for n, spec in torch.items() if n not in chosen and n not in kept]
    left += [f"flax {path} {spec.value.shape}" for path, spec in flax.items() if path not in used]
    return Proposal(tuple(rules), tuple(doubts), tuple(left))


def _in_order(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Order flax paths as torch stores such blocks, if their names are known ("query", or "hz")."""
    owners = [path.split(".")[-2] if "." in path else path for path in paths]
    for blocks in _BLOCKS:
        places = [next((k for k, block in enumerate(blocks) if owner.endswith(block)), None) for owner in owners]
        if None not in places and len(set(places)) == len(places):
            return tuple(path for _, path in sorted(zip(places, paths, strict=True)))
    return paths


def _rules(candidate: _Candidate, shape: tuple[int, ...]) -> list[Rule]:
    pattern = candidate.patterns[0]
    if len(candidate.flax) == 1:
        return [(candidate.torch, candidate.flax[0], pattern)]
    length = shape[0] // len(candidate.flax)
    return [
        (f"{candidate.torch}[{length * k}:{length * (k + 1)}]", path, pattern) for k, path in enumerate(candidate.flax)
    ]


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
    """Propose `check_pair`'s `params` by shape and name; print it, correct it, pass it back.

    Nothing is applied: a shape that fits may still be the wrong order of gates, or a square kernel the wrong way round.
    All arguments are those of `check_pair`; linen modules infer shapes from `inputs`.

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
    found = {}
    for key, side in sides.items():
        with running(key, examples[key], drawn.layout.names):
            found[key] = side.parameters(examples[key])
    torch, flax = found["torch"], found["jax"]
    return propose_rules(torch, flax)
