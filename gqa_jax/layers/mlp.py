"""The dense feed-forward block: SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gqa_jax.layers.projection import Projection


def swiglu(gate_up: Float[Array, "... F 2"]) -> Float[Array, "... F"]:
    """`silu(gate) * up` of interleaved pairs, in the input's dtype (arXiv 2002.05202, section 2)."""
    return jax.nn.silu(gate_up[..., 0]) * gate_up[..., 1]


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` with gate and up fused channel by channel, so that a shard is whole channels.

    Attributes:
      gate_up: kernel `[M, F, 2]`, (gate, up) per channel.
      down: kernel `[F, M]`.
    """

    def __init__(
        self,
        model_dim: int,
        intermediate_size: int,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        """Builds the block: M and F, then as for `SelfAttention`."""
        common = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.gate_up = Projection((model_dim,), (intermediate_size, 2), **common)
        self.down = Projection((intermediate_size,), (model_dim,), **common)

    def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
        """Maps the last axis; same shape."""
        return self.down(swiglu(self.gate_up(x)))
