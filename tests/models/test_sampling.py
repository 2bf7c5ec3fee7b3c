"""Sampling: the exact support of each filter, the distribution, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax.models.sampling import make_sampling, sample

DRAW = jax.jit(
    lambda logits, sampling, keys: jax.vmap(
        lambda key: sample(logits, sampling=sampling, key=key)[0]
    )(keys)
)


def draws(logits, n=2000, **options) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), n)
    logits = jnp.asarray([logits], jnp.float32)
    return np.asarray(DRAW(logits, make_sampling(**options), keys))


PROBABILITIES = np.array([0.02, 0.4, 0.08, 0.3, 0.2])
LOGITS = np.log(PROBABILITIES)


@pytest.mark.parametrize(
    "options, support",
    [
        (dict(temperature=1.0), {0, 1, 2, 3, 4}),
        (dict(temperature=1.0, top_k=1), {1}),
        (dict(temperature=1.0, top_k=3), {1, 3, 4}),
        (dict(temperature=1.0, top_k=5), {0, 1, 2, 3, 4}),
        (dict(temperature=1.0, top_p=0.01), {1}),
        (dict(temperature=1.0, top_p=0.41), {1, 3}),
        (dict(temperature=1.0, top_p=0.71), {1, 3, 4}),
        (dict(temperature=1.0, top_p=1.0), {0, 1, 2, 3, 4}),
        (dict(temperature=1.0, top_k=2, top_p=0.6), {1, 3}),  # of the two, the first has 4/7
        (dict(temperature=1.0, top_k=2, top_p=0.5), {1}),
    ],
)
def test_support_and_distribution(options, support):
    counts = np.bincount(draws(LOGITS, **options), minlength=5)
    assert set(np.flatnonzero(counts)) == support
    expected = np.where(np.isin(np.arange(5), list(support)), PROBABILITIES, 0.0)
    expected = expected / expected.sum()
    deviation = np.sqrt(expected * (1 - expected) / counts.sum())
    assert (np.abs(counts / counts.sum() - expected) <= 4.5 * deviation + 1e-9).all()


def test_temperature_sharpens():
    counts = np.bincount(draws(LOGITS, temperature=0.5), minlength=5) / 2000
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert np.abs(counts - expected).max() < 0.05


def test_ties_go_to_the_lowest_id_and_top_k_is_exact():
    assert set(draws([0.0, 1.0, 1.0, 1.0], temperature=1.0, top_k=2)) == {1, 2}
    assert sample(jnp.asarray([[0.0, 1.0, 1.0]]), sampling=make_sampling(0.0)).tolist() == [1]


def test_greedy_needs_no_key_and_reads_any_dtype():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], jnp.bfloat16)
    token = sample(logits, sampling=make_sampling())
    assert token.dtype == jnp.int32
    assert token.tolist() == [1, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "`temperature` must be at least 0, got -1.0"),
        (dict(temperature=float("nan")), "`temperature` must be at least 0, got nan"),
        (dict(temperature=1.0, top_k=0), "`top_k` must be None or a positive int, got 0"),
        (dict(temperature=1.0, top_k=1.5), "`top_k` must be None or a positive int, got 1.5"),
        (dict(temperature=1.0, top_p=0.0), "`top_p` must be None or in (0, 1], got 0.0"),
        (dict(temperature=1.0, top_p=1.1), "`top_p` must be None or in (0, 1], got 1.1"),
        (dict(top_k=3), "`top_k` must be None when `temperature=0` (greedy), got 3"),
        (dict(top_p=0.5), "`top_p` must be None when `temperature=0` (greedy), got 0.5"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_sampling(**options)


def test_draws_need_a_key_and_enough_tokens():
    logits = jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="`key` must be given when `temperature` is positive"):
        sample(logits, sampling=make_sampling(1.0))
    with pytest.raises(ValueError, match="`top_k` must be at most the vocabulary's size 3, got 4"):
        sample(logits, sampling=make_sampling(1.0, top_k=4), key=jax.random.key(0))


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e-6])
def test_the_coldest_temperatures_are_greedy(temperature):
    """Logits over a tiny temperature are infinite: the most likely one must still win."""
    logits = jnp.asarray([[5.0, 30.0, 29.0, -4.0], [900.0, -1.0, 899.5, 2.0]])
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        sampling = make_sampling(temperature, **options)
        for seed in range(5):
            drawn = sample(logits, sampling=sampling, key=jax.random.key(seed))
            assert drawn.tolist() == [1, 0]
