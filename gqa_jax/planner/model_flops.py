"""Operations that no program can avoid, from the config alone."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gqa_jax.config import DecoderConfig
from gqa_jax.models.decoder import Decoder
from gqa_jax.parallel import sharding


def model_flops(config: DecoderConfig, *, batch: int, length: int, decode: bool) -> float:
    """Operations of one step on all devices together: 2 per multiply-add, nothing recomputed.

    Products with every parameter that a token meets (k of E experts); logits and weighted sums of visible
    keys only; the recurrence of Gated DeltaNet token by token. Training counts the backward as twice the forward.

    Args:
      config: of the model.
      batch, length: rows and tokens; with `decode`, rows of one new token over `length` held ones.
      decode: one step of decoding instead of one update.
    """
    tokens = batch * (1 if decode else length)
    total = tokens * _flops_per_token(config)
    for index, kind in enumerate(config.layers):
        if kind == "linear_attention":
            assert config.gated_deltanet is not None
            delta = config.gated_deltanet
            # S^T k, the rank-one update and S^T q: three products with the state.
            total += tokens * 6 * delta.num_value_heads * delta.key_head_dim * delta.value_head_dim
            continue
        attention = config.attention_at(index)
        visible = _visible(length, attention.sliding_window, decode) * batch
        total += 4 * visible * attention.num_heads * attention.head_dim
    return float(total) if decode else 3.0 * total


def _visible(length: int, window: int | None, decode: bool) -> int:
    """Pairs of a query and a key that it sees, in one row."""
    window = min(window or length, length)
    if decode:
        return window
    return window * (window + 1) // 2 + (length - window) * window


def _flops_per_token(config: DecoderConfig) -> float:
    """2 per parameter that a token is multiplied with."""
    make = functools.partial(Decoder, config, param_dtype=jnp.float32, keep_rngs=False)
    decoder = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder):
        name, size = sharding.path_name(path), math.prod(leaf.shape)
        if name.endswith("embed.embedding"):
            size = size if config.tie_embeddings else 0  # a lookup
        elif ".experts." in name:
            assert config.moe is not None
            size = size * config.moe.num_experts_per_token / config.moe.num_experts
        elif not name.endswith("kernel"):
            size = 0  # norms, biases, gates: one operation per channel
        total += 2.0 * size
    return total
