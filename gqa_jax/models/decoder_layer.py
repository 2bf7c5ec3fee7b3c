"""One layer of the decoder, and its embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gqa_jax.config import DecoderConfig
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.mlp import MLP
from gqa_jax.layers.moe import MoE, RouterStatistics
from gqa_jax.layers.norms import RMSNorm
from gqa_jax.parallel import tensor as tensor_parallel
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes
from pallas_kernels import as_int32


class Embedding(nnx.Module):
    """Token embedding.

    Attributes:
      embedding: `[V, M]`.
    """

    def __init__(
        self,
        num: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
        axes: MeshAxes | None = None,
    ):
        self.dtype = dtype
        self.axes = axes
        draw = 0.02 * jax.random.normal(rngs.params(), (num, dim), jnp.float32)
        self.embedding = nnx.Param(draw.astype(param_dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        """Rows of the table; NaN for ids outside it (where they cannot be refused, inside `jit`)."""
        tokens = as_int32("tokens", tokens)
        if self.axes is not None:
            return tensor_parallel.embed(self, tokens)
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
        axes: MeshAxes | None = None,
        context_parallel: ContextParallel | None = None,
    ):
        self.any_order = context_parallel is not None and context_parallel.layout == "positions"
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, axes=axes)
        spread: dict[str, Any] = dict(context_parallel=context_parallel, **common)
        norm: dict[str, Any] = dict(
            eps=config.norm_eps, zero_centred=config.norm_zero_centred, param_dtype=param_dtype
        )
        self.mixer_norm = RMSNorm(config.model_dim, **norm)
        if config.layers[index] == "linear_attention":
            assert config.gated_deltanet is not None  # DecoderConfig has checked
            self.mixer = GatedDeltaNet(config.gated_deltanet, **spread)
        else:
            self.mixer = SelfAttention(config.attention_at(index), keep_rngs=False, **spread)
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
        rngs: Any = None,
    ) -> tuple[Float[Array, "B T M"], RouterStatistics | None]:
        """The layer over whole rows, and the router's statistics of a mixture; arguments as for the mixer."""
        x = tensor_parallel.hide_padding(x, segment_ids, self.mlp.axes)
        normed = self.mixer_norm(x)
        if isinstance(self.mixer, GatedDeltaNet):
            places = positions if self.any_order else None
            mixed = self.mixer(normed, positions=places, segment_ids=segment_ids)
        else:
            mixed = self.mixer(
                normed,
                positions=positions,
                segment_ids=segment_ids,
                deterministic=deterministic,
                dropout_key=dropout_key,
                rngs=rngs,
            )
        x = x + mixed
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.mlp_norm(x)), None
        real = None if segment_ids is None else segment_ids >= 0
        out, statistics = self.mlp.with_statistics(self.mlp_norm(x), real=real)
        return x + out, statistics

    def step(
        self, x: Float[Array, "B T M"], cache: Any, *, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Advances the mixer's cache by T tokens."""
        mixed, cache = self.mixer.step(self.mixer_norm(x), cache, lengths=lengths)
        x = x + mixed
        return x + tensor_parallel.for_steps(self.mlp)(self.mlp_norm(x)), cache
