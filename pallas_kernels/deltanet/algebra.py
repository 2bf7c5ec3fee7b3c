"""What both decode kernels make of a token besides the delta rule: convolution, SiLU and gates, in float32.

Written with operations that every backend has and that compile to neither a subroutine nor a lossy approximation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _inert


class Inputs(NamedTuple):
    """What the front end of a kernel reads, as arrays outside and as references inside; None for what is not given.

    Attributes:
      mixed: `[rows, T, Hk, F]`, F >= C = 2 Dk + n Dv; logits: `[rows, T, Hk, 2 n]`.
      conv_state: `[P, W, Hk, C]`; conv_kernel: `[W, Hk, C]`; conv_bias: `[Hk, C]`.
      A_log, dt_bias: `[Hk, n]`.
      lengths: `[rows]`.
    """

    mixed: jax.Array
    logits: jax.Array
    conv_state: jax.Array
    conv_kernel: jax.Array
    conv_bias: jax.Array | None
    A_log: jax.Array
    dt_bias: jax.Array
    lengths: jax.Array | None


class Options(NamedTuple):
    """Everything static about a step."""

    scale: float
    use_qk_l2norm: bool
    allow_negative_eigenvalues: bool
    return_states: bool


def convolve(taps, history, bias: jax.Array | None):
    """SiLU of the convolution at one token: `taps[w]` belongs to `history[w]`, the current token is the last."""
    total = sum(tap * x for tap, x in zip(taps, history, strict=True))
    if bias is not None:
        total = total + bias
    return total * sigmoid(total)


def sigmoid(x):
    """`1 / (1 + e^-x)`; 0 where the exponential overflows."""
    return 1.0 / (1.0 + jnp.exp(-x))


def softplus(x: jax.Array):
    """`log(1 + e^x)` as `max(x, 0) + 2 atanh(z)`, `z = e / (2 + e)` and `e = exp(-|x|)`.

    z is at most 1/3, so eight terms of the series give every digit of a float32, also where the argument of a
    logarithm would round to 1.
    """
    e = jnp.exp(-jnp.maximum(x, -x))
    z = e / (2.0 + e)
    square, series = z * z, 0.0
    for power in range(15, 0, -2):
        series = series * square + 1.0 / power
    return jnp.maximum(x, 0.0) + 2.0 * z * series


def gates(
    write: jax.Array,
    decay: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    *,
    allow_negative_eigenvalues: bool,
    sigmoid: Callable[..., jax.Array] = jax.nn.sigmoid,
    softplus: Callable[..., jax.Array] = jax.nn.softplus,
    product: Callable[..., jax.Array] = jnp.multiply,
) -> tuple[jax.Array, jax.Array]:
    """`(g, beta)` from the two logits of a value head; inside a kernel with the two functions of this file."""
    beta = sigmoid(write)
    if allow_negative_eigenvalues:
        beta = 2.0 * beta
    return product(-jnp.exp(A_log), softplus(decay + dt_bias)), beta


def gated_deltanet_gates(
    logits: Float[Array, "B T Hk 2*n"],
    A_log: Float[Array, "Hk n"],
    dt_bias: Float[Array, "Hk n"],
    *,
    allow_negative_eigenvalues: bool = False,
) -> tuple[Float[Array, "B T Hv"], Float[Array, "B T Hv"]]:
    """Log decay `g = -exp(A_log) softplus(a + dt_bias)` and writing strength `beta = sigmoid(b)` of Gated DeltaNet.

    Args:
      logits: `[B, T, Hk, 2 n]`, per key head b of its n value heads, then a; computed in its dtype.
      A_log, dt_bias: `[Hk, n]`.
      allow_negative_eigenvalues: `beta = 2 sigmoid(b)`.
    """
    group = logits.shape[-1] // 2
    A_log, dt_bias = (x.astype(logits.dtype)[None, None] for x in (A_log, dt_bias))
    g, beta = gates(
        logits[..., :group],
        logits[..., group:],
        A_log,
        dt_bias,
        allow_negative_eigenvalues=allow_negative_eigenvalues,
        # A token that is not finite spoils the gradient of no parameter.
        sigmoid=functools.partial(_inert.guarded, jax.nn.sigmoid),
        softplus=functools.partial(_inert.guarded, jax.nn.softplus),
        product=functools.partial(_inert.product, jnp.multiply),
    )
    return g.reshape(*g.shape[:2], -1), beta.reshape(*g.shape[:2], -1)
