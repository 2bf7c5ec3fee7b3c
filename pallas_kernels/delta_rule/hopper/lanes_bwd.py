"""The Hopper backward kernels over a whole call: rows of chunks, units, then segments, then gradients.

As in `lanes`, the kernels read what the caller gave and make it float16 where they hold it. Before them XLA
only finds powers of two per key head, above all cotangents and, where they are not normalised, above all queries.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.hopper import bwd, tuning
from pallas_kernels.delta_rule.hopper.chunk import own_unit, power_of_two
from pallas_kernels.delta_rule.hopper.lanes import Kept, operand
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


def arranged(plan: Plan, order: Order, tokens: Tokens) -> Tokens:
    """What the kernels' gradients are of. Linear: JAX arranges the gradients as the tokens were."""
    query, key, value = (operand(plan, order, x) for x in tokens[:3])
    single = lambda x: orders.real_rows(plan, order, x).astype(jnp.float32)
    return Tokens(query, key, value, single(tokens.g), single(tokens.beta))


def sizes(x: jax.Array):
    """The largest number of every row and head, float32 `[z, heads]`."""
    return jnp.max(jnp.abs(x), axis=(1, 3)).astype(jnp.float32)


def unit_of(order: Order, read, state: jax.Array):
    """A power of two above `read` `[z, Hv]` and all states of the row."""
    states = jnp.max(jnp.abs(state), axis=(2, 3))
    if order.sequence is not None:
        states = jnp.max(states, axis=0, keepdims=True)
    return power_of_two(jnp.maximum(read, states))


def shared(unit: jax.Array, group: int):
    """The largest of a key head for all its value heads: the kernels add up their gradients of its query and key."""
    largest = jnp.max(unit.reshape(unit.shape[0], -1, group), axis=2)
    return jnp.repeat(largest, group, axis=1)


def backward(
    plan: Plan,
    order: Order,
    tokens: Tokens,
    initial_state,
    kept: Kept,
    d_out: jax.Array,
    d_final: jax.Array,
) -> tuple[Tokens, jax.Array]:
    """Cotangents of the tokens, each in its dtype, and of the initial state."""
    given, pull = jax.vjp(lambda tokens: arranged(plan, order, tokens), tokens)
    d_out = operand(plan, order, d_out)
    heads, group = tokens.key.shape[2], tokens.value.shape[2] // tokens.key.shape[2]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    grouped = lambda x: x.reshape(x.shape[0], heads, group, *x.shape[2:])
    wide_key, wide_value = given.key.shape[3], given.value.shape[3]
    fill = lambda x: _mosaic_gpu.pad_axis(_mosaic_gpu.pad_axis(x, 2, wide_key), 3, wide_value)
    packed = order.sequence is not None
    start = fill(initial_state if packed else flat(kept.start))
    end = fill(d_final)

    held = jnp.max(kept.unit, axis=0, keepdims=True) if packed else kept.unit
    asked, read = None, sizes(d_out)
    if not plan.use_qk_l2norm:
        asked = jnp.repeat(own_unit(sizes(given.query)), group, axis=1)
        read = read * asked
    options: dict[str, Any] = {
        "config": tuning.backward_config(heads=start.shape[0] * start.shape[1]),
        "scale": plan.scale,
        "tables": kept.tables,
        "segments": order.segment is not None,
        "use_qk_l2norm": plan.use_qk_l2norm,
        "inverse": kept.inverse,
        "asked": asked,
    }
    spans = None
    if packed:
        found = orders.spans(order, initial_state.shape[0])
        spans = jnp.concatenate([jnp.zeros_like(found[:, :1]), found], axis=1)
    elif kept.transition is not None:
        extra = bwd.retreat(
            given.query,
            given.key,
            d_out,
            d_final=jnp.zeros_like(start),
            pulled=shared(power_of_two(read), group),
            **options,
        )
        back = jnp.swapaxes(grouped(fill_square(flat(kept.transition), wide_key)), -1, -2)
        end = flat(orders.through_lanes(plan, grouped(end), back, grouped(extra), reverse=True))
    found = bwd.backward(
        given.query,
        given.key,
        given.value,
        start_state=start,
        d_out=d_out,
        d_final=end,
        held=shared(held, group),
        pulled=shared(unit_of(order, read, end), group),
        spans=spans,
        **options,
    )
    by_head = lambda x: jnp.swapaxes(x, 1, 2)
    (d_tokens,) = pull(
        Tokens(found.query, found.key, found.value, by_head(found.g), by_head(found.beta))
    )
    d_start = found.state
    if not packed:
        d_start = d_start.reshape(plan.batch, plan.lanes, *d_start.shape[1:])[:, 0]
    return d_tokens, d_start[..., : initial_state.shape[2], : initial_state.shape[3]]


def fill_square(x: jax.Array, width: int):
    """`[z, Hv, Dk, Dk]` filled up with zeros."""
    return _mosaic_gpu.pad_axis(_mosaic_gpu.pad_axis(x, 2, width), 3, width)
