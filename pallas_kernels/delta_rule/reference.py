"""The gated delta rule as a recurrence over tokens: the oracle. One line of code per line of the definition.

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T
o_t = scale * S_t^T q_t
"""

import jax
import jax.numpy as jnp

from pallas_kernels._inert import guarded, product
from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule.order import bounded


def recurrent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    initial_state,
    scale: float,
    use_qk_l2norm: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    keep_states=False,
    unroll=1,
):
    """Returns `(out [B, T, Hv, Dv], final_state, states [B, T, Hv, Dk, Dv] or None)`."""
    compute = initial_state.dtype
    starts, real, sequence = boundaries(value.shape[:2], segment_ids, cu_seqlens)

    def clean(x):
        """Zeros on padding, and NaN for infinity: only NaN stays what it is in every sum and product."""
        if real is not None:
            x = jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)
        return jnp.where(jnp.isfinite(x), x, jnp.nan).astype(compute)

    q, k, v, g, beta = (clean(x) for x in (query, key, value, bounded(g), beta))
    if use_qk_l2norm:
        q, k = algebra.l2_normalize(q), algebra.l2_normalize(k)
    per_key_head = value.shape[2] // query.shape[2]
    q, k = (jnp.repeat(x, per_key_head, axis=2) for x in (q, k))
    if g.ndim == 4:
        g = jnp.repeat(g, per_key_head, axis=2)

    def advance(carry, token):
        state, finals = carry
        q, k, v, g, beta, start, index = token
        if start is not None:
            fresh = jnp.zeros_like(state) if index is None else initial_state[index]
            state = jnp.where(start[:, None, None, None], fresh, state)
        state, out = step(state, q, k, v, g, beta, scale=scale)
        if index is not None:
            finals = finals.at[index].set(state, mode="drop")
        return (state, finals), (out, state if keep_states else None)

    finals = None if cu_seqlens is None else initial_state
    state = (
        initial_state
        if cu_seqlens is None
        else jnp.zeros_like(initial_state, shape=(1, *initial_state.shape[1:]))
    )
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, starts, sequence))
    (state, finals), (out, states) = jax.lax.scan(advance, (state, finals), tokens, unroll=unroll)
    if states is not None:
        states = jnp.moveaxis(states, 0, 1)
    out = jnp.moveaxis(out, 0, 1).astype(value.dtype)
    if real is not None:
        out = jnp.where(real[..., None, None], out, 0)  # whatever the state holds
    return out, state if finals is None else finals, states


def boundaries(shape, segment_ids: jax.Array | None, cu_seqlens: jax.Array | None):
    """`(starts, real, sequence)`, each `[B, T]` or None."""
    if segment_ids is not None:
        return *algebra.segment_starts(segment_ids), None
    if cu_seqlens is None:
        return None, None, None
    place = jnp.arange(shape[1], dtype=cu_seqlens.dtype)
    sequence = jnp.searchsorted(cu_seqlens[1:], place, side="right")
    real = sequence < cu_seqlens.shape[0] - 1
    starts = real & (place == cu_seqlens[sequence])
    return starts[None], real[None], sequence[None]


def step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float,
):
    """One token for every head: state `[..., Dk, Dv]`, q and k `[..., Dk]`, v `[..., Dv]`, beta `[...]`.

    g is `[...]`, or `[..., Dk]` with a decay per key channel.
    """
    decay = guarded(jnp.exp, g)
    per_channel = g.ndim == k.ndim
    state = product(
        jnp.multiply, state, decay[..., None] if per_channel else decay[..., None, None]
    )
    update = product(jnp.multiply, v - product(_read, state, k), beta[..., None])
    state = state + product(_outer, k, update)
    return state, scale * product(_read, state, q)


def _read(state, k):
    return jnp.einsum("...kv,...k->...v", state, k, precision="highest")


def _outer(k, v):
    return k[..., :, None] * v[..., None, :]
