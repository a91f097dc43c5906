"""Describe a pair that people port, and the bugs that they make: its two halves lie in twin rooms of the frameworks.

A half is a function of `parity_tests.frameworks.<framework>.<room>` with the pair's name; it returns that side's part
of `check_pair`'s arguments, and its keyword arguments are what a port can get wrong. Their defaults are the faithful
port.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parity_tests.pair.mapping import Rule

TO_LAST = {2: "b c h -> b h c", 3: "b c h w -> b h w c", 4: "b c d h w -> b d h w c"}
_WINDOW = {1: "k", 2: "kh kw", 3: "kd kh kw"}


@dataclass(frozen=True)
class Bug:
    """One mistake of a port."""

    name: str  # an identifier
    # What a rightly named cause says, a regular expression without regard to case; None where no search can be expected
    # to name it, so that any cause that is named is wrong. It counts among the causes all the same
    cause: str | None
    flax: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the flax half
    torch: Mapping[str, Any] = field(default_factory=dict)  # of the torch half
    pair: Mapping[str, Any] = field(default_factory=dict)  # other arguments of `check_pair`, such as a wrong rule
    place: str = ""  # what a rightly named place says, likewise; empty where the pair has only one place
    # Judged in; the float64 comparison, which belongs to every check, finds most bugs in any of them
    dtypes: tuple[str, ...] = ("float32",)


@dataclass(frozen=True)
class Ported:
    """One pair: where its halves are, what is common to both, and its bugs."""

    name: str
    room: str
    params: Sequence[Rule]
    inputs: Any
    bugs: tuple[Bug, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def part(self, side: str, bug: Bug | None = None) -> dict[str, Any]:
        """Return a part of `check_pair`'s arguments, `torch`, `jax` or `pair`, faithful or with a bug."""
        if side == "pair":
            name = self.name if bug is None else f"{self.name}__{bug.name}"
            common = {"params": self.params, "inputs": self.inputs, "name": name, **self.options}
            return common | dict(bug.pair if bug else {})
        half = getattr(importlib.import_module(f"parity_tests.frameworks.{side}.{self.room}"), self.name)
        return half(**({} if bug is None else bug.torch if side == "torch" else bug.flax))


def bug(name: str, cause: str | None, place: str = "", **flax: Any) -> Bug:
    """Make a bug of the flax half from its keyword arguments."""
    return Bug(name, cause, flax=flax, place=place)


def dense(torch: str = "", flax: str | None = None, bias: bool = True) -> list[Rule]:
    """Return the rules of a linear layer."""
    left, right = _prefixes(torch, flax)
    rules: list[Rule] = [(f"{left}weight", f"{right}kernel", "o i -> i o")]
    return rules + ([(f"{left}bias", f"{right}bias")] if bias else [])


def conv(torch: str, flax: str | None = None, axes: int = 2, bias: bool = True) -> list[Rule]:
    """Return the rules of a convolution over this many axes."""
    left, right = _prefixes(torch, flax)
    rules: list[Rule] = [(f"{left}weight", f"{right}kernel", f"o i {_WINDOW[axes]} -> {_WINDOW[axes]} i o")]
    return rules + ([(f"{left}bias", f"{right}bias")] if bias else [])


def norm(torch: str = "", flax: str | None = None, bias: bool = True, state: bool = False) -> list[Rule]:
    """Return the rules of a normalisation, with `state` of a batch norm's running statistics as well."""
    left, right = _prefixes(torch, flax)
    names = [("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")]
    kept = names[: 2 if bias else 1] + (names[2:] if state else [])
    return [(f"{left}{a}", f"{right}{b}") for a, b in kept]


def images(axes: int = 2, outputs: Sequence[str] = ("y",)) -> dict[str, Any]:
    """Return the patterns of channels first against channels last."""
    return {"input_patterns": {0: TO_LAST[axes + 1]}, "output_patterns": dict.fromkeys(outputs, TO_LAST[axes + 1])}


def _prefixes(torch: str, flax: str | None) -> tuple[str, str]:
    flax = torch if flax is None else flax
    return torch and f"{torch}.", flax and f"{flax}."
