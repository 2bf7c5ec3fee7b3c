"""One layer of the decoder, and its embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gqa_jax.config import DecoderConfig
from gqa_jax.layers import masks
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.mlp import MLP
from gqa_jax.layers.moe import MoE, RouterStatistics
from gqa_jax.layers.norms import RMSNorm
from pallas_kernels import as_int32


class Embedding(nnx.Module):
    """Token embedding.

    Attributes:
      embedding: `[V, M]`.
    """

    def __init__(self, num: int, dim: int, *, rngs: nnx.Rngs, dtype=None, param_dtype=jnp.float32):
        self.dtype = dtype
        draw = 0.02 * jax.random.normal(rngs.params(), (num, dim), jnp.float32)
        self.embedding = nnx.Param(draw.astype(param_dtype))

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """Rows of the table; NaN for ids outside it (where they cannot be refused, inside `jit`); 0 on padding."""
        tokens = as_int32("tokens", tokens)
        if segment_ids is not None:
            tokens = jnp.where(segment_ids < 0, 0, tokens)  # whatever id stands there
        return masks.hide_padding(self.look_up(tokens), segment_ids)

    def look_up(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        """Rows of the table; NaN for ids outside it."""
        table = self.embedding[...]
        tokens = jnp.where(tokens < 0, table.shape[0], tokens)  # or they would count from the end
        return (
            table.at[tokens].get(mode="fill", fill_value=jnp.nan).astype(self.dtype or table.dtype)
        )


class DecoderLayer(nnx.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    Attributes:
      mixer_norm, mlp_norm: scale `[M]`.
      mixer: `SelfAttention` or `GatedDeltaNet`.
      mlp: `MLP` or `MoE`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype,
    ):
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        norm: dict[str, Any] = dict(
            eps=config.norm_eps, zero_centred=config.norm_zero_centred, param_dtype=param_dtype
        )
        self.mixer_norm = RMSNorm(config.model_dim, **norm)
        if config.layers[index] == "linear_attention":
            assert config.gated_deltanet is not None  # DecoderConfig has checked
            self.mixer = GatedDeltaNet(config.gated_deltanet, **common)
        else:
            self.mixer = SelfAttention(config.attention_at(index), keep_rngs=False, **common)
        self.mlp_norm = RMSNorm(config.model_dim, **norm)
        if config.is_moe(index):
            assert config.moe is not None
            self.mlp = MoE(config.moe, config.model_dim, **common)
        else:
            assert config.intermediate_size is not None
            self.mlp = MLP(config.model_dim, config.intermediate_size, **common)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Array | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        dropout_offset: Array | None = None,
    ) -> tuple[Float[Array, "B T M"], RouterStatistics | None]:
        """The layer over rows that are 0 on padding, and the router's statistics; arguments as the mixer's."""
        normed = self.gather(self.mixer_norm(x))
        if isinstance(self.mixer, GatedDeltaNet):
            places = dict(positions=positions) if self.mixer.goes_by_positions else {}
            mixed = self.mixer(normed, segment_ids=segment_ids, **places)
        else:
            mixed = self.mixer(
                normed,
                positions=positions,
                segment_ids=segment_ids,
                deterministic=deterministic,
                dropout_key=dropout_key,
                dropout_offset=dropout_offset,
            )
        x = x + self.reduce(mixed)
        normed = self.gather(self.mlp_norm(x))
        if isinstance(self.mlp, MLP):
            return x + self.reduce(self.mlp(normed)), None
        real = None if segment_ids is None else segment_ids >= 0
        out, statistics = self.mlp.with_statistics(normed, real=real)
        return x + self.reduce(out), statistics

    def step(
        self, x: Float[Array, "B T M"], cache: Any, *, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Advances the mixer's cache by T tokens."""
        mixed, cache = self.mixer.step(self.mixer_norm(x), cache, lengths=lengths)
        x = x + self.reduce(mixed)
        return x + self.reduce(self.mlp(self.mlp_norm(x))), cache

    def gather(self, x: Array) -> Array:
        """The tokens that a block reads: those of the residual stream, here. A mesh may split the stream."""
        return x

    def reduce(self, out: Array) -> Array:
        """A block's whole result: its own, here. On a mesh, the sum over the devices that split its heads."""
        return out
