"""Decoder configs of a few thousand parameters that still have every kind of layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa_jax import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNetConfig,
    MoEConfig,
    RopeConfig,
)

ATTENTION = AttentionConfig(
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    output_gate=True,
    qk_norm="rms_zero_centred",
    rope=RopeConfig(rotary_dim=4),
)
DELTA = GatedDeltaNetConfig(
    model_dim=16, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4
)
MIXTURE = MoEConfig(
    num_experts=4, num_experts_per_token=2, intermediate_size=12, shared_intermediate_size=8
)
HYBRID = DecoderConfig(
    vocab_size=40,
    model_dim=16,
    layers=("linear_attention", "sliding_attention", "full_attention"),
    attention=ATTENTION,
    sliding_window=3,
    gated_deltanet=DELTA,
    intermediate_size=24,
    norm_zero_centred=True,
)
CONFIGS = {
    "hybrid": HYBRID,
    "hybrid of mixtures, tied": dataclasses.replace(
        HYBRID,
        moe=MIXTURE,
        moe_layers=(True, False, True),
        tie_embeddings=True,
        norm_zero_centred=False,
    ),
    "linear only": dataclasses.replace(HYBRID, layers=("linear_attention",), attention=None),
    "attention only": dataclasses.replace(
        HYBRID, layers=("full_attention", "sliding_attention"), gated_deltanet=None
    ),
}
REPEATING = dataclasses.replace(
    HYBRID,
    layers=("linear_attention", "full_attention") * 3,
    moe=MIXTURE,
    moe_layers=(False, True) * 3,
)


def build(config: DecoderConfig, seed: int = 0, **kwargs) -> Decoder:
    """A decoder whose every parameter is random, norms and biases too; nothing is compiled to make it."""
    kwargs["keep_rngs"] = False  # every leaf is a parameter
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **kwargs))
    rng = np.random.default_rng(seed)

    def draw(path, leaf) -> jax.Array:
        name = jax.tree_util.keystr(path)
        centre = 1.0 if "scale" in name else 0.0
        spread = 0.5 if "embedding" in name else 0.15  # a residual stream and logits of order one
        return jnp.asarray(centre + spread * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def tokens(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Random ids."""
    return jnp.asarray(rng.integers(0, HYBRID.vocab_size, shape), jnp.int32)
