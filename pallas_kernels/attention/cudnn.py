"""cuDNN's fused attention, through `jax.nn.dot_product_attention`."""

import jax

from pallas_kernels.attention import algebra


def attention(inputs: algebra.Inputs, options: algebra.Options) -> jax.Array:
    """Returns `[B, T, N, D]`; what it cannot do is refused by `tuning.unsupported_reason` before."""
    # (W - 1, 0): W - 1 keys to the left and the query's own.
    window = None if options.sliding_window is None else (options.sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        inputs.query, inputs.key, inputs.value, scale=options.scale, is_causal=options.is_causal,
        local_window_size=window, implementation="cudnn",
    )  # fmt: skip
