"""Root-mean-square norms: statistics and products in float32, result in the input's dtype.

Flax's `nnx.RMSNorm(dtype=bfloat16)` promotes implicitly and so fails under strict promotion; these do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gqa_jax.config import AttentionConfig


def rms_normalize(x: Float[Array, "... D"], *, eps: float) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in float32 (float64 for float64)."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(mean_square + jnp.asarray(eps, wide.dtype))


def _scaled(normed: Array, scale: Array, zero_centred: bool) -> Array:
    weight = scale.astype(normed.dtype)
    if zero_centred:
        weight = weight + jnp.ones((), normed.dtype)
    return normed * weight.reshape((1,) * (normed.ndim - 1) + weight.shape)


class RMSNorm(nnx.Module):
    """`rms_normalize(x) * w`, or `* (1 + w)` when zero-centred.

    Attributes:
      scale: `[D]`, w; initialised so that the factor is one.
    """

    def __init__(
        self, dim: int, *, eps: float = 1e-6, zero_centred: bool = False, param_dtype=jnp.float32
    ):
        self.eps = eps
        self.zero_centred = zero_centred
        initial = jnp.zeros if zero_centred else jnp.ones
        self.scale = nnx.Param(initial((dim,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; same shape and dtype."""
        normed = rms_normalize(x, eps=self.eps)
        return _scaled(normed, self.scale[...], self.zero_centred).astype(x.dtype)


class L2Norm(nnx.Module):
    """Weightless RMS norm of queries and keys (Megatron's `qk_l2_norm`, Llama 4)."""

    def __init__(self, *, eps: float = 1e-6):
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis; same shape and dtype."""
        return rms_normalize(x, eps=self.eps).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """`RMSNorm(x) * silu(gate)`: the output norm of Gated DeltaNet; norm before gate.

    Attributes:
      scale: `[D]`.
    """

    def __init__(
        self, dim: int, *, eps: float = 1e-6, zero_centred: bool = False, param_dtype=jnp.float32
    ):
        self.eps = eps
        self.zero_centred = zero_centred
        initial = jnp.zeros if zero_centred else jnp.ones
        self.scale = nnx.Param(initial((dim,), param_dtype))

    def __call__(self, x: Float[Array, "... D"], gate: Float[Array, "... D"]) -> Array:
        """Both arguments share one shape; the result has x's dtype."""
        normed = _scaled(rms_normalize(x, eps=self.eps), self.scale[...], self.zero_centred)
        return (normed * jax.nn.silu(gate.astype(normed.dtype))).astype(x.dtype)


def head_norm(config: AttentionConfig, param_dtype) -> nnx.Module | None:
    """The configured norm of queries or keys."""
    match config.qk_norm:
        case "none":
            return None
        case "l2":
            return L2Norm(eps=config.norm_eps)
        case kind:
            return RMSNorm(
                config.head_dim,
                eps=config.norm_eps,
                zero_centred=kind == "rms_zero_centred",
                param_dtype=param_dtype,
            )


def check_injected_norms(config: AttentionConfig, q_norm, k_norm) -> None:
    """Raises `ValueError` for one norm without the other, or norms that the config does not know of."""
    if (q_norm is None) != (k_norm is None):
        raise ValueError("`q_norm` and `k_norm` must be given together")
    if q_norm is not None and config.qk_norm == "none":
        raise ValueError(
            "`q_norm` and `k_norm` must be None when `config.qk_norm` is 'none': they take the place of its norm"
        )
