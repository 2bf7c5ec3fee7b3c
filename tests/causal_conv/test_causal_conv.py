"""`causal_conv1d` against a NumPy loop over tokens: values, gradients, packing, padding, continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, explain
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.conv_cases import KINDS, arrays, oracle, segments


@pytest.mark.parametrize("length, width", [(9, 4), (2, 4), (1, 1), (7, 1), (0, 3), (12, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_final_state(kind, length, width):
    x, weight, bias, state = arrays(1, length, width)
    ids = segments(kind, length)
    silu = length % 2 == 1
    expected, final = oracle(x, weight, bias, silu, state, ids)
    poison = np.where((ids < 0)[..., None], np.nan, x)
    result = causal_conv1d(
        *(jnp.asarray(a, jnp.float32) for a in (poison, weight)), bias=jnp.asarray(bias, jnp.float32),
        activation="silu" if silu else None, initial_state=jnp.asarray(state, jnp.float32),
        segment_ids=None if kind == "none" else jnp.asarray(ids),
    )  # fmt: skip
    assert_close(result.out, expected, atol=2e-6, what="out")
    assert_bitwise_equal(result.final_state, jnp.asarray(final, jnp.float32), what="final state")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(x64, kind):
    x, weight, bias, state = arrays(2, 6, 3, features=2, batch=2)
    ids = segments(kind, 6, batch=2)
    rng = np.random.default_rng(0)
    d_out, d_final = rng.standard_normal(x.shape), rng.standard_normal(state.shape)

    def loss(x, weight, bias, state):
        out, final = causal_conv1d(
            x, weight, bias=bias, activation="silu", initial_state=state,
            segment_ids=None if kind == "none" else jnp.asarray(ids),
        )  # fmt: skip
        return jnp.sum(out * d_out) + jnp.sum(final * d_final)

    def truth(*operands):
        out, final = oracle(*operands[:3], True, operands[3], ids)
        return (out * d_out).sum() + (final * d_final).sum()

    operands = (x, weight, bias, state)
    grads = jax.grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, operands))
    for i, name in enumerate(("x", "weight", "bias", "initial_state")):
        numeric = np.zeros_like(operands[i])
        for at in np.ndindex(numeric.shape):
            moved = [[*operands[:i], operands[i].copy(), *operands[i + 1 :]] for _ in range(2)]
            moved[0][i][at] += 1e-6
            moved[1][i][at] -= 1e-6
            numeric[at] = (truth(*moved[0]) - truth(*moved[1])) / 2e-6
        assert_close(grads[i], numeric, atol=1e-7, what=name)


def test_splits_continue_each_other():
    x, weight, bias, _ = (jnp.asarray(a, jnp.float32) for a in arrays(3, 20, 4))
    whole = causal_conv1d(x, weight, bias=bias)
    state, outs = None, []
    for part in jnp.split(x, [1, 3, 11], axis=1):
        out, state = causal_conv1d(part, weight, bias=bias, initial_state=state)
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), whole.out, atol=1e-6)
    assert_bitwise_equal(state, whole.final_state)


def test_right_padded_prefill_continues_at_the_true_length():
    x, weight, _, _ = (jnp.asarray(a, jnp.float32) for a in arrays(4, 16, 4))
    lengths = jnp.array([1, 5, 0, 12])
    ids = jnp.where(jnp.arange(12)[None] < lengths[:, None], 0, -1)
    state = causal_conv1d(x[:, :12], weight, segment_ids=ids).final_state
    for b, length in enumerate(lengths.tolist()):
        row = jnp.concatenate([x[b, :length], x[b, 12:]])[None]
        expected = causal_conv1d(row, weight)
        got = causal_conv1d(x[b : b + 1, 12:], weight, initial_state=state[b : b + 1])
        assert_close(got.out, expected.out[:, length:], atol=1e-6)
        assert_bitwise_equal(got.final_state, expected.final_state[:, -4:])


def test_sixteen_bits_sum_in_float32_and_stay_sixteen_bits():
    x, weight, bias, _ = arrays(5, 30, 4)
    narrow = [jnp.asarray(a).astype(jnp.bfloat16) for a in (x, weight, bias)]
    exact = [np.asarray(a).astype(np.float64) for a in narrow]
    result = causal_conv1d(*narrow[:2], bias=narrow[2], activation="silu")
    expected, _ = oracle(*exact, True, np.zeros((4, 4, 3)), np.zeros((4, 30), int))
    assert result.out.dtype == jnp.bfloat16
    assert result.final_state.dtype == jnp.bfloat16
    assert_close(result.out, expected, atol=1e-6, rtol=2**-8)


def test_transforms_and_defaults():
    x, weight, bias, state = (jnp.asarray(a, jnp.float32) for a in arrays(6, 9, 4))
    plain = causal_conv1d(x, weight)
    passed = causal_conv1d(
        x, weight, bias=None, activation=None, initial_state=None, segment_ids=None,
        implementation=None,
    )  # fmt: skip
    assert_bitwise_equal(plain.out, passed.out)
    ids = jnp.asarray(segments("right padding", 9))
    whole = causal_conv1d(x, weight, initial_state=state, segment_ids=ids)
    rows = jax.jit(
        jax.vmap(
            lambda x, s, i: causal_conv1d(
                x[None], weight, initial_state=s[None], segment_ids=i[None]
            )
        )
    )
    assert_close(rows(x, state, ids).out[:, 0], whole.out, atol=1e-6)
    loss = lambda w, x: jnp.sum(jnp.sin(causal_conv1d(x[None], w, bias=bias).out))
    per_row = jax.vmap(jax.grad(loss), (None, 0))(weight, x)
    total = jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 0))(w, x)))(weight)
    assert_close(per_row.sum(0), total, atol=1e-5)


@pytest.mark.torch
def test_hugging_face_causal_convolution():
    torch = pytest.importorskip("torch")
    x, weight, bias, _ = arrays(7, 11, 4)
    expected = torch.nn.functional.conv1d(
        torch.tensor(x).mT, torch.tensor(weight).T[:, None], torch.tensor(bias), padding=3, groups=3
    )
    result = causal_conv1d(
        *(jnp.asarray(a, jnp.float32) for a in (x, weight)), bias=jnp.asarray(bias, jnp.float32)
    )
    assert_close(result.out, expected[..., :11].mT, atol=2e-6)


def test_messages_name_the_argument():
    x, weight = jnp.ones((1, 5, 3)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"`weight` must have shape \[W=4, F=3\]"):
        causal_conv1d(x, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="`weight` must have at least one tap"):
        causal_conv1d(x, weight[:0])
    with pytest.raises(ValueError, match="`activation` must be one of None, 'silu', got 'relu'"):
        causal_conv1d(x, weight, activation="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \[B=1, W=4, F=3\]"):
        causal_conv1d(x, weight, initial_state=jnp.ones((1, 3, 3)))
    with pytest.raises(TypeError, match="`segment_ids` must be an integer array"):
        causal_conv1d(x, weight, segment_ids=jnp.ones((1, 5)))
    assert explain("causal_conv1d", x, weight).chosen == "reference"


@pytest.mark.parametrize("given", [False, True])
def test_left_padding_is_not_read(given):
    """With the initial state given as zeros or not at all, the inputs that stand on padding are never seen."""
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    ids = jnp.asarray([[-1, -1, -1, 0, 0, 0]])
    state = jnp.zeros((1, 4, 1)) if given else None
    result = causal_conv1d(x, jnp.ones((4, 1)), initial_state=state, segment_ids=ids)
    assert result.out[0, :, 0].tolist() == [0, 0, 0, 4, 9, 15]
    assert result.final_state[0, :, 0].tolist() == [0, 4, 5, 6]
