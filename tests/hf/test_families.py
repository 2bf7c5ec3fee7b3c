"""Logits and greedy tokens of every family against transformers, through the checkpoint that transformers wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import checkpoint
from tests.hf.hf_models import FAMILIES, shared_model
from tests.support.compare import assert_close

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

NEW = 40
PROMPTS = (3, 9, 6)
LENGTH = max(PROMPTS) + NEW  # of every batch, so that compilations are shared


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A transformers model, our decoder of its checkpoint, and the decoder's logits (one compilation per shape)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = shared_model(request.param)
    theirs.save_pretrained(folder)
    ours = checkpoint.load_hf(folder)
    return theirs, ours, jax.jit(lambda tokens, segment_ids: ours(tokens, segment_ids=segment_ids))


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits(pair, padding):
    theirs, _, logits_of = pair
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 61, (3, LENGTH))
    mask = np.ones_like(tokens)
    if padding != "none":
        for row, length in enumerate((LENGTH, 23, 2)):
            mask[row, slice(length, None) if padding == "right" else slice(0, LENGTH - length)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    segment_ids = None if padding == "none" else jnp.asarray(mask - 1, jnp.int32)
    logits = logits_of(jnp.asarray(tokens, jnp.int32), segment_ids)
    real = mask.astype(bool)
    assert_close(np.asarray(logits)[real], expected[real], atol=1e-5, what=padding)


def left_padded():
    rng = np.random.default_rng(8)
    width = max(PROMPTS)
    mask = np.arange(width)[None, :] >= width - np.array(PROMPTS)[:, None]
    return np.where(mask, rng.integers(1, 61, mask.shape), 0), mask


def greedy_reference(theirs, tokens, mask):
    """Tokens of transformers' `generate`, and how much the chosen one leads at every step."""
    out = theirs.generate(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits, 1).topk(2).values
    return out.sequences[:, tokens.shape[1] :].numpy(), (best[..., 0] - best[..., 1]).min().item()


def greedy_with_cache(ours, tokens, mask):
    step = jax.jit(
        lambda tokens, cache, lengths: ours.step(
            tokens, cache, lengths=lengths, padding_side="left", last_only=True
        ),
        donate_argnums=1,
    )
    cache = ours.init_cache(len(tokens), tokens.shape[1] + NEW)
    lengths = jnp.asarray(mask.sum(1), jnp.int32)
    logits, cache = step(jnp.asarray(tokens, jnp.int32), cache, lengths)
    ones = jnp.ones(len(tokens), jnp.int32)
    found = []
    for _ in range(NEW):
        found.append(jnp.argmax(logits[:, -1], -1).astype(jnp.int32))
        logits, cache = step(found[-1][:, None], cache, ones)
    return np.stack(found, 1)


def greedy_without_cache(logits_of, tokens, mask):
    """The whole text again for every token, in one buffer so that one compilation serves all."""
    batch, width = tokens.shape
    buffer = np.zeros((batch, width + NEW), np.int32)
    segments = np.full((batch, width + NEW), -1, np.int32)
    buffer[:, :width], segments[:, :width] = tokens, np.where(mask, 0, -1)
    for at in range(width, width + NEW):
        buffer[:, at] = np.asarray(logits_of(buffer, segments))[:, at - 1].argmax(-1)
        segments[:, at] = 0
    return buffer[:, width:]


def test_forty_greedy_tokens_with_and_without_cache(pair):
    theirs, ours, logits_of = pair
    tokens, mask = left_padded()
    expected, lead = greedy_reference(theirs, tokens, mask)
    assert lead > 1e-4, f"the reference itself is undecided (lead {lead}): choose another seed"
    np.testing.assert_array_equal(greedy_with_cache(ours, tokens, mask), expected)
    np.testing.assert_array_equal(greedy_without_cache(logits_of, tokens, mask), expected)
