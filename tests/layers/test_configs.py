"""Configurations: one that exists runs, whatever made its numbers; others are refused by field, value and rule."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import (
    MLP,
    AttentionConfig,
    CrossAttention,
    Decoder,
    DecoderConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    MoE,
    MoEConfig,
    RopeConfig,
    SelfAttention,
)
from gqa_jax.config import LinearScaling, Llama3Scaling, YarnScaling
from tests.support.random_layers import draw

ATTENTION = dict(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)
DELTA = dict(model_dim=16, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4)


def pick(rng, *choices):
    return choices[rng.integers(len(choices))]


def random_rope(rng, head_dim):
    rotary_dim = pick(rng, None, 2, 6, np.int64(4))
    half = (head_dim if rotary_dim is None else int(rotary_dim)) // 2
    if 2 * half > head_dim:
        return RopeConfig()
    temporal = int(rng.integers(half + 1))
    height = int(rng.integers(half - temporal + 1))
    return RopeConfig(
        theta=pick(rng, 10_000, np.float32(500.0), 1.5),
        rotary_dim=rotary_dim,
        pairing=pick(rng, "half", "adjacent"),
        scaling=pick(
            rng, None, LinearScaling(factor=np.float64(2)), Llama3Scaling(factor=8),
            YarnScaling(factor=4, original_max_positions=16, mscale=0.7, mscale_all_dim=0.7),
            YarnScaling(factor=1.0, original_max_positions=1, truncate=False),
        ),
        mrope_sections=pick(rng, None, [temporal, height, half - temporal - height]),
    )  # fmt: skip


def random_attention(rng, **fixed):
    groups, per_group = pick(rng, 1, 2, np.int32(3)), pick(rng, 1, 2)
    head_dim = pick(rng, 4, 6, np.int64(8))
    return AttentionConfig(
        model_dim=16, num_heads=groups * per_group, num_kv_heads=groups, head_dim=head_dim,
        qkv_bias=pick(rng, True, np.bool_(False)), out_bias=pick(rng, True, False),
        output_gate=pick(rng, True, False), output_gate_dtype=pick(rng, "model", "float32"),
        qk_norm=pick(rng, "none", "rms", "rms_zero_centred", "l2"),
        qk_norm_position=pick(rng, "before_rope", "after_rope"),
        norm_eps=pick(rng, 1e-6, np.float32(1e-5)), rope=pick(rng, None, random_rope(rng, int(head_dim))),
        scale=pick(rng, None, 1, np.float64(0.3)), logits_soft_cap=pick(rng, None, 2, 50.0),
        sinks=pick(rng, "none", "zero", "learnable"), dropout_rate=pick(rng, 0, 0.5), **fixed,
    )  # fmt: skip


def random_decoder(rng):
    kinds = ["full_attention", "sliding_attention", "linear_attention"]
    pattern = [pick(rng, *kinds) for _ in range(rng.integers(1, 4))]
    layers = pattern * 2
    mixtures = [pick(rng, True, False) for _ in pattern] * 2
    experts = int(rng.integers(1, 4))
    return DecoderConfig(
        vocab_size=np.int64(pick(rng, 1, 7)), model_dim=16, layers=layers,
        attention=random_attention(rng), sliding_window=pick(rng, 1, np.int32(3)),
        gated_deltanet=GatedDeltaNetConfig(
            model_dim=16, num_key_heads=pick(rng, 1, 2), num_value_heads=pick(rng, 2, 4),
            key_head_dim=pick(rng, 4, 8), value_head_dim=pick(rng, 4, 6), conv_width=pick(rng, 1, 2, 4),
            conv_bias=pick(rng, True, False), norm_zero_centred=pick(rng, True, False),
            allow_negative_eigenvalues=pick(rng, True, False), decay_init=pick(rng, "ones", "mamba"),
            A_init_range=[np.float32(0.5), 2], chunk_size=pick(rng, None, 16, 32, 64, 128),
        ),
        intermediate_size=pick(rng, 1, 12), moe=MoEConfig(
            num_experts=experts, num_experts_per_token=int(rng.integers(1, experts + 1)), intermediate_size=4,
            shared_intermediate_size=pick(rng, None, 3), normalize_top_k=pick(rng, True, False),
        ),
        moe_layers=pick(rng, None, mixtures), norm_zero_centred=pick(rng, True, False),
        tie_embeddings=pick(rng, True, False), scan_layers=pick(rng, True, False),
        remat=pick(rng, True, False, jax.checkpoint_policies.everything_saveable),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_a_decoder_config_that_exists_runs(seed):
    rng = np.random.default_rng(seed)
    config = random_decoder(rng)
    assert hash(config) == hash(dataclasses.replace(config))
    dtype = pick(rng, None, jnp.bfloat16, jnp.float16)

    def run(ids):
        decoder = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, keep_rngs=False)
        segment_ids = jnp.asarray([[0, 0, -1, 1, 1], [0, -1, -1, 0, 0]])
        drop = dict(deterministic=False, dropout_key=jax.random.key(0))
        logits, gradient = jax.value_and_grad(
            lambda d: d(ids, segment_ids=segment_ids, **drop).astype(jnp.float32).sum()
        )(decoder)
        _, cache = decoder.step(ids, decoder.init_cache(2, 8), lengths=jnp.asarray([5, 2]))
        return logits, gradient, decoder.step(ids[:, :1], cache).logits

    ids = jnp.zeros((2, 5), jnp.int32)
    assert jax.eval_shape(run, ids)[-1].shape == (2, 1, config.vocab_size)


@pytest.mark.parametrize("seed", range(6))
def test_an_encoder_config_that_exists_runs(seed):
    config = random_attention(np.random.default_rng(100 + seed), is_causal=False)

    def run(x):
        mask = jnp.ones((2, 1, 5, 5), bool)
        drop = dict(deterministic=False, dropout_key=jax.random.key(0), mask=mask)
        y = SelfAttention(config, rngs=nnx.Rngs(0))(x, **drop)
        return y + CrossAttention(config, rngs=nnx.Rngs(0))(x, x, **drop)

    assert jax.eval_shape(run, jnp.zeros((2, 5, 16))).shape == (2, 5, 16)


def test_numbers_of_numpy_and_lists_make_the_same_config():
    plain = DecoderConfig(
        vocab_size=9, model_dim=16, layers=("full_attention",) * 2, intermediate_size=8,
        attention=AttentionConfig(**ATTENTION, scale=0.5, rope=RopeConfig(mrope_sections=(1, 1, 2))),
    )  # fmt: skip
    other = DecoderConfig(
        vocab_size=np.int64(9), model_dim=np.uint8(16), layers=["full_attention"] * 2,
        intermediate_size=np.int32(8), attention=AttentionConfig(
            **{name: np.int16(n) for name, n in ATTENTION.items()}, scale=np.float32(0.5),
            is_causal=np.bool_(True), rope=RopeConfig(mrope_sections=[1, np.int8(1), 2]),
        ),
    )  # fmt: skip
    assert plain == other
    assert hash(plain) == hash(other)
    assert all(type(n) is int for n in (other.vocab_size, other.attention.head_dim))


DENSE = dict(vocab_size=9, model_dim=16, layers=("full_attention",), intermediate_size=8)
REFUSED = [
    (AttentionConfig, ATTENTION | dict(norm_eps=-1), "`norm_eps` must be positive, got -1"),
    (AttentionConfig, ATTENTION | dict(scale=np.inf), "`scale` must be finite, got inf"),
    (AttentionConfig, ATTENTION | dict(scale="1"), "`scale` must be a number, got '1'"),
    (AttentionConfig, ATTENTION | dict(scale=True), "`scale` must be a number, got True"),
    (AttentionConfig, ATTENTION | dict(logits_soft_cap=np.nan), "`logits_soft_cap` must be finite"),
    (AttentionConfig, ATTENTION | dict(num_heads=4.0), "`num_heads` must be an int, got 4.0"),
    (AttentionConfig, ATTENTION | dict(num_heads=True), "`num_heads` must be an int, got True"),
    (AttentionConfig, ATTENTION | dict(is_causal="no"), "`is_causal` must be True or False"),
    (AttentionConfig, ATTENTION | dict(qk_norm=None), "`qk_norm` must be one of ('none', 'rms'"),
    (AttentionConfig, ATTENTION | dict(rope={"theta": 1.0}), "`rope` must be a RopeConfig, got {"),
    (
        AttentionConfig, ATTENTION | dict(rope=RopeConfig(mrope_sections=(1, 1, 1))),
        "`rope.mrope_sections=(1, 1, 1)` must sum to rotary_dim / 2 = 4",
    ),
    (RopeConfig, dict(mrope_sections=(1, 2)), "`mrope_sections` must hold 3 values, got (1, 2)"),
    (RopeConfig, dict(mrope_sections=(5, -1, 0)), "`mrope_sections` must not be negative"),
    (RopeConfig, dict(scaling="yarn"), "`scaling` must be one of LinearScaling, Llama3Scaling"),
    (RopeConfig, dict(theta=np.inf), "`theta` must be finite, got inf"),
    (
        RopeConfig, dict(theta=1.0, scaling=YarnScaling(factor=2, original_max_positions=8)),
        "`theta` must exceed 1 with YarnScaling",
    ),
    (YarnScaling, dict(factor=2, original_max_positions=8, beta_slow=0), "`beta_slow` must be pos"),
    (LinearScaling, dict(factor=np.nan), "`factor` must be finite, got nan"),
    (GatedDeltaNetConfig, DELTA | dict(norm_eps=0.0), "`norm_eps` must be positive, got 0.0"),
    (GatedDeltaNetConfig, DELTA | dict(A_init_range=3.0), "`A_init_range` must be a tuple, got 3"),
    (GatedDeltaNetConfig, DELTA | dict(chunk_size=1), "`chunk_size` must be None or one of (16, 32, 64, 128), got 1"),
    (DecoderConfig, DENSE, "`attention` must be given for `layers` of"),
    (DecoderConfig, DENSE | dict(norm_eps=-1.0), "`norm_eps` must be positive, got -1.0"),
    (DecoderConfig, DENSE | dict(attention=ATTENTION), "`attention` must be a AttentionConfig"),
    (DecoderConfig, DENSE | dict(layers="full_attention"), "`layers` must be a tuple, got 'full_"),
    (DecoderConfig, DENSE | dict(layers=["full"]), "`layers` must hold full_attention, sliding_"),
    (DecoderConfig, DENSE | dict(moe_layers=[1]), "`moe_layers[0]` must be True or False, got 1"),
    (DecoderConfig, DENSE | dict(scan_layers="no"), "`scan_layers` must be True or False, got 'no"),
    (
        DecoderConfig, DENSE | dict(
            layers=["sliding_attention"], sliding_window=2,
            attention=AttentionConfig(**ATTENTION, is_causal=False),
        ),
        "`attention.is_causal` must be True when `layers` has sliding_attention",
    ),
]  # fmt: skip


@pytest.mark.parametrize("cls, fields, text", REFUSED)
def test_what_cannot_run_is_refused_by_field_value_and_rule(cls, fields, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        cls(**fields)


def layers(param_dtype):
    options = dict(rngs=nnx.Rngs(0), param_dtype=param_dtype)
    moe = MoEConfig(num_experts=3, num_experts_per_token=2, intermediate_size=4)
    return {
        "mlp": MLP(16, 8, **options),
        "moe": MoE(moe, 16, **options),
        "attention": SelfAttention(AttentionConfig(**ATTENTION), **options),
        "delta": GatedDeltaNet(GatedDeltaNetConfig(**DELTA), **options),
    }


@pytest.mark.parametrize("name", ["mlp", "moe", "attention", "delta"])
def test_float16_and_bfloat16_meet_in_float32_and_integers_are_refused(name):
    x = draw(0, 1, 4, 16)
    for narrow, other in ((jnp.bfloat16, jnp.float16), (jnp.float16, jnp.bfloat16)):
        layer = nnx.eval_shape(lambda narrow=narrow: layers(narrow))[name]
        call = lambda layer, x: layer(x)
        shape = jax.eval_shape(call, layer, x.astype(other))
        assert shape.dtype == jnp.float32
        with pytest.raises(TypeError, match="`x` must be a floating-point array, got int32"):
            jax.eval_shape(call, layer, jnp.ones((1, 4, 16), jnp.int32))
