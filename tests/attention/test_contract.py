# ruff: noqa: E501 (one line per refusal)
"""The contract of `gqa_attention` beyond values: errors, choices, dropout, alignment, the fused buffer."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import _dispatch
from pallas_kernels.attention import algebra, tuning
from tests.support import attention_cases as cases
from tests.support.compare import assert_bitwise_equal, assert_close, rounding

X = jnp.zeros((2, 6, 4, 8))
KV = jnp.zeros((2, 5, 2, 8))
IDS = jnp.zeros((2, 6), jnp.int32)
KV_IDS = jnp.zeros((2, 5), jnp.int32)
KEY = jax.random.key(0)

REFUSED = [
    (dict(query=[1.0]), TypeError, "`query` must be an array, got list"),
    (dict(query=X[0]), ValueError, r"`query` must have shape \[B, T, N, D\], got \(6, 4, 8\)"),
    (dict(query=X.astype(jnp.int32)), TypeError, "`query` must be floating point, got int32"),
    (dict(query=X.astype(jnp.bfloat16)), TypeError, "must share one dtype, got `query` bfloat16"),
    (dict(key=KV[:1]), ValueError, r"`key` must have shape \[B=2, S, K, D=8\], got \(1, 5, 2, 8\)"),
    (dict(value=KV[:, :4]), ValueError, r"`value` must have shape \[B=2, S=5, K=2, Dv\]"),
    (dict(query=X[:, :, :3]), ValueError, "`N=3` must be a positive multiple of `K=2`"),
    (dict(query=X[:, :0]), ValueError, "`T` must be positive, got 0"),
    (dict(key=KV[:, :0], value=KV[:, :0]), ValueError, "`S` must be positive, got 0"),
    (dict(scale=jnp.ones(())), TypeError, "`scale` must be a Python number, got"),
    (dict(logits_soft_cap=0.0), ValueError, "`logits_soft_cap` must be positive, got 0.0"),
    (dict(logits_soft_cap="a"), TypeError, "`logits_soft_cap` must be a Python number, got str"),
    (dict(mask=jnp.ones((2, 4, 6, 5))), TypeError, "`mask` must be boolean, got float32"),
    (dict(mask=jnp.ones((6, 5), bool)), ValueError, r"`mask` must have shape \[B, N, T, S\], got \(6, 5\)"),
    (dict(mask=jnp.ones((2, 2, 6, 5), bool)), ValueError, r"`mask` must have shape \[2 or 1, 4 or 1, 6 or 1, 5 or 1\], got \(2, 2, 6, 5\)"),
    (dict(bias=jnp.ones((1, 1, 6, 5), jnp.int32)), TypeError, "`bias` must be floating point, got int32"),
    (dict(bias=jnp.ones((1, 3, 6, 5))), ValueError, r"`bias` must have shape \[2 or 1, 4 or 1"),
    (dict(sinks=jnp.ones(2)), ValueError, r"`sinks` must have shape \[N=4\], got \(2,\)"),
    (dict(sinks=jnp.ones(4, jnp.int32)), TypeError, "`sinks` must be floating point"),
    (dict(causal_alignment="left"), ValueError, "`causal_alignment` must be one of 'upper_left', 'bottom_right', got 'left'"),
    (dict(sliding_window=3), ValueError, "`is_causal` must be True with `sliding_window=3`, got False"),
    (dict(sliding_window=0, is_causal=True), ValueError, "`sliding_window` must be a positive number of keys, got 0"),
    (dict(sliding_window=2.5, is_causal=True), TypeError, "`sliding_window` must be an int, got 2.5"),
    (dict(query_segment_ids=IDS), ValueError, "`query_segment_ids` and `kv_segment_ids` must be given together, got only `query_segment_ids`"),
    (dict(kv_positions=KV_IDS), ValueError, "`query_positions` and `kv_positions` must be given together, got only `kv_positions`"),
    (dict(kv_cu_seqlens=jnp.array([0, 5])), ValueError, "`query_cu_seqlens` and `kv_cu_seqlens` must be given together"),
    (dict(query_segment_ids=IDS, kv_segment_ids=IDS), ValueError, r"`kv_segment_ids` must have shape \[B=2, S=5\], got \(2, 6\)"),
    (dict(query_positions=IDS.astype(float), kv_positions=KV_IDS), TypeError, "`query_positions` must be an integer array, got float32"),
    (dict(query_cu_seqlens=jnp.array([0, 5]), kv_cu_seqlens=jnp.array([0, 5])), ValueError, "`query_cu_seqlens` must come with B=1, got B=2"),
    (dict(q_offset=1.5), TypeError, "`q_offset` must be an array, got float"),
    (dict(q_offset=jnp.zeros(3, jnp.int32)), ValueError, r"`q_offset` must have shape \[B=2\], got \(3,\)"),
    (dict(q_offset=jnp.zeros(2)), TypeError, "`q_offset` must be an integer array, got float32"),
    (dict(q_offset=1, causal_alignment="bottom_right"), ValueError, "`q_offset` must not be given together with `causal_alignment='bottom_right'`"),
    (dict(q_offset=1, query_positions=IDS, kv_positions=KV_IDS), ValueError, "`q_offset` must not be given together with `query_positions`"),
    (dict(causal_alignment="bottom_right", query_positions=IDS, kv_positions=KV_IDS), ValueError, "bottom_right'` must not be given together with `query_positions`"),
    (dict(dropout_rate=1.0, dropout_key=KEY), ValueError, r"`dropout_rate` must be in \[0, 1\), got 1.0"),
    (dict(dropout_rate=0.1), ValueError, "`dropout_key` must be given with `dropout_rate=0.1`, got None"),
    (dict(dropout_offset=(1, 2, 3)), ValueError, r"`dropout_offset` must be \(batch row, query head\), got \(1, 2, 3\)"),
    (dict(implementation="fast"), ValueError, "`implementation` must be None or one of .*'blockwise'.*got 'fast'"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[m[:60] for *_, m in REFUSED])
def test_bad_calls_are_refused_by_name(change, error, message):
    arguments = dict(query=X, key=KV, value=KV) | change
    query, key, value = (arguments.pop(n) for n in ("query", "key", "value"))
    for function in (pk.gqa_attention, pk.gqa_attention_with_lse):
        with pytest.raises(error, match=message):
            function(query, key, value, **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query_segment_ids=IDS[:1], kv_segment_ids=KV_IDS[:1]), "query_segment_ids"),
        (dict(query_positions=IDS[:1], kv_positions=KV_IDS[:1]), "query_positions"),
        (dict(q_offset=1), "q_offset"),
    ],
)
def test_packing_excludes_other_ways_to_place_tokens(change, message):
    packed = dict(query_cu_seqlens=jnp.array([0, 6]), kv_cu_seqlens=jnp.array([0, 5]))
    with pytest.raises(ValueError, match=f"`{message}` must not be given together with"):
        pk.gqa_attention(X[:1], KV[:1], KV[:1], **packed, **change)
    with pytest.raises(ValueError, match="at least two entries, got 1"):
        pk.gqa_attention(
            X[:1], KV[:1], KV[:1], query_cu_seqlens=jnp.array([0]), kv_cu_seqlens=jnp.array([0])
        )


def test_every_default_can_be_passed():
    defaults = {
        n: p.default
        for n, p in inspect.signature(pk.gqa_attention).parameters.items()
        if p.default is not p.empty
    }
    arrays, _ = cases.Case().arrays(np.float32)
    arrays = [jnp.asarray(a) for a in arrays.values()]
    assert_bitwise_equal(pk.gqa_attention(*arrays, **defaults), pk.gqa_attention(*arrays))
    assert_bitwise_equal(
        pk.gqa_attention_with_lse(*arrays, **defaults).out, pk.gqa_attention(*arrays)
    )


def test_signatures_agree_and_are_keyword_only():
    one, two = (
        inspect.signature(f).parameters for f in (pk.gqa_attention, pk.gqa_attention_with_lse)
    )
    assert [(n, p.default, p.kind) for n, p in one.items()] == [
        (n, p.default, p.kind) for n, p in two.items()
    ]
    fused = inspect.signature(pk.gqa_attention_qkv).parameters
    merged = {re.sub("^(query|kv)_", "", n) for n in list(one)[3:]}
    assert {n for n in fused if n != "qkv"} == merged
    for parameters, positional in ((one, 3), (fused, 1)):
        kinds = [p.kind for p in parameters.values()]
        assert all(k == inspect.Parameter.KEYWORD_ONLY for k in kinds[positional:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_fused_buffer_equals_split_arrays(dtype):
    draw = np.random.default_rng(5)
    qkv = jnp.asarray(draw.normal(size=(2, 9, 3, 4 + 2, 8)), dtype)
    options = dict(
        is_causal=True, sliding_window=4, sinks=jnp.asarray(draw.normal(size=12), jnp.float32),
        segment_ids=jnp.asarray(np.sort(draw.integers(0, 2, (2, 9)), 1)),
        positions=jnp.asarray(draw.integers(0, 9, (2, 9))),
    )  # fmt: skip
    query = qkv[:, :, :, :4].reshape(2, 9, 12, 8)
    both = lambda name: {f"query_{name}": options[name], f"kv_{name}": options[name]}
    split = {n: o for n, o in options.items() if n not in ("segment_ids", "positions")}
    expected = pk.gqa_attention(
        query, qkv[:, :, :, 4], qkv[:, :, :, 5], **split, **both("segment_ids"), **both("positions")
    )
    assert_bitwise_equal(pk.gqa_attention_qkv(qkv, **options), expected)


def test_fused_buffer_refusals():
    with pytest.raises(ValueError, match=r"`qkv` must have shape \[B, T, K, R\+2, D\], got"):
        pk.gqa_attention_qkv(jnp.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"with R >= 1, got \(1, 2, 3, 2, 4\)"):
        pk.gqa_attention_qkv(jnp.zeros((1, 2, 3, 2, 4)))


# Where tokens stand.


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_chunked_prefill_equals_one_call(implementation):
    arrays, _ = cases.Case(lengths=(24, 24)).arrays(np.float32)
    query, key, value = (jnp.asarray(a) for a in arrays.values())
    options = dict(is_causal=True, sliding_window=7, implementation=implementation)
    whole = pk.gqa_attention(query, key, value, **options)
    chunk = lambda offset: pk.gqa_attention(query[:, 9:16], key, value, q_offset=offset, **options)
    for offset in (9, jnp.array([9, 9])):
        assert_close(chunk(offset), whole[:, 9:16], atol=rounding(jnp.float32), what=str(offset))
    last = pk.gqa_attention(query[:, 15:], key, value, causal_alignment="bottom_right", **options)
    assert_close(last, whole[:, 15:], atol=rounding(jnp.float32), what="bottom right")


def test_window_means_exactly_that_many_keys():
    value = jnp.eye(12)[None, :, None]
    out = pk.gqa_attention(
        jnp.zeros((1, 12, 1, 8)), jnp.zeros((1, 12, 1, 8)), value, is_causal=True, sliding_window=4
    )
    seen = np.asarray(out[0, :, 0] > 0)
    for t in range(12):
        assert np.flatnonzero(seen[t]).tolist() == list(range(max(0, t - 3), t + 1))


def test_a_query_sees_the_first_key_of_a_tile():
    """A lone query at the very position where the second tile of keys begins."""
    first = tuning.blocks(1, 1, 1, 1, 600).keys
    assert first < 600
    key, value = jnp.zeros((1, 600, 1, 8)), jnp.zeros((1, 600, 1, 8)).at[0, first].set(first + 1.0)
    out = pk.gqa_attention(jnp.zeros((1, 1, 1, 8)), key, value, is_causal=True, q_offset=first)
    assert_close(out, np.ones((1, 1, 1, 8)), atol=1e-6)


def test_packed_sequences_equal_separate_calls():
    draw = np.random.default_rng(11)
    lengths, kv_lengths = (5, 0, 7, 3), (6, 2, 7, 1)
    array = lambda n, h: jnp.asarray(draw.normal(size=(1, n, h, 8)), jnp.float32)
    query, key, value = array(18, 4), array(19, 2), array(19, 2)
    starts, kv_starts = np.cumsum([0, *lengths]), np.cumsum([0, *kv_lengths])
    for alignment in ("upper_left", "bottom_right"):
        options = dict(is_causal=True, causal_alignment=alignment)
        packed = pk.gqa_attention(
            query, key, value, query_cu_seqlens=jnp.asarray(starts), kv_cu_seqlens=jnp.asarray(kv_starts), **options
        )  # fmt: skip
        assert not np.asarray(packed[:, starts[-1] :]).any(), "tokens behind the last sequence"
        for i in (0, 2, 3):
            own, kv_own = slice(starts[i], starts[i + 1]), slice(kv_starts[i], kv_starts[i + 1])
            alone = pk.gqa_attention(query[:, own], key[:, kv_own], value[:, kv_own], **options)
            assert_close(packed[:, own], alone, atol=rounding(jnp.float32), what=f"sequence {i}")


# Dropout.


def dropped(
    implementation, key, *, shape=(2, 40, 4, 2), rate=0.25, rows=None, heads=None, **options
):
    """The dropout mask itself, read off with one-hot values and equal logits."""
    batch, length, num_heads, groups = shape
    value = jnp.broadcast_to(jnp.eye(length)[None, :, None], (batch, length, groups, length))
    zeros = jnp.zeros((batch, length, num_heads, 8))
    out = pk.gqa_attention(
        zeros, zeros[:, :, :groups], value, dropout_rate=rate, dropout_key=key,
        implementation=implementation, **options,
    )  # fmt: skip
    return np.asarray(out) > 0


def test_dropout_is_one_function_of_key_and_indices(monkeypatch):
    expected = dropped("reference", KEY)
    assert abs(expected.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / expected.size)
    np.testing.assert_array_equal(dropped("blockwise", KEY), expected)
    cases.small_blocks(monkeypatch)
    np.testing.assert_array_equal(dropped("blockwise", KEY), expected)
    assert (dropped("reference", jax.random.key(1)) != expected).mean() > 0.3
    np.testing.assert_array_equal(dropped("reference", jax.random.PRNGKey(0)), expected)


def test_dropout_does_not_depend_on_sharding_or_order():
    whole = dropped("reference", KEY)
    shard = dropped("blockwise", KEY, shape=(1, 40, 2, 1), dropout_offset=(1, 2))
    np.testing.assert_array_equal(shard[0], whole[1][:, 2:])
    order = np.random.default_rng(0).permutation(40)
    positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None], (2, 40))
    moved = dropped("blockwise", KEY, query_positions=positions, kv_positions=positions)
    np.testing.assert_array_equal(moved, whole[:, order][..., order])


def test_dropout_bits_are_independent():
    """Neighbouring rows, heads, batch rows and segments drop independently; the mask is not a function of t - s."""
    kept = dropped("reference", KEY, rate=0.5).astype(np.float64) - 0.5
    size = kept.size
    for axis in range(4):
        correlation = (kept * np.roll(kept, 1, axis)).mean() * 4
        assert abs(correlation) < 5 / np.sqrt(size), axis
    diagonal = (kept * np.roll(kept, (1, 1), (1, 3))).mean() * 4
    assert abs(diagonal) < 5 / np.sqrt(size)
    rates = kept.mean((0, 2, 3)) + 0.5
    assert np.abs(rates - 0.5).max() < 5 * 0.5 / np.sqrt(size / 40)


@pytest.mark.parametrize("rate", [1e-9, 0.999999])
def test_extreme_dropout_rates_stay_finite(rate):
    arrays, _ = cases.Case().arrays(np.float32)
    out = pk.gqa_attention(*map(jnp.asarray, arrays.values()), dropout_rate=rate, dropout_key=KEY)
    assert np.isfinite(np.asarray(out)).all()


# Choice of implementation.


def explained(dtype=jnp.bfloat16, dim=64, value_dim=64, **options):
    array = lambda n, h, d: jax.ShapeDtypeStruct((2, n, h, d), dtype)
    return pk.explain(
        "gqa_attention",
        array(1024, 8, dim),
        array(1024, 2, dim),
        array(1024, 2, value_dim),
        **options,
    )


def test_blockwise_is_the_default_without_a_gpu():
    explanation = explained()
    assert explanation.chosen == "blockwise"
    assert explanation.reasons["cudnn"] == "it needs an NVIDIA GPU, this is cpu"
    with pytest.raises(
        NotImplementedError, match="cudnn.*cannot run this call: it needs an NVIDIA"
    ):
        pk.gqa_attention(X, KV, KV, implementation="cudnn")


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype=jnp.float32), "it needs float16 or bfloat16, got float32"),
        (dict(dim=60, value_dim=60), "D must be a multiple of 8 up to 256, got 60"),
        (dict(dim=264, value_dim=264), "D must be a multiple of 8 up to 256, got 264"),
        (dict(value_dim=32), "it needs Dv == D, got 32 and 64"),
        (dict(mask=jnp.ones((1, 1, 1, 1), bool)), "it gives no zeros for a query that"),
        (dict(bias=jnp.ones((1, 1, 1, 1))), "it gives no zeros for a query that"),
        (dict(sinks=jnp.zeros(8)), "it has no `sinks`"),
        (dict(logits_soft_cap=2.0), "it has no `logits_soft_cap`"),
        (dict(dropout_rate=0.1, dropout_key=KEY), "its dropout cannot be reproduced"),
        (dict(is_causal=True, q_offset=3), "it has no `q_offset`"),
        (dict(is_causal=True, causal_alignment="bottom_right"), "aligns the causal mask to the upper left"),
        (dict(query_segment_ids=jnp.zeros((2, 1024), int), kv_segment_ids=jnp.zeros((2, 1024), int)), "it has no `query_segment_ids`"),
        (dict(query_positions=jnp.zeros((2, 1024), int), kv_positions=jnp.zeros((2, 1024), int)), "it has no `query_positions`"),
    ],
)  # fmt: skip
def test_cudnn_names_what_it_cannot_do(change, reason):
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        assert explained().chosen == "cudnn"
        assert explained(is_causal=True, sliding_window=128, scale=0.1).chosen == "cudnn"
        explanation = explained(**change)
    assert explanation.chosen == "blockwise"
    assert re.search(reason, explanation.reasons["cudnn"])


def test_cudnn_depends_on_the_device_and_on_the_lse():
    with _dispatch.targeting(_dispatch.Target("gpu", "8.6")):
        assert "up to 128" in explained(dim=192, value_dim=192).reasons["cudnn"]
        assert "packed" not in explained().reasons
    with _dispatch.targeting(_dispatch.Target("gpu", "7.5")):
        assert explained().reasons["cudnn"] == "it needs compute capability 8.0, this is 7.5"
    half = [x.astype(jnp.bfloat16) for x in (X, KV, KV)]
    with (
        _dispatch.targeting(_dispatch.Target("gpu", "9.0")),
        pytest.raises(NotImplementedError, match="it cannot differentiate the lse"),
    ):
        pk.gqa_attention_with_lse(*half, implementation="cudnn")


@pytest.mark.parametrize("name", ["gqa_attention", "gqa_attention_with_lse", "gqa_attention_qkv"])
def test_an_unexpected_option_is_refused(name):
    arrays = (jnp.zeros((2, 6, 2, 4, 8)),) if name == "gqa_attention_qkv" else (X, KV, KV)
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected .* argument 'causal'"):
        getattr(pk, name)(*arrays, causal=True)


# Tiles.


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (4, 8, 4, 100, 77), (3, 2, 16, 5000, 5003), (1, 1, 1, 65536, 65536)]
)
def test_blocks_cover_their_lengths_and_divide_batch_and_heads(shape):
    batch, groups, group, q_len, kv_len = shape
    size = tuning.blocks(*shape)
    assert batch % size.batch == 0
    assert groups % size.heads == 0
    for length, block in ((q_len, size.queries), (kv_len, size.keys)):
        assert 1 <= block <= max(length, tuning.GRANULE)
        padded = -(-length // block) * block
        assert padded - length < block
        assert padded <= length + tuning.GRANULE * (padded // block)
    assert size.queries * group <= max(tuning.TILE_ROWS, tuning.GRANULE * group)


def test_hash_flips_half_of_the_bits():
    words = jnp.asarray(np.random.default_rng(2).integers(0, 2**32, 2000, np.uint32))
    for bit in range(32):
        difference = np.asarray(algebra._mix(words) ^ algebra._mix(words ^ jnp.uint32(1 << bit)))
        flipped = np.unpackbits(difference.view(np.uint8)).mean()
        assert abs(flipped - 0.5) < 0.06, bit


@pytest.mark.parametrize("values", [[0, 4, 3, 5], [0, 6], [1, 5], [0, -1, 5]])
@pytest.mark.parametrize("name", ["query_cu_seqlens", "kv_cu_seqlens"])
def test_offsets_rise_from_zero_where_they_can_be_read(name, values):
    q = jnp.ones((1, 5, 2, 4))
    right = jnp.array([0] * (len(values) - 1) + [5])
    offsets = dict(query_cu_seqlens=right, kv_cu_seqlens=right)
    packed = lambda given: pk.gqa_attention(q, q, q, **offsets | {name: given})
    with pytest.raises(ValueError, match=rf"`{name}` must rise from 0 to at most [TS]=5, got \["):
        packed(jnp.array(values))
    assert jax.jit(packed)(jnp.array(values)).shape == q.shape  # nobody can look there
