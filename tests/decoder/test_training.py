"""The training recipe: loss, masks, a step that learns and donates; the bytes it learns from."""

import dataclasses
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa_jax import Decoder
from gqa_jax.byte_text import (
    as_text,
    model_bits_per_byte,
    random_windows,
    standard_library,
    zlib_bits_per_byte,
)
from gqa_jax.training import TrainState, next_token_loss, train_step
from tests.support.compare import assert_close
from tests.support.tiny_decoders import HYBRID, MIXTURE, build

pytestmark = pytest.mark.usefixtures("loose_promotion")  # optax relies on JAX's default promotion
SMALL = dataclasses.replace(HYBRID, layers=("linear_attention", "full_attention"))


def test_loss_equals_float64_and_leaves_out_what_is_not_real():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    each = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    real = rng.random((2, 5)) < 0.5
    real[0, 0] = True
    narrow = jnp.asarray(logits, jnp.float32)
    assert_close(next_token_loss(narrow, jnp.asarray(targets)), each.mean(), atol=1e-6)
    spoilt = jnp.where(jnp.asarray(real)[..., None], narrow, jnp.nan)
    loss = next_token_loss(spoilt, jnp.asarray(targets), real=jnp.asarray(real))
    assert_close(loss, each[real].mean(), atol=1e-6)
    assert next_token_loss(narrow, jnp.asarray(targets), real=jnp.zeros((2, 5), bool)) == 0.0
    with pytest.raises(ValueError, match=re.escape("`targets` must have shape (2, 5), got (2, 4)")):
        next_token_loss(narrow, jnp.asarray(targets[:, :4]))
    with pytest.raises(ValueError, match=re.escape("`real` must have shape (2, 5), got (5,)")):
        next_token_loss(narrow, jnp.asarray(targets), real=jnp.ones((5,), bool))


def test_thirty_steps_learn_and_the_state_is_donated():
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(build(SMALL, 1), optimizer)
    first = state.params
    tokens = np.tile(np.arange(6, dtype=np.int32), (4, 3))
    losses = []
    for _ in range(30):
        state, loss, norm = train_step(state, tokens, optimizer=optimizer)
        losses.append(float(loss))
        assert np.isfinite(float(norm))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert state.decoder(jnp.asarray(tokens)).shape == (4, 18, 40)
    same = jax.tree.map(np.asarray, state.params)
    state, *_ = train_step(state, tokens, optimizer=optimizer, update_scale=np.float32(0.0))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixture_is_balanced_and_padding_does_not_count():
    config = dataclasses.replace(SMALL, moe=MIXTURE)
    optimizer = optax.sgd(0.0)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 40, (2, 9)).astype(np.int32)
    segments = np.array([[0] * 9, [0] * 5 + [-1] * 4], np.int32)
    changed = np.where(segments < 0, 39 - tokens, tokens)
    losses = [
        float(
            train_step(
                TrainState.create(build(config, 2), optimizer),
                ids,
                optimizer=optimizer,
                segment_ids=segments,
                load_balancing=0.01,
            ).loss
        )
        for ids in (tokens, changed)
    ]
    assert math.isclose(*losses, rel_tol=1e-6)
    with pytest.raises(ValueError, match=re.escape("`tokens` must have shape [B, T] with T >= 2")):
        train_step(TrainState.create(build(SMALL), optimizer), tokens[:, :1], optimizer=optimizer)


def test_standard_library_is_split_by_file_and_stable():
    text, again = standard_library(), standard_library()
    assert text.num_train_files > 5 * text.num_held_out_files > 0
    np.testing.assert_array_equal(text.held_out, again.held_out)
    assert text.held_out.tobytes()[:4000] not in text.train.tobytes()
    sample = text.held_out[:50_000]
    assert zlib_bits_per_byte(sample) == 8 * len(zlib.compress(sample.tobytes(), 9)) / 50_000


def test_windows_are_pieces_of_the_data():
    data = np.arange(200, dtype=np.uint8)
    windows = random_windows(data, np.random.default_rng(0), batch_size=50, length=7)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(7), (50, 1)))
    whole = random_windows(data, np.random.default_rng(0), batch_size=1, length=200)
    np.testing.assert_array_equal(whole[0], data)
    with pytest.raises(ValueError, match="`data` must hold at least length=201 bytes, got 200"):
        random_windows(data, np.random.default_rng(0), batch_size=1, length=201)


def test_bits_per_byte_counts_every_byte_once():
    decoder = build(SMALL, 3)
    data = np.random.default_rng(3).integers(0, 40, 23).astype(np.uint8)
    total = 0.0
    for start in range(0, 22, 5):
        window = jnp.asarray(data[None, start : start + 6], jnp.int32)
        logits = jax.jit(Decoder.__call__)(decoder, window)
        count = min(5, 22 - start)
        loss = next_token_loss(logits[:, :count], window[:, 1 : count + 1])
        total += float(loss) * count / math.log(2)
    ours = model_bits_per_byte(decoder, data, length=5, batch_size=2)
    assert math.isclose(ours, total / 22, rel_tol=1e-5)


def test_text_arrives_in_whole_characters():
    assert "".join(as_text("héllo €".encode())) == "héllo €"
    assert "".join(as_text(b"a\xffb\xe2")) == "a\ufffdb\ufffd"
