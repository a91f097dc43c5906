"""Who takes part in a cell. The names come from the workers, so that no second list can drift from the registries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EAGER, COMPILE, JIT = "eager", "compile", "jit"
IMPLEMENTATION, STOCK, YARDSTICK = "implementation", "stock", "yardstick"
# What a user of the framework would type; the mode that every competitor of that framework is timed in.
DEFAULT_MODE: Mapping[str, str] = {"torch": EAGER, "jax": JIT}
FRAMEWORKS: tuple[str, ...] = tuple(DEFAULT_MODE)


@dataclass(frozen=True)
class Competitor:
    """One way of computing the map.

    Attributes:
        framework: ``torch`` or ``jax``.
        implementation: a name of the tree's registry, ``stock:...`` for what users write instead, or ``dense``.
        mode: ``eager``, ``compile`` or ``jit``.
        kind: ``implementation``, ``stock`` or ``yardstick`` (computes another function; never ranked).
    """

    framework: str
    implementation: str
    mode: str
    kind: str = IMPLEMENTATION

    @property
    def label(self) -> str:
        """One readable name, for example ``torch matmul (eager)``."""
        return f"{self.framework} {self.implementation} ({self.mode})"


@dataclass(frozen=True)
class Catalogue:
    """What one framework's worker can run, as it reported itself.

    Attributes:
        framework: ``torch`` or ``jax``.
        implementations: names of the tree's registry, in its order.
        stock: what users of the framework write instead.
        yardsticks: functions that are timed for orientation only.
        missing: what users write instead, but cannot be run there, each with the reason.
    """

    framework: str
    implementations: tuple[str, ...]
    stock: tuple[str, ...]
    yardsticks: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def kinds(self) -> dict[str, str]:
        """Name to kind, in the order in which competitors are listed."""
        return (
            dict.fromkeys(self.implementations, IMPLEMENTATION)
            | dict.fromkeys(self.stock, STOCK)
            | dict.fromkeys(self.yardsticks, YARDSTICK)
        )


def competitors_for(
    catalogues: Sequence[Catalogue], *, compiled: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[Competitor, ...]:
    """Lists the competitors of a cell.

    Args:
        catalogues: one for each framework that takes part.
        compiled: names that run under ``torch.compile`` as well.
        only: names to keep; empty keeps all.

    Returns:
        Competitors, framework by framework, each in its default mode first.
    """
    found: list[Competitor] = []
    for catalogue in catalogues:
        kinds = {name: kind for name, kind in catalogue.kinds().items() if not only or name in only}
        mode = DEFAULT_MODE[catalogue.framework]
        found.extend(Competitor(catalogue.framework, name, mode, kind) for name, kind in kinds.items())
        if catalogue.framework == "torch":
            found.extend(Competitor("torch", name, COMPILE, kinds[name]) for name in compiled if name in kinds)
    return tuple(found)
