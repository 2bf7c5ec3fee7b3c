# ruff: noqa: E501 (one line per refusal)
"""Rows of caches: selected, lost inside `jit`, handed on clean; what is hidden in a cache reaches nobody."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from gqa_jax import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    SelfAttention,
)
from gqa_jax.cache import POLICIES, rewind, select_rows
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, random_layer

ATTENTION = AttentionConfig(
    model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, sliding_window=4, sinks="learnable"
)
DELTA = GatedDeltaNetConfig(
    model_dim=16, num_key_heads=1, num_value_heads=2, key_head_dim=8, value_head_dim=4
)
KINDS = (*POLICIES, "delta")
STEP = jax.jit(lambda layer, x, cache, lengths: layer.step(x, cache, lengths=lengths))


def build(kind):
    """A layer, and its empty cache of 3 rows."""
    if kind == "delta":
        layer = random_layer(GatedDeltaNet, DELTA)
        return layer, layer.init_cache(3)
    layer = random_layer(SelfAttention, ATTENTION)
    return layer, layer.init_cache(3, 48, policy=kind)


@pytest.mark.parametrize("num_new", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_length_that_is_none_loses_its_row_alone(kind, num_new):
    layer, cache = build(kind)
    _, cache = STEP(layer, draw(0, 3, num_new, 16), cache, jnp.asarray([3, 2, 4]))
    x = draw(1, 3, num_new, 16)
    expected, kept = STEP(layer, x, cache, jnp.asarray([1, 2, num_new]))
    for wrong in (num_new + 1, -1, 2**31 - 1):
        out, lost = STEP(layer, x, cache, jnp.asarray([1, wrong, num_new]))
        assert lost.overflowed().tolist() == [False, True, False]
        assert np.isnan(np.asarray(out[1])).all()
        for row, real in ((0, 1), (2, num_new)):
            assert_bitwise_equal(out[row, :real], expected[row, :real])
            jax.tree.map(lambda a, b, r=row: assert_bitwise_equal(a[r], b[r]), lost, kept)
    again, lost = STEP(layer, x, lost, jnp.asarray([1, 1, 1]))
    assert np.isnan(np.asarray(again)).all(axis=(1, 2)).tolist() == [False, True, False]
    back, accepted = lost.rewind(jnp.asarray([lost.length[0], 2, lost.length[2]]))
    assert accepted.tolist() == [True, False, True]
    back, accepted = rewind((back,), jnp.asarray([-1, 0, -1]))
    assert accepted.tolist() == [False, True, False]
    fresh = build(kind)[1]
    expected, _ = STEP(layer, x, fresh, jnp.asarray([1, 2, 1]))
    out, _ = STEP(layer, x, back[0], jnp.asarray([1, 2, 1]))
    assert_close(out[1, :2], expected[1, :2], atol=1e-6, what="after a rewind to 0")


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_request_left_reaches_nobody(kind):
    """NaN and infinity as padding, in rows that are reset or rewound, and behind every length."""
    layer, clean = build(kind)
    poison = draw(0, 3, 20, 16).at[0].set(jnp.nan).at[1, 4:].set(jnp.inf).at[2, 4:].set(jnp.nan)
    full = jnp.asarray([20, 20, 20])
    _, used = STEP(layer, poison, clean, full)
    for num_new in (5, 20):
        lengths = jnp.asarray([num_new, 3, 2])
        x = draw(num_new, 3, num_new, 16)
        padded = jnp.where(
            (np.arange(num_new) < np.asarray(lengths)[:, None])[..., None], x, jnp.nan
        )
        expected, after = STEP(layer, x, clean, lengths)
        wanted, _ = STEP(layer, x, after, lengths)
        for emptied in (used.reset(), rewind((used,), 0).cache[0]):
            out, held = STEP(layer, padded, emptied, lengths)
            more, _ = STEP(layer, padded, held, lengths)
            for row, real in enumerate(lengths.tolist()):
                assert_close(out[row, :real], expected[row, :real], atol=1e-6, what=f"row {row}")
                assert_close(
                    more[row, :real], wanted[row, :real], atol=1e-6, what=f"then, row {row}"
                )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rewind_leaves_poison_behind(policy):
    layer, cache = build(policy)
    x = draw(0, 3, 20, 16)
    _, held = STEP(layer, x[:, :8], cache, jnp.asarray([8, 8, 8]))
    _, poisoned = STEP(layer, x[:, 8:12].at[:, 1:].set(jnp.nan), held, jnp.asarray([4, 4, 4]))
    back, accepted = poisoned.rewind(jnp.asarray([9, 8, 12]))
    assert accepted.all()
    for num_new in (2, 8):
        new = x[:, 12 : 12 + num_new]
        out, _ = STEP(layer, new, back, jnp.full(3, num_new))
        one, _ = STEP(layer, x[:, 8:9], held, jnp.ones(3, jnp.int32))[1], None
        expected, _ = STEP(layer, new, one, jnp.full(3, num_new))
        assert_close(out[0], expected[0], atol=1e-5, what="one of four kept")
        expected, _ = STEP(layer, new, held, jnp.full(3, num_new))
        assert_close(out[1], expected[1], atol=1e-5, what="all four forgotten")
        assert np.isnan(np.asarray(out[2, 0])).all()  # this row did see them


HYBRID = DecoderConfig(
    vocab_size=31, model_dim=16, layers=("linear_attention", "full_attention") * 2,
    attention=dataclasses.replace(ATTENTION, sliding_window=None), gated_deltanet=DELTA, intermediate_size=8,
)  # fmt: skip


@pytest.mark.parametrize("scan", [False, True])
def test_selected_rows_go_on_as_they_would_have(scan):
    decoder = Decoder(dataclasses.replace(HYBRID, scan_layers=scan), rngs=nnx.Rngs(0))
    step = jax.jit(lambda d, t, c: d.step(t, c))
    prompt = jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    _, cache = step(decoder, prompt, decoder.init_cache(3, 8))
    new = jnp.asarray([[10], [11], [12]])
    expected = step(decoder, new, cache).logits
    rows = np.asarray([2, 0, 0, 1], np.uint8)
    chosen = jax.jit(select_rows)(cache, rows)
    got, chosen = step(decoder, new[rows], chosen)
    assert_close(got, expected[rows], atol=1e-5, what="logits")
    assert chosen[0].batch_size == 4
    lost = jax.jit(select_rows)(cache, jnp.asarray([1, 3, -1]))
    assert all(e.overflowed().reshape(-1, 3)[0].tolist() == [False, True, True] for e in lost)
    finite = np.isfinite(np.asarray(step(decoder, new, lost).logits)).all(axis=(1, 2))
    assert finite.tolist() == [True, False, False]


def test_every_kind_of_cache_selects_rows():
    for kind in KINDS:
        layer, cache = build(kind)
        _, cache = STEP(layer, draw(0, 3, 5, 16), cache, jnp.asarray([5, 2, 4]))
        jax.tree.map(
            lambda a, b: assert_bitwise_equal(a, np.asarray(b)[[1, 1, 2]]),
            jax.jit(select_rows)((cache,), jnp.asarray([1, 1, 2]))[0], cache,
        )  # fmt: skip
    for rows, error, message in [
        (jnp.asarray([0, 3]), ValueError, "`rows` must lie in [0, B=3), got 3"),
        (jnp.asarray([-1]), ValueError, "`rows` must lie in [0, B=3), got -1"),
        (jnp.zeros((1, 1), jnp.int32), ValueError, "`rows` must have shape [n >= 1], got (1, 1)"),
        (jnp.zeros(2), TypeError, "`rows` must be an integer array, got float32"),
        ([0, 1], TypeError, "`rows` must be an array, got list"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            select_rows((cache,), rows)
    with pytest.raises(ValueError, match="`caches` must hold caches"):
        select_rows((), jnp.asarray([0]))


ATTENDS, DELTAS = build("full"), build("delta")
X = jnp.zeros((3, 1, 16))
OTHER = AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)
REFUSED = [
    (lambda: ATTENDS[0].step(X, DELTAS[1]), TypeError, "`cache` must be what this layer's `init_cache` made, got GatedDeltaNetState"),
    (lambda: DELTAS[0].step(X, ATTENDS[1]), TypeError, "`cache` must be what this layer's `init_cache` made, got KVCache"),
    (lambda: ATTENDS[0].step(X, (ATTENDS[1],)), TypeError, "`cache` must be what this layer's `init_cache` made, got tuple"),
    (lambda: ATTENDS[0].step(X, None), TypeError, "`cache` must be what this layer's `init_cache` made, got NoneType"),
    (lambda: ATTENDS[0].step(X, random_layer(SelfAttention, OTHER).init_cache(3, 8)), ValueError, "`cache.key` must have shape [any, 1, any, 8], got (3, 2, 8, 8)"),
    (lambda: ATTENDS[0].step(X, jax.tree.map(lambda a: a[None], ATTENDS[1])), ValueError, "`cache.key` must have shape [any, 1, any, 8], got (1, 3, 1, 48, 8)"),
    (lambda: ATTENDS[0].step(X.tolist(), ATTENDS[1]), TypeError, "`x` must be an array, got list"),
    (lambda: ATTENDS[0].step(X[..., :8], ATTENDS[1]), ValueError, "`x` must have shape [B, T, M=16] with T >= 1, got (3, 1, 8)"),
    (lambda: ATTENDS[0].step(X.astype(jnp.int32), ATTENDS[1]), TypeError, "`x` must be floating point, got int32"),
    (lambda: ATTENDS[0].step(X, ATTENDS[1], lengths=[1, 1, 1]), TypeError, "`lengths` must be an array, got list"),
    (lambda: ATTENDS[0].step(X, ATTENDS[1], lengths=np.int32(1)), ValueError, "`lengths` must have shape [B=3], got ()"),
    (lambda: ATTENDS[0].init_cache(2.0, 8), TypeError, "`batch_size` must be an int, got 2.0"),
    (lambda: ATTENDS[0].init_cache(True, 8), TypeError, "`batch_size` must be an int, got True"),
    (lambda: ATTENDS[0].init_cache(2, "8"), TypeError, "`max_length` must be an int, got '8'"),
    (lambda: ATTENDS[0].init_cache(2, -8), ValueError, "`batch_size` and `max_length` must be positive, got 2 and -8"),
    (lambda: ATTENDS[0].init_cache(2, 8, dtype=jnp.int32), TypeError, "`dtype` must be floating point, got int32"),
    (lambda: DELTAS[0].init_cache([2]), TypeError, "`batch_size` must be an int, got [2]"),
    (lambda: Decoder(HYBRID, rngs=nnx.Rngs(0)).step(jnp.ones((3, 1), jnp.int32), ATTENDS[1]), TypeError, "`cache` must be a tuple of caches, as `init_cache` made, got KVCache"),
    (lambda: Decoder(HYBRID, rngs=nnx.Rngs(0)).step(jnp.ones((3, 1), jnp.int32), (ATTENDS[1], DELTAS[1]) * 2), TypeError, "`cache` must be what this layer's `init_cache` made, got KVCache"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED, ids=range(len(REFUSED)))
def test_wrong_caches_and_sizes_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_numpy_sizes_are_sizes():
    cache = ATTENDS[0].init_cache(np.int64(2), np.uint8(5), policy="ring", chunk_size=np.int32(2))
    assert cache.key.shape == (2, 1, 5, 8)


def test_decode_lengths_beyond_the_cache():
    """Inside `jit` NaN for a query whose own key cannot be in the cache; refused where a row has no other."""
    query, held = draw(0, 3, 2, 2, 8), draw(1, 3, 1, 16, 8)
    run = jax.jit(pk.decode_attention, static_argnames="implementation")
    for name in ("blockwise", "reference"):
        good = run(query, held, held, jnp.asarray([16, 2, 9]), implementation=name)
        out = run(query, held, held, jnp.asarray([17, 300, 9]), implementation=name)
        assert np.isnan(np.asarray(out)).all(axis=(2, 3)).tolist() == [[0, 1], [1, 1], [0, 0]]
        assert_bitwise_equal(out[2], good[2])
        assert_close(
            out[0, 0], run(query[:, :1], held, held, jnp.asarray([16, 2, 9]))[0, 0], atol=1e-6
        )
    with pytest.raises(ValueError, match=r"`lengths` must be at most S=16 for some query, got 300"):
        pk.decode_attention(query, held, held, jnp.asarray([17, 300, 9]))


def test_a_layer_step_with_a_traced_length_that_is_none():
    delta, cache = build("delta")
    mixed, logits = draw(0, 3, 2, 1, 24), draw(1, 3, 2, 1, 4)
    run = jax.jit(lambda lengths: pk.gated_deltanet_step(
        mixed, logits, cache.state + 1, cache.conv, conv_kernel=delta.conv.kernel[...], A_log=delta.A_log[...],
        dt_bias=delta.dt_bias[...], lengths=lengths,
    ))  # fmt: skip
    good, bad = run(jnp.asarray([2, 0, 1])), run(jnp.asarray([2, 3, 1]))
    assert np.isnan(np.asarray(bad.out)).all(axis=(1, 2, 3)).tolist() == [False, True, False]
    assert_bitwise_equal(bad.final_state, good.final_state)
    assert_bitwise_equal(bad.final_conv_state, good.final_conv_state)
    assert_bitwise_equal(bad.out[::2], good.out[::2])


@pytest.mark.parametrize("policy", ["int8", "fp8"])
def test_eight_bits_are_neither_rewritten_nor_widened_whole(policy):
    """Compiled scratch memory of an append, and of a step, in caches (XLA on a CPU widens float8 where it can)."""
    config = AttentionConfig(model_dim=16, num_heads=64, num_kv_heads=64, head_dim=64)
    layer = nnx.eval_shape(lambda: SelfAttention(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: layer.init_cache(1, 1024, policy=policy))
    new = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float32)
    append = lambda c, x: c.append(x, x, jnp.ones(1, jnp.int32))
    attend = lambda c, x: c.append_and_attend(x, x, x, jnp.ones(1, jnp.int32))
    for run, most in ((append, 0.1), (attend, 1.5)):
        compiled = jax.jit(run, donate_argnums=0).lower(cache, new).compile()
        held = cache.key.size * cache.key.dtype.itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < most * held


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_uint8_caches_are_the_bits_of_float8(implementation):
    codes, query = draw(0, 2, 1, 9, 8).astype(jnp.float8_e4m3fn), draw(1, 2, 1, 2, 8)
    run = jax.jit(pk.decode_attention, static_argnames="implementation")
    attend = lambda cache: run(
        query, cache, cache, jnp.asarray([9, 4]), implementation=implementation
    )
    assert_close(attend(codes.view(jnp.uint8)), attend(codes), atol=1e-6, what="uint8")
