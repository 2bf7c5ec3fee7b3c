"""Integers keep no dtype of their own: any integer array means its values, in every function that takes one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from gqa_jax import (
    AttentionConfig,
    CrossAttention,
    Decoder,
    DecoderConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    RopeConfig,
    SelfAttention,
    cache,
    masks,
    qk_clip,
)
from gqa_jax.layers.rotary import rotary_tables
from tests.support.compare import assert_bitwise_equal
from tests.support.random_layers import draw

DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ATTENTION = AttentionConfig(
    model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeConfig(theta=50.0)
)
DELTA = GatedDeltaNetConfig(
    model_dim=16, num_key_heads=1, num_value_heads=2, key_head_dim=8, value_head_dim=4
)
HYBRID = DecoderConfig(
    vocab_size=127, model_dim=16, layers=("linear_attention", "full_attention"), attention=ATTENTION,
    gated_deltanet=DELTA, intermediate_size=8,
)  # fmt: skip


@functools.cache
def layer(kind, config=ATTENTION):
    with jax.ensure_compile_time_eval():
        return kind(config, rngs=nnx.Rngs(0))


def ring_step(lengths):
    windowed = layer(SelfAttention, dataclasses.replace(ATTENTION, sliding_window=4))
    held = windowed.init_cache(1, 32, policy="ring")
    return windowed.step(draw(0, 1, 6, 16), held, lengths=lengths)[0][:, :5]


def full_step(lengths):
    attention = layer(SelfAttention)
    held = attention.init_cache(1, 300).append(*[draw(1, 1, 120, 1, 8)] * 2, np.asarray([120]))
    out, held = attention.step(draw(2, 1, 20, 16), held, lengths=lengths)
    return out[:, :16], held.length


def kernel_step(slots):
    x, g, pool = draw(0, 2, 1, 1, 4), -jnp.ones((2, 1, 1)), draw(1, 130, 1, 4, 4)
    return pk.gated_delta_rule_step(x, x, x, g, -g, pool, slots=slots).final_state


def layer_step(lengths):
    delta = layer(GatedDeltaNet, DELTA)
    _, held = delta.step(draw(1, 2, 4, 16), delta.init_cache(2), lengths=lengths)
    return held.state, held.length


def rewound(position):
    held = layer(SelfAttention).init_cache(2, 300)
    held = held.append(*[draw(0, 2, 130, 1, 8)] * 2, lengths=jnp.asarray([130, 110]))
    return cache.rewind((held,), position)


Q, KV = draw(0, 2, 3, 2, 8), draw(1, 2, 9, 1, 8)
PACKED = [draw(i, 1, 90, 2, 4) for i in range(3)]
CALLS = {  # name -> (function of the integers, the integers)
    "decode_attention lengths": (
        lambda n: pk.decode_attention(draw(0, 2, 9, 2, 8), *[draw(1, 2, 1, 300, 8)] * 2, n), [9, 120],
    ),
    "gqa_attention q_offset": (
        lambda n: pk.gqa_attention(Q, *[draw(1, 2, 130, 1, 8)] * 2, is_causal=True, q_offset=n), [5, 126],
    ),
    "gqa_attention positions": (
        lambda p: pk.gqa_attention(
            Q, KV, KV, is_causal=True, sliding_window=100, query_positions=p, kv_positions=jnp.arange(18).reshape(2, 9)
        ),
        [[0, 3, 120], [1, 2, 5]],
    ),
    "gqa_attention segment_ids": (
        lambda s: pk.gqa_attention_with_lse(Q, Q, Q, query_segment_ids=s, kv_segment_ids=s), [[0, 0, 120], [3, 4, 4]],
    ),
    "gqa_attention cu_seqlens": (
        lambda n: pk.gqa_attention(
            *PACKED, is_causal=True, causal_alignment="bottom_right", query_cu_seqlens=n, kv_cu_seqlens=n
        ),
        [0, 1, 60, 90],
    ),
    "gqa_attention_qkv positions": (
        lambda p: pk.gqa_attention_qkv(draw(3, 1, 4, 1, 4, 8), is_causal=True, positions=p), [[3, 120, 0, 7]],
    ),
    "gqa_attention dropout_offset": (
        lambda n: pk.gqa_attention(Q, Q, Q, dropout_rate=0.5, dropout_key=jax.random.key(0), dropout_offset=n),
        [3, 120],
    ),
    "gated_delta_rule cu_seqlens": (
        lambda n: pk.gated_delta_rule(*PACKED, PACKED[0][..., 0] * 0, PACKED[1][..., 0], cu_seqlens=n), [0, 10, 60, 90],
    ),
    "gated_delta_rule segment_ids": (
        lambda s: pk.gated_delta_rule(Q, Q, Q, Q[..., 0] * 0, Q[..., 1], segment_ids=s), [[0, 120, 120], [5, 5, 6]],
    ),
    "gated_delta_rule_step slots": (kernel_step, [127, 3]),
    "causal_conv1d segment_ids": (
        lambda s: pk.causal_conv1d(KV[..., 0, :], draw(2, 4, 8), segment_ids=s),
        [[0, 0, 0, 1, 1, 1, 120, 120, 120]] * 2,
    ),
    "causal_conv1d_qkv segment_ids": (
        lambda s: pk.causal_conv1d_qkv(Q, draw(2, 4, 2, 8), key_dim=2, value_dim=4, segment_ids=s),
        [[0, 0, 120], [5, 6, 6]],
    ),
    "SelfAttention": (
        lambda p: layer(SelfAttention)(draw(0, 2, 3, 16), positions=p, segment_ids=p), [[0, 120, 120], [1, 1, 2]],
    ),
    "SelfAttention.step lengths": (full_step, [16]),
    "SelfAttention.step positions": (
        lambda p: layer(SelfAttention).step(draw(0, 1, 3, 16), layer(SelfAttention).init_cache(1, 8), positions=p)[0],
        [[5, 120, 7]],
    ),
    "ring step lengths": (ring_step, [5]),
    "CrossAttention": (
        lambda s: layer(CrossAttention, dataclasses.replace(ATTENTION, is_causal=False))(
            draw(0, 1, 3, 16), draw(1, 1, 5, 16), positions=s, segment_ids=s
        ),
        [[0, 120, 0]],
    ),
    "GatedDeltaNet": (lambda s: layer(GatedDeltaNet, DELTA)(draw(0, 1, 3, 16), segment_ids=s), [[0, 120, 120]]),
    "GatedDeltaNet.step": (layer_step, [4, 1]),
    "Decoder": (lambda t: layer(Decoder, HYBRID)(t, positions=t, segment_ids=t), [[0, 120, 120], [5, 6, 6]]),
    "Decoder.step tokens": (
        lambda t: layer(Decoder, HYBRID).step(t, layer(Decoder, HYBRID).init_cache(1, 8)), [[2, 120, 126]],
    ),
    "Decoder.step lengths": (
        lambda n: layer(Decoder, HYBRID).step(
            jnp.ones((2, 3), jnp.int32), layer(Decoder, HYBRID).init_cache(2, 8), lengths=n, padding_side="left"
        ),
        [2, 3],
    ),
    "embedding": (lambda t: layer(Decoder, HYBRID).embed(t), [[1, 126, 120]]),
    "rewind": (rewound, [120, 120]),
    "right_padding_segment_ids": (lambda n: masks.right_padding_segment_ids(n, 200), [120, 3]),
    "positions_in_segments": (masks.positions_in_segments, [[3, 3, 120, 120, 5]]),
    "document_segment_ids": (lambda n: masks.document_segment_ids(n, 300), [[120, 100, 60]]),
    "cu_seqlens_segment_ids": (lambda n: masks.cu_seqlens_segment_ids(n, 125), [0, 7, 120]),
    "attention_mask": (
        lambda p: masks.attention_mask(3, is_causal=True, sliding_window=2, query_positions=p, query_segment_ids=p),
        [[0, 120, 1]],
    ),
    "max_logits": (lambda p: qk_clip.max_logits(Q, Q, positions=p, segment_ids=p), [[0, 120, 1], [3, 3, 2]]),
    "rotary_tables": (lambda p: rotary_tables(RopeConfig(), 8, p), [[0, 120, 1]]),
}  # fmt: skip


def doors(jaxpr, variables):
    """Names and dtypes of what an integer argument first goes through, inside calls too."""
    for equation in jaxpr.eqns:
        for place, used in enumerate(equation.invars):
            if used in variables:
                inner = equation.params.get("jaxpr")
                if equation.primitive.name in ("jit", "pjit", "closed_call") and inner is not None:
                    yield from doors(inner.jaxpr, [inner.jaxpr.invars[place]])
                else:
                    yield equation.primitive.name, str(equation.params.get("new_dtype"))


@pytest.mark.parametrize("dtype", ["int8", "uint16"])
@pytest.mark.parametrize("name", CALLS)
def test_integers_become_int32_before_anything_is_done_with_them(name, dtype):
    call, integers = CALLS[name]
    traced = jax.make_jaxpr(call)(np.asarray(integers, dtype)).jaxpr
    assert set(doors(traced, traced.invars)) <= {
        ("convert_element_type", kind) for kind in ("int32", "uint32")
    }
    assert traced.invars


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_integer_dtype_means_its_values(dtype):
    values = np.asarray([[0, 3, 120], [1, 2, 5]])
    with jax.enable_x64("64" in dtype):  # or JAX itself would cut what it is given
        given = jnp.asarray(values.astype(dtype))
        assert given.dtype == dtype
        for array in (given, values.astype(dtype)):
            cast = pk.as_int32("x", array)
            assert cast.dtype == np.int32
            assert cast.tolist() == values.tolist()
        assert jax.jit(lambda x: pk.as_int32("x", x))(given).tolist() == values.tolist()
        seen = masks.attention_mask(3, is_causal=True, sliding_window=100, query_positions=given)
        assert seen[0, 0].tolist() == [
            [True, False, False],
            [True, True, False],
            [False, False, True],
        ]
    for limit in (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max):
        edge = np.asarray([1, limit], dtype)
        if -(2**31) <= limit < 2**31:
            assert pk.as_int32("x", edge).tolist() == [1, limit]
        else:
            with pytest.raises(ValueError, match=f"`x` must fit int32, got {limit}"):
                pk.as_int32("x", edge)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int8", "int16"])
def test_narrow_and_unsigned_lengths_give_what_int32_gives(dtype):
    for name in ("decode_attention lengths", "ring step lengths"):
        call, integers = CALLS[name]
        got, expected = (call(jnp.asarray(integers, d)) for d in (dtype, jnp.int32))
        assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_int32_is_refused_by_name_and_value(name):
    call, integers = CALLS[name]
    integers = np.asarray(integers)
    with pytest.raises(ValueError, match=r"`\w+` must fit int32, got 4294967301"):
        call(integers.astype(np.int64) + 2**32 + 5 - integers.flat[0])
    with pytest.raises(ValueError, match=r"`\w+` must fit int32, got 3000000000"):
        call(np.full_like(integers, 3_000_000_000, dtype=np.uint32))
    for wrong in (integers.astype(np.float32), integers.astype(bool)):
        with pytest.raises(TypeError, match=f"`.*` must be an integer.*, got {wrong.dtype}"):
            call(wrong)


def test_traced_values_that_do_not_fit_become_the_nearest_that_do():
    cast = jax.jit(lambda x: pk.as_int32("x", x))
    assert cast(np.asarray([3, 2**31, 2**32 - 1], np.uint32)).tolist() == [3] + [2**31 - 1] * 2
    with jax.enable_x64(True):
        wide = cast(jnp.asarray([-(2**40), -5, 2**31], jnp.int64))
    assert wide.dtype == jnp.int32
    assert wide.tolist() == [-(2**31), -5, 2**31 - 1]
    assert pk.as_int32("x", None) is None
    with pytest.raises(TypeError, match="`x` must be an array, got list"):
        pk.as_int32("x", [1, 2])
