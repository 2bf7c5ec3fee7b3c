"""The gated delta rule in chunks, in XLA, with one decay per head.

A row of T tokens is cut into P segments ("lanes") of N chunks of C tokens. All lanes advance together. Chunks are taken
in blocks: what of a chunk does not depend on the state is computed for a whole block in large products, then the state
walks through the block, two products a chunk. With P > 1 a first pass finds each lane's affine map `S -> M S + E`, a
short scan over lanes gives every lane its start state, and the second pass computes outputs. Packed `cu_seqlens` rows
are gathered into chunks that no sequence shares.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


class Saved(NamedTuple):
    """What the backward keeps besides the inputs.

    Attributes:
      inverse: `[N, z, h, n, C, C]`, T of every chunk.
      start: `[z, h, n, Dk, Dv]`, the state at the start of every lane.
      transition: `[z, h, n, Dk, Dk]`, each lane's M; None with one lane.
    """

    inverse: jax.Array
    start: jax.Array
    transition: jax.Array | None


def forward(plan: Plan, order: Order, tokens: Tokens, initial_state: jax.Array, *, keep: bool):
    """Returns `(out, final_state, Saved or None)`."""
    chunks = orders.all_chunks(plan, order, tokens)
    states = orders.start_states(plan, order, tokens, initial_state)
    start, inverse, transition = states.entry, None, None
    if plan.lanes > 1:
        transition, extra, inverse = _lane_maps(plan, order, chunks, states)
        start = orders.through_lanes(plan, start, transition, extra)
    (state, finals), (out, inverse) = _walk(
        plan, order, chunks, inverse, states.bank, (start, states.bank), collect="out", keep=keep
    )
    final = orders.lane(plan, state, -1) if finals is None else finals
    saved = Saved(inverse, start, transition) if keep else None
    return orders.from_chunks(plan, order, out), final.reshape(initial_state.shape), saved


def backward(
    plan: Plan,
    order: Order,
    tokens: Tokens,
    initial_state: jax.Array,
    saved: Saved,
    d_out: jax.Array,
    d_final: jax.Array,
):
    """Returns `(Tokens of cotangents, cotangent of initial_state)`, each in its primal's dtype."""
    chunks = orders.all_chunks(plan, order, tokens)
    states = orders.start_states(plan, order, tokens, initial_state)
    d_final = d_final.reshape(states.shape)
    bank = None if states.bank is None else d_final
    _, (starts, _) = _walk(
        plan, order, chunks, saved.inverse, states.bank, (saved.start, None), collect="state"
    )
    xs = (chunks, orders.places(order), saved.inverse, orders.to_chunks(plan, order, d_out))
    end = d_final if bank is None else jnp.zeros_like(states.entry)
    if saved.transition is not None:
        block = functools.partial(_backward_block, plan, bank, gradients=False)
        nothing = (jnp.zeros_like(saved.start), None)
        (extra, _), _ = _over_blocks(plan, block, nothing, (*xs, starts), reverse=True)
        transposed = jnp.swapaxes(saved.transition, -1, -2)
        end = orders.through_lanes(plan, end, transposed, extra, reverse=True)

    block = functools.partial(_backward_block, plan, bank, gradients=True)
    # A sequence without tokens hands its cotangent through.
    (d_state, d_bank), d_raw = _over_blocks(plan, block, (end, bank), (*xs, starts), reverse=True)
    d_initial = orders.lane(plan, d_state, 0) if d_bank is None else d_bank
    d_tokens = Tokens(*(orders.from_chunks(plan, order, x) for x in d_raw))
    return d_tokens, d_initial.reshape(initial_state.shape)


def _walk(
    plan: Plan,
    order: Order,
    chunks,
    inverse,
    bank,
    carry,
    *,
    collect,
    keep: bool = False,
    widen=lambda value: value,
):
    """Carries `(state, finals)` through all chunks.

    Returns the carry after them, and by chunk what `collect` names ("out" `[N, z C, Hv, Dv]`, "state" at its start,
    or None) with T if it is to be kept.
    """

    def block(carry, xs):
        raw, places, inverse = xs

        def state_free(raw, place, inverse):
            q, k, v, g, beta = orders.load(plan, place, *raw)
            decay = algebra.gates(g, place.segment)
            query = q if collect == "out" else None
            terms = algebra.chunk_terms(query, k, beta, decay, plan.scale, inverse=inverse)
            # A block's C x C decays have served.
            return widen(v), beta, decay._replace(between=None), terms

        def step(carry, xs):
            state, finals = carry
            (value, beta, decay, terms), place = xs
            state = orders.enter(state, place, bank)
            after, out = algebra.advance(state, terms, value, beta, decay, plan.scale)
            finals = orders.put(finals, place.last, place, after)
            return (after, finals), {"out": out, "state": state, None: None}[collect]

        free = jax.vmap(state_free)(raw, places, inverse)
        carry, collected = jax.lax.scan(step, carry, (free, places))
        if collect == "out":
            collected = jax.vmap(orders.join_groups)(collected).astype(raw.value.dtype)
        return carry, (collected, free[-1].inverse if keep else None)

    return _over_blocks(plan, block, carry, (chunks, orders.places(order), inverse))


def _backward_block(plan: Plan, bank, carry, xs, *, gradients):
    """One block of the reverse walk: `(d_state, d_bank)` through its chunks, then the gradients of all of them."""
    raw, places, inverse, d_out, states = xs
    tokens, pull = jax.vjp(
        lambda *raw: jax.vmap(lambda place, *raw: orders.load(plan, place, *raw))(places, *raw),
        *raw,
    )
    heads, compute = raw.key.shape[2], tokens.value.dtype
    d_out = jax.vmap(lambda x: orders.load_output(plan, x, heads, compute))(d_out)

    def echo(tokens, place, inverse, d_out):
        decay = algebra.gates(tokens.g, place.segment)
        return decay, algebra.chunk_echo(
            d_out, tokens.query, tokens.key, decay, inverse, plan.scale
        )

    decays, echoes = jax.vmap(echo)(tokens, places, inverse, d_out)

    def step(carry, xs):
        d_state, d_bank = carry
        key, beta, decay, echo, place = xs
        d_state = orders.enter(d_state, place, bank, at="last")
        d_before, d_write = algebra.retreat(d_state, echo, key, beta, decay)
        d_bank = orders.put(d_bank, place.first, place, d_before)
        return (orders.cut(d_before, place), d_bank), (d_state, d_write)

    chain = (tokens.key, tokens.beta, decays._replace(between=None), echoes._replace(scores=None))
    carry, (d_states, d_writes) = jax.lax.scan(step, carry, (*chain, places), reverse=True)
    if not gradients:
        return carry, None

    def chunk(d_out, d_state, d_write, echo, state, tokens, decay, inverse):
        query, key, value, _, beta = tokens
        return algebra.chunk_gradients(
            d_out,
            d_state,
            d_write,
            echo,
            state,
            query,
            key,
            value,
            beta,
            decay,
            inverse,
            plan.scale,
        )

    grads = jax.vmap(chunk)(d_out, d_states, d_writes, echoes, states, tokens, decays, inverse)
    return carry, pull(Tokens(*grads))


def _lane_maps(plan: Plan, order: Order, chunks, states):
    """`(M, E, T)` of every lane: the chain run on the columns `[E | M]` from `[0 | I]`, where M sees no values."""
    *lead, key_dim, value_dim = states.shape[1:]
    lanes = plan.batch * plan.lanes
    identity = jnp.broadcast_to(
        jnp.eye(key_dim, dtype=states.entry.dtype)[None, None, None],
        (lanes, *lead, key_dim, key_dim),
    )
    nothing = jnp.zeros_like(states.entry, shape=(lanes, *lead, key_dim, value_dim))
    widen = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, key_dim)])
    bank = None if states.bank is None else widen(states.bank)
    start = jnp.concatenate([nothing, identity], -1)
    (state, _), (_, inverse) = _walk(
        plan, order, chunks, None, bank, (start, None), collect=None, keep=True, widen=widen
    )
    return state[..., value_dim:], state[..., :value_dim], inverse


def _over_blocks(plan: Plan, step, carry, tree, *, reverse: bool = False):
    """`scan` of `step(carry, block)` over the chunks in `tree`, `[N, a, ...]`; `step` sees `[block, a, ...]`.

    Around the loop block and a are one axis: for one of length 1 XLA would copy each operand to another layout.
    """
    flat = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    split = lambda x: x.reshape(plan.block, -1, *x.shape[1:])

    def body(carry, xs):
        carry, ys = step(carry, jax.tree.map(split, xs))
        return carry, jax.tree.map(flat, ys)

    in_blocks = lambda x: x.reshape(-1, plan.block * x.shape[1], *x.shape[2:])
    carry, ys = jax.lax.scan(body, carry, jax.tree.map(in_blocks, tree), reverse=reverse)
    return carry, jax.tree.map(lambda y: y.reshape(plan.steps, -1, *y.shape[2:]), ys)
