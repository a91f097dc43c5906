"""What differs by default between the modules of the example pairs: measured on fresh modules, not quoted."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One aspect in which freshly created modules of a pair may differ.

    Attributes:
        pair: name of the example.
        aspect: what was measured.
        torch: measured on torch's module.
        flax: measured on Flax's module.
    """

    pair: str
    aspect: str
    torch: str
    flax: str

    @property
    def differs(self) -> bool:
        """Whether the two measurements read differently."""
        return self.torch != self.flax


def default_differences() -> list[Difference]:
    """Measures every aspect on both sides; needs both frameworks."""
    sides = [
        importlib.import_module(f"parity_tests.frameworks.{side}.examples").measure_defaults()
        for side in ("torch", "jax")
    ]
    return [Difference(key[0], key[1], sides[0][key], sides[1][key]) for key in sides[0]]
