"""NaN and infinity reach the outputs whose window holds them, and no gradient of what did not see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, causal_conv1d_qkv
from tests.support.compare import assert_close


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poison_reaches_its_window_only(value):
    draw = np.random.default_rng(0)
    x, weight = (draw.normal(size=s).astype(np.float32) for s in ((2, 12, 3), (4, 3)))
    ids = np.array([[0] * 5 + [-1] * 2 + [1] * 5, [0] * 12])
    poisoned = np.where((ids < 0)[..., None], value, x)
    poisoned[0, 4, 1] = poisoned[1, 9, 2] = value
    clean = np.ones(x.shape, bool)
    clean[0, 4, 1] = False  # its segment ends there
    clean[1, 9:, 2] = False

    @jax.jit
    def run(x, weight):
        def loss(x, weight):
            made = causal_conv1d(x, weight, activation="silu", segment_ids=jnp.asarray(ids))
            return (jnp.where(clean, made.out, 0.0) ** 2).sum(), made.out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weight)

    (_, expected), d_expected = run(np.where(np.isfinite(poisoned), poisoned, 0), weight)
    (_, out), gradients = run(poisoned, weight)
    out = np.asarray(out)
    assert_close(out[clean], np.asarray(expected)[clean], atol=0)
    assert not np.isfinite(out[~clean]).any()
    for got, wanted in zip(gradients, d_expected, strict=True):
        assert_close(got, wanted, atol=1e-6)
    assert (np.asarray(gradients[0])[~np.isfinite(poisoned)] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_norm_of_poison_spoils_no_gradient(value):
    """One channel of one token is poison; the loss reads the tokens before it."""
    draw = np.random.default_rng(1)
    mixed, weight = (draw.normal(size=s).astype(np.float32) for s in ((1, 9, 1, 12), (3, 1, 12)))
    poisoned = mixed.copy()
    poisoned[0, 6, 0, [1, 5]] = value

    @jax.jit
    def run(mixed, weight):
        def loss(mixed, weight):
            made = causal_conv1d_qkv(mixed, weight, key_dim=4, value_dim=4, use_qk_l2norm=True)
            return sum((x[:, :6] ** 3).sum() for x in made[:3]), made

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(mixed, weight)

    (_, made), expected = run(mixed, weight)
    (_, spoiled), gradients = run(poisoned, weight)
    assert np.isnan(np.asarray(spoiled[0])[0, 6:]).all()  # the norm is of all channels
    assert_close(spoiled[0][:, :6], made[0][:, :6], atol=0)
    for got, wanted in zip(gradients, expected, strict=True):
        assert_close(got, wanted, atol=1e-6)
