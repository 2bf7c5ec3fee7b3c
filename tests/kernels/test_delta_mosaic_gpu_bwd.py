"""The Hopper backward of the gated delta rule on the CPU, by the interpreter with race detection, against the float64
recurrence and against the chunk form's algebra."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import GatedDeltaRuleOutput, gated_delta_rule
from pallas_kernels.delta_rule import (
    mosaic_gpu_bwd,
    mosaic_gpu_prologue,
    mosaic_gpu_tuning,
    order,
)
from pallas_kernels.delta_rule.mosaic_gpu_tuning import BackwardConfig
from tests.support import compare, delta_cases
from tests.support.mosaic_gpu_interpreter import interpreted

DEFAULT = BackwardConfig()
FIELDS = ("query", "key", "value", "g", "beta", "initial_state")


def rounded(case, dtype):
    """The case with 16-bit queries, keys, values and output cotangents: what the kernels are given exactly."""
    names = ("query", "key", "value", "d_out")
    round_to = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(dtype)).astype(np.float64)
    return dataclasses.replace(case, **{name: round_to(getattr(case, name)) for name in names})


def plan_of(case):
    batch, length = case.value.shape[:2]
    count = None if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    steps = order.chunk_count(length, count, 64)
    return order.Plan(batch, length, 64, 1, steps, case.query.shape[-1] ** -0.5, False)


def spans_of(case):
    """By hand: every packed sequence begins a chunk."""
    chunks = -(-np.diff(case.cu_seqlens) // 64)
    first = np.cumsum(chunks) - chunks
    return jnp.asarray(np.stack([0 * chunks, first, chunks], axis=1), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(plan, config, dtype, arrays, segment_ids, cu_seqlens, spans):
    """The kernels on a case's arrays, in the order of `FIELDS`."""
    query, key, value, g, beta, initial_state, d_out, d_final = arrays
    place = order.dense_order(plan, segment_ids)
    if cu_seqlens is not None:
        place = order.packed_order(plan, cu_seqlens)
    rows = lambda x: order.to_rows(plan, place, x)
    tables = order.tables(plan, place, g, beta)
    narrow = lambda x: rows(x).astype(dtype)
    stacked = order.stacked(tables)
    inverse = mosaic_gpu_prologue.inverse(
        narrow(key), stacked, segments=tables.segment is not None, dtype=dtype
    )
    options = {
        "config": config, "scale": plan.scale, "tables": tables, "d_final": d_final, "inverse": inverse,
    }  # fmt: skip
    found = mosaic_gpu_bwd.backward(
        narrow(query), narrow(key), narrow(value), start_state=initial_state, d_out=narrow(d_out),
        spans=spans, **options,
    )  # fmt: skip
    back = lambda x: order.from_rows(plan, place, x)
    both = (back(found.g.swapaxes(1, 2)), back(found.beta.swapaxes(1, 2)))
    return (back(found.query), back(found.key), back(found.value), *both, found.state)


def run(case, dtype=jnp.bfloat16, config=DEFAULT):
    per_token = [*case.operands[:5], case.d_out]
    real = None
    if case.segment_ids is not None:  # the kernels expect zeros on padding
        real = case.segment_ids >= 0
        per_token = [x * real.reshape(real.shape + (1,) * (x.ndim - 2)) for x in per_token]
    *operands, d_out = per_token
    arrays = (*operands, case.initial_state, d_out, case.d_final)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    whole = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
    spans = None if case.cu_seqlens is None else spans_of(case)
    with interpreted():
        found = jax.block_until_ready(
            gradients(
                plan_of(case),
                config,
                dtype,
                arrays,
                whole(case.segment_ids),
                whole(case.cu_seqlens),
                spans,
            )
        )
    if real is None:
        return found
    return tuple(
        x if x is found[-1] else np.asarray(x) * real.reshape(real.shape + (1,) * (x.ndim - 2))
        for x in found
    )


def check(case, dtype=jnp.bfloat16, config=DEFAULT):
    case = rounded(case, dtype)
    found = run(case, dtype, config)
    _, _, truth = delta_cases.recurrence(case)
    limits = compare.DELTA_RULE_TOLERANCES[jnp.dtype(dtype).name]
    errors = {
        name: compare.relative_error(actual, truth[name])
        for name, actual in zip(FIELDS, found, strict=True)
    }
    print(jnp.dtype(dtype).name, {name: f"{error:.1e}" for name, error in errors.items()})
    wrong = {n: e for n, e in errors.items() if not e <= limits.get(n, limits["gradient"])}
    assert not wrong, wrong


@pytest.mark.parametrize(
    "batch, length, heads, key_dim, value_dim, dtype",
    [
        (1, 192, (1, 2), 128, 128, jnp.bfloat16),
        (2, 100, (2, 2), 64, 64, jnp.float16),
        (1, 65, (1, 3), 64, 128, jnp.bfloat16),
        (1, 130, (2, 4), 128, 64, jnp.float16),
    ],
)
def test_against_the_recurrence(batch, length, heads, key_dim, value_dim, dtype):
    key_heads, value_heads = heads
    check(
        delta_cases.random_case(length, batch, length, key_heads, value_heads, key_dim, value_dim),
        dtype,
    )


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
    monkeypatch.setattr(mosaic_gpu_tuning, "FIXED_REGISTERS", fixed)
    assert mosaic_gpu_tuning.backward_config(heads=heads) == BackwardConfig(chain_owners=owners)
