"""SelfAttention: every field of its config is heard, injected parts, the fused path, patterns of layers, masks."""

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, LinearScaling, RMSNorm, RopeConfig, SelfAttention, masks
from gqa_jax.models.layer_pattern import attention_layers, no_rope_layers, windowed_layers
from pallas_kernels import gqa_attention
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
BARE = dataclasses.replace(BASE, rope=None)


def build(config, seed=0, **kwargs):
    layer = SelfAttention(config, rngs=nnx.Rngs(seed), **kwargs)
    for path, leaf in nnx.iter_graph(layer):
        if isinstance(leaf, nnx.Param):
            name = zlib.crc32(repr(path).encode())
            noise = np.random.default_rng((seed, name)).normal(size=leaf.shape)
            leaf[...] = leaf[...] + jnp.asarray(0.3 * noise, leaf.dtype)
    return layer


def shapes(layer):
    return {p: v.shape for p, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))}


RICH = dataclasses.replace(
    BASE, output_gate=True, qk_norm="rms", scale=0.9, rope=RopeConfig(theta=50.0)
)
# Field -> (config, change): fields that change the shape of a parameter, then fields that change a value alone.
RESHAPES = {
    "model_dim": {"model_dim": 20},
    "num_heads": {"num_heads": 6},
    "num_kv_heads": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 4},
    "qkv_bias": {"qkv_bias": True},
    "out_bias": {"out_bias": True},
    "output_gate": {"output_gate": True},
    "qk_norm": {"qk_norm": "rms"},
    "sinks": {"sinks": "learnable"},
}
CHANGES = {
    "output_gate_dtype": (RICH, {"output_gate_dtype": "float32"}),
    "qk_norm": (RICH, {"qk_norm": "l2"}),
    "qk_norm_position": (RICH, {"qk_norm_position": "after_rope"}),
    "norm_eps": (RICH, {"norm_eps": 0.5}),
    "rope": (BASE, {"rope": RopeConfig(scaling=LinearScaling(factor=4.0))}),
    "sliding_window": (BASE, {"sliding_window": 3}),
    "scale": (BASE, {"scale": 1.7}),
    "logits_soft_cap": (BASE, {"logits_soft_cap": 0.5}),
    "sinks": (BASE, {"sinks": "zero"}),
    "is_causal": (BASE, {"is_causal": False}),
}


def test_every_field_of_the_config_is_covered():
    fields = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert fields == set(RESHAPES) | set(CHANGES) | {"dropout_rate"}  # dropout has its own test


@pytest.mark.parametrize("field", RESHAPES)
def test_fields_that_shape_parameters(field):
    config = dataclasses.replace(BASE, **RESHAPES[field])
    layer = build(config)
    assert shapes(layer) != shapes(build(BASE))
    groups, per_group, dim = config.num_kv_heads, config.q_per_kv, config.head_dim
    width = (2 if config.output_gate else 1) * per_group + 2
    assert layer.qkv.kernel.shape == (config.model_dim, groups, width, dim)
    assert layer.out.kernel.shape == (groups, per_group, dim, config.model_dim)
    x = draw(0, 1, 6, config.model_dim)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("field", CHANGES)
def test_fields_that_change_values(field):
    config, change = CHANGES[field]
    dtype = jnp.bfloat16 if field == "output_gate_dtype" else None  # float32 has nothing to show
    x = draw(0, 2, 9, 24)
    if dtype is not None:
        x = x.astype(dtype)
    before = build(config, dtype=dtype)(x)
    default = getattr(config, field)
    assert_bitwise_equal(build(dataclasses.replace(config, **{field: default}), dtype=dtype)(x), before)  # fmt: skip
    after = build(dataclasses.replace(config, **change), dtype=dtype)(x)
    assert float(jnp.abs(after - before).max()) > 1e-4


def test_a_rotary_embedding_of_none_ignores_positions():
    layer, x = build(BARE), draw(0, 2, 9, 24)
    elsewhere = jnp.broadcast_to(jnp.arange(9) * 7, (2, 9))
    assert_bitwise_equal(layer(x, positions=elsewhere), layer(x))
    assert (build(BASE)(x, positions=elsewhere) != build(BASE)(x)).any()


def test_padding_is_zero_even_with_a_bias():
    layer, x = build(dataclasses.replace(BASE, out_bias=True)), draw(0, 2, 6, 24)
    ids = jnp.asarray([[-1, 0, 0, 0, -1, -1], [0] * 6])
    out = np.asarray(layer(x, segment_ids=ids))
    assert not out[np.asarray(ids) < 0].any()
    assert out[np.asarray(ids) >= 0].any(axis=-1).all()


# Injected parts ---------------------------------------------------------------------------------------------------


class Doubling(nnx.Module):
    """A projection of someone else: no kernel, no bias."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return 2.0 * self.inner(x)


def test_injected_modules_and_callables_take_the_place_of_ours():
    config = dataclasses.replace(BASE, qk_norm="rms", output_gate=True)
    ours, x = build(config), draw(0, 2, 7, 24)
    theirs = SelfAttention(
        config, rngs=nnx.Rngs(9),
        qkv=Doubling(ours.qkv), out=lambda heads: ours.out(heads), q_norm=ours.q_norm, k_norm=RMSNorm(8),
    )  # fmt: skip
    twice = build(config)
    twice.qkv.kernel[...] = 2.0 * twice.qkv.kernel[...]
    twice.k_norm = RMSNorm(8)
    assert_close(theirs(x), twice(x), atol=1e-6)
    cache = theirs.init_cache(2, 7)
    assert cache.key.dtype == jnp.float32
    stepped, _ = theirs.step(x, cache)
    assert_close(stepped, twice(x), atol=1e-5)
    paths = {".".join(map(str, path)) for path in shapes(theirs)}
    assert {"qkv.inner.kernel", "q_norm.scale", "k_norm.scale"} <= paths
    assert "out.kernel" not in paths


def test_an_injected_norm_goes_where_the_config_says():
    calls = []
    norm = lambda a: (calls.append(a.shape), a)[1]
    x = draw(0, 1, 3, 24)
    config = dataclasses.replace(BASE, qk_norm="l2")
    assert_close(build(config, q_norm=norm, k_norm=norm)(x), build(BASE)(x), atol=1e-6)
    assert calls == [(1, 3, 4, 8), (1, 3, 2, 8)]


def test_injected_norms_come_in_pairs_and_need_a_config_with_a_norm():
    norm = lambda a: a
    with pytest.raises(ValueError, match="`q_norm` and `k_norm` must be given together"):
        build(BASE, q_norm=norm)
    with pytest.raises(ValueError, match=r"must be None when `config.qk_norm` is 'none'"):
        build(BASE, q_norm=norm, k_norm=norm)


# The fused path ---------------------------------------------------------------------------------------------------


def test_the_fused_path_equals_the_split_one():
    config = dataclasses.replace(
        BARE, sliding_window=4, sinks="learnable", logits_soft_cap=3.0, scale=0.4, qkv_bias=True
    )
    layer, x = build(config), draw(0, 2, 9, 24)
    ids = jnp.asarray([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7])
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, 9, 9)) < 0.7)
    got = layer(x, segment_ids=ids, mask=mask, split_qkv=False)
    assert_close(got, layer(x, segment_ids=ids, mask=mask, split_qkv=True), atol=1e-6)


@pytest.mark.parametrize(
    "config, options, found",
    [
        (BASE, {}, "a rotary embedding"),
        (dataclasses.replace(BARE, qk_norm="l2"), {}, "a query/key norm"),
        (dataclasses.replace(BARE, output_gate=True), {}, "an output gate"),
        (BARE, {"positions": jnp.zeros((1, 3), jnp.int32)}, "`positions`"),
        (dataclasses.replace(BASE, qk_norm="rms"), {}, "a query/key norm and a rotary embedding"),
    ],
)
def test_the_fused_path_refuses_work_in_between(config, options, found):
    with pytest.raises(ValueError, match=f"`split_qkv` must be True with {found}, got False"):
        build(config)(draw(0, 1, 3, 24), split_qkv=False, **options)


# Patterns of layers -----------------------------------------------------------------------------------------------


def test_layer_patterns():
    assert no_rope_layers(8, 4) == (False, False, False, True) * 2
    assert no_rope_layers(3, [1, 0, 1]) == (True, False, True)
    assert no_rope_layers(2, 1) == (True, True)
    assert no_rope_layers(2, None) == (False, False)
    assert (
        windowed_layers(6, 3) == (True, True, False) * 2
    )  # windowed where layer_number % 3 != 0, from 1
    assert windowed_layers(2, [0, 1]) == (False, True)
    assert windowed_layers(2, None) == (True, True)
    config = dataclasses.replace(BASE, sliding_window=5)
    layers = attention_layers(config, 4, no_rope_freq=4, window_attn_skip_freq=2)
    assert [layer.rope is None for layer in layers] == [False, False, False, True]
    assert [layer.sliding_window for layer in layers] == [5, None, 5, None]
    assert attention_layers(config, 2) == (config, config)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: no_rope_layers(4, 0), "`no_rope_freq` must be positive, got 0"),
        (lambda: no_rope_layers(4, [1, 0]), r"`no_rope_freq` must hold 0 or 1 for each of 4 layers, got \[1, 0\]"),
        (lambda: windowed_layers(2, [1, 2]), "`window_attn_skip_freq` must hold 0 or 1"),
        (lambda: attention_layers(BARE, 4, no_rope_freq=2), "`no_rope_freq` must be None without `config.rope`"),
        (lambda: attention_layers(BASE, 4, window_attn_skip_freq=2), "`window_attn_skip_freq` must be None without"),
    ],
)  # fmt: skip
def test_bad_layer_patterns(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Masks ------------------------------------------------------------------------------------------------------------


def test_document_ids_and_masks_of_the_reference_system():
    lengths = jnp.asarray([[2, 3, 1, 0], [2, 2, 2, 0]])
    ids = masks.document_segment_ids(lengths, 6)
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2]]
    first = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0],
             [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]  # fmt: skip
    second = np.kron(np.eye(3, dtype=int), np.tril(np.ones((2, 2), int))).tolist()
    assert masks.block_causal_mask(lengths, 6)[:, 0].astype(int).tolist() == [first, second]
    assert masks.document_segment_ids(jnp.asarray([[2, 1]]), 5).tolist() == [[0, 0, 1, -1, -1]]
    cu = jnp.asarray([0, 6, 19, 22, 32])
    assert masks.cu_seqlens_segment_ids(cu, 33).tolist() == [
        [0] * 6 + [1] * 13 + [2] * 3 + [3] * 10 + [-1]
    ]


@pytest.mark.parametrize("seed", range(4))
def test_pictures_show_what_the_operator_does(seed):
    """With one-hot values the output is the row of weights: positive exactly where the picture says."""
    rng = np.random.default_rng(seed)
    causal = bool(seed % 2)
    options = dict(
        is_causal=causal,
        sliding_window=int(rng.integers(1, 6)) if causal else None,
        query_segment_ids=jnp.asarray(np.sort(rng.integers(-1, 3, (2, 7)), axis=1)),
        kv_segment_ids=jnp.asarray(np.sort(rng.integers(-1, 3, (2, 9)), axis=1)),
        query_positions=jnp.asarray(rng.integers(0, 9, (2, 7))),
        kv_positions=jnp.asarray(rng.integers(0, 9, (2, 9))),
    )
    value = jnp.broadcast_to(jnp.eye(9)[None, :, None], (2, 9, 1, 9))
    weights = gqa_attention(draw(1, 2, 7, 1, 4), draw(2, 2, 9, 1, 4), value, **options)
    picture = masks.attention_mask(7, 9, **options)
    assert ((np.asarray(weights)[:, :, 0] > 0) == np.asarray(picture)[:, 0]).all()


def test_encoder_prefix_and_errors():
    assert masks.attention_mask(3).all()
    prefix = masks.attention_mask(4, is_causal=True, prefix_length=2)[0, 0].astype(int).tolist()
    assert prefix == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    layer, x = build(dataclasses.replace(BASE, is_causal=False)), draw(0, 2, 4, 24)
    causal = masks.attention_mask(4, is_causal=True)
    assert_close(layer(x, mask=causal), build(BASE)(x), atol=1e-6)
    with pytest.raises(ValueError, match="`sliding_window` must be a positive number of keys"):
        masks.attention_mask(4, sliding_window=2)
    with pytest.raises(
        ValueError, match=r"`kv_segment_ids` must have shape \[B, 5\], got \(1, 4\)"
    ):
        masks.attention_mask(4, 5, query_segment_ids=jnp.zeros((1, 4), jnp.int32))
