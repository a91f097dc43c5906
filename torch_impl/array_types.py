"""Shape-annotated tensor types: one letter for each axis of the operation.

Letters: `b` batch (any number of leading axes), `n` partition, `i` in_features, `o` out_features.
"""

from typing import TypeAlias

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
