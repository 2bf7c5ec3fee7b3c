"""`causal_conv1d_qkv` in XLA against a NumPy loop over tokens: values, gradients, rounding, continuation, messages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, causal_conv1d_qkv, explain
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.conv_cases import KINDS, oracle_qkv, random_qkv, segments

DIMS: dict[str, Any] = {"key_dim": 4, "value_dim": 6}
NAMES = ("query", "key", "value", "final_state")


@pytest.mark.parametrize("length, width, group", [(9, 4, 2), (2, 4, 1), (7, 1, 1), (0, 3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_final_state(kind, length, width, group):
    operands = random_qkv(1, length, width, group=group, spare=3, **DIMS)
    mixed, weight, bias, state = operands
    ids = segments(kind, length, mixed.shape[0])
    normalise = group == 2
    expected = oracle_qkv(*operands, ids, **DIMS, normalise=normalise)
    mixed = np.where((ids < 0)[..., None, None], np.nan, mixed)
    mixed[..., weight.shape[-1] :] = np.nan  # channels that are not read
    narrow = [jnp.asarray(a, jnp.float32) for a in (mixed, weight, bias, state)]
    result = causal_conv1d_qkv(
        *narrow[:2], **DIMS, bias=narrow[2], initial_state=narrow[3], use_qk_l2norm=normalise,
        segment_ids=None if kind == "none" else jnp.asarray(ids),
    )  # fmt: skip
    for name, actual, wanted in zip(NAMES, result, expected, strict=True):
        assert_close(actual, wanted, atol=5e-6, what=name)


@pytest.mark.parametrize("kind", ["none", "everywhere"])
def test_gradients_are_finite_differences(x64, kind):
    operands = random_qkv(2, 5, 3, batch=1, key_dim=2, value_dim=2)
    ids = segments(kind, 5, 1)
    rng = np.random.default_rng(0)
    shapes = [(1, 5, 2, 2), (1, 5, 2, 2), (1, 5, 4, 2), operands[3].shape]
    cotangents = [rng.standard_normal(shape) for shape in shapes]

    def loss(mixed, weight, bias, state):
        result = causal_conv1d_qkv(
            mixed, weight, key_dim=2, value_dim=2, bias=bias, use_qk_l2norm=True, initial_state=state,
            segment_ids=None if kind == "none" else jnp.asarray(ids),
        )  # fmt: skip
        return sum(jnp.sum(a * b) for a, b in zip(result, cotangents, strict=True))

    def truth(*operands):
        result = oracle_qkv(*operands, ids, key_dim=2, value_dim=2, normalise=True)
        return sum((a * b).sum() for a, b in zip(result, cotangents, strict=True))

    grads = jax.grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, operands))
    for i, name in enumerate(("mixed", "weight", "bias", "initial_state")):
        numeric = np.zeros_like(operands[i])
        for at in np.ndindex(numeric.shape):
            moved = [[*operands[:i], operands[i].copy(), *operands[i + 1 :]] for _ in range(2)]
            moved[0][i][at] += 1e-6
            moved[1][i][at] -= 1e-6
            numeric[at] = (truth(*moved[0]) - truth(*moved[1])) / 2e-6
        assert_close(grads[i], numeric, atol=1e-7, what=name)


def test_a_zero_row_has_a_bounded_gradient():
    mixed, weight = jnp.zeros((1, 3, 1, 12)), jnp.ones((2, 1, 12))
    options: dict[str, Any] = dict(key_dim=4, value_dim=4, use_qk_l2norm=True)
    gradient = jax.grad(lambda m: jnp.sum(causal_conv1d_qkv(m, weight, **options).query))(mixed)
    assert not np.asarray(gradient).any()


def test_sixteen_bits_are_rounded_once():
    operands = random_qkv(3, 30, 4, dtype=jnp.bfloat16, **DIMS)
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in operands]
    result = causal_conv1d_qkv(
        *narrow[:2], bias=narrow[2], initial_state=narrow[3], use_qk_l2norm=True, **DIMS
    )
    ids = segments("none", 30, operands[0].shape[0])
    expected = oracle_qkv(*operands, ids, **DIMS, normalise=True)
    for name, actual, wanted in zip(NAMES, result, expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual, wanted, atol=1e-6, rtol=2**-8, what=name)


def test_is_the_plain_convolution_split():
    mixed, weight, bias, state = (jnp.asarray(a, jnp.float32) for a in random_qkv(4, 11, 4, **DIMS))
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    whole = causal_conv1d(
        flat(mixed), flat(weight), bias=flat(bias), activation="silu", initial_state=flat(state)
    )
    whole_out = whole.out.reshape(mixed.shape)
    made = causal_conv1d_qkv(
        mixed, weight, bias=bias, initial_state=state, use_qk_l2norm=False, segment_ids=None,
        implementation=None, **DIMS,
    )  # fmt: skip
    assert_bitwise_equal(made.query, whole_out[..., :4])
    assert_bitwise_equal(made.key, whole_out[..., 4:8])
    assert_bitwise_equal(made.value.reshape((*mixed.shape[:3], -1)), whole_out[..., 8:])
    assert_bitwise_equal(flat(made.final_state), whole.final_state)


def test_messages_name_the_argument():
    mixed, weight = jnp.ones((1, 5, 2, 20)), jnp.ones((4, 2, 20))
    dims: dict[str, Any] = {"key_dim": 4, "value_dim": 6}
    with pytest.raises(
        ValueError, match=r"`weight` must have shape \[W=4, Hk=2, C\], got \(4, 3, 20"
    ):
        causal_conv1d_qkv(mixed, jnp.ones((4, 3, 20)), **dims)
    with pytest.raises(ValueError, match="`weight` must have at least one tap, got W=0"):
        causal_conv1d_qkv(mixed, weight[:0], **dims)
    with pytest.raises(ValueError, match="`weight` must have C = 2 Dk .* Dk=4, Dv=5, .* got C=20"):
        causal_conv1d_qkv(mixed, weight, key_dim=4, value_dim=5)
    with pytest.raises(ValueError, match="`weight` must have C = 2 Dk .* Dk=10, Dv=6"):
        causal_conv1d_qkv(mixed, weight, key_dim=10, value_dim=6)
    with pytest.raises(ValueError, match="`key_dim` must be positive, got 0"):
        causal_conv1d_qkv(mixed, weight, key_dim=0, value_dim=5)
    with pytest.raises(ValueError, match="`mixed` must have at least C=20 channels, got F=19"):
        causal_conv1d_qkv(mixed[..., :19], weight, **dims)
    with pytest.raises(ValueError, match=r"`bias` must have shape \[Hk, C\], got \(20,\)"):
        causal_conv1d_qkv(mixed, weight, bias=jnp.ones((20,)), **dims)
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \[B=1, W=4, Hk=2, C=20\]"):  # fmt: skip
        causal_conv1d_qkv(mixed, weight, initial_state=jnp.ones((1, 3, 2, 20)), **dims)
    with pytest.raises(TypeError, match="`segment_ids` must be an integer array"):
        causal_conv1d_qkv(mixed, weight, segment_ids=jnp.ones((1, 5)), **dims)
    with pytest.raises(TypeError, match="`mixed` must be floating point"):
        causal_conv1d_qkv(mixed.astype(jnp.int32), weight, **dims)
    assert explain("causal_conv1d_qkv", mixed, weight, **dims).chosen == "reference"
