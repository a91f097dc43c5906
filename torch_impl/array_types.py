"""Shape-annotated tensor types: one letter for each axis of the operation.

Letters: `b` batch (any number of leading axes), `n` partition, `i` in_features, `o` out_features.
"""

from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

Inputs: TypeAlias = Float[Tensor, "*b n i"]
"""Features of every partition, shape (*b, n, i)."""

Weight: TypeAlias = Float[Tensor, "n i o"]
"""One matrix per partition, shape (n, i, o)."""

Bias: TypeAlias = Float[Tensor, "n o"]
"""One bias vector per partition, shape (n, o)."""

Outputs: TypeAlias = Float[Tensor, "*b n o"]
"""Results of every partition, shape (*b, n, o)."""


def kind_of(value: Any, *expected: str) -> str:
    """The name of a value's type; with its package where it is a namesake of what was expected."""
    package = f"{type(value).__module__.partition('.')[0]}." if type(value).__name__ in expected else ""
    return package + type(value).__name__
