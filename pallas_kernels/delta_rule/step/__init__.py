"""Decode steps: the recurrence in XLA, and the kernels with that recurrence as their derivative."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._precision import compute_dtype
from pallas_kernels.delta_rule import reference
from pallas_kernels.delta_rule.step import tuning


class Tokens(NamedTuple):
    """T <= 8 tokens of every row, as the operator takes them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    g: jax.Array
    beta: jax.Array


class Options(NamedTuple):
    """Everything static about a step."""

    scale: float
    use_qk_l2norm: bool
    return_states: bool


def state_dtype(state: jax.Array, value: jax.Array) -> Any:
    """What a state is returned in: 16-bit ones keep their dtype, others are float32 (float64 beside float64 values)."""
    is_narrow = jnp.dtype(state.dtype).itemsize == 2
    return state.dtype if is_narrow else compute_dtype(value.dtype)


def run(
    implementation: str, options: Options, tokens: Tokens, state: jax.Array, slots: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`(out, state after, states or None)` by a kernel; the state's dtype is kept."""
    return _program(implementation, options, tokens, state, slots)


def recurrence(options: Options, tokens: Tokens, state, slots: jax.Array | None):
    """`(out, state after, states or None)` in XLA; the state's dtype is kept."""
    compute = compute_dtype(tokens.value.dtype)
    rows, segment_ids = state, None
    if slots is not None:
        slots = in_pool(slots, state.shape[0])
        rows = state[jnp.maximum(slots, 0)]
        segment_ids = jnp.broadcast_to(jnp.where(slots < 0, -1, 0)[:, None], tokens.value.shape[:2])
    out, rows, states = reference.recurrent(
        *tokens,
        initial_state=rows.astype(compute),
        segment_ids=segment_ids,
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        keep_states=options.return_states,
        unroll=tokens.value.shape[1],
    )
    rows = rows.astype(state.dtype)
    if states is not None:
        states = states.astype(state.dtype)
    if slots is not None:
        if states is not None:
            states = jnp.where((slots < 0)[:, None, None, None, None], 0, states)
        rows = into_pool(state, rows, slots)
    return out, rows, states


def in_pool(slots, num_slots: int):
    """`slots` with -1 wherever they name no place in the pool."""
    return jnp.where((slots >= 0) & (slots < num_slots), slots, -1)


def into_pool(pool, rows, slots):
    """`pool` with each row in its slot; rows with slot -1 go nowhere."""
    return pool.at[jnp.where(slots < 0, pool.shape[0], slots)].set(rows, mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(
    implementation: str, options: Options, tokens: Tokens, state: jax.Array, slots: jax.Array | None
):
    launch = functools.partial(_launch, implementation, options)
    return by_rows(launch)(tokens, state, slots, ())


def _forward(
    implementation: str, options: Options, tokens: Tokens, state: jax.Array, slots: jax.Array | None
):
    return _kernel(implementation, options, tokens, state, slots), (tokens, state, slots)


def _backward(implementation: str, options: Options, residuals: tuple, cotangents: tuple):
    """By recomputation: a step is a handful of tokens."""
    tokens, state, slots = residuals
    _, pull = jax.vjp(lambda *x: recurrence(options, x[0], x[1], slots), tokens, state)
    return *pull(cotangents), None


_kernel.defvjp(_forward, _backward)
# Outside `jit`, one program for the operator, not one per operation.
_program = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)(_kernel)


def by_rows(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch(tokens, pools, slots, weights)`, whose `vmap` is more rows (and larger pools) of the same kernel.

    `tokens` and `pools` are trees with a leading axis of rows (or of slots), `weights` are the same for all rows; where
    `vmap` gives each call weights of its own, the calls follow each other.
    """
    call: Any = jax.custom_batching.custom_vmap(launch)

    @call.def_vmap
    def _(size, batched, *arrays):
        spread = lambda x, is_batched: (
            x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
        )
        if any(jax.tree.leaves(batched[3])):
            results = jax.lax.map(lambda x: call(*x), jax.tree.map(spread, arrays, tuple(batched)))
            return results, jax.tree.map(lambda _: True, results)
        weights = arrays[3]
        tokens, pools, slots = jax.tree.map(spread, arrays[:3], tuple(batched[:3]))
        pool = jax.tree.leaves(pools)[0].shape[1]
        if slots is not None:
            first = jnp.arange(size, dtype=slots.dtype)[:, None] * pool
            slots = in_pool(slots, pool)
            slots = jnp.where(slots < 0, -1, slots + first)
        merge = lambda x: x.reshape(-1, *x.shape[2:])
        results = call(*jax.tree.map(merge, (tokens, pools, slots)), weights)
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _launch(
    implementation: str,
    options: Options,
    tokens: Tokens,
    state: jax.Array,
    slots: jax.Array | None,
    _,
):
    # A kernel's file is imported where it is called: a machine without it never reads it.
    if implementation == "triton":
        from pallas_kernels.delta_rule.step.triton import launch, loaded
    else:
        from pallas_kernels.delta_rule.step.mosaic_gpu import Loaded as loaded
        from pallas_kernels.delta_rule.step.mosaic_gpu import launch
    gates = (tokens.g.astype(jnp.float32), tokens.beta.astype(jnp.float32))
    return launch(
        tuning.shapes(implementation, tokens.query.shape[:3], state, options),
        loaded,  # pyright: ignore[reportArgumentType]
        (*tokens[:3], *gates),
        state,
        None if slots is None else slots.astype(jnp.int32),
        out_dtype=tokens.value.dtype,
        name="gated_delta_rule_step",
    )
