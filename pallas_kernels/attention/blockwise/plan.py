"""Which tiles are needed: known from minima and maxima of positions and segments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import algebra, tuning
from pallas_kernels.attention.blockwise.layout import Problem


class Plan(NamedTuple):
    """Which key blocks each block of queries needs: from `first` up to, not including, `last`."""

    first: jax.Array | int  # [batch blocks|1, query blocks]
    last: jax.Array | int
    full: (
        jax.Array | bool
    )  # [.., key blocks]: every key of the block is visible to every query of the block


def make_plan(problem: Problem, options: algebra.Options, size: tuning.Blocks) -> Plan:
    num_keys = problem.key.shape[2] // size.keys
    by_position = algebra.hides_by_position(options)
    if not by_position and problem.queries.segment is None:
        hidden = problem.mask is not None or problem.key_exists is not None
        return Plan(0, num_keys, not hidden)

    def extremes(array, length, padding=None):
        """Minimum and maximum of each block, `[batch blocks|1, blocks]`."""
        rows = 1 if array.shape[0] == 1 else size.batch
        cut = lambda array: array.reshape(array.shape[0] // rows, rows, -1, length)
        low = array if padding is None else jnp.where(array < 0, padding, array)
        return cut(low).min((1, 3)), cut(array).max((1, 3))

    needed, full = jnp.ones((1, 1, 1), bool), jnp.ones((1, 1, 1), bool)
    if by_position:
        q_low, q_high = (a[:, :, None] for a in extremes(problem.queries.position, size.queries))
        k_low, k_high = (a[:, None] for a in extremes(problem.keys.position, size.keys))
        needed, full = needed & (q_high >= k_low), full & (q_low >= k_high)
        if options.sliding_window is not None:
            needed = needed & (q_low - k_high < options.sliding_window)
            full = full & (q_high - k_low < options.sliding_window)
    if problem.queries.segment is not None:
        beyond = jnp.iinfo(jnp.int32).max
        q_low, q_high = (
            a[:, :, None] for a in extremes(problem.queries.segment, size.queries, beyond)
        )
        k_low, k_high = (a[:, None] for a in extremes(problem.keys.segment, size.keys, beyond))
        needed = needed & (q_high >= 0) & (k_high >= 0) & (q_high >= k_low) & (k_high >= q_low)
        q_least, _ = extremes(problem.queries.segment, size.queries)
        k_least, _ = extremes(problem.keys.segment, size.keys)
        one = (q_least[:, :, None] == q_high) & (k_least[:, None] == k_high) & (q_high == k_high)
        full = full & one & (q_high >= 0)
    shape = (max(needed.shape[0], full.shape[0]), problem.query.shape[3] // size.queries, num_keys)
    needed, full = jnp.broadcast_to(needed, shape), jnp.broadcast_to(full, shape)
    first = jnp.argmax(needed, axis=-1).astype(jnp.int32)
    last = num_keys - jnp.argmax(needed[..., ::-1], axis=-1).astype(jnp.int32)
    last = jnp.where(needed.any(-1), last, first)
    if problem.mask is not None or num_keys == 1:
        return Plan(first, last, False)
    if problem.key_exists is not None:
        full = full & (jnp.arange(num_keys) < num_keys - 1)[None, None]
    return Plan(first, last, full)


def own_row(array: jax.Array, b) -> jax.Array:
    return array[0] if array.shape[0] == 1 else array[b]


def key_blocks(plan: Plan, b, i):
    if isinstance(plan.first, int) or isinstance(plan.last, int):
        return plan.first, plan.last
    return own_row(plan.first, b)[i], own_row(plan.last, b)[i]
