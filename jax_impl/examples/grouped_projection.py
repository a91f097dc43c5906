"""A grouped output projection of attention, as DeepSeek-V4 has it: each group of heads is projected down by itself."""

from flax import nnx
from jax import Array

from jax_impl.layer import PartitionedLinear


class GroupedOutputProjection(nnx.Module):
    """Project the outputs of attention heads group by group to a lower rank, and all groups together to the model.

    Shape:
        Input (..., heads, head); output (..., model).

    Args:
        heads: Attention heads, a multiple of `groups`.
        head: Features of a head.
        groups: Groups of heads with a projection of their own; 8 in Flash, 16 in Pro.
        rank: Features to which a group is projected.
        model: Features of the residual stream.
        implementation: Of the groups' projections; "loop" is one `nnx.Linear` a group.
        rngs: Random streams of the initial values.

    Source: DeepSeek-V4's attention, whose grouped projection the implementations call `GroupedLinear`.
    """

    def __init__(
        self,
        heads: int = 64,
        head: int = 512,
        groups: int = 8,
        rank: int = 1024,
        model: int = 4096,
        *,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        # Flat features in and out: a group's heads lie beside each other, and so do the groups' results.
        self.down = PartitionedLinear(
            groups,
            heads // groups * head,
            rank,
            use_bias=False,
            partition_axis=-1,
            implementation=implementation,
            rngs=rngs,
        )
        self.up = nnx.Linear(groups * rank, model, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Compute the projection."""
        return self.up(self.down(x.reshape(*x.shape[:-2], -1)))
