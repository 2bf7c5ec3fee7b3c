"""Behaviour of `gated_deltanet_step` without kernels: truth, composition, lengths, slots, gradients, errors, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, gated_delta_rule_step, gated_deltanet_step
from tests.support.compare import (
    DELTA_RULE_TOLERANCES,
    assert_bitwise_equal,
    assert_close,
    relative_error,
)
from tests.support.deltanet_cases import nasty_case, random_case, truth

STEP = jax.jit(
    lambda given, **options: gated_deltanet_step(**given, **options),
    static_argnames=(
        "scale", "use_qk_l2norm", "allow_negative_eigenvalues", "return_states", "implementation",
    ),
)  # fmt: skip


def arrays(case, dtype=jnp.float32):
    return {name: jnp.asarray(x, dtype) for name, x in case.items()}


@pytest.mark.parametrize(
    "sizes, options",
    [
        (dict(length=1, group=1, width=4), {}),
        (dict(length=8, group=2, width=2, key_dim=9, value_dim=5), dict(scale=0.5)),
        (dict(length=5, group=4, width=1, bias=False, key_heads=2), dict(use_qk_l2norm=False)),
        (dict(length=3, group=2, width=3, extra=7), dict(allow_negative_eigenvalues=True)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_equals_the_float64_recurrence(dtype, sizes, options, x64):
    case = nasty_case(0, **sizes)
    if not options.get("use_qk_l2norm", True):
        case["mixed"] *= 0.1
    given = arrays(case, dtype)
    result = STEP(given, return_states=True, **options)
    expected = truth(given, **options)
    names = ("out", "final_state", "final_conv_state", "states")
    for name, wanted in zip(names, expected, strict=True):
        found = getattr(result, name)
        assert found.dtype == jnp.dtype(dtype)
        for row in range(len(wanted)):
            error = relative_error(found[row], wanted[row])
            assert error < DELTA_RULE_TOLERANCES[dtype]["out"], (name, row, error)


def test_is_the_composition_bit_by_bit():
    """Options that are defaults, given; operands of a bfloat16 model."""
    case = arrays(random_case(1, rows=2, length=3), jnp.bfloat16)
    case |= {n: case[n].astype(jnp.float32) for n in ("state", "A_log", "dt_bias")}
    result = STEP(
        case, lengths=None, slots=None, scale=None, use_qk_l2norm=True, return_states=False,
        allow_negative_eigenvalues=False, implementation=None,
    )  # fmt: skip

    @jax.jit
    def compose(case):
        flat = lambda x, leading: x.reshape(*x.shape[:leading], -1)
        convolved, window = causal_conv1d(
            flat(case["mixed"], 2), flat(case["conv_kernel"], 1), activation="silu",
            bias=flat(case["conv_bias"], 0), initial_state=flat(case["conv_state"], 2),
        )  # fmt: skip
        write, decay = jnp.split(case["logits"].astype(jnp.float32)[:, :, 0], 2, axis=-1)
        g = -jnp.exp(case["A_log"])[None] * jax.nn.softplus(decay + case["dt_bias"][None])
        step = gated_delta_rule_step(
            convolved[:, :, None, :16], convolved[:, :, None, 16:32],
            convolved[..., 32:].reshape(2, 3, 2, 16), g, jax.nn.sigmoid(write), case["state"],
            use_qk_l2norm=True,
        )  # fmt: skip
        return step.out, step.final_state, window.reshape(case["conv_state"].shape)

    for found, expected in zip(result[:3], compose(case), strict=True):
        assert_bitwise_equal(found, expected)
    assert result.states is None


def test_lengths_end_rows_early_and_hide_what_follows():
    case = random_case(2, rows=4, length=4)
    lengths = [4, 0, 1, 3]
    for row, count in enumerate(lengths):
        case["mixed"][row, count:], case["logits"][row, count:] = np.nan, np.nan
    given = arrays(case)
    result = STEP(given, lengths=jnp.asarray(lengths), return_states=True)
    expected = truth(given, lengths=lengths)
    for found, wanted in zip(
        (result.out, result.final_state, result.final_conv_state, result.states), expected, strict=True
    ):  # fmt: skip
        assert_close(found, wanted, atol=1e-6)
    assert_bitwise_equal(result.final_state[1], given["state"][1])
    assert_bitwise_equal(result.final_conv_state[1], given["conv_state"][1])


def test_slots_of_a_pool():
    case = random_case(3, rows=3, length=2, pool=6)
    slots = np.array([5, -1, 2])
    case["mixed"][1], case["logits"][1] = np.nan, np.nan
    given = arrays(case)
    result = STEP(given, slots=jnp.asarray(slots))
    real = np.array([0, 2])
    rows = {n: given[n][real] for n in ("mixed", "logits")}
    rows |= {n: given[n][slots[real]] for n in ("state", "conv_state")}
    out, final, windows, _ = truth(given | rows)
    assert_close(result.out[real], out, atol=1e-6)
    assert not np.asarray(result.out[1]).any()
    assert_close(result.final_state[slots[real]], final, atol=1e-6)
    assert_close(result.final_conv_state[slots[real]], windows, atol=1e-6)
    for slot in (0, 1, 3, 4):
        assert_bitwise_equal(result.final_state[slot], given["state"][slot])
        assert_bitwise_equal(result.final_conv_state[slot], given["conv_state"][slot])


def test_gradients_against_differences_of_the_float64_recurrence(x64):
    case = random_case(4, rows=2, length=3, key_dim=5, value_dim=3)
    lengths, rng = [3, 2], np.random.default_rng(4)
    weights = [rng.standard_normal(x.shape) for x in truth(case)[:3]]
    direction = {n: rng.standard_normal(x.shape) for n, x in case.items()}

    def loss(given):
        result = gated_deltanet_step(**given, lengths=jnp.asarray(lengths))
        return sum(jnp.sum(x * w) for x, w in zip(result[:3], weights, strict=True))

    gradient = jax.jit(jax.grad(loss))(arrays(case, jnp.float64))
    for name in case:
        at = lambda step, name=name: sum(
            float((x * w).sum())
            for x, w in zip(
                truth(case | {name: case[name] + step * direction[name]}, lengths=lengths), weights,
                strict=False,
            )
        )  # fmt: skip
        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        found = float((np.asarray(gradient[name]) * direction[name]).sum())
        assert abs(found - expected) < 1e-7 * (1 + abs(expected)), name


def test_donated_states_are_updated_in_place():
    case = arrays(random_case(5, rows=2, length=1))
    states = {n: case.pop(n) for n in ("state", "conv_state")}

    def step(case, states):
        return gated_deltanet_step(**case, **states)

    text = jax.jit(step, donate_argnums=1).lower(case, states).compile().as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert aliased.count("may-alias") + aliased.count("must-alias") == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mixed": jnp.ones((1, 9, 1, 64))}, ValueError, "`mixed` must hold 1 to 8 tokens, got T=9"),
        ({"mixed": jnp.ones((1, 1, 1, 63))}, ValueError, r"at least C = 2 Dk \+ n Dv = 64 channels, got F=63"),
        ({"mixed": jnp.ones((1, 1, 1, 64), jnp.bfloat16)}, TypeError, "`mixed`, `conv_state` must share one dtype"),
        ({"mixed": jnp.ones((1, 1, 1, 64), jnp.int32)}, TypeError, "`mixed` must be floating point, got int32"),
        ({"logits": jnp.ones((1, 1, 1, 2))}, ValueError, r"`logits` must have shape .*2\*n=4"),
        ({"state": jnp.ones((1, 3, 16, 16))}, ValueError, r"`state` must have shape \[B=1, Hv=2, Dk, Dv\]"),
        ({"state": jnp.ones((2, 2, 16, 16))}, ValueError, r"`mixed` must have shape \[B=2,"),
        ({"conv_state": jnp.ones((1, 3, 1, 64))}, ValueError, r"`conv_state` must have shape \[B=1, W=4,"),
        ({"conv_kernel": jnp.ones((0, 1, 64)), "conv_state": jnp.ones((1, 0, 1, 64))}, ValueError, "got W=0"),
        ({"conv_bias": jnp.ones((64,))}, ValueError, "`conv_bias` must have shape"),
        ({"A_log": jnp.ones((1, 2), jnp.int32)}, TypeError, "`A_log` must be floating point"),
        ({"dt_bias": jnp.ones((2, 1))}, ValueError, r"`dt_bias` must have shape \[Hk=1, n=2\]"),
        ({"lengths": jnp.ones((2,), jnp.int32)}, ValueError, r"`lengths` must have shape \[B=1\]"),
        ({"lengths": jnp.full((1,), 2)}, ValueError, r"`lengths` must lie in \[0, T=1\], got \[2\]"),
        ({"slots": jnp.zeros((1,))}, TypeError, "`slots` must be an integer array"),
    ],
)  # fmt: skip
def test_bad_calls(change, error, message):
    given = arrays(random_case(6, rows=1, length=1)) | change
    with pytest.raises(error, match=message):
        gated_deltanet_step(**given)
