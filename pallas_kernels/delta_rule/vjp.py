"""What the backward of the gated delta rule keeps: the inputs, T of every chunk, and the state at lane starts."""

import functools

import jax

from pallas_kernels.delta_rule import channelwise, chunked
from pallas_kernels.delta_rule import order as orders


@functools.partial(
    jax.jit, static_argnums=0, inline=True
)  # outside `jit`, one program, not hundreds
def gated_delta_rule(
    plan: orders.Plan, tokens: orders.Tokens, initial_state, *, segment_ids, cu_seqlens
) -> tuple[jax.Array, jax.Array]:
    """`(out, final_state)` in chunks. Differentiable in reverse to any order; forward mode needs the reference."""
    order = (
        orders.dense_order(plan, segment_ids)
        if cu_seqlens is None
        else orders.packed_order(plan, cu_seqlens)
    )
    return _chunked(plan, order, tokens, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, order, tokens, initial_state):
    if plan.per_channel:
        return channelwise.forward(plan, order, tokens, initial_state)
    return chunked.forward(plan, order, tokens, initial_state, keep=False)[:2]


def _forward(plan, order, tokens, initial_state):
    if plan.per_channel:
        out, final = channelwise.forward(plan, order, tokens, initial_state)
        return (out, final), (order, tokens, initial_state, None)
    out, final, saved = chunked.forward(plan, order, tokens, initial_state, keep=True)
    return (out, final), (order, tokens, initial_state, saved)


def _backward(plan, residuals, cotangents):
    order, tokens, initial_state, saved = residuals
    d_out, d_final = cotangents
    if plan.per_channel:
        return None, *channelwise.backward(plan, order, tokens, initial_state, d_out, d_final)
    return None, *chunked.backward(plan, order, tokens, initial_state, saved, d_out, d_final)


_chunked.defvjp(_forward, _backward)
