"""The gated delta rule in chunks with one decay per key channel: a scan over chunks, one lane.

The backward keeps nothing but the inputs and the start states; it differentiates one chunk at a time inside its own
reverse scan.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.order import Order, Plan, Tokens


def forward(plan: Plan, order: Order, tokens: Tokens, initial_state: jax.Array):
    """Returns `(out, final_state)`."""
    states = orders.start_states(plan, order, tokens, initial_state)

    def step(carry, xs):
        state, finals = carry
        raw, place = xs
        state, out = _chunk(plan, place, orders.enter(state, place, states.bank), *raw)
        finals = orders.put(finals, place.last, place, state)
        return (state, finals), orders.join_groups(out).astype(tokens.value.dtype)

    xs = (orders.all_chunks(plan, order, tokens), orders.places(order))
    (state, finals), out = jax.lax.scan(step, (states.entry, states.bank), xs)
    final = state if finals is None else finals
    return orders.from_chunks(plan, order, out), final.reshape(initial_state.shape)


def backward(
    plan: Plan,
    order: Order,
    tokens: Tokens,
    initial_state: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
):
    """Returns `(Tokens of cotangents, cotangent of initial_state)`, each in its primal's dtype."""
    states = orders.start_states(plan, order, tokens, initial_state)
    xs = (orders.all_chunks(plan, order, tokens), orders.places(order))
    d_final = d_final.reshape(states.shape)
    bank = None if states.bank is None else d_final

    def replay(state, xs):
        raw, place = xs
        state = orders.enter(state, place, states.bank)
        return _chunk(plan, place, state, *raw)[0], state

    def step(carry, xs):
        d_state, d_bank = carry
        raw, place, d_out, state = xs
        d_state = orders.enter(d_state, place, bank, at="last")
        _, pull = jax.vjp(lambda state, *raw: _chunk(plan, place, state, *raw), state, *raw)
        d_out = orders.load_output(plan, d_out, raw.key.shape[1], state.dtype)
        d_before, *d_raw = pull((d_state, d_out))
        d_bank = orders.put(d_bank, place.first, place, d_before)
        return (orders.cut(d_before, place), d_bank), tuple(d_raw)

    _, starts = jax.lax.scan(replay, states.entry, xs)
    end = d_final if bank is None else jnp.zeros_like(states.entry)
    (d_state, d_bank), d_raw = jax.lax.scan(
        step, (end, bank), (*xs, orders.to_chunks(plan, order, d_out), starts), reverse=True
    )
    d_initial = d_state if d_bank is None else d_bank
    d_tokens = Tokens(*(orders.from_chunks(plan, order, x) for x in d_raw))
    return d_tokens, d_initial.reshape(initial_state.shape)


def _chunk(plan: Plan, place, state: jax.Array, *raw):
    return channel_chunk(state, *orders.load(plan, place, *raw), place.segment, plan.scale)


def channel_chunk(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    segment: jax.Array | None,
    scale: float,
):
    """One chunk with a decay per key channel, g `[z, h, C, Dk]`: `(state after it, output [z, h, n, C, Dv])`."""
    sums = algebra.two_float_cumsum(jnp.swapaxes(g, -1, -2))
    high, low = (jnp.swapaxes(x, -1, -2) for x in sums)
    until = jnp.exp((high[..., -1:, :] - high) + (low[..., -1:, :] - low))
    since = jnp.exp(high + low)
    whole = since[..., -1, :]
    size = g.shape[-2]
    visible = jnp.asarray(np.tril(np.ones((size, size), bool)))[None]
    if segment is not None:
        visible = visible & (segment[:, :, None] == segment[:, None, :])
        until = jnp.where((segment == segment[:, -1:])[:, None, :, None], until, 0.0)
        since = jnp.where((segment == 0)[:, None, :, None], since, 0.0)
        whole = since[..., -1, :]
    pairs = lambda x: jnp.where(visible[:, None], _channel_scores(x, key, high, low), 0.0)

    lower = algebra.strictly_lower(beta[..., None] * pairs(key)[:, :, None])
    recalled = algebra.matmul("zhck,zhnkv->zhncv", since * key, state)
    written = beta[..., None] * (value - recalled)
    update = algebra.matmul("zhnij,zhnjv->zhniv", algebra.unit_lower_inverse(lower), written)
    out = algebra.matmul("zhck,zhnkv->zhncv", since * query, state)
    out += algebra.matmul("zhij,zhnjv->zhniv", pairs(query), update)
    after = whole[:, :, None, :, None] * state
    return after + algebra.matmul("zhck,zhncv->zhnkv", until * key, update), scale * out


def _channel_scores(left: jax.Array, right: jax.Array, high: jax.Array, low: jax.Array):
    """`sum_d left[i, d] right[j, d] e^(G_id - G_jd)` for i >= j, `[z, h, C, C]`; anything above the diagonal.

    By blocks of 16, so that no exponent is positive: rows against earlier blocks split the decay at the block's start;
    inside a block the exponents are formed one by one.
    """
    size, width = left.shape[-2], min(algebra.BLOCK, left.shape[-2])
    inside = jnp.asarray(np.tril(np.ones((width, width), bool)))[None, None, :, :, None]
    rows = []
    for begin in range(0, size, width):
        here, ago = slice(begin, begin + width), slice(0, begin)
        own_high, own_low = high[..., here, :], low[..., here, :]
        exponent = own_high[..., :, None, :] - own_high[..., None, :, :]
        exponent += own_low[..., :, None, :] - own_low[..., None, :, :]
        decay = jnp.where(inside, jnp.exp(jnp.where(inside, exponent, 0.0)), 0.0)
        block = [
            algebra.matmul("zhik,zhijk,zhjk->zhij", left[..., here, :], decay, right[..., here, :])
        ]
        if begin:
            last = slice(begin - 1, begin)
            to_here = (own_high - high[..., last, :]) + (own_low - low[..., last, :])
            from_ago = (high[..., last, :] - high[..., ago, :]) + (
                low[..., last, :] - low[..., ago, :]
            )
            entering = left[..., here, :] * jnp.exp(to_here)
            leaving = right[..., ago, :] * jnp.exp(from_ago)
            block.insert(0, algebra.matmul("zhik,zhjk->zhij", entering, leaving))
        after = size - begin - width
        row = jnp.concatenate(block, axis=-1)
        rows.append(jnp.pad(row, ((0, 0), (0, 0), (0, 0), (0, after))))
    return jnp.concatenate(rows, axis=-2)
