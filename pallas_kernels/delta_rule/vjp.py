"""What the backward of the gated delta rule keeps: the inputs, T of every chunk, and the state at lane starts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import channelwise, chunked
from pallas_kernels.delta_rule import order as orders


def _order(
    plan: orders.Plan, segment_ids: jax.Array | None, cu_seqlens: jax.Array | None
) -> orders.Order:
    if cu_seqlens is None:
        return orders.dense_order(plan, segment_ids)
    return orders.packed_order(plan, cu_seqlens)


@functools.partial(
    jax.jit, static_argnums=0, inline=True
)  # outside `jit`, one program, not hundreds
def gated_delta_rule(
    plan: orders.Plan,
    tokens: orders.Tokens,
    initial_state: jax.Array,
    *,
    segment_ids: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`(out, final_state)` in chunks. Differentiable in reverse to any order; forward mode needs the reference."""
    return _chunked(plan, _order(plan, segment_ids, cu_seqlens), tokens, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    plan: orders.Plan, order: orders.Order, tokens: orders.Tokens, initial_state: jax.Array
):
    if plan.per_channel:
        return channelwise.forward(plan, order, tokens, initial_state)
    return chunked.forward(plan, order, tokens, initial_state, keep=False)[:2]


def _forward(
    plan: orders.Plan, order: orders.Order, tokens: orders.Tokens, initial_state: jax.Array
):
    if plan.per_channel:
        out, final = channelwise.forward(plan, order, tokens, initial_state)
        return (out, final), (order, tokens, initial_state, None)
    out, final, saved = chunked.forward(plan, order, tokens, initial_state, keep=True)
    return (out, final), (order, tokens, initial_state, saved)


def _backward(plan: orders.Plan, residuals: tuple, cotangents: tuple):
    order, tokens, initial_state, saved = residuals
    if plan.per_channel:
        made = channelwise.backward(plan, order, tokens, initial_state, *cotangents)
    else:
        made = chunked.backward(plan, order, tokens, initial_state, saved, *cotangents)
    d_tokens, d_initial = made
    return None, d_tokens, jnp.where(jnp.isfinite(initial_state), d_initial, 0)


_chunked.defvjp(_forward, _backward)


# --- Mosaic GPU ------------------------------------------------------------------------------------------------------
# The kernels' files are imported where they are called: a machine without them never reads them.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def mosaic_gpu(
    plan: orders.Plan,
    tokens: orders.Tokens,
    initial_state: jax.Array,
    *,
    segment_ids: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `gated_delta_rule`, forward and backward by the Hopper kernels; a second derivative recomputes in XLA."""
    order = _order(plan, segment_ids, cu_seqlens)
    result: Any = _kernels(plan, order, tokens, initial_state)
    return result[:2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(
    plan: orders.Plan, order: orders.Order, tokens: orders.Tokens, initial_state: jax.Array
):
    from pallas_kernels.delta_rule.hopper import lanes

    return lanes.forward(plan, order, tokens, initial_state)


def _kernels_forward(
    plan: orders.Plan, order: orders.Order, tokens: orders.Tokens, initial_state: jax.Array
):
    # The wrapped function itself, not its body: a second derivative comes back to `_kernels_backward`.
    result: Any = _kernels(plan, order, tokens, initial_state)
    return result, (order, tokens, initial_state, result[2])


def _kernels_backward(plan: orders.Plan, residuals: tuple, cotangents: tuple):
    gradients: Any = _gradient(plan, *residuals, cotangents[:2])
    return None, *gradients


_kernels.defvjp(_kernels_forward, _kernels_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(
    plan: orders.Plan,
    order: orders.Order,
    tokens: orders.Tokens,
    initial_state: jax.Array,
    kept,
    cotangents: tuple,
):
    from pallas_kernels.delta_rule.hopper import lanes_bwd

    return lanes_bwd.backward(plan, order, tokens, initial_state, kept, *cotangents)


def _gradient_forward(
    plan: orders.Plan,
    order: orders.Order,
    tokens: orders.Tokens,
    initial_state: jax.Array,
    kept,
    cotangents: tuple,
):
    out = _gradient(plan, order, tokens, initial_state, kept, cotangents)
    return out, (order, tokens, initial_state, kept, cotangents)


def _gradient_backward(plan: orders.Plan, residuals: tuple, cotangents_of_gradient: tuple):
    order, tokens, initial_state, _, cotangents = residuals

    def plain(tokens, initial_state, cotangents):
        _, pull = jax.vjp(lambda *given: _chunked(plan, order, *given), tokens, initial_state)
        return pull(cotangents)

    _, pull = jax.vjp(plain, tokens, initial_state, cotangents)
    d_tokens, d_initial, d_cotangents = pull(cotangents_of_gradient)
    # `kept` is a function of the inputs, whose cotangents here are already the total ones.
    return None, d_tokens, d_initial, None, d_cotangents


_gradient.defvjp(_gradient_forward, _gradient_backward)
