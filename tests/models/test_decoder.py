"""Decoder: one call, any split of steps, any padding, scan and remat agree; what cannot be right is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import Decoder, KVCache
from gqa_jax.models.decoder import pattern_length
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.tiny_decoders import CONFIGS, HYBRID, REPEATING, build, tokens

CALL = jax.jit(Decoder.__call__)
STEP = jax.jit(Decoder.step, static_argnames=("padding_side", "last_only"))


B, T = 3, 24
# Steps of 1, 4 and 17 tokens: recurrent and chunked delta rule, decoding and prefill attention.


def in_pieces(decoder, ids, schedule, side="right", policy="full"):
    """Feeds `schedule = [(width, lengths [B]), ...]` of right- or left-padded steps; yields each row's logits."""
    cache = decoder.init_cache(B, T, policy=policy)
    held, rows = np.zeros(B, int), [[] for _ in range(B)]
    for width, lengths in schedule:
        piece = np.full((B, width), -7)  # padding may hold anything, ids that do not exist too
        where = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
        for row, at in enumerate(where):
            piece[row, at] = ids[row, held[row] : held[row] + lengths[row]]
        logits, cache = STEP(
            decoder, jnp.asarray(piece), cache, lengths=jnp.asarray(lengths), padding_side=side
        )
        for row, at in enumerate(where):
            rows[row].append(np.asarray(logits)[row, at])
        held += lengths
        for entry in cache:
            np.testing.assert_array_equal(entry.length, held)
    return [np.concatenate(row) for row in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_any_split_equal_one_call(name):
    rng = np.random.default_rng(0)
    decoder = build(CONFIGS[name], 0)
    ids = np.asarray(tokens(rng, B, T))
    expected = np.asarray(CALL(decoder, ids))
    shuffled = [int(n) for n in rng.permutation([1, 1, 1, 4, 17])]
    for widths in ([1] * T, [17, 4, 1, 1, 1], [4] * 6, shuffled):
        schedule = [(width, np.full(B, width)) for width in widths]
        for row, logits in enumerate(in_pieces(decoder, ids, schedule)):
            assert_close(logits, expected[row], atol=1e-5, rtol=1e-5, what=f"row {row} of {widths}")


@pytest.mark.parametrize("name, side", [*((name, "right") for name in CONFIGS), ("hybrid", "left")])
def test_rows_of_different_lengths_equal_rows_alone(name, side):
    rng = np.random.default_rng(3)
    decoder = build(CONFIGS[name], 3)
    ids = np.asarray(tokens(rng, B, T))
    expected = np.asarray(CALL(decoder, ids))
    schedule, held = [], np.zeros(B, int)
    for width in (17, 1, 4, 4, 17, 1):
        lengths = np.minimum(rng.integers(0, width + 1, B), T - held)
        schedule.append((width, lengths))
        held += lengths
    for row, logits in enumerate(in_pieces(decoder, ids, schedule, side)):
        what = f"row {row} of {schedule}"
        assert_close(logits, expected[row, : len(logits)], atol=1e-5, rtol=1e-5, what=what)


def test_a_step_without_lengths_is_a_step_of_full_rows():
    decoder = build(HYBRID, 1)
    ids = tokens(np.random.default_rng(1), B, 4)
    plain = STEP(decoder, ids, decoder.init_cache(B, T))
    full = STEP(
        decoder, ids, decoder.init_cache(B, T), lengths=jnp.full((B,), 4), padding_side="right"
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(full), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_ring_caches_of_sliding_layers_change_nothing():
    decoder = build(HYBRID, 2)
    ids = np.asarray(tokens(np.random.default_rng(2), B, T))
    schedule = [(4, np.array([4, 2, 0])), (1, np.ones(B, int)), (4, np.full(B, 4))]
    rings = in_pieces(decoder, ids, schedule, policy="ring")
    for a, b in zip(rings, in_pieces(decoder, ids, schedule), strict=True):
        assert_close(a, b, atol=1e-5)
    kinds = [type(entry).__name__ for entry in decoder.init_cache(B, T, policy="ring")]
    assert kinds == ["GatedDeltaNetState", "RingKVCache", "KVCache"]
    coded = decoder.init_cache(B, T, policy="int8")
    assert [entry.key.dtype for entry in coded[1:]] == [jnp.int8, jnp.int8]
    with pytest.raises(ValueError, match="`policy` must not be 'ring' for a decoder without"):
        build(CONFIGS["linear only"]).init_cache(B, T, policy="ring")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_in_a_call_equals_rows_alone(side):
    rng = np.random.default_rng(4)
    decoder = build(CONFIGS["hybrid of mixtures, tied"], 4)
    ids, lengths = np.asarray(tokens(rng, 3, 14)), [14, 5, 9]
    padded, segments = np.full((3, 14), -1), np.full((3, 14), -1)
    where = [slice(14 - n, 14) if side == "left" else slice(0, n) for n in lengths]
    for row, at in enumerate(where):
        padded[row, at], segments[row, at] = ids[row, : lengths[row]], 0
    logits = CALL(decoder, jnp.asarray(padded), segment_ids=jnp.asarray(segments))
    for row, at in enumerate(where):
        alone = CALL(decoder, jnp.asarray(ids[row : row + 1, : lengths[row]]))
        assert_close(logits[row, at], alone[0], atol=1e-5, what=f"row {row}")


def test_packed_documents_equal_documents_alone():
    rng = np.random.default_rng(5)
    decoder = build(HYBRID, 5)
    ids = tokens(rng, 1, 15)
    segments = jnp.asarray([[3] * 4 + [1] * 10 + [7]])
    packed = CALL(decoder, ids, segment_ids=segments)
    for start, stop in ((0, 4), (4, 14), (14, 15)):
        assert_close(packed[:, start:stop], CALL(decoder, ids[:, start:stop]), atol=1e-5)


def test_positions_reach_the_rotary_embedding():
    rng = np.random.default_rng(6)
    decoder = build(CONFIGS["attention only"], 6)
    ids = tokens(rng, 1, 9)
    plain = CALL(decoder, ids)
    count = jnp.arange(9, dtype=jnp.int32)[None]
    assert_bitwise_equal(CALL(decoder, ids, positions=count), plain)
    assert_close(
        CALL(decoder, ids, positions=count + 100), plain, atol=1e-4
    )  # rotation is relative
    assert jnp.abs(CALL(decoder, ids, positions=count * 3) - plain).max() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_only_is_the_last_real_token(side):
    rng = np.random.default_rng(7)
    decoder = build(HYBRID, 7)
    ids, lengths = tokens(rng, 2, 6), jnp.asarray([6, 2])
    cache = decoder.init_cache(2, 8)
    every, _ = STEP(decoder, ids, cache, lengths=lengths, padding_side=side)
    last, _ = STEP(decoder, ids, cache, lengths=lengths, padding_side=side, last_only=True)
    expected = every[:, -1] if side == "left" else every[jnp.arange(2), lengths - 1]
    assert last.shape == (2, 1, 40)
    assert_close(last[:, 0], expected, atol=1e-6)
    whole, _ = STEP(decoder, ids, cache, last_only=True)
    assert_close(whole, STEP(decoder, ids, cache).logits[:, -1:], atol=1e-6)


def stacked(decoder: Decoder) -> Decoder:
    """The same model with scanned layers."""
    config = dataclasses.replace(decoder.config, scan_layers=True)
    scanned = build(config)
    pattern = scanned.pattern
    for i in range(pattern):
        rows = [decoder.layers[j] for j in range(i, len(config.layers), pattern)]
        scanned.layers[i] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    for name in ("embed", "norm", "lm_head"):
        setattr(scanned, name, getattr(decoder, name))
    return scanned


def test_scanned_layers_equal_a_loop_over_layers():
    rng = np.random.default_rng(8)
    decoder = build(REPEATING, 8)
    scanned = stacked(decoder)
    assert len(scanned.layers) == 2
    assert scanned.layers[0].mixer.in_proj.kernel.shape == (3, 16, 2, 32)
    ids, segments = tokens(rng, 2, 11), jnp.asarray([[0] * 6 + [1] * 5, [0] * 9 + [-1] * 2])
    real = np.asarray(segments) >= 0
    expected = decoder.with_router_statistics(ids, segment_ids=segments)
    output = scanned.with_router_statistics(ids, segment_ids=segments)
    assert_close(
        output.logits[real], expected.logits[real], atol=1e-4
    )  # six layers, fused differently
    for name, a, b in zip(output.router._fields, output.router, expected.router, strict=True):
        assert_close(a, b, atol=1e-4, what=name)
    for index in range(6):
        pairs = zip(
            jax.tree.leaves(scanned.layer(index)),
            jax.tree.leaves(decoder.layer(index)),
            strict=True,
        )
        for a, b in pairs:
            assert_bitwise_equal(a, b)

    cache, expected_cache = scanned.init_cache(2, 12), decoder.init_cache(2, 12)
    assert cache[1].key.shape == (3, 2, 2, 12, 8)
    for start, stop, lengths in ((0, 9, [9, 5]), (9, 10, [1, 0]), (10, 11, [1, 1])):
        lengths = jnp.asarray(lengths)
        logits, cache = STEP(scanned, ids[:, start:stop], cache, lengths=lengths)
        expected, expected_cache = STEP(
            decoder, ids[:, start:stop], expected_cache, lengths=lengths
        )
        real = np.arange(stop - start)[None] < np.asarray(lengths)[:, None]
        assert_close(logits[real], expected[real], atol=1e-4)  # six layers, fused differently
    for i, stack in enumerate(cache):
        rows = [expected_cache[j] for j in range(i, 6, 2)]
        for a, b in zip(
            jax.tree.leaves(stack),
            jax.tree.leaves(jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)),
            strict=True,
        ):
            assert_close(a, b, atol=1e-4)  # six layers, fused differently


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_changes_no_gradient(scan_layers):
    ids = tokens(np.random.default_rng(9), 2, 7)

    @jax.jit
    def gradients(decoder):
        return jax.grad(lambda d: jnp.square(d(ids)).mean())(decoder)

    config = dataclasses.replace(REPEATING, scan_layers=scan_layers)
    plain, remat = (build(dataclasses.replace(config, remat=r), 9) for r in (False, True))
    for a, b in zip(
        jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients(plain)), strict=True
    ):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    text = str(jax.make_jaxpr(lambda d: jax.grad(lambda d: d(ids).sum())(d))(remat))
    assert "remat" in text or "checkpoint" in text


def test_scan_compiles_a_pattern_once():
    ids = jnp.zeros((1, 4), jnp.int32)
    counts = []
    for repeats in (2, 6):
        config = dataclasses.replace(
            HYBRID, layers=("linear_attention", "full_attention") * repeats, scan_layers=True
        )
        abstract = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        jaxpr = jax.make_jaxpr(Decoder.__call__)(abstract, ids)
        counts.append(len(str(jaxpr).splitlines()))
    assert counts[0] == counts[1]


def test_causality_by_gradient():
    decoder = build(HYBRID, 10)
    ids = jnp.arange(6, dtype=jnp.int32)[
        None
    ]  # token t is the only one that reads row t of the table

    @jax.jit
    def by_row(decoder, at):
        return jnp.abs(jax.grad(lambda d: d(ids)[0, at].sum())(decoder).embed.embedding[...]).sum(1)

    for at in (0, 3, 5):
        norms = np.asarray(by_row(decoder, at))
        assert (norms[at + 1 :] == 0).all()
        assert (norms[: at + 1] > 0).all()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bfloat16(scan_layers):
    config = dataclasses.replace(REPEATING, scan_layers=scan_layers, tie_embeddings=True)
    ids = tokens(np.random.default_rng(11), 2, 9)
    decoder = build(config, 11, param_dtype=jnp.bfloat16)
    logits = CALL(decoder, ids)
    assert logits.dtype == jnp.bfloat16
    cache = decoder.init_cache(2, 9)
    attention = next(entry for entry in cache if isinstance(entry, KVCache))
    assert attention.key.dtype == jnp.bfloat16
    stepped, advanced = STEP(decoder, ids, cache)
    assert jax.tree.map(lambda x: x.dtype, advanced) == jax.tree.map(lambda x: x.dtype, cache)
    assert_close(stepped, logits, atol=0.1, rtol=0.05)
    wide = build(config, 11, param_dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    assert CALL(wide, ids).dtype == jnp.float32
    mixed = build(config, 11, dtype=jnp.bfloat16)
    assert mixed.embed.embedding.dtype == jnp.float32
    assert CALL(mixed, ids).dtype == jnp.bfloat16
    assert mixed.init_cache(2, 9, dtype=jnp.float32)[1].key.dtype == jnp.float32


def test_dropout_needs_a_key_and_uses_it():
    attention = dataclasses.replace(HYBRID.attention, dropout_rate=0.5)
    config = dataclasses.replace(HYBRID, attention=attention)
    decoder = build(config, 12)
    ids = tokens(np.random.default_rng(12), 1, 8)
    drop = jax.jit(lambda key: decoder(ids, deterministic=False, dropout_key=key))
    one, again, two = (drop(jax.random.key(k)) for k in (0, 0, 1))
    assert_bitwise_equal(one, again)
    assert jnp.abs(one - two).max() > 1e-3
    assert_bitwise_equal(CALL(decoder, ids, dropout_key=jax.random.key(0)), CALL(decoder, ids))
    with pytest.raises(ValueError, match="`dropout_key` must be given when deterministic=False"):
        decoder(ids, deterministic=False)


@pytest.mark.parametrize(
    "layers, length",
    [
        (("full_attention",) * 4, 1),
        (("linear_attention", "full_attention") * 2, 2),
        (("linear_attention", "linear_attention", "full_attention") * 2, 3),
    ],
)
def test_pattern_length(layers, length):
    assert pattern_length(dataclasses.replace(HYBRID, layers=layers)) == length


@pytest.mark.parametrize(
    "layers", [("full_attention",), ("full_attention", "linear_attention", "full_attention")]
)
def test_layers_that_do_not_repeat_cannot_be_scanned(layers):
    config = dataclasses.replace(HYBRID, layers=layers, scan_layers=True)
    with pytest.raises(ValueError, match="must repeat a pattern at least twice when `scan_layers"):
        Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bad_input_is_refused_by_name(scan_layers):
    decoder = build(
        dataclasses.replace(REPEATING, moe=None, moe_layers=None, scan_layers=scan_layers)
    )
    ids = jnp.zeros((2, 3), jnp.int32)
    cache = decoder.init_cache(2, 4)
    calls = [
        (TypeError, "`tokens` must be an array, got list", lambda: decoder([[1]])),
        (
            TypeError,
            "`tokens` must be an integer array, got float32",
            lambda: decoder(jnp.ones((1, 2))),
        ),
        (
            ValueError,
            "`tokens` must have shape [B, T] with T >= 1, got (3,)",
            lambda: decoder(ids[0]),
        ),
        (ValueError, "got (2, 0)", lambda: decoder(ids[:, :0])),
        (
            ValueError,
            "`tokens` must lie in [0, vocab_size=40), got 40",
            lambda: decoder(ids.at[1, 2].set(40)),
        ),
        (ValueError, "got -1", lambda: decoder(ids - 1)),
        (
            ValueError,
            "`segment_ids` must have the shape of `tokens`, (2, 3), got (2, 4)",
            lambda: decoder(ids, segment_ids=jnp.zeros((2, 4), jnp.int32)),
        ),
        (
            ValueError,
            "`positions` must have shape (2, 3) or (3, 2, 3), got (3,)",
            lambda: decoder(ids, positions=jnp.arange(3)),
        ),
        (
            ValueError,
            "`config.moe` must be given for router statistics, got None",
            lambda: decoder.with_router_statistics(ids),
        ),
        (
            ValueError,
            "`tokens` must have the cache's 2 rows, got 3",
            lambda: decoder.step(jnp.zeros((3, 1), jnp.int32), cache),
        ),
        (
            ValueError,
            "`cache` must hold 5 tokens after this step, got capacity 4",
            lambda: decoder.step(jnp.zeros((2, 5), jnp.int32), cache),
        ),
        (
            ValueError,
            "`cache` must hold 6 tokens after this step, got capacity 4",
            lambda: decoder.step(ids, STEP(decoder, ids, cache).cache),
        ),
        (
            ValueError,
            "`cache` must have",
            lambda: decoder.step(ids, cache[:1]),
        ),
        (
            ValueError,
            "`lengths` must have shape [B=2], got (1,)",
            lambda: decoder.step(ids, cache, lengths=jnp.ones((1,), jnp.int32)),
        ),
        (
            TypeError,
            "`lengths` must be an integer array, got float32",
            lambda: decoder.step(ids, cache, lengths=jnp.ones((2,))),
        ),
        (
            TypeError,
            "`lengths` must be an array, got list",
            lambda: decoder.step(ids, cache, lengths=[1, 1]),
        ),
        (
            ValueError,
            "`lengths` must lie in [0, T=3], got [4, 0]",
            lambda: decoder.step(ids, cache, lengths=jnp.asarray([4, 0])),
        ),
        (
            ValueError,
            "`padding_side` must be 'right' or 'left', got 'both'",
            lambda: decoder.step(ids, cache, padding_side="both"),
        ),
        (ValueError, "must be positive, got 0", lambda: decoder.init_cache(0, 4)),
        (ValueError, "`index` must lie in [0, 6), got 6", lambda: decoder.layer(6)),
    ]
    for error, text, call in calls:
        with pytest.raises(error, match=re.escape(text)):
            call()


def test_inside_jit_what_cannot_be_refused_is_nan():
    decoder = build(HYBRID, 13)
    ids = jnp.zeros((1, 3), jnp.int32)
    assert jnp.isnan(CALL(decoder, ids.at[0, 2].set(40))[0, 2]).all()
    assert jnp.isnan(CALL(decoder, ids.at[0, 2].set(-1))[0, 2]).all()
    _, cache = STEP(decoder, ids, decoder.init_cache(1, 4))
    logits, _ = STEP(decoder, ids, cache)
    assert jnp.isnan(logits).all()


def test_constants_inside_jit_are_checked_not_traced():
    decoder = build(HYBRID, 14)
    good, bad = jnp.full((1, 3), 39, jnp.int32), jnp.full((1, 3), 40, jnp.int32)
    assert jax.jit(lambda d: d(good))(decoder).shape == (1, 3, 40)
    with pytest.raises(ValueError, match="vocab_size=40"):
        jax.jit(lambda d: d(bad))(decoder)
