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
from pallas_kernels.delta_rule import (
    mosaic_gpu_fwd,
    mosaic_gpu_prologue,
    mosaic_gpu_tuning,
)
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


class Kept(NamedTuple):
    """What the backward reads besides the inputs.

    Attributes:
      inverse: `[z, Hv, N, 64, 64]` float16.
      tables: `order.stacked`.
      unit: `[z, Hv]`, or of each packed sequence: a power of two above all values and the start state.
      start: `[z, h, n, Dk, Dv]`, the state at the start of every lane.
      transition: `[z, h, n, Dk, Dk]`, each lane's M; None with one lane.
    """

    inverse: jax.Array
    tables: jax.Array
    unit: jax.Array
    start: jax.Array
    transition: jax.Array | None


class Operands(NamedTuple):
    """What the kernels read: see `mosaic_gpu_fwd.forward`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    tables: jax.Array


def operands(plan: Plan, order: Order, tokens: Tokens) -> Operands:
    """Rows of chunks with zeros on padding, and the tables of their gates."""
    rows = plan.batch * plan.lanes
    real = None
    if order.real is not None:
        real = jnp.moveaxis(order.real, 0, 1).reshape(rows, -1)[..., None, None]

    def clean(x):
        x = orders.to_rows(plan, order, x)
        x = x if real is None else jnp.where(real, x, jnp.zeros_like(x))
        return _mosaic_gpu.pad_axis(x, 3, mosaic_gpu_tuning.padded_dim(x.shape[3]))

    query, key, value = (clean(x) for x in (tokens.query, tokens.key, tokens.value))
    tables = orders.stacked(orders.tables(plan, order, tokens.g, tokens.beta))
    return Operands(query, key, value, tables)


def forward(
    plan: Plan, order: Order, tokens: Tokens, initial_state
) -> tuple[jax.Array, jax.Array, Kept]:
    """`(out [B, T, Hv, Dv], final_state, Kept)` of the whole call."""
    call = operands(plan, order, tokens)
    segments = order.segment is not None
    inverse = mosaic_gpu_prologue.inverse(
        call.key, call.tables, segments=segments, use_qk_l2norm=plan.use_qk_l2norm
    )
    key_dim, value_dim = initial_state.shape[2:]
    wide_key, wide_value = call.key.shape[3], call.value.shape[3]
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
        transition, extra = _maps(plan, call, inverse)
        start = orders.through_lanes(plan, grouped(start), grouped(transition), grouped(extra))
        start = start.reshape(extra.shape)
        transition = grouped(transition[..., :key_dim, :key_dim])
        kept_start = grouped(narrow(start))
    else:
        kept_start = grouped(initial_state)
    config = mosaic_gpu_tuning.forward_config(
        width=wide_value, heads=start.shape[0] * start.shape[1]
    )
    out, final, unit = mosaic_gpu_fwd.forward(
        *call, inverse, start, config=config, scale=plan.scale, segments=segments,
        use_qk_l2norm=plan.use_qk_l2norm, spans=spans,
    )  # fmt: skip
    if plan.lanes > 1:
        final = final.reshape(plan.batch, plan.lanes, *final.shape[1:])[:, -1]
    out = orders.from_rows(plan, order, out)[..., :value_dim]
    return out, narrow(final), Kept(inverse, call.tables, unit, kept_start, transition)


def _maps(plan: Plan, call: Operands, inverse) -> tuple[jax.Array, jax.Array]:
    """M `[z, Hv, Dk, Dk]` and E `[z, Hv, Dk, Dv]` of every lane."""
    rows, heads = inverse.shape[:2]
    key_dim, value_dim = call.key.shape[3], call.value.shape[3]
    run = lambda value, start: mosaic_gpu_fwd.final_state(
        call.key, value, call.tables, inverse, start,
        config=mosaic_gpu_tuning.forward_config(width=start.shape[3], heads=rows * heads),
        use_qk_l2norm=plan.use_qk_l2norm,
    )  # fmt: skip
    identity = jnp.eye(key_dim, dtype=jnp.float32)[None, None]
    transition = run(None, jnp.broadcast_to(identity, (rows, heads, key_dim, key_dim)))
    extra = run(call.value, jnp.zeros_like(transition, shape=(rows, heads, key_dim, value_dim)))
    return transition, extra
