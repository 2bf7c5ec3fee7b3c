"""The Hopper backward of the gated delta rule on the CPU, by the interpreter with race detection, against the float64
recurrence and against the chunk form's algebra."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import algebra, mosaic_gpu_bwd, order
from tests.support import compare, delta_cases
from tests.support.mosaic_gpu_interpreter import interpreted

FIELDS = ("query", "key", "value", "g", "beta", "initial_state")


def rounded(case, dtype):
    """The case with 16-bit queries, keys, values and output cotangents: what the kernels are given exactly."""
    names = ("query", "key", "value", "d_out")
    round_to = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(dtype)).astype(np.float64)
    return dataclasses.replace(case, **{name: round_to(getattr(case, name)) for name in names})


def plan_of(case, lanes: int = 1):
    batch, length = case.value.shape[:2]
    steps = -(-length // (64 * lanes))
    return order.Plan(batch, length, 64, lanes, steps, case.query.shape[-1] ** -0.5, False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gradients(plan, config, dtype, arrays, segment_ids):
    """The kernels on a case's arrays, in the order of `FIELDS`."""
    query, key, value, g, beta, initial_state, d_out, d_final = arrays
    place = order.dense_order(plan, segment_ids)
    rows = lambda x: order.to_rows(plan, place, x)
    tables = order.tables(plan, place, g, beta)
    heads, group = key.shape[2], value.shape[2] // key.shape[2]
    chunks = lambda x: x.reshape(*x.shape[:2], plan.steps, plan.chunk)
    by_group = lambda x: jnp.moveaxis(chunks(x), 2, 1).reshape(-1, heads, group, plan.chunk)
    segment = tables.segment
    decay = algebra.gates(
        by_group(order.to_rows(plan, place, g).swapaxes(1, 2)),
        None if segment is None else segment.reshape(-1, plan.chunk),
    )
    wide = rows(key).reshape(-1, plan.chunk, heads, key.shape[-1]).swapaxes(1, 2)
    inverse = algebra.chunk_inverse(wide, by_group(tables.beta), decay)
    inverse = inverse.reshape(plan.batch, plan.steps, heads * group, plan.chunk, plan.chunk)
    narrow = lambda x: rows(x).astype(dtype)
    found = mosaic_gpu_bwd.backward(
        narrow(query), narrow(key), narrow(value), config=config, scale=plan.scale, tables=tables,
        inverse=inverse.swapaxes(1, 2).astype(dtype), start_state=initial_state, d_out=narrow(d_out),
        d_final=d_final,
    )  # fmt: skip
    back = lambda x: order.from_rows(plan, place, x)
    return (
        back(found.query), back(found.key), back(found.value), back(found.g.swapaxes(1, 2)),
        back(found.beta.swapaxes(1, 2)), found.state,
    )  # fmt: skip


def run(case, dtype=jnp.bfloat16, config=None):
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (*case.operands, case.d_out, case.d_final))
    ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
    with interpreted():
        return jax.block_until_ready(
            gradients(plan_of(case), config or mosaic_gpu_bwd.Config(), dtype, arrays, ids)
        )


def check(case, dtype=jnp.bfloat16, config=None):
    case = rounded(case, dtype)
    found = run(case, dtype, config)
    _, _, truth = delta_cases.recurrence(case)
    limits = compare.DELTA_RULE_TOLERANCES[jnp.dtype(dtype).name]
    errors = {
        name: compare.relative_error(actual, truth[name])
        for name, actual in zip(FIELDS, found, strict=True)
    }
    print(errors)
    wrong = {n: e for n, e in errors.items() if not e <= limits.get(n, limits["gradient"])}
    assert not wrong, wrong


@pytest.mark.parametrize(
    "dim, dtype, heads", [(128, jnp.bfloat16, (1, 2)), (64, jnp.float16, (2, 2))]
)
def test_three_chunks(dim, dtype, heads):
    check(delta_cases.random_case(dim, 1, 192, *heads, dim, dim), dtype)
