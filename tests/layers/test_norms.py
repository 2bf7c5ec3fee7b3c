"""Norms against their definition in float64, in every dtype, with their gradients at zero rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax.layers.norms import GatedRMSNorm, L2Norm, RMSNorm
from tests.support.compare import assert_close

TOLERANCE = {"float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}


def draw(seed: int, dtype: str, dim: int = 24):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(3, 5, dim)) * 3, rng.normal(size=dim)
    return jnp.asarray(x, dtype), jnp.asarray(weight, "float32")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_rms_norm(dtype, zero_centred, eps):
    x, weight = draw(0, dtype)
    norm = RMSNorm(24, eps=eps, zero_centred=zero_centred)
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    assert_close(norm(x), normed, atol=4 * TOLERANCE[dtype])  # a fresh norm multiplies by one
    norm.scale[...] = weight
    out = norm(x)
    assert out.dtype == x.dtype
    expected = normed * (np.asarray(weight, np.float64) + zero_centred)
    assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("zero_centred", [False, True])
def test_gated_rms_norm(zero_centred):
    x, weight = draw(1, "float32")
    gate, _ = draw(2, "float32")
    norm = GatedRMSNorm(24, eps=1e-5, zero_centred=zero_centred)
    norm.scale[...] = weight
    wide, open_ = np.asarray(x, np.float64), np.asarray(gate, np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected = (
        normed * (np.asarray(weight, np.float64) + zero_centred) * open_ / (1 + np.exp(-open_))
    )
    assert_close(norm(x, gate), expected, atol=2e-5, rtol=2e-6)


def test_l2_norm_divides_by_the_mean_square():
    x, _ = draw(3, "float32")
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert_close(L2Norm(eps=1e-5)(x), expected, atol=5e-6)


def test_gradient_at_a_zero_row_is_bounded_by_rsqrt_eps():
    norm = RMSNorm(4, eps=1e-6)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))
    assert np.abs(np.asarray(gradient)).max() <= 1e3
