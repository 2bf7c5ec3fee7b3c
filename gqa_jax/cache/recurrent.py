"""The state of a Gated DeltaNet layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gqa_jax.cache.checks import LOST
from gqa_jax.cache.rewinding import Rewound, target_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetState:
    """All that a Gated DeltaNet layer remembers; its size does not depend on the number of tokens.

    Attributes:
      conv: `[B, W, Hk, 2 Dk + n Dv]`, the last W inputs of the convolution, oldest first.
      state: `[B, Hv, Dk, Dv]` float32.
      length: `[B]` int32, tokens seen per row.
    """

    conv: Float[Array, "B W Hk F"]
    state: Float[Array, "B Hv Dk Dv"]
    length: Int[Array, "B"]

    @property
    def max_tokens(self) -> int | None:
        """None: any number of tokens."""
        return None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.length.shape[-1]

    def overflowed(self) -> Array:
        """`[B]` bool: rows that were told, inside `jit`, a number of tokens outside [0, T]."""
        return self.length >= LOST

    def reset(self) -> "GatedDeltaNetState":
        """The same memory, no tokens."""
        return jax.tree.map(jnp.zeros_like, self)

    def rewind(self, position: int | Int[Array, "B"]) -> Rewound:
        """Accepts where the row is (nothing to do) and 0 (an empty state): a token cannot be removed from the state."""
        position = target_positions(position, self.length)
        emptied = position == 0
        accepted = emptied | ((position == self.length) & ~self.overflowed())

        def clear(x: Array) -> Array:
            rows = emptied.reshape(emptied.shape + (1,) * (x.ndim - emptied.ndim))
            return jnp.where(rows, jnp.zeros((), x.dtype), x)

        return Rewound(jax.tree.map(clear, self), accepted)
