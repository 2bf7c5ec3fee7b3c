"""What stands behind the lengths or outside of the window is inert, NaN and infinity included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.support.compare import assert_bitwise_equal, assert_close

LENGTHS = np.array([9, 3, 17], np.int32)
IMPLEMENTATIONS = ("blockwise", "reference")


def problem(seed, capacity=21):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    hidden = np.arange(capacity) >= LENGTHS[:, None]
    return normal(3, 2, 4, 8), normal(3, 2, capacity, 8), normal(3, 2, capacity, 5), hidden


def spoiled(cache, hidden, value, head):
    return np.where(hidden[:, None, :, None] & (np.arange(2) == head)[:, None, None], value, cache)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_behind_the_lengths(implementation, value):
    """Values keep their bits, gradients their values, and what is hidden has a gradient of 0."""
    query, key, cache, hidden = problem(0)
    options = {"sliding_window": 6, "logits_soft_cap": 2.0, "sinks": np.ones(4, np.float32)}

    def attend(*arrays):
        out = pk.decode_attention(*arrays, LENGTHS, implementation=implementation, **options)
        return (out * out).sum(), out

    run = jax.jit(jax.value_and_grad(attend, (0, 1, 2), has_aux=True))
    (_, expected), d_expected = run(query, key, cache)
    outside = hidden | (np.arange(21) < LENGTHS[:, None] - 7)
    for poisoned in (
        (query, spoiled(key, outside, value, 1), cache),
        (query, key, spoiled(cache, outside, value, 0)),
    ):
        (_, out), grads = run(*poisoned)
        assert_bitwise_equal(out, expected)
        for got, wanted in zip(grads, d_expected, strict=True):
            assert_close(got, wanted, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scales_and_float8(implementation):
    query, key, cache, hidden = problem(1)
    scale = np.where(hidden[:, None], np.nan, 0.1 * np.ones((3, 2, 21))).astype(np.float32)
    narrow = [np.asarray(np.round(9 * x), np.int8) for x in (key, cache)]
    attend = jax.jit(lambda *a, **k: pk.decode_attention(*a, implementation=implementation, **k))
    for dtype in (jnp.float32, jnp.bfloat16):
        few = jnp.asarray(query).astype(dtype)
        actual = attend(few, *narrow, LENGTHS, key_scale=scale, value_scale=scale)
        plain = np.nan_to_num(scale)
        expected = attend(few, *narrow, LENGTHS, key_scale=plain, value_scale=plain)
        assert_bitwise_equal(actual, expected)
    float8 = [jnp.asarray(x).astype(jnp.float8_e4m3fn) for x in (key, cache)]
    bad = [jnp.where(hidden[:, None, :, None], jnp.asarray(jnp.nan, x.dtype), x) for x in float8]
    assert_bitwise_equal(attend(query, *bad, LENGTHS), attend(query, *float8, LENGTHS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_who_sees_it_is_nan_and_nobody_else(implementation, place):
    """Slot 7 of row 0 is the first of its two new tokens' position: seen by both; slot 8 by the second only."""
    query, key, cache, hidden = problem(2)
    cache = spoiled(cache, hidden, np.nan, 1)  # and something hidden everywhere
    arrays = {"query": np.array(query), "key": np.array(key), "value": np.array(cache)}
    if place == "query":
        arrays["query"][0, 1, 2] = np.nan
    else:
        arrays[place][0, 1, 8, 0] = np.nan
    attend = lambda q, k, v, n: pk.decode_attention(q, k, v, n, implementation=implementation)
    given = (*arrays.values(), LENGTHS)
    alone = [x[:, None] for x in given]
    for out in (jax.jit(attend)(*given), jax.vmap(attend)(*alone)[:, 0]):  # in `vmap` both ways run
        broken = np.isnan(np.asarray(out)).any(-1)
        wanted = np.zeros_like(broken)
        wanted[0, 1, 2 if place == "query" else slice(2, 4)] = True
        np.testing.assert_array_equal(broken, wanted)
