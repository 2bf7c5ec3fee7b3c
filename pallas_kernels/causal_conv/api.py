"""Public causal convolution: contract, validation, choice of implementation."""

from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch
from pallas_kernels.causal_conv import reference


class CausalConvOutput(NamedTuple):
    """Convolution output and the inputs that the next call needs.

    Attributes:
      out: `[B, T, F]`, the input's dtype.
      final_state: `[B, W, F]`, the last W inputs (before convolution and activation), oldest first; pass it as
        `initial_state` of the call that continues the sequence.
    """

    out: jax.Array
    final_state: jax.Array


def causal_conv1d(
    x: Float[Array, "B T F"],
    weight: Float[Array, "W F"],
    *,
    bias: Float[Array, "F"] | None = None,
    activation: Literal["silu"] | None = None,
    initial_state: Float[Array, "B W F"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> CausalConvOutput:
    """Depthwise causal convolution `out[t] = act(sum_w weight[w] * x[t - (W - 1) + w] + bias)`.

    Args:
      x: `[B, T, F]`, T >= 0.
      weight: `[W, F]`; `weight[W - 1]` multiplies the current token.
      bias: `[F]`.
      activation: None or "silu", applied in float32 (float64 for float64), in which sums are held too.
      initial_state: `[B, W, F]`, the W inputs before `x`, oldest first (zeros if None). With `segment_ids` it
        belongs to the segment of each row's first real token, and stands directly before it.
      segment_ids: `[B, T]`; a token reads only inputs of its own segment. Negative ids are padding: output 0, never
        read. Padding between two tokens of a segment takes its places in the window, as zeros. The final state is the
        window that ends at the row's last real token; its taps that belong to other segments are 0.
      implementation: None or "reference" (XLA, any device, differentiable to any order, vmap, jit).

    Raises:
      TypeError, ValueError: naming the argument.

    Source: the short convolution of Mamba (arXiv 2312.00752, section 3.4), as in Gated Delta Networks.

    Example:
      >>> import jax.numpy as jnp
      >>> causal_conv1d(jnp.ones((1, 5, 2)), jnp.ones((4, 2))).out[0, :, 0].tolist()
      [1.0, 2.0, 3.0, 4.0, 4.0]
    """
    _check(x, weight, bias, activation, initial_state, segment_ids)
    _dispatch.resolve("causal_conv1d", implementation, _REASONS)
    return CausalConvOutput(
        *reference.causal_conv(
            x,
            weight,
            bias=bias,
            activation=jax.nn.silu if activation == "silu" else None,
            initial_state=initial_state,
            segment_ids=segment_ids,
        )
    )


def explain_causal_conv1d(
    x,
    weight,
    *,
    bias=None,
    activation=None,
    initial_state=None,
    segment_ids=None,
    implementation=None,
) -> _dispatch.Explanation:
    """Implementation choice for `causal_conv1d`."""
    del implementation
    _check(x, weight, bias, activation, initial_state, segment_ids)
    return _dispatch.explain("causal_conv1d", _REASONS)


_REASONS: dict[str, str | None] = {"reference": None}


def _check(x, weight, bias, activation, initial_state, segment_ids) -> None:
    sizes: dict[str, int] = {}
    _checks.check_array("x", x, "B T F", sizes)
    _checks.check_array("weight", weight, "W F", sizes)
    _checks.check_float("x", x)
    _checks.check_float("weight", weight)
    _checks.check_one_of("activation", activation, (None, "silu"))
    if sizes["W"] < 1:
        raise ValueError("`weight` must have at least one tap, got W=0")
    if bias is not None:
        _checks.check_array("bias", bias, "F", sizes)
        _checks.check_float("bias", bias)
    if initial_state is not None:
        _checks.check_array("initial_state", initial_state, "B W F", sizes)
        _checks.check_float("initial_state", initial_state)
    if segment_ids is not None:
        _checks.check_array("segment_ids", segment_ids, "B T", sizes)
        _checks.check_integer("segment_ids", segment_ids)
