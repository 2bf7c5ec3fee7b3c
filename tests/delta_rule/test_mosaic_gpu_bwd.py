"""The Hopper backward of the gated delta rule on the CPU, by the interpreter with race detection, against the float64
recurrence and against the chunk form's algebra."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import GatedDeltaRuleOutput, gated_delta_rule
from pallas_kernels.delta_rule.hopper import tuning
from pallas_kernels.delta_rule.hopper.tuning import BackwardConfig
from tests.support import compare, delta_cases
from tests.support.mosaic_gpu_interpreter import interpreted

DEFAULT = BackwardConfig()
FIELDS = ("query", "key", "value", "g", "beta", "initial_state")


def rounded(case, dtype):
    """The case with 16-bit queries, keys, values and output cotangents: what the kernels are given exactly."""
    names = ("query", "key", "value", "d_out")
    round_to = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(dtype)).astype(np.float64)
    return dataclasses.replace(case, **{name: round_to(getattr(case, name)) for name in names})


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(use_qk_l2norm, config, operands, d_out, d_final, segment_ids, cu_seqlens):
    """The operator's gradients in the order of `FIELDS`, with a chosen layout of the backward kernels."""

    def call(query, key, value, g, beta, initial_state):
        return gated_delta_rule(
            query, key, value, g, beta, initial_state=initial_state, segment_ids=segment_ids,
            cu_seqlens=cu_seqlens, use_qk_l2norm=use_qk_l2norm, implementation="mosaic_gpu",
        )  # fmt: skip

    with mock.patch.object(tuning, "backward_config", return_value=config):
        _, pull = jax.vjp(call, *operands)
        return pull(GatedDeltaRuleOutput(out=d_out, final_state=d_final))


def run(case, dtype=jnp.bfloat16, config=DEFAULT, *, use_qk_l2norm=False):
    half = lambda x: jnp.asarray(x, jnp.float32).astype(dtype)
    single = lambda x: jnp.asarray(x, jnp.float32)
    whole = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
    operands = (*map(half, case.operands[:3]), *map(single, case.operands[3:]))
    rest = (half(case.d_out), single(case.d_final), whole(case.segment_ids), whole(case.cu_seqlens))
    if config is not DEFAULT:  # not part of what the operator's own programs are cached by
        jax.clear_caches()
    with interpreted():
        found = jax.block_until_ready(gradients(use_qk_l2norm, config, operands, *rest))
    if config is not DEFAULT:
        jax.clear_caches()
    return found


def check(case, dtype=jnp.bfloat16, config=DEFAULT, *, use_qk_l2norm=False):
    case = rounded(case, dtype)
    found = run(case, dtype, config, use_qk_l2norm=use_qk_l2norm)
    truth = recurrence_of_any_length(case) if use_qk_l2norm else delta_cases.recurrence(case)[2]
    limits = compare.DELTA_RULE_TOLERANCES[jnp.dtype(dtype).name]
    errors = {
        name: compare.relative_error(actual, truth[name])
        for name, actual in zip(FIELDS, found, strict=True)
    }
    print(jnp.dtype(dtype).name, {name: f"{error:.1e}" for name, error in errors.items()})
    wrong = {n: e for n, e in errors.items() if not e <= limits.get(n, limits["gradient"])}
    assert not wrong, wrong


def recurrence_of_any_length(case):
    """Gradients where queries and keys are divided by their lengths first, by hand; zero rows have none."""
    names = ("query", "key")
    inverse = {n: 1 / np.sqrt((getattr(case, n) ** 2).sum(-1, keepdims=True) + 1e-6) for n in names}
    unit = {name: getattr(case, name) * inverse[name] for name in names}
    truth = delta_cases.recurrence(dataclasses.replace(case, **unit))[2]
    for name in names:
        along = (unit[name] * truth[name]).sum(-1, keepdims=True)
        pulled = inverse[name] * (truth[name] - unit[name] * along)
        truth[name] = np.where(getattr(case, name).any(-1, keepdims=True), pulled, 0)
    return truth


def sizes_of(seed, shape):
    """Of tokens, from 1/20 to 20, with zeros."""
    sizes = np.exp(np.random.default_rng(seed).uniform(-3, 3, shape))[..., None]
    sizes[:, 5:8] = 0.0
    return sizes


@pytest.mark.parametrize(
    "batch, length, heads, key_dim, value_dim, dtype, use_qk_l2norm",
    [
        (1, 192, (1, 2), 128, 128, jnp.bfloat16, True),
        (2, 100, (2, 2), 64, 64, jnp.float16, False),
        (1, 65, (1, 3), 64, 128, jnp.bfloat16, False),
        (1, 130, (2, 4), 128, 64, jnp.float16, True),
    ],
)
def test_against_the_recurrence(batch, length, heads, key_dim, value_dim, dtype, use_qk_l2norm):
    case = delta_cases.random_case(length, batch, length, *heads, key_dim, value_dim)
    if use_qk_l2norm:
        sizes = [sizes_of(length + i, case.key.shape[:3]) for i in range(2)]
        case = dataclasses.replace(case, query=case.query * sizes[0], key=case.key * sizes[1])
    check(case, dtype, use_qk_l2norm=use_qk_l2norm)


@pytest.mark.parametrize("values, cotangents", [(1.0, 1.0), (1e4, 1e-6), (1e-6, 1e4)])
def test_operands_of_any_size(values, cotangents):
    """Half precision inside neither overflows nor vanishes; queries differ in size from token to token."""
    case = delta_cases.random_case(15, 1, 65, 1, 3, 64, 128)
    query = values * case.query * sizes_of(15, case.query.shape[:3])
    held = {name: values * getattr(case, name) for name in ("value", "initial_state")}
    pulled = {"d_out": cotangents * case.d_out, "d_final": cotangents * values * case.d_final}
    check(dataclasses.replace(case, query=query, **held, **pulled))


def test_against_the_algebra():
    """The same 16-bit operands through the chunk form in float32 leave only the kernels' own rounding."""
    case = rounded(delta_cases.random_case(5, 1, 128, 1, 2, 64, 64), jnp.float16)
    found = run(case, jnp.float16)
    given = tuple(jnp.asarray(x, jnp.float32) for x in case.operands)

    def call(query, key, value, g, beta, initial_state):
        options = {"g": g, "beta": beta, "initial_state": initial_state}
        return gated_delta_rule(query, key, value, **options, implementation="chunked")

    _, pull = jax.vjp(call, *given)
    cotangents = tuple(jnp.asarray(x, jnp.float32) for x in (case.d_out, case.d_final))
    cotangents = GatedDeltaRuleOutput(out=cotangents[0], final_state=cotangents[1])
    expected = jax.jit(pull)(cotangents)
    for name, actual, truth in zip(FIELDS, found, expected, strict=True):
        assert compare.relative_error(actual, truth) <= 2e-3, name


def test_segments():
    ids = np.repeat([[0, 1, -1, 2, 3]], [30, 50, 7, 40, 43], axis=1)
    check(delta_cases.random_case(3, 1, 170, 1, 2, 64, 64, segment_ids=ids), jnp.float16)


def test_packed_sequences_with_states_of_their_own():
    bounds = np.asarray([0, 70, 70, 100, 228])
    check(delta_cases.random_case(4, 1, 228, 1, 2, 64, 64, cu_seqlens=bounds), jnp.float16)


NASTY = delta_cases.nasty_cases(11, 128, 64)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs(name):
    check(NASTY[name], jnp.float16)


def test_a_chunk_whose_first_gate_is_beyond_float32():
    """e^-90 is a subnormal number: its inverse is infinite, its gradient zero, and nothing may be NaN."""
    case = delta_cases.random_case(8, 1, 128, 1, 2, 64, 64)
    g = case.g.copy()
    g[:, [0, 64]] = [-90.0, -100.0]
    found = run(rounded(dataclasses.replace(case, g=g), jnp.float16), jnp.float16)
    for name, x in zip(FIELDS, found, strict=True):
        assert np.isfinite(np.asarray(x, np.float32)).all(), name
    assert not np.asarray(found[-1]).any()


def test_twice_and_tiled_otherwise_is_bitwise_the_same():
    case = rounded(delta_cases.random_case(7, 1, 192, 1, 2, 64, 128), jnp.bfloat16)
    first = run(case)
    for config in (DEFAULT, BackwardConfig(chain_owners=1, stages=2)):
        for name, a, b in zip(FIELDS, first, run(case, config=config), strict=True):
            compare.assert_bitwise_equal(a, b, what=name)


@pytest.mark.parametrize("heads, fixed, owners", [(66, False, 1), (67, False, 2), (67, True, 1)])
def test_few_heads_or_fixed_registers_spread_a_head_over_blocks(monkeypatch, heads, fixed, owners):
    monkeypatch.setattr(tuning, "FIXED_REGISTERS", fixed)
    assert tuning.backward_config(heads=heads) == BackwardConfig(chain_owners=owners)
