"""The gated delta rule in chunks, in XLA: a scan over chunks whose body is the algebra of one chunk.

A row of T tokens is cut into P segments ("lanes") of N chunks of C tokens. All lanes advance together, N steps. With
P > 1 a first pass finds each lane's affine map `S -> M S + E`, a short scan over lanes gives every lane its start
state, and the second pass computes outputs. Packed `cu_seqlens` rows are gathered into chunks that no sequence shares.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule.order import (
    Order,
    Plan,
    Tokens,
    from_chunks,
    through_lanes,
    to_chunks,
)


class Saved(NamedTuple):
    """What the backward keeps besides the inputs.

    Attributes:
      inverse: `[N, z, h, n, C, C]`, T of every chunk; None with a decay per key channel.
      start: `[z, h, n, Dk, Dv]`, the state at the start of every lane.
      transition: `[z, h, n, Dk, Dk]`, each lane's M; None with one lane.
    """

    inverse: jax.Array | None
    start: jax.Array
    transition: jax.Array | None


def forward(plan: Plan, order: Order, tokens: Tokens, initial_state, *, keep: bool):
    """Returns `(out, final_state, Saved or None)`."""
    chunks = _all_chunks(plan, order, tokens)
    layout = _Layout.of(plan, order, tokens, initial_state)
    bank, start = layout.bank, layout.entry
    inverse = transition = None
    if plan.lanes > 1:
        inverse = jax.vmap(lambda raw, place: _inverse(plan, raw, place))(chunks, _places(order))
        transition, extra = _lane_maps(plan, order, chunks, inverse, layout)
        start = through_lanes(plan, start, transition, extra)

    def step(carry, xs):
        state, finals = carry
        raw, place, t = xs
        state = _enter(state, place, bank)
        if plan.per_channel:
            state, out = _channel_chunk(plan, place, state, *raw)
        else:
            q, k, v, g, beta = _load(plan, place, *raw)
            decay = algebra.gates(g, place.segment)
            t = algebra.chunk_inverse(k, beta, decay) if t is None else t
            chain = algebra.advance(state, k, v, beta, decay, t)
            out = algebra.chunk_output(state, q, k, chain.write, decay, t, plan.scale)
            state = chain.state
        out = _unload(out).astype(tokens.value.dtype)
        finals = _put(finals, place.last, place, state)
        return (state, finals), (out, t if keep else None)

    (state, finals), (out, kept) = jax.lax.scan(
        step, (start, bank), (chunks, _places(order), inverse)
    )
    final = _lane(plan, state, -1) if finals is None else finals
    saved = Saved(kept, start, transition) if keep else None
    return from_chunks(plan, order, out), final.reshape(initial_state.shape), saved


def backward(plan: Plan, order: Order, tokens: Tokens, initial_state, saved: Saved, d_out, d_final):
    """Returns `(Tokens of cotangents, cotangent of initial_state)`, each in its primal's dtype."""
    chunks = _all_chunks(plan, order, tokens)
    layout = _Layout.of(plan, order, tokens, initial_state)
    bank, places = layout.bank, _places(order)
    d_chunks = to_chunks(plan, order, d_out)
    d_final = d_final.reshape(layout.shape)
    packed = bank is not None

    def replay(state, xs):
        raw, place, t = xs
        state = _enter(state, place, bank)
        if plan.per_channel:
            return _channel_chunk(plan, place, state, *raw)[0], state
        _, k, v, g, beta = _load(plan, place, *raw)
        decay = algebra.gates(g, place.segment)
        return algebra.advance(state, k, v, beta, decay, t).state, state

    _, states = jax.lax.scan(replay, saved.start, (chunks, places, saved.inverse))

    end = jnp.zeros_like(layout.entry) if packed else d_final
    if saved.transition is not None:

        def retreat(d_state, xs):
            raw, place, t, do = xs
            d_state = _enter(d_state, place, d_final if packed else None, at="last")
            q, k, _, g, beta = _load(plan, place, *raw)
            decay = algebra.gates(g, place.segment)
            do = _load_out(k.shape[1], k.dtype, do)
            d_state = algebra.retreat(do, d_state, q, k, beta, decay, t, plan.scale)[0]
            return _cut(d_state, place), None

        extra, _ = jax.lax.scan(
            retreat, jnp.zeros_like(saved.start), (chunks, places, saved.inverse, d_chunks),
            reverse=True,
        )  # fmt: skip
        transposed = jnp.swapaxes(saved.transition, -1, -2)
        end = through_lanes(plan, end, transposed, extra, reverse=True)

    def step(carry, xs):
        d_state, d_bank = carry
        raw, place, t, do, state = xs
        d_state = _enter(d_state, place, d_final if packed else None, at="last")
        if plan.per_channel:
            chunk = lambda state, *raw: _channel_chunk(plan, place, state, *raw)
            _, pull = jax.vjp(chunk, state, *raw)
            d_before, *d_raw = pull((d_state, _load_out(raw[1].shape[2], state.dtype, do)))
            d_bank = _put(d_bank, place.first, place, d_before)
            return (_cut(d_before, place), d_bank), tuple(d_raw)
        (q, k, v, g, beta), pull = jax.vjp(lambda *raw: _load(plan, place, *raw), *raw)
        decay = algebra.gates(g, place.segment)
        grads = algebra.chunk_gradients(
            _load_out(k.shape[1], k.dtype, do), d_state, state, q, k, v, beta, decay, t, plan.scale
        )
        d_bank = _put(d_bank, place.first, place, grads.state)
        d_raw = pull((grads.query, grads.key, grads.value, grads.g, grads.beta))
        return (_cut(grads.state, place), d_bank), d_raw

    d_bank = d_final if packed else None  # a sequence without tokens hands its cotangent through
    (d_state, d_bank), d_raw = jax.lax.scan(
        step, (end, d_bank), (chunks, places, saved.inverse, d_chunks, states), reverse=True
    )
    d_initial = _lane(plan, d_state, 0) if d_bank is None else d_bank
    d_tokens = Tokens(*(from_chunks(plan, order, x) for x in d_raw))
    return d_tokens, d_initial.reshape(initial_state.shape)


class _Layout(NamedTuple):
    """Shapes and start of the state: `bank` holds every packed sequence's own, `entry` a dense row's."""

    shape: tuple[int, ...]
    entry: jax.Array
    bank: jax.Array | None

    @classmethod
    def of(cls, plan: Plan, order: Order, tokens: Tokens, initial_state) -> "_Layout":
        heads, group = tokens.key.shape[2], tokens.value.shape[2] // tokens.key.shape[2]
        states = initial_state.reshape(-1, heads, group, *initial_state.shape[-2:])
        if order.sequence is None:
            return cls(states.shape, states, None)
        empty = jnp.zeros_like(states, shape=(plan.batch, *states.shape[1:]))
        return cls(states.shape, empty, states)


def _lane_maps(plan, order, chunks, inverse, layout):
    """`(M, E)` of every lane: the chain run on the columns `[E | M]` from `[0 | I]`, where M sees no values."""
    *lead, key_dim, value_dim = layout.shape[1:]
    lanes = plan.batch * plan.lanes
    dtype = layout.entry.dtype
    identity = jnp.broadcast_to(
        jnp.eye(key_dim, dtype=dtype)[None, None, None], (lanes, *lead, key_dim, key_dim)
    )
    nothing = jnp.zeros_like(layout.entry, shape=(lanes, *lead, key_dim, value_dim))
    widen = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, key_dim)])
    bank = None if layout.bank is None else widen(layout.bank)

    def step(state, xs):
        raw, place, t = xs
        state = _enter(state, place, bank)
        _, k, v, g, beta = _load(plan, place, *raw)
        decay = algebra.gates(g, place.segment)
        return algebra.advance(state, k, widen(v), beta, decay, t).state, None

    state, _ = jax.lax.scan(
        step, jnp.concatenate([nothing, identity], -1), (chunks, _places(order), inverse)
    )
    return state[..., value_dim:], state[..., :value_dim]


def _inverse(plan, raw, place):
    _, k, _, g, beta = _load(plan, place, *raw)
    return algebra.chunk_inverse(k, beta, algebra.gates(g, place.segment))


def _places(order: Order) -> Order:
    """The part of the order that a scan over chunks walks through."""
    return order._replace(source=None, target=None)


def _load(plan, place, query, key, value, g, beta):
    """One chunk's operands, heads first and wide: padding is zero whatever it held."""
    compute = algebra.compute_dtype(value.dtype)
    heads = key.shape[2]

    def clean(x):
        if place.real is not None:
            x = jnp.where(place.real.reshape(place.real.shape + (1,) * (x.ndim - 2)), x, 0)
        return x.astype(compute)

    q, k = (jnp.moveaxis(clean(x), 1, 2) for x in (query, key))
    if plan.use_qk_l2norm:
        q, k = algebra.l2_normalize(q), algebra.l2_normalize(k)
    decay = jnp.moveaxis(clean(g), 1, 2) if plan.per_channel else _by_group(clean(g), heads)
    return q, k, _by_group(clean(value), heads), decay, _by_group(clean(beta), heads)


def _load_out(heads, dtype, d_out):
    return _by_group(d_out.astype(dtype), heads)


def _channel_chunk(plan, place, state, *raw):
    return algebra.channel_chunk(state, *_load(plan, place, *raw), place.segment, plan.scale)


def _by_group(x, heads):
    """`[z, C, Hv, ...]` to `[z, h, n, C, ...]`."""
    x = x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _unload(x):
    """`[z, h, n, C, Dv]` to `[z, C, Hv, Dv]`."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _enter(state, place: Order, bank, *, at: str = "first"):
    """Lanes whose chunk is the first (in the backward: the last) of a sequence take that sequence's own state."""
    if bank is None:
        return state
    here = getattr(place, at)
    return jnp.where(here[:, None, None, None, None], bank[place.sequence], state)


def _cut(d_state, place: Order):
    """Nothing flows from a packed sequence to the one before it."""
    if place.first is None:
        return d_state
    return jnp.where(place.first[:, None, None, None, None], 0.0, d_state)


def _put(bank, here, place: Order, state):
    """Files the states of lanes that are `here` under their sequences."""
    if bank is None or place.sequence is None:
        return None
    return bank.at[jnp.where(here, place.sequence, bank.shape[0])].set(state, mode="drop")


def _lane(plan, state, index):
    return state.reshape(plan.batch, plan.lanes, *state.shape[1:])[:, index]


def _all_chunks(plan: Plan, order: Order, tokens: Tokens) -> Tokens:
    return Tokens(*(to_chunks(plan, order, x) for x in tokens))
