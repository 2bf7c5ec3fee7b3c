"""The gated delta rule as a recurrence over tokens: the oracle. One line of code per line of the definition.

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T
o_t = scale * S_t^T q_t
"""

import jax
import jax.numpy as jnp


def recurrent(query, key, value, g, beta, *, initial_state, segment_ids, scale):
    """Returns `(out [B, T, Hv, Dv], states [B, T, Hv, Dk, Dv])`: the state after every token."""
    compute = jnp.promote_types(value.dtype, jnp.float32)
    per_key_head = value.shape[2] // query.shape[2]
    q, k = (jnp.repeat(x.astype(compute), per_key_head, axis=2) for x in (query, key))
    v, g, beta = (x.astype(compute) for x in (value, g, beta))
    starts = jnp.zeros(v.shape[:2], jnp.bool_)
    if segment_ids is not None:
        starts = starts.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])

    def advance(state, token):
        q, k, v, g, beta, start = token
        state = jnp.where(start[:, None, None, None], jnp.zeros_like(state), state)
        state, out = step(state, q, k, v, g, beta, scale=scale)
        return state, (out, state)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, starts))
    _, (out, states) = jax.lax.scan(advance, initial_state.astype(compute), tokens)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), jnp.moveaxis(states, 0, 1)


def step(state, q, k, v, g, beta, *, scale):
    """One token for every head: state `[..., Dk, Dv]`, q and k `[..., Dk]`, v `[..., Dv]`, g and beta `[...]`."""
    state = state * jnp.exp(g)[..., None, None]
    residual = v - jnp.einsum("...kv,...k->...v", state, k, precision="highest")
    update = residual * beta[..., None]
    state = state + k[..., :, None] * update[..., None, :]
    return state, scale * jnp.einsum("...kv,...k->...v", state, q, precision="highest")


def l2_normalize(x):
    """`x * rsqrt(sum(x^2) + 1e-6)` over the last axis in float32; zero rows have zero gradient."""
    compute = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(compute)
    squared = jnp.sum(wide * wide, axis=-1, keepdims=True)
    is_zero = squared == 0.0
    inverse = jax.lax.rsqrt(jnp.where(is_zero, 1.0, squared) + jnp.asarray(1e-6, compute))
    return jnp.where(is_zero, 0.0, wide * inverse)
