"""What a token does not see is inert, NaN and infinity included; g = -inf forgets everything and is no NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.support import delta_cases
from tests.support.compare import assert_close
from tests.support.delta_properties import check_truth

IMPLEMENTATIONS = ("chunked", "reference")
SEGMENTS = np.concatenate([np.zeros(20, int), np.full(5, -1), np.ones(25, int)])[None]
PACKED = np.array([0, 18, 18, 40, 47], np.int32)


def operands(seed, *, per_channel=False, sequences=1):
    case = delta_cases.random_case(seed, 1, 50, 2, 4, 8, 6)
    arrays = [np.array(x, np.float32) for x in case.operands]
    if per_channel:
        arrays[3] = np.repeat(arrays[3][..., :2, None], 8, axis=-1)
    arrays[5] = np.repeat(arrays[5], sequences, axis=0)
    return arrays


def run(implementation, clean, **options):
    """Outputs, and gradients of a loss that reads the outputs `clean [T]` only."""

    def loss(*arrays):
        out, final = pk.gated_delta_rule(
            *arrays[:5], initial_state=arrays[5], implementation=implementation, **options
        )
        kept = jnp.where(clean[:, None, None], out, 0.0)
        return (kept * kept).sum(), (out, final)

    return jax.jit(jax.value_and_grad(loss, tuple(range(6)), has_aux=True))


@pytest.mark.parametrize(
    "where, implementation",
    [
        *((where, "chunked") for where in ("dense", "segments", "packed", "per channel")),
        *((where, "reference") for where in ("segments", "packed")),
    ],
)
def test_poison_stays_in_its_future(where, implementation):
    """One token, then the initial state: NaN from there to the end of its segment, nowhere else; right gradients."""
    options, last, first_end = {}, 49, 49
    if where == "segments":
        options, last, first_end = {"segment_ids": jnp.asarray(SEGMENTS)}, 19, 19
    elif where == "packed":
        options, last, first_end = {"cu_seqlens": jnp.asarray(PACKED)}, 39, 17
    sequences = 4 if where == "packed" else 1
    given = operands(1, per_channel=where == "per channel", sequences=sequences)
    real = np.ones(50, bool)
    if where == "segments":
        real = SEGMENTS[0] >= 0
        for x in given[:5]:
            x[:, ~real] = np.inf
    if where == "packed":
        real = np.arange(50) < 47
    for name, start, end in (
        ("key", 19, last),
        ("value", 19, last),
        ("g", 19, last),
        ("state", 0, first_end),
    ):
        index = {"key": 1, "value": 2, "g": 3, "state": 5}[name]
        poisoned = [x.copy() for x in given]
        poisoned[index][(0, 1, 0, 3) if name == "state" else (0, start, 1)] = np.nan
        spoiled = (np.arange(50) >= start) & (np.arange(50) <= end) & real
        call = run(implementation, ~spoiled, **options)
        (_, (expected, _)), d_expected = call(*(np.where(np.isfinite(x), x, 0) for x in poisoned))
        (_, (out, final)), d_given = call(*poisoned)
        out = np.asarray(out)
        assert_close(out[:, ~spoiled], expected[:, ~spoiled], atol=1e-6, what=name)
        assert np.isnan(out[0, spoiled]).any((-1, -2)).all()
        assert (out[:, ~real] == 0).all()
        reaches_end = where != "segments"
        assert np.isnan(np.asarray(final)).any() == reaches_end, name
        for got, wanted, was in zip(d_given, d_expected, poisoned, strict=True):
            assert_close(got, wanted, atol=1e-5, what=name)
            assert (np.asarray(got)[~np.isfinite(was)] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_spoils_its_own_output_only(implementation):
    given = operands(2)
    poisoned = [x.copy() for x in given]
    poisoned[0][0, 30, 0, 2] = np.inf
    call = run(implementation, np.ones(50, bool))
    (_, (expected, final)), _ = call(*given)
    (_, (out, got)), _ = call(*poisoned)
    assert np.isnan(np.asarray(out)[0, 30, :2]).all()
    others = np.arange(50) != 30
    assert_close(np.asarray(out)[:, others], np.asarray(expected)[:, others], atol=1e-6)
    assert_close(got, final, atol=1e-6)


@pytest.mark.parametrize("length, implementation", [(70, "chunked"), (7, "reference")])
def test_minus_infinity_forgets_everything(length, implementation):
    case = delta_cases.random_case(length, 2, length, 1, 2, 16, 12)
    g = np.where(np.random.default_rng(length).random(case.g.shape) < 0.1, -np.inf, case.g)
    g[:, 1] = -np.inf
    with np.errstate(invalid="ignore"):
        check_truth(dataclasses.replace(case, g=g), implementation=implementation)


def test_minus_infinity_in_a_step_and_per_channel():
    case = delta_cases.random_case(5, 1, 6, 2, 2, 8, 8)
    g = np.repeat(case.g[..., None], 8, axis=-1)
    g[0, 2, :, ::2], g[0, 4] = -np.inf, -np.inf
    case = dataclasses.replace(case, g=g)
    out, final, _ = delta_cases.recurrence(case)
    given = [jnp.asarray(x, jnp.float32) for x in case.operands]
    step = jax.jit(pk.gated_delta_rule_step)(*given)
    for implementation in IMPLEMENTATIONS:
        got = pk.gated_delta_rule(*given[:5], initial_state=given[5], implementation=implementation)
        assert_close(got.out, out, atol=1e-5, what=implementation)
        assert_close(got.final_state, final, atol=1e-5, what=implementation)
    assert_close(step.out, out, atol=1e-5)
    assert_close(step.final_state, final, atol=1e-5)


def test_a_padding_row_of_a_pool_yields_zeros_whatever_the_pool_holds():
    case = delta_cases.random_case(6, 2, 1, 1, 1, 4, 4)
    given = [jnp.asarray(x, jnp.float32) for x in case.operands]
    pool = given[5].at[0].set(jnp.nan)
    step = pk.gated_delta_rule_step(*given[:5], pool, slots=jnp.array([-1, 1]))
    assert_close(step.out[0], jnp.zeros_like(step.out[0]), atol=0)
    assert np.isfinite(np.asarray(step.final_state[1])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("l2norm", [False, True])
def test_a_step_hides_later_tokens_from_gradients(value, l2norm):
    """The loss reads tokens 0 and 1 of the first row; tokens 2 and 3, and the state of the second row, are poison."""
    case = delta_cases.random_case(7, 2, 4, 1, 2, 4, 4)
    given = [np.array(x, np.float32) for x in case.operands]

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            out, final, _ = pk.gated_delta_rule_step(*arrays[:5], arrays[5], use_qk_l2norm=l2norm)
            return (out[0, :2] ** 2).sum(), (out, final)

        return jax.value_and_grad(loss, tuple(range(6)), has_aux=True)(*arrays)

    for index in (0, 1, 2, 4):
        poisoned = [x.copy() for x in given]
        poisoned[index][0, 2:] = value
        poisoned[5][1, 1, :, 2] = value
        (_, (expected, _)), d_expected = run(
            *(np.where(np.isfinite(x), x, 0).astype(np.float32) for x in poisoned)
        )
        (_, (out, final)), gradients = run(*poisoned)
        assert_close(out[0, :2], expected[0, :2], atol=0)
        assert not np.isfinite(np.asarray(out)[0, 2]).all()
        assert np.isnan(np.asarray(final)[1, 1, :, 2]).all()
        for got, wanted in zip(gradients, d_expected, strict=True):
            assert_close(got, wanted, atol=1e-6, what=str(index))
