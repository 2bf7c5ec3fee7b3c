"""What stands on padding reaches nothing, and padding may stand anywhere: rows and gradients are those without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import (
    AttentionConfig,
    CrossAttention,
    Decoder,
    GatedDeltaNet,
    MoE,
    SelfAttention,
    masks,
    qk_clip,
)
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, random_layer, randomise
from tests.support.tiny_decoders import DELTA, HYBRID, MIXTURE, build, tokens

ATTENTION = AttentionConfig(
    model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, out_bias=True,
    qk_norm="rms", qk_norm_position="after_rope", output_gate=True, sinks="learnable",
)  # fmt: skip
MIDDLE = jnp.asarray([[0, 0, -1, -1, 0, 0, 0, -1], [-1, 0, -2, 0, 0, 0, -1, 0]])
LAYERS = {
    "attention": lambda: random_layer(SelfAttention, ATTENTION),
    "window": lambda: random_layer(
        SelfAttention, dataclasses.replace(ATTENTION, sliding_window=2, scale=0.4)
    ),
    "delta": lambda: random_layer(GatedDeltaNet, dataclasses.replace(DELTA, conv_bias=True)),
}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", LAYERS)
def test_padding_anywhere_equals_the_row_without_it(name, poison):
    layer, x, weights = LAYERS[name](), draw(1, 2, 8, 16), draw(2, 2, 8, 16)
    call = jax.jit(lambda layer, x, ids: layer(x, segment_ids=ids))

    def loss(layer, x, ids):
        out = layer(x, segment_ids=ids)
        kept = jnp.where((ids >= 0)[..., None], out, 0.0)
        return (kept * weights).sum(), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    hidden = (MIDDLE < 0)[..., None]
    (_, out), (gradient, by_x) = both(layer, jnp.where(hidden, poison, x), MIDDLE)
    (_, clean), (expected, _) = both(layer, x, MIDDLE)
    for row in range(2):
        real = np.flatnonzero(np.asarray(MIDDLE[row]) >= 0)
        alone = call(layer, x[row : row + 1, real], jnp.zeros((1, len(real)), jnp.int32))
        assert_close(out[row, real], alone[0], atol=2e-6, rtol=2e-5, what=f"row {row}")
        assert_bitwise_equal(out[row, real], clean[row, real])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert_bitwise_equal(a, b)
    assert not jnp.where(hidden, by_x, 0.0).any()


def test_interleaved_segments_equal_each_alone():
    layer, x = LAYERS["window"](), draw(3, 1, 9, 16)
    ids = np.asarray([[0, 1, 0, -1, 1, 1, 0, 2, 0]])
    mask = jnp.asarray(
        (np.random.default_rng(0).random((1, 4, 9, 9)) < 0.7) | np.eye(9, dtype=bool)
    )
    out = layer(x, segment_ids=jnp.asarray(ids), mask=mask)
    for segment in range(3):
        own = np.flatnonzero(ids[0] == segment)
        alone = layer(x[:, own], mask=mask[:, :, own][:, :, :, own])
        assert_close(out[:, own], alone, atol=2e-6, rtol=2e-5, what=f"segment {segment}")
    assert not out[:, 3].any()


def test_positions_count_real_tokens_of_the_segment():
    ids = np.asarray([[0, 0, -1, -1, 0, 0], [3, 1, 3, 1, -1, 3], [-1, -1, 0, 0, 1, 1]])
    got = np.asarray(jax.jit(masks.positions_in_segments)(jnp.asarray(ids)))
    for row, own in enumerate(ids):
        for t in np.flatnonzero(own >= 0):
            assert got[row, t] == (own[:t] == own[t]).sum()


@pytest.mark.parametrize("way", [{}, dict(remat=True, scan_layers=True)])
def test_a_decoder_with_a_padded_middle_equals_the_row_without_it(way):
    config = dataclasses.replace(
        HYBRID, layers=("linear_attention", "sliding_attention") * 2, moe=MIXTURE,
        moe_layers=(False, True) * 2, **way,
    )  # fmt: skip
    decoder, ids = build(config, 3), tokens(np.random.default_rng(3), 2, 8)
    padded = jnp.where(MIDDLE >= 0, ids, 999)
    logits, router = jax.jit(lambda d, ids: d.with_router_statistics(ids, segment_ids=MIDDLE))(
        decoder, padded
    )
    total = 0.0
    for row in range(2):
        real = np.flatnonzero(np.asarray(MIDDLE[row]) >= 0)
        alone = decoder.with_router_statistics(ids[row : row + 1, real])
        assert_close(logits[row, real], alone.logits[0], atol=1e-5, rtol=1e-4, what=f"row {row}")
        total = total + alone.router.probability
    assert_close(router.probability, total, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixture", [False, True])
def test_a_decoder_hides_what_stands_on_padding_from_its_layers(mixture):
    """The table's row of the token that stands there is not finite."""
    config = dataclasses.replace(HYBRID, moe=MIXTURE if mixture else None)
    decoder = randomise(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jnp.where(MIDDLE < 0, 7, jnp.arange(8, dtype=jnp.int32)[None] % 7)

    def with_row(value):
        copy = jax.tree.map(lambda x: x, decoder)
        copy.embed.embedding.set_value(copy.embed.embedding[...].at[7].set(value))
        return copy

    def loss(decoder, tokens):
        logits = decoder(tokens, segment_ids=MIDDLE)[..., :7]
        return jnp.where((MIDDLE < 0)[..., None], 0.0, logits).sum()

    both = jax.jit(jax.value_and_grad(nnx.capture(loss, qk_clip.MaxLogits), has_aux=True))
    results = both(with_row(jnp.nan), tokens), both(with_row(0.0), tokens)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("told", ["ids", "mask"])
def test_hidden_memory_reaches_nothing(told):
    config = dataclasses.replace(ATTENTION, is_causal=False, rope=None)
    layer = random_layer(CrossAttention, config)
    x, memory = draw(5, 2, 3, 16), draw(6, 2, 8, 16)
    shown, ids = MIDDLE >= 0, jnp.asarray([[0, 0, -1], [0, -1, 0]])

    def loss(layer, x, memory):
        if told == "ids":
            out = layer(x, layer.project_memory(memory, segment_ids=MIDDLE), segment_ids=ids)
        else:
            out = layer(
                x, memory, segment_ids=ids, mask=jnp.repeat(shown[:, None, None], 3, axis=2)
            )
        return (out**2).sum(), out

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    poisoned = [
        jnp.where(real[..., None], v, jnp.nan) for real, v in ((ids >= 0, x), (shown, memory))
    ]
    for a, b in zip(
        jax.tree.leaves(both(layer, *poisoned)),
        jax.tree.leaves(both(layer, x, memory)),
        strict=True,
    ):
        assert_bitwise_equal(a, b)
    for row in range(2):
        alone = layer(x[row : row + 1], memory[row : row + 1, np.asarray(shown[row])])
        real = np.asarray(ids[row] >= 0)
        out = loss(layer, *poisoned)[1]
        assert_close(out[row, real], alone[0, real], atol=2e-6, rtol=2e-5)


def test_a_mixture_counts_nothing_of_padding():
    layer = randomise(MoE(MIXTURE, 16, rngs=nnx.Rngs(0)))
    x, real = draw(7, 2, 8, 16), MIDDLE >= 0

    def loss(layer, x):
        out, statistics = layer.with_statistics(x, real=real)
        return jnp.where(real[..., None], out, 0.0).sum() + statistics.probability[1], statistics

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = both(layer, jnp.where(real[..., None], x, jnp.inf)), both(layer, x)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_bitwise_equal(a, b)
    assert results[0][0][1].num_tokens == int(real.sum())


@pytest.mark.parametrize(
    "name, marks, text",
    [
        ("attention", dict(positions=jnp.arange(8)), r"`positions` must have shape \[B=2, T=8\]"),
        ("window", dict(positions=jnp.zeros((2, 7), jnp.int32)), r"got \(2, 7\)"),
        ("attention", dict(segment_ids=MIDDLE[0]), r"`segment_ids` must have shape \[B=2, T=8\]"),
        ("delta", dict(segment_ids=MIDDLE[:, :3]), r"`segment_ids` must have .* got \(2, 3\)"),
        ("attention", dict(mask=jnp.ones((8, 8), bool)), r"`mask` must have shape \[B or 1, N or"),
    ],
)
def test_marks_of_the_wrong_shape_are_refused_by_name(name, marks, text):
    with pytest.raises(ValueError, match=text):
        LAYERS[name]()(draw(1, 2, 8, 16), **marks)


def test_one_row_of_positions_stands_for_all():
    layer, x = LAYERS["attention"](), draw(8, 2, 8, 16)
    places = jnp.asarray([[0, 2, 3, 5, 7, 8, 9, 11]])
    expected = layer(x, positions=jnp.repeat(places, 2, axis=0))
    assert_bitwise_equal(layer(x, positions=places), expected)
