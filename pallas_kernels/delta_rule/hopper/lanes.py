"""The Hopper forward kernels over a whole call: half-precision operands, T, maps of segments, then the chain.

The kernels make queries and keys float16 whatever they were: they have length about 1, where float16 is eight times
finer than bfloat16; a query that is not normalised is first divided by a power of two. Head dims are filled up with
zeros to 64 or 128.

A row cut into P segments ("lanes") is walked twice: the first time without outputs, from zero and from the identity
(with values of zero), which yields each segment's affine map `S -> M S + E` of its start state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.hopper import fwd, prologue, tuning
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


class Kept(NamedTuple):
    """What the backward reads besides the inputs.

    Attributes:
      inverse: `[z, Hv, N, 64, 64]` float16.
      tables: `[z, Hv, N, 5 or 6, 64]` float32, the gates (`order.HIGH` and so on).
      unit: `[z, Hv]`, or of each packed sequence: a power of two above all values and the start state.
      start: `[z, h, n, Dk, Dv]`, the state at the start of every lane.
      transition: `[z, h, n, Dk, Dk]`, each lane's M; None with one lane.
    """

    inverse: jax.Array
    tables: jax.Array
    unit: jax.Array
    start: jax.Array
    transition: jax.Array | None


def operand(plan: Plan, order: Order, x: jax.Array):
    """`[B, T, heads, dim]` in rows of chunks, zero on padding and in the channels that fill up a tile."""
    x = orders.real_rows(plan, order, x)
    return _mosaic_gpu.pad_axis(x, 3, tuning.padded_dim(x.shape[3]))


def forward(
    plan: Plan, order: Order, tokens: Tokens, initial_state
) -> tuple[jax.Array, jax.Array, Kept]:
    """`(out [B, T, Hv, Dv], final_state, Kept)` of the whole call."""
    query, key, value = (operand(plan, order, x) for x in tokens[:3])
    gates = orders.gates(plan, order, tokens.g, tokens.beta)
    inverse, tables = prologue.prologue(key, gates, use_qk_l2norm=plan.use_qk_l2norm)
    key_dim, value_dim = initial_state.shape[2:]
    wide_key, wide_value = key.shape[3], value.shape[3]
    widen = lambda x: _mosaic_gpu.pad_axis(_mosaic_gpu.pad_axis(x, 2, wide_key), 3, wide_value)
    narrow = lambda x: x[..., :key_dim, :value_dim]
    heads = (tokens.key.shape[2], -1)
    grouped = lambda x: x.reshape(x.shape[0], *heads, *x.shape[2:])

    start, spans, transition = widen(initial_state), None, None
    if order.sequence is not None:
        found = orders.spans(order, initial_state.shape[0])
        spans = jnp.concatenate([jnp.zeros_like(found[:, :1]), found], axis=1)
        kept_start = jnp.zeros_like(
            grouped(initial_state), shape=(1, *grouped(initial_state).shape[1:])
        )
    elif plan.lanes > 1:
        transition, extra = _maps(plan, key, value, tables, inverse)
        start = orders.through_lanes(plan, grouped(start), grouped(transition), grouped(extra))
        start = start.reshape(extra.shape)
        transition = grouped(transition[..., :key_dim, :key_dim])
        kept_start = grouped(narrow(start))
    else:
        kept_start = grouped(initial_state)
    config = tuning.forward_config(
        width=wide_value, heads=start.shape[0] * start.shape[1], key_width=wide_key
    )
    out, final, unit = fwd.forward(
        query,
        key,
        value,
        tables,
        inverse,
        start,
        config=config,
        scale=plan.scale,
        segments=order.segment is not None,
        use_qk_l2norm=plan.use_qk_l2norm,
        spans=spans,
    )
    if plan.lanes > 1:
        final = final.reshape(plan.batch, plan.lanes, *final.shape[1:])[:, -1]
    out = orders.from_rows(plan, order, out)[..., :value_dim]
    return out, narrow(final), Kept(inverse, tables, unit, kept_start, transition)


def _maps(
    plan: Plan, key: jax.Array, value: jax.Array, tables: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """M `[z, Hv, Dk, Dk]` and E `[z, Hv, Dk, Dv]` of every lane."""
    rows, heads = inverse.shape[:2]
    key_dim, value_dim = key.shape[3], value.shape[3]
    run = lambda written, start: fwd.final_state(
        key,
        written,
        tables,
        inverse,
        start,
        config=tuning.forward_config(width=start.shape[3], heads=rows * heads, key_width=key_dim),
        use_qk_l2norm=plan.use_qk_l2norm,
    )
    identity = jnp.eye(key_dim, dtype=jnp.float32)[None, None]
    transition = run(None, jnp.broadcast_to(identity, (rows, heads, key_dim, key_dim)))
    extra = run(value, jnp.zeros_like(transition, shape=(rows, heads, key_dim, value_dim)))
    return transition, extra
