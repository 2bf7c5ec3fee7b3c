"""Cache policies: ring against full cache and mask, 8 bits against explicit rounding, rewinds, sizes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    RopeConfig,
    SelfAttention,
)
from gqa_jax.cache import POLICIES, allocate, common_prefix, rewind
from gqa_jax.cache.quantized import quantize
from gqa_jax.models.memory import Memory, module_memory, required_bytes, tree_bytes
from pallas_kernels import gqa_attention
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, random_layer

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
WINDOWED = dataclasses.replace(
    BASE, sliding_window=8, sinks="learnable", logits_soft_cap=5.0, scale=0.4,
    rope=RopeConfig(theta=50.0), output_gate=True, qk_norm="rms",
)  # fmt: skip
STEP = nnx.jit(SelfAttention.step, graph=False, graph_updates=False)
build = functools.partial(random_layer, SelfAttention)


def run(layer, cache, x, sizes, lengths=None):
    """Outputs of the steps side by side, and the last cache; `lengths` per step, or None."""
    outs, at, x = [], 0, np.asarray(x)  # NumPy slices without compiling
    for i, size in enumerate(sizes):
        out, cache = STEP(
            layer,
            jnp.asarray(x[:, at : at + size]),
            cache,
            lengths=None if lengths is None else lengths[i],
        )
        outs.append(np.asarray(out))
        at += size
    return np.concatenate(outs, axis=1), cache


# The schedules of the reference system: prefill 16, 48 and 40 tokens in chunks of 16 (window 8, capacity 23), 32 tokens
# and then decoding, decoding alone; and chunks beyond the capacity.
SCHEDULES = {
    "16": [16],
    "16x3": [16] * 3,
    "16+16+8": [16, 16, 8],
    "32 then decode": [16, 16] + [1] * 10,
    "decode": [1] * 26,
    "longer than the ring": [40, 3, 30, 1, 1],
    "ragged": [7, 1, 5, 16, 2, 24, 1],
}


CASES = [(schedule, None) for schedule in SCHEDULES] + [("ragged", 1), ("longer than the ring", 1)]


@pytest.mark.parametrize("schedule, chunk_size", CASES)
def test_ring_equals_full_cache_with_a_window(schedule, chunk_size):
    layer, sizes = build(WINDOWED), SCHEDULES[schedule]
    x = draw(3, 2, sum(sizes), 24)
    ring = layer.init_cache(2, 64, policy="ring", chunk_size=chunk_size)
    assert ring.capacity == (8 if chunk_size == 1 else 23)
    out, ring = run(layer, ring, x, sizes)
    assert_close(out, layer(x), atol=2e-5, what="ring against the whole row")
    if schedule == "ragged":
        full, _ = run(layer, layer.init_cache(2, 128), x, sizes)
        assert_close(out, full, atol=2e-5, what="ring against the full cache")
    assert ring.length.tolist() == [sum(sizes)] * 2


@pytest.mark.parametrize("policy", ["ring", "int8", "fp8", "full"])
def test_rows_of_different_lengths(policy):
    """Padding behind each row's own tokens changes nothing: row by row equals all rows together."""
    seed = POLICIES.index(policy)
    rng, layer = np.random.default_rng(seed), build(WINDOWED, seed)
    sizes = [3, 17, 1, 25, 2, 1]
    counts = [rng.integers(0, size + 1, size=3) for size in sizes]
    x = draw(seed, 3, sum(sizes), 24)
    lengths = [jnp.asarray(c, jnp.int32) for c in counts]
    out, cache = run(layer, layer.init_cache(3, 64, policy=policy), x, sizes, lengths)
    starts = np.cumsum([0, *sizes])
    for row in range(3):
        spans = [slice(at, at + n) for at, n in zip(starts, np.stack(counts)[:, row], strict=False)]
        pick = lambda a, row=row, spans=spans: np.concatenate(
            [np.asarray(a)[row : row + 1, s] for s in spans], axis=1
        )
        real, got = pick(x), pick(out)
        expected, alone = STEP(layer, jnp.asarray(real), layer.init_cache(1, 64, policy=policy))
        assert_close(got, expected, atol=3e-5, what=f"row {row}")
        assert cache.length[row] == alone.length[0] == real.shape[1]


@pytest.mark.parametrize("policy, levels", [("int8", 127.0), ("fp8", 448.0)])
def test_quantised_cache_equals_attention_over_rounded_keys_and_values(policy, levels):
    layer, x = build(WINDOWED), draw(5, 2, 30, 24)

    def rounded(array):  # float64, one scale per head and token
        wide = np.asarray(array, np.float64)
        scale = np.abs(wide).max(-1, keepdims=True) / levels
        if policy == "int8":
            return np.round(wide / scale) * scale
        codes = np.asarray(jnp.asarray(wide / scale, jnp.float32).astype(jnp.float8_e4m3fn))
        return codes.astype(np.float64) * scale

    positions = jnp.broadcast_to(jnp.arange(30), (2, 30))
    query, key, value, gate = layer.project(x, positions)
    out = gqa_attention(
        query, jnp.asarray(rounded(key), jnp.float32), jnp.asarray(rounded(value), jnp.float32),
        is_causal=True, scale=0.4, sliding_window=8, logits_soft_cap=5.0, sinks=layer.sinks[...].reshape(4),
    )  # fmt: skip
    expected = layer._finish(out, gate)
    # An element on the edge between two codes may round either way in float32: one code of one token's value.
    for sizes in ([30], [17, 12, 1], [1] * 30):
        got, cache = run(layer, layer.init_cache(2, 30, policy=policy), x, sizes)
        assert_close(got, expected, atol=5e-3, what=f"{policy} {sizes}")
        assert cache.key.dtype == {"int8": jnp.int8, "fp8": jnp.uint8}[policy]  # its bits
        assert cache.key_scale.shape == (2, 2, 30)
        assert cache.key_scale.dtype == jnp.float32
    exact = layer(x)
    assert 1e-5 < float(jnp.abs(got - exact).max()) < {"int8": 0.05, "fp8": 0.3}[policy]


@pytest.mark.parametrize("dtype, relative", [(jnp.int8, 0.5 / 127), (jnp.float8_e4m3fn, 2.0**-4)])
def test_quantize_is_within_half_a_code(dtype, relative):
    x = draw(1, 3, 5, 16) * jnp.asarray([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    codes, scale = quantize(x, dtype)
    assert codes.dtype == dtype
    restored = codes.astype(jnp.float32) * scale[..., None]
    top = np.abs(np.asarray(x)).max(-1, keepdims=True)
    assert (np.abs(np.asarray(restored - x)) <= relative * top * 1.001).all()
    codes, scale = quantize(jnp.zeros((2, 4)), dtype)
    assert (codes.astype(jnp.float32) == 0).all()
    assert (scale == 1).all()
    bad = jnp.asarray([[1.0, jnp.nan], [jnp.inf, 1.0]])
    codes, scale = quantize(bad, dtype)
    assert not np.isfinite(np.asarray(codes.astype(jnp.float32) * scale[:, None])).all(axis=1).any()


def test_ring_slots_hold_the_newest_positions():
    for length in (0, 1, 5, 6, 7, 20):
        cache = allocate(
            "ring", batch_size=1, num_kv_heads=1, head_dim=2, max_length=99, dtype=jnp.float32,
            sliding_window=4, chunk_size=3,
        )  # fmt: skip
        assert cache.capacity == 6
        for position in range(length):
            new = jnp.full((1, 1, 1, 2), float(position))
            cache = cache.append(new, new, jnp.ones(1, jnp.int32))
        positions = np.asarray(cache.slot_positions()[0])
        held = np.asarray(cache.key[0, 0, :, 0])
        expected = set(range(max(0, length - 6), length))
        assert {p for p in positions if p >= 0} == expected
        assert all(held[slot] == p for slot, p in enumerate(positions) if p >= 0)
        end = length - 1  # the reference system's formula
        assert positions.tolist() == [end - ((end % 6 - j + 6) % 6) for j in range(6)]


def fill(policy, length, window=8):
    cache = allocate(
        policy, batch_size=1, num_kv_heads=2, head_dim=4, max_length=64, sliding_window=window,
        dtype=None if policy in ("int8", "fp8") else jnp.float32, chunk_size=16 if policy == "ring" else None,
    )  # fmt: skip
    new = draw(0, 1, length, 2, 4)
    return cache.append(new, new, jnp.asarray([length], jnp.int32))


@pytest.mark.parametrize("policy", ["full", "int8", "fp8"])
def test_rewind_of_an_unbounded_cache(policy):
    cache = fill(policy, 20)
    for position, expected in [(21, False), (20, True), (5, True), (6, False), (-1, False)]:
        before = cache
        cache, accepted = cache.rewind(position)
        assert bool(accepted[0]) is expected
        if not expected:
            jax.tree.map(lambda a, b: assert_bitwise_equal(a, b), cache, before)
    assert cache.length.tolist() == [5]


def test_rewind_of_a_ring():
    cache = fill("ring", 40)
    assert cache.capacity == 23
    for position, expected in [(24, False), (41, False), (25, True), (26, False)]:
        before = cache
        cache, accepted = cache.rewind(position)
        assert bool(accepted[0]) is expected
        if not expected:
            jax.tree.map(lambda a, b: assert_bitwise_equal(a, b), cache, before)
    # What the reference system allows and should not: 24 is within 15 of 25, but its window was overwritten before.
    assert not bool(cache.rewind(24).accepted[0])
    assert cache.reset().length.tolist() == cache.reset().written.tolist() == [0]


@pytest.mark.parametrize("policy", ["full", "ring", "int8"])
def test_rewind_then_other_tokens_equals_a_fresh_run(policy):
    layer, x, other = build(WINDOWED), draw(0, 2, 40, 24), draw(1, 2, 12, 24)
    _, cache = run(layer, layer.init_cache(2, 64, policy=policy), x, [16, 16, 8])
    cache, accepted = cache.rewind(jnp.asarray([25, 40]))
    assert accepted.tolist() == [True, True]
    got, _ = run(layer, cache, other, [5, 7])
    for row, kept in enumerate((25, 40)):
        fresh = layer.init_cache(1, 64, policy=policy)
        _, fresh = run(layer, fresh, x[row : row + 1, :kept], [kept])
        expected, _ = run(layer, fresh, other[row : row + 1], [12])
        assert_close(got[row : row + 1], expected, atol=3e-5, what=f"row {row}")


@pytest.mark.parametrize("policy", ["full", "ring", "int8", "fp8"])
def test_reset_keeps_the_memory_and_forgets_the_tokens(policy):
    layer, x = build(WINDOWED), draw(0, 2, 20, 24)
    _, used = run(layer, layer.init_cache(2, 32, policy=policy), x, [20])
    emptied = used.reset()
    assert emptied.key is used.key
    assert emptied.value is used.value
    got, _ = run(layer, emptied, x[:, 7:], [13])
    fresh, _ = run(layer, layer.init_cache(2, 32, policy=policy), x[:, 7:], [13])
    assert_close(got, fresh, atol=2e-6)


@pytest.mark.parametrize("policy", ["ring", "int8", "fp8"])
def test_a_donated_cache_is_updated_in_place(policy):
    layer = build(WINDOWED)
    graph, state = nnx.split(layer)
    cache = layer.init_cache(2, 64, policy=policy)
    step = jax.jit(lambda s, x, c: nnx.merge(graph, s).step(x, c), donate_argnums=2)
    text = step.lower(state, draw(0, 2, 1, 24), cache).compile().as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert aliased.count("-alias") == len(jax.tree.leaves(cache))


def test_a_ring_shorter_than_its_window_overflows_like_a_full_cache():
    layer, x = build(WINDOWED), draw(0, 1, 7, 24)
    cache = layer.init_cache(1, 6, policy="ring")
    assert cache.capacity == cache.max_tokens == 6
    out, cache = layer.step(x[:, :6], cache)
    assert_close(out, layer(x[:, :6]), atol=2e-5)
    assert bool(cache.rewind(2).accepted[0])
    with pytest.raises(ValueError, match="`cache` must hold 7 tokens after this step"):
        layer.step(x[:, 6:], cache)
    out, _ = jax.jit(layer.step)(x[:, 6:], cache)
    assert np.isnan(np.asarray(out)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(policy="paged"), r"`policy` must be one of \('full', 'ring', 'int8', 'fp8'\), got 'paged'"),
        (dict(policy="int8", dtype=jnp.float32), "`dtype` must be None with policy='int8', got float32"),
        (dict(policy="fp8", dtype=jnp.bfloat16), "`dtype` must be None with policy='fp8', got bfloat16"),
        (dict(policy="full", chunk_size=4), "`chunk_size` must be None unless policy='ring', got 4"),
        (dict(policy="ring", chunk_size=0), "`chunk_size` must be positive, got 0"),
    ],
)  # fmt: skip
def test_bad_policies(options, message):
    with pytest.raises(ValueError, match=message):
        build(WINDOWED).init_cache(2, 16, **options)


def test_ring_needs_a_window_and_every_policy_a_causal_layer():
    with pytest.raises(ValueError, match="`policy` must not be 'ring' for a layer without"):
        build(BASE).init_cache(2, 16, policy="ring")
    with pytest.raises(ValueError, match="`is_causal` must be True for a layer that decodes"):
        build(dataclasses.replace(BASE, is_causal=False)).init_cache(2, 16)
    ring = build(WINDOWED).init_cache(1, 16, policy="ring")
    with pytest.raises(ValueError, match="`sliding_window` must be the ring's window 8, got 7"):
        build(dataclasses.replace(WINDOWED, sliding_window=7)).step(draw(0, 1, 1, 24), ring)
    with pytest.raises(TypeError, match="`position` must be an integer, got float32"):
        ring.rewind(1.0)
    with pytest.raises(ValueError, match=r"`position` must be one integer or have shape \[B=1\]"):
        ring.rewind(jnp.zeros(2, jnp.int32))


HYBRID = DecoderConfig(
    vocab_size=16, model_dim=24, attention=BASE, sliding_window=8, intermediate_size=8,
    layers=("linear_attention", "sliding_attention", "full_attention"),
    gated_deltanet=GatedDeltaNetConfig(
        model_dim=24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4
    ),
)  # fmt: skip


def allocated(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("policy", ["full", "ring", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_required_bytes_equal_what_is_allocated(policy, dtype):
    sizes = dict(batch_size=3, max_length=40)
    given = None if policy in ("int8", "fp8") else dtype
    made = build(WINDOWED).init_cache(3, 40, dtype=given, policy=policy)
    assert required_bytes(WINDOWED, **sizes, policy=policy, dtype=dtype) == allocated(made)
    state = GatedDeltaNet(HYBRID.gated_deltanet, rngs=nnx.Rngs(0)).init_cache(3, 40, dtype=dtype)
    assert required_bytes(HYBRID.gated_deltanet, **sizes, dtype=dtype) == allocated(state)
    layers = [
        build(HYBRID.attention_at(i)).init_cache(
            3, 40, dtype=given, policy="full" if (policy, i) == ("ring", 2) else policy
        )
        for i in (1, 2)
    ]
    total = allocated([state, *layers])
    assert required_bytes(HYBRID, **sizes, policy=policy, dtype=dtype) == total
    if dtype == jnp.float32:
        for scan in (False, True):
            config = dataclasses.replace(HYBRID, layers=HYBRID.layers * 2, scan_layers=scan)
            make = lambda config=config: Decoder(config, rngs=nnx.Rngs(0)).init_cache(
                3, 40, policy=policy
            )
            caches = jax.eval_shape(make)
            predicted = required_bytes(config, **sizes, policy=policy)
            assert predicted == tree_bytes(caches) == 2 * total


@pytest.mark.parametrize("policy", ["full", "int8"])
def test_a_padded_step_may_end_at_the_last_slot(policy):
    """Two real tokens fit, though the two of padding behind them would not."""
    layer, x = build(WINDOWED), draw(0, 2, 12, 24)
    _, cache = run(layer, layer.init_cache(2, 12, policy=policy), x, [10])
    padded = jnp.concatenate([x[:, 10:], 9.0 * jnp.ones((2, 2, 24))], axis=1)
    got, cache = layer.step(padded, cache, lengths=jnp.asarray([2, 1]))
    expected, _ = run(layer, layer.init_cache(2, 12, policy=policy), x, [12])
    assert_close(got[0, :2], expected[0, 10:], atol=2e-5)
    assert_close(got[1, :1], expected[1, 10:11], atol=2e-5)
    assert cache.length.tolist() == [12, 11]


def test_a_ring_needs_a_window_somewhere_in_a_decoder():
    config = dataclasses.replace(HYBRID, layers=("full_attention",))
    with pytest.raises(ValueError, match="`policy` must not be 'ring' for a decoder without"):
        required_bytes(config, batch_size=1, max_length=4, policy="ring")


def test_required_bytes_by_hand():
    """2 B K capacity D bytes and one int32 length per row; the worked example of Llama 3.1 8B."""
    llama = AttentionConfig(model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128)
    layer = required_bytes(llama, batch_size=1, max_length=8192, dtype=jnp.bfloat16)
    assert 32 * layer == 32 * (2 * 8 * 8192 * 128 * 2 + 4) == 1_073_741_952
    windowed = dataclasses.replace(llama, sliding_window=1024)
    ring = required_bytes(
        windowed, batch_size=2, max_length=8192, policy="ring", chunk_size=512, dtype=jnp.bfloat16
    )
    assert ring == 2 * (2 * 8 * (1024 + 512 - 1) * 128 * 2 + 8)
    fp8 = required_bytes(llama, batch_size=2, max_length=8192, policy="fp8")
    assert fp8 == 2 * (2 * 8 * 8192 * (128 + 4) + 4)


def test_memory_of_a_module_without_building_it():
    make = lambda: SelfAttention(BASE, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    parameters = 2 * (24 * 2 * 4 * 8 + 2 * 2 * 8 * 24)
    assert module_memory(nnx.eval_shape(make)) == Memory(parameters, parameters, 0)
    layer = make()
    memory = module_memory(layer, caches=layer.init_cache(1, 5))
    assert memory == Memory(parameters, parameters, 2 * 2 * 5 * 8 * 2 + 4)
    assert memory.plus(Memory(1, 2, 3)).total == memory.total + 6
    assert tree_bytes(jax.ShapeDtypeStruct((3, 3), jnp.int4)) == 5  # half bytes round up


@pytest.mark.parametrize(
    "held, tokens, shared",
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),  # one token is always left to run
        ([1, 2, 3], [1, 9, 3, 4], 1),
        ([1, 2, 3], [7], 0),
        ([], [7, 8], 0),
        ([1, 2, 3, 4], [1, 2], 1),
    ],
)
def test_common_prefix(held, tokens, shared):
    assert common_prefix(held, tokens) == shared


def test_common_prefix_of_nothing():
    with pytest.raises(ValueError, match="`cached` and `tokens` must have shape"):
        common_prefix([1], [])


def test_a_reused_prefix_gives_what_a_fresh_prefill_gives():
    layer, table = build(WINDOWED), draw(9, 50, 24)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 50, 30)
    second = np.concatenate([first[:26], rng.integers(0, 50, 9)])
    second[26] = (first[26] + 1) % 50
    for policy in ("full", "ring", "int8"):
        _, cache = layer.step(table[first][None], layer.init_cache(1, 64, policy=policy))
        start = common_prefix(first, second)
        assert start == 26
        caches, accepted = rewind((cache,), start)
        assert accepted.tolist() == [True]
        got, _ = layer.step(table[second[start:]][None], caches[0])
        expected, _ = layer.step(table[second][None], layer.init_cache(1, 64, policy=policy))
        assert_close(got, expected[:, start:], atol=3e-5, what=policy)


def test_a_hybrid_stack_rewinds_only_where_every_layer_can():
    delta = GatedDeltaNet(HYBRID.gated_deltanet, rngs=nnx.Rngs(0))
    layer, x = build(WINDOWED), draw(0, 3, 10, 24)
    caches = (delta.step(x, delta.init_cache(3))[1], layer.step(x, layer.init_cache(3, 32))[1])
    position = jnp.asarray([0, 4, 10])
    moved, accepted = jax.jit(rewind)(caches, position)
    assert accepted.tolist() == [True, False, True]
    assert moved[0].length.tolist() == moved[1].length.tolist() == [0, 10, 10]
    assert not moved[0].state[0].any()
    assert_bitwise_equal(moved[0].state[1:], caches[0].state[1:])
    # The same caches stacked over layers, as a scanned decoder holds them.
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), caches)
    moved, accepted = rewind(stacked, position)
    assert accepted.tolist() == [True, False, True]
    assert moved[1].length.tolist() == [[0, 10, 10]] * 2
    with pytest.raises(ValueError, match="`caches` must hold at least one cache"):
        rewind((), 0)
