"""Rotary position embedding (arXiv 2104.09864): both pairings, partial, multi-axis, and extended contexts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gqa_jax.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from pallas_kernels import as_int32


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies and the factor on cos and sin.

    Returns:
      `[rotary_dim / 2]` float32 radians per position, and the concentration (1 unless YaRN).
    """
    dim = config.rotary_dim or head_dim
    plain = config.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    concentration = 1.0
    match config.scaling:
        case None:
            frequencies = plain
        case LinearScaling(factor=factor):
            frequencies = plain / factor
        case Llama3Scaling() as scaling:
            frequencies = _llama3(plain, scaling)
        case YarnScaling() as scaling:
            frequencies = _yarn(plain, scaling, config.theta, dim)
            concentration = _yarn_concentration(scaling)
    return frequencies.astype(np.float32), concentration


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    rotations = scaling.original_max_positions * plain / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: np.ndarray, scaling: YarnScaling, theta: float, dim: int) -> np.ndarray:
    def channel(rotations: float) -> float:
        """The (fractional) channel that turns so often over the original context."""
        wavelength = scaling.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    interpolate = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    return interpolate * plain / scaling.factor + (1 - interpolate) * plain


def _yarn_concentration(scaling: YarnScaling) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rotary_tables(
    config: RopeConfig, head_dim: int, positions: Int[Array, "B T"] | Int[Array, "3 B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of every position, float32.

    Args:
      config: pairing is not used here.
      head_dim: D.
      positions: `[B, T]`, or `[3, B, T]` (temporal, height, width) with `mrope_sections`.

    Raises:
      ValueError: positions of the wrong rank.
    """
    frequencies, concentration = inverse_frequencies(config, head_dim)
    positions = as_int32("positions", positions)
    if positions.ndim == 3 and config.mrope_sections is None:
        raise ValueError(
            f"`positions` must have shape [B, T] without `mrope_sections`, got {positions.shape}"
        )
    if positions.ndim not in (2, 3) or (positions.ndim == 3 and positions.shape[0] != 3):
        raise ValueError(f"`positions` must have shape [B, T] or [3, B, T], got {positions.shape}")
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies).reshape(
        (1,) * positions.ndim + (-1,)
    )
    if positions.ndim == 3:
        axis = jnp.asarray(_axis_of_channel(config, len(frequencies)))
        angles = jnp.select([(axis == i)[None, None, :] for i in range(3)], list(angles))
    return jnp.cos(angles) * concentration, jnp.sin(angles) * concentration


def _axis_of_channel(config: RopeConfig, num_channels: int) -> np.ndarray:
    """Which of the three position axes each channel follows."""
    sections = config.mrope_sections
    assert sections is not None
    if sum(sections) != num_channels:
        raise ValueError(f"`mrope_sections={sections}` must sum to rotary_dim / 2 = {num_channels}")
    if not config.mrope_interleaved:
        return np.repeat(np.arange(3), sections)
    axis = np.zeros(num_channels, np.int32)
    for which in (1, 2):
        axis[which : 3 * sections[which] : 3] = which
    return axis


def apply_rotary(
    x: Float[Array, "B T H D"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    pairing: str = "half",
) -> Float[Array, "B T H D"]:
    """Rotates the first `2 * half` channels of each head, in float32; the rest pass through."""
    half = cos.shape[-1]
    wide = x[..., : 2 * half].astype(np.promote_types(x.dtype, np.float32))
    cos, sin = (table.astype(wide.dtype)[:, :, None, :] for table in (cos, sin))
    if pairing == "half":
        first, second = wide[..., :half], wide[..., half:]
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    if pairing == "half":
        rotated = jnp.concatenate(turned, axis=-1)
    else:
        rotated = jnp.stack(turned, axis=-1).reshape(wide.shape)
    rotated, passed = rotated.astype(x.dtype), x[..., 2 * half :]
    # An empty operand crashes XLA's CPU compiler (JAX 0.11.2) where a `shard_map` runs un-jitted, by single operations.
    return jnp.concatenate([rotated, passed], axis=-1) if passed.size else rotated
