"""A decode step of Gated DeltaNet in XLA: the convolution, the gates and the recurrence, one after the other."""

import jax
import jax.numpy as jnp

from pallas_kernels._precision import compute_dtype
from pallas_kernels.causal_conv import reference as causal_conv
from pallas_kernels.delta_rule import step as delta_rule
from pallas_kernels.deltanet.algebra import Inputs, Options, gated_deltanet_gates


def step(options: Options, inputs: Inputs, state: jax.Array, slots: jax.Array | None):
    """`(out, state after, states or None, conv_state after)`; both states keep their dtype."""
    batch, length = inputs.mixed.shape[:2]
    value_heads, key_dim, value_dim = state.shape[1:]
    width, key_heads, features = inputs.conv_kernel.shape
    mixed = inputs.mixed[..., :features]
    segment_ids, pool = None, inputs.conv_state
    if inputs.lengths is not None:
        place = jnp.arange(length, dtype=inputs.lengths.dtype)[None]
        segment_ids = jnp.where(place < inputs.lengths[:, None], 0, -1)
    windows = pool
    if slots is not None:
        slots = delta_rule.in_pool(slots, state.shape[0])
        windows = pool[jnp.maximum(slots, 0)]

    flat = lambda x, leading: x.reshape(*x.shape[:leading], key_heads * features)
    convolved, windows = causal_conv.causal_conv(
        flat(mixed, 2),
        flat(inputs.conv_kernel, 1),
        bias=None if inputs.conv_bias is None else flat(inputs.conv_bias, 0),
        activation=jax.nn.silu,
        initial_state=flat(windows, 2),
        segment_ids=segment_ids,
    )
    convolved = convolved.reshape(mixed.shape)
    query, key = convolved[..., :key_dim], convolved[..., key_dim : 2 * key_dim]
    value = convolved[..., 2 * key_dim :].reshape(batch, length, value_heads, value_dim)
    pads = None
    if segment_ids is not None:
        pads = (segment_ids < 0)[..., None]
        logits = jnp.where(pads[..., None], jnp.zeros((), inputs.logits.dtype), inputs.logits)
        inputs = inputs._replace(logits=logits)
    g, beta = gated_deltanet_gates(
        inputs.logits.astype(compute_dtype(mixed.dtype)),
        inputs.A_log,
        inputs.dt_bias,
        allow_negative_eigenvalues=options.allow_negative_eigenvalues,
    )
    if pads is not None:  # g = 0 and beta = 0 leave the state as it is
        g, beta = (jnp.where(pads, jnp.zeros((), x.dtype), x) for x in (g, beta))
    out, state, states = delta_rule.recurrence(
        delta_rule.Options(options.scale, options.use_qk_l2norm, options.return_states),
        delta_rule.Tokens(query, key, value, g, beta),
        state,
        slots,
    )
    windows = windows.reshape(-1, width, key_heads, features)
    if slots is not None:
        windows = delta_rule.into_pool(pool, windows, slots)
    return out, state, states, windows
