"""Public causal convolution: contract, validation, choice of implementation."""

from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch, _sharding
from pallas_kernels.causal_conv import reference, tuning, vjp


class CausalConvOutput(NamedTuple):
    """Convolution output and the inputs that the next call needs.

    Attributes:
      out: `[B, T, F]`, the input's dtype.
      final_state: `[B, W, F]`, the last W inputs (before convolution and activation), oldest first; pass it as
        `initial_state` of the call that continues the sequence.
    """

    out: jax.Array
    final_state: jax.Array


class QKVConvOutput(NamedTuple):
    """What the delta rule reads, and the inputs that the next call needs.

    Attributes:
      query, key: `[B, T, Hk, Dk]`, the input's dtype.
      value: `[B, T, Hv, Dv]`, the input's dtype.
      final_state: `[B, W, Hk, 2 Dk + n Dv]`, the last W inputs, oldest first; pass it as `initial_state` of the call
        that continues the sequence.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    final_state: jax.Array


@_dispatch.operator
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
    segment_ids = _checks.as_int32("segment_ids", segment_ids)
    _check(x, weight, bias, activation, initial_state, segment_ids)
    run = _dispatch.choose("causal_conv1d", implementation, _IMPLEMENTATIONS)
    return CausalConvOutput(
        *run(
            x,
            weight,
            bias=bias,
            activation=jax.nn.silu if activation == "silu" else None,
            initial_state=initial_state,
            segment_ids=segment_ids,
        )
    )


@_dispatch.operator
def causal_conv1d_qkv(
    mixed: Float[Array, "B T Hk F"],
    weight: Float[Array, "W Hk C"],
    *,
    key_dim: int,
    value_dim: int,
    bias: Float[Array, "Hk C"] | None = None,
    use_qk_l2norm: bool = False,
    initial_state: Float[Array, "B W Hk C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> QKVConvOutput:
    """`causal_conv1d` with SiLU over a fused projection, split into queries, keys and values that may be normalised.

    With n = Hv // Hk value heads per key head and C = 2 Dk + n Dv, the channels of a key head are
    `query Dk | key Dk | value n Dv`; value head j belongs to key head j // n.

    Args:
      mixed: `[B, T, Hk, F]`, F >= C. Channels beyond C (the output gate of a fused projection) are not read: passing
        the projection whole saves the copy that a slice of it would be. Their gradient is 0.
      weight: `[W, Hk, C]`; `weight[W - 1]` multiplies the current token.
      key_dim, value_dim: Dk, Dv.
      bias: `[Hk, C]`.
      use_qk_l2norm: divides each query and key by its length, `x * rsqrt(sum x^2 + 1e-6)`, as `gated_delta_rule` would;
        then call that with `use_qk_l2norm=False`.
      initial_state: `[B, W, Hk, C]`, as for `causal_conv1d`.
      segment_ids: `[B, T]`, as for `causal_conv1d`.
      implementation: None takes "reference": XLA, any device, any dims, differentiable to any order, vmap, `shard_map`.
        "mosaic_gpu" is one kernel for sm_90: bf16, fp16, fp32; Dk and Dv of 64, 128 or 256; W <= 9; forward and
        backward are one kernel each, a second derivative is XLA's; vmap; `shard_map` with `check_vma=False` only. Both
        are deterministic.

    Sums, SiLU and norms are float32 (float64 for float64), rounded once, to the input's dtype.

    Raises:
      TypeError, ValueError: naming the argument.
      NotImplementedError: `implementation` cannot run this call, with the reason.

    Source: the short convolution of Gated Delta Networks (arXiv 2412.06464, section 3.4).

    Example:
      >>> import jax.numpy as jnp
      >>> made = causal_conv1d_qkv(jnp.ones((1, 5, 2, 24)), jnp.ones((4, 2, 24)), key_dim=4, value_dim=8)
      >>> made.query.shape, made.value.shape
      ((1, 5, 2, 4), (1, 5, 4, 8))
    """
    segment_ids = _checks.as_int32("segment_ids", segment_ids)
    sizes = _check_qkv(mixed, weight, key_dim, value_dim, bias, initial_state, segment_ids)
    use_qk_l2norm = _checks.check_flag("use_qk_l2norm", use_qk_l2norm)
    options = vjp.Options(int(key_dim), int(value_dim), use_qk_l2norm)
    operands = vjp.Operands(mixed, weight, bias, initial_state, segment_ids)
    call = tuning.Call(
        mixed.dtype, sizes, options.key_dim, options.value_dim, _sharding.is_varying(operands)
    )
    run = _dispatch.choose("causal_conv1d_qkv", implementation, _QKV_IMPLEMENTATIONS, call=call)
    return QKVConvOutput(*run(options, operands))


_IMPLEMENTATIONS = {"reference": _dispatch.Implementation(reference.causal_conv)}
# The kernel comes last until it has run on a GPU: nobody is given what only an interpreter and a compiler have seen.
_QKV_IMPLEMENTATIONS = {
    "reference": _dispatch.Implementation(vjp.in_xla),
    "mosaic_gpu": _dispatch.Implementation(vjp.mosaic_gpu, tuning.unsupported_reason),
}


def _check(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
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


def _check_qkv(
    mixed: jax.Array,
    weight: jax.Array,
    key_dim: int,
    value_dim: int,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    _checks.check_array("mixed", mixed, "B T Hk F", sizes)
    _checks.check_array("weight", weight, "W Hk C", sizes)
    _checks.check_float("mixed", mixed)
    _checks.check_float("weight", weight)
    if sizes["W"] < 1:
        raise ValueError("`weight` must have at least one tap, got W=0")
    for name, dim in (("key_dim", key_dim), ("value_dim", value_dim)):
        _checks.check_int(name, dim)
    channels = sizes["C"]
    values = channels - 2 * key_dim
    if values < value_dim or values % value_dim:
        raise ValueError(
            f"`weight` must have C = 2 Dk + n Dv channels with Dk={key_dim}, Dv={value_dim}, n >= 1, got C={channels}"
        )
    if sizes["F"] < channels:
        raise ValueError(f"`mixed` must have at least C={channels} channels, got F={sizes['F']}")
    if bias is not None:
        _checks.check_array("bias", bias, "Hk C", sizes)
        _checks.check_float("bias", bias)
    if initial_state is not None:
        _checks.check_array("initial_state", initial_state, "B W Hk C", sizes)
        _checks.check_float("initial_state", initial_state)
    if segment_ids is not None:
        _checks.check_array("segment_ids", segment_ids, "B T", sizes)
        _checks.check_integer("segment_ids", segment_ids)
    return sizes
