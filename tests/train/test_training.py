"""The training recipe: loss, masks, a step that learns and donates; the bytes it learns from."""

import dataclasses
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from gqa_jax import Decoder
from gqa_jax.demo.byte_text import (
    as_text,
    model_bits_per_byte,
    random_windows,
    standard_library,
    zlib_bits_per_byte,
)
from gqa_jax.parallel.sharding import MeshAxes
from gqa_jax.train import step
from gqa_jax.train.step import TrainState, next_token_loss, train_step
from tests.support.compare import assert_close
from tests.support.meshes import mesh
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


LABELS = [[1, 2, -100, 3], [-1, 0, 7, -100]]


def by_hand(logits, labels):
    """float64: mean loss over labels >= 0, and its gradient."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    counted = labels >= 0
    clean = np.where(counted[..., None], logits, 0.0)
    chances = np.exp(clean - clean.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    hot = np.eye(logits.shape[-1])[np.where(counted, labels, 0)]
    count = max(counted.sum(), 1)
    loss = -np.log((chances * hot).sum(-1))[counted].sum() / count
    return loss, (chances - hot) * counted[..., None] / count


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_negative_labels_are_ignored_whatever_stands_there(dtype):
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(2, 4, 300)).astype("f4")  # more entries than an int8 can name
    labels = np.array(LABELS, dtype)
    loss, gradient = by_hand(logits, labels)
    spoilt = np.where(labels[..., None] < 0, np.float32(np.nan), logits)
    for given in (logits, spoilt):
        for labels_given in (labels, jnp.asarray(labels.astype("i4"))):
            assert_close(next_token_loss(jnp.asarray(given), labels_given), loss, atol=1e-6)
        ours = jax.jit(jax.value_and_grad(next_token_loss))(jnp.asarray(given), labels)
        assert_close(ours[0], loss, atol=1e-6)
        assert_close(ours[1], gradient, atol=1e-6)
    assert next_token_loss(jnp.asarray(spoilt), np.full((2, 4), -100, dtype)) == 0.0


@pytest.mark.torch
def test_the_loss_is_that_of_torch_and_optax():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(3).normal(size=(2, 4, 9)).astype("f4")
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(8, 9),
        torch.tensor([[1, 2, -100, 3], [-100, 0, 7, -100]]).reshape(8),
        ignore_index=-100,
    )
    assert_close(next_token_loss(jnp.asarray(logits), np.array(LABELS)), theirs.numpy(), atol=1e-6)
    labels = np.array([[1, 2, 9, 3], [8, 0, 7, 700]])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    for row in range(2):  # optax too gives NaN where there is no such token
        ours = jax.jit(next_token_loss)(logits[row : row + 1], labels[row : row + 1])
        np.testing.assert_allclose(ours, np.asarray(each)[row].mean(), rtol=1e-6)


@pytest.mark.parametrize("label", [8, 200, 2**31 + 5, 2**32 + 1])
def test_a_label_outside_the_vocabulary_is_an_error_or_nan(label):
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(1, 3, 8)), jnp.float32)
    labels = np.array([[1, label, 0]], np.min_scalar_type(label))  # unsigned, 8 to 64 bits
    message = f"`targets` must be negative .* size 8, got {label}"
    with pytest.raises(ValueError, match=message):
        next_token_loss(logits, labels)
    if label < 2**32:
        jitted = jax.jit(jax.value_and_grad(next_token_loss))(logits, labels)
        assert np.isnan(jitted[0])
        assert np.isnan(jitted[1][0, 1]).all()
    real = np.array([[True, False, True]])
    kept = next_token_loss(logits, labels, real=real)
    assert_close(kept, by_hand(logits, [[1, -1, 0]])[0], atol=1e-6)
    with pytest.raises(TypeError, match="`targets` must be an integer array, got float32"):
        next_token_loss(logits, np.ones((1, 3), "f4"))
    with pytest.raises(TypeError, match="`real` must be boolean, got int32"):
        next_token_loss(logits, labels, real=np.ones((1, 3), "i4"))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_labels_mean_the_same_where_the_vocabulary_is_split(kind):
    the_mesh, axes = mesh(kind, dp=2, tp=4), MeshAxes(batch="dp", heads="tp")
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(size=(2, 4, 16)).astype("f4"), np.array(LABELS)
    labels[0, 0] = 15
    spoilt = np.where(labels[..., None] < 0, np.float32(np.nan), logits)
    lay = lambda x, spec: jax.device_put(x, jax.NamedSharding(the_mesh, spec))
    both = jax.jit(
        lambda x, y: jax.value_and_grad(next_token_loss)(x, y, axes=axes),
    )
    with jax.set_mesh(the_mesh):
        x = lay(spoilt, axes.logits)
        loss, gradient = both(x, lay(labels.astype("i4"), axes.tokens))
        labels[1, 1] = 16
        far = lay(labels.astype("i4"), axes.tokens)
        torn, torn_gradient = both(x, far)
        with pytest.raises(ValueError, match="`targets` must be negative .* size 16, got 16"):
            next_token_loss(x, far, axes=axes)
    assert np.isnan(torn)
    np.testing.assert_array_equal(np.isnan(torn_gradient).any(-1), labels == 16)
    labels[1, 1] = 0
    expected, expected_gradient = by_hand(logits, labels)
    assert_close(loss, expected, atol=1e-6)
    assert_close(gradient, expected_gradient, atol=1e-6)


def test_a_step_ignores_negative_targets_and_refuses_those_outside_the_vocabulary():
    optimizer = optax.sgd(1.0)
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, 40, (2, 7)).astype(np.int32)
    targets = rng.integers(0, 40, (2, 7))
    targets[:, ::2] = -100
    segments = np.array([[0] * 7, [0] * 4 + [-1] * 3])
    state = TrainState.create(build(SMALL, 4), optimizer)
    logits = jax.jit(Decoder.__call__)(state.decoder, jnp.asarray(tokens), segment_ids=segments)
    expected, _ = by_hand(logits, np.where(segments < 0, -1, targets))
    targets[1, 5] = 10**9  # on padding
    for outside in (40, 2**32 + 1):
        torn = targets.copy()
        torn[0, 1] = outside
        with pytest.raises(ValueError, match=f"`targets` must be negative .* 40, got {outside}"):
            train_step(state, tokens, optimizer=optimizer, targets=torn, segment_ids=segments)
    with pytest.raises(ValueError, match=re.escape("`segment_ids` must have shape (2, 7), got")):
        train_step(state, tokens, optimizer=optimizer, segment_ids=segments[:, :6])
    far = {
        "segment_ids": segments + 2**32,
        "tokens": tokens.astype(np.int64) + 2**32,
    }  # 64 bits are not cut to 32
    for name, ids in far.items():
        with pytest.raises(ValueError, match=f"`{name}` must fit int32"):
            train_step(state, **({"tokens": tokens} | {name: ids}), optimizer=optimizer)
    options = dict(optimizer=optimizer, segment_ids=segments)
    state, loss, norm = train_step(state, tokens, targets=targets, **options)
    assert_close(loss, expected, atol=1e-5)
    assert np.isfinite(norm)
    torn = jnp.asarray(np.where(segments < 0, -1, 40), jnp.int32)  # values that only a device has
    state, loss, norm = train_step(state, tokens, targets=torn, **options)
    assert np.isnan(loss)
    assert np.isnan(norm)


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


def test_an_optimizer_that_keeps_the_parameters_owns_its_copy():
    """Donated twice, a buffer would be an error: schedule-free averages start at the parameters themselves."""
    optimizer = optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    state = TrainState.create(build(SMALL, 1), optimizer)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves if isinstance(leaf, jax.Array)]
    assert len(set(buffers)) == len(buffers)


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


def test_two_folders_of_one_model_share_their_program_and_keep_their_names():
    optimizer = optax.sgd(0.1)
    tokens = jnp.ones((1, 8), jnp.int32)
    attention = dataclasses.replace(HYBRID, layers=("full_attention",), gated_deltanet=None)
    compiled = []
    for source in ("base", "tuned"):
        config = dataclasses.replace(attention, source=source)
        assert config == attention
        assert hash(config) == hash(attention)
        state = TrainState.create(build(config), optimizer)
        state = train_step(state, tokens, optimizer=optimizer).state
        assert state.decoder.config.source == source
        compiled.append(step._train_step._cache_size())
    assert compiled[0] == compiled[1]
