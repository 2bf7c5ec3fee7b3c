"""The Hopper backward kernels over a whole call: half-precision operands and cotangents, then segments, then gradients.

As in `mosaic_gpu_lanes`, queries and keys become float16. So do values, states and cotangents, each divided by a power
of two per key head: the backward is linear in what values and states hold and in the cotangents, so the gradients are
multiplied by both. A query is divided by a power of two, by which the cotangent of its output is multiplied.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import algebra, mosaic_gpu_bwd, mosaic_gpu_tuning
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.mosaic_gpu_chunk import own_unit, power_of_two
from pallas_kernels.delta_rule.mosaic_gpu_lanes import Kept
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


def clean(plan: Plan, order: Order, x):
    """`[B, T, heads, ...]` as float32 rows of chunks, zero on padding."""
    x = orders.to_rows(plan, order, x)
    if order.real is None:
        return x.astype(jnp.float32)
    real = jnp.moveaxis(order.real, 0, 1).reshape(x.shape[0], -1)
    real = real.reshape(real.shape + (1,) * (x.ndim - 2))
    return jnp.where(real, x, jnp.zeros_like(x)).astype(jnp.float32)


def widen(x):
    """Channels filled up to the width of a tile."""
    return _mosaic_gpu.pad_axis(x, x.ndim - 1, mosaic_gpu_tuning.padded_dim(x.shape[-1]))


def prepared(plan: Plan, order: Order, tokens: Tokens) -> Tokens:
    """What the kernels' gradients are of; differentiated by JAX."""
    query, key, value, g, beta = (clean(plan, order, x) for x in tokens)
    if plan.use_qk_l2norm:
        query, key = algebra.l2_normalize(query), algebra.l2_normalize(key)
    return Tokens(widen(query), widen(key), widen(value), g, beta)


def unit_of(plan: Plan, tokens, state, group: int):
    """A power of two per row and head, `[z, Hv]`, that nothing of its tokens and states exceeds.

    The value heads of a key head share it, since the kernels add up their gradients of its query and key.
    """
    sizes = jnp.max(jnp.abs(tokens), axis=(1, 3)).reshape(plan.batch, plan.lanes, -1, group)
    states = jnp.max(jnp.abs(state), axis=(2, 3)).reshape(plan.batch, -1, sizes.shape[2], group)
    largest = jnp.maximum(jnp.max(sizes, axis=(1, 3)), jnp.max(states, axis=(1, 3)))
    return jnp.repeat(jnp.repeat(power_of_two(largest), group, axis=1), plan.lanes, axis=0)


def backward(
    plan: Plan, order: Order, tokens: Tokens, initial_state, kept: Kept, d_out, d_final
) -> tuple[Tokens, jax.Array]:
    """Cotangents of the tokens, each in its dtype, and of the initial state."""
    given, pull = jax.vjp(lambda tokens: prepared(plan, order, tokens), tokens)
    tables = orders.tables(plan, order, tokens.g, tokens.beta)
    heads, group = tokens.key.shape[2], tokens.value.shape[2] // tokens.key.shape[2]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    grouped = lambda x: x.reshape(x.shape[0], heads, group, *x.shape[2:])
    wide_key, wide_value = given.key.shape[3], given.value.shape[3]
    fill = lambda x: _mosaic_gpu.pad_axis(_mosaic_gpu.pad_axis(x, 2, wide_key), 3, wide_value)
    packed = order.sequence is not None
    start = fill(initial_state if packed else flat(kept.start))
    end = fill(d_final)

    length = own_unit(jnp.max(jnp.abs(given.query), axis=-1))[..., None]
    read = widen(clean(plan, order, d_out)) * jnp.repeat(length, group, axis=2)
    held = unit_of(plan, given.value, start, group)
    pulled = unit_of(plan, read, end, group)
    by_token, by_state = (lambda x: x[:, None, :, None]), (lambda x: x[:, :, None, None])
    half = lambda x: x.astype(jnp.float16)
    query, key = half(given.query / length), half(given.key)
    read = half(read / by_token(pulled))
    options: dict[str, Any] = {
        "config": mosaic_gpu_tuning.backward_config(heads=start.shape[0] * start.shape[1]),
        "scale": plan.scale, "tables": tables, "inverse": kept.inverse,
    }  # fmt: skip
    spans = None
    if packed:
        found = orders.spans(order, initial_state.shape[0])
        spans = jnp.concatenate([jnp.zeros_like(found[:, :1]), found], axis=1)
    elif kept.transition is not None:
        extra = mosaic_gpu_bwd.retreat(query, key, read, d_final=jnp.zeros_like(start), **options)
        extra = grouped(extra * by_state(pulled))
        back = jnp.swapaxes(grouped(fill_square(flat(kept.transition), wide_key)), -1, -2)
        end = flat(orders.through_lanes(plan, grouped(end), back, extra, reverse=True))
    found = mosaic_gpu_bwd.backward(
        query, key, half(given.value / by_token(held)), start_state=start / by_state(held),
        d_out=read, d_final=end / by_state(pulled), spans=spans, **options,
    )  # fmt: skip

    both = held * pulled
    of_key = by_token(both[:, ::group])
    single = lambda x: x.astype(jnp.float32)
    per_head = lambda x: jnp.swapaxes(x * both[..., None], 1, 2)
    (d_tokens,) = pull(
        Tokens(
            single(found.query) * of_key / length, single(found.key) * of_key,
            single(found.value) * by_token(pulled), per_head(found.g), per_head(found.beta),
        )
    )  # fmt: skip
    d_start = found.state * by_state(pulled)
    if not packed:
        d_start = d_start.reshape(plan.batch, plan.lanes, *d_start.shape[1:])[:, 0]
    return d_tokens, d_start[..., : initial_state.shape[2], : initial_state.shape[3]]


def fill_square(x, width: int):
    """`[z, Hv, Dk, Dk]` filled up with zeros."""
    return _mosaic_gpu.pad_axis(_mosaic_gpu.pad_axis(x, 2, width), 3, width)
