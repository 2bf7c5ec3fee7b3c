"""What the delta rule kernels say about a chunk in the same words: layouts of its matrices, gates, products."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._precision import EPSILON
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper.tuning import CHUNK

MATRIX, TRANSPOSED, PER_ROW, PER_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA_TRANSPOSED,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)
SQUARE = (CHUNK, CHUNK)


def across(row, shape: tuple[int, int] = SQUARE):
    """A value per row, repeated over the columns."""
    return lax.broadcast_in_dim(row, shape, [0])


def down(column, shape: tuple[int, int] = SQUARE):
    """A value per column, repeated over the rows."""
    return lax.broadcast_in_dim(column, shape, [1])


def places(shape: tuple[int, int] = SQUARE):
    """Row and column of every entry."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX) for axis in (0, 1))


def gated(tables: _mosaic_gpu.Ref, visible, segments: bool):
    """Decay between the tokens of a chunk where `visible`, else 0; `tables` holds its rows (`order.HIGH` and so on)."""
    # The compiler would merge two loads of one row into one, which then would need two layouts.
    (again,) = _mosaic_gpu.opaque(jnp.int32(0))

    def both(row: int):
        by_row = across(plgpu.load(tables.at[row], layout=PER_ROW))
        return by_row, down(plgpu.load(tables.at[again + row], layout=PER_COLUMN))

    (high, high_before), (low, low_before) = both(order.HIGH), both(order.LOW)
    exponent = (high - high_before) + (low - low_before)
    if segments:
        here, there = both(order.SEGMENT)
        visible = visible & (here == there)
    return jnp.where(visible, jnp.exp(jnp.where(visible, exponent, 0.0)), 0.0)


def product(left: jax.Array, right: jax.Array):
    """A product of 64 rows and 64 columns, waited for."""

    def run(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(run, _mosaic_gpu.accumulator(*SQUARE))


def wide(tile: _mosaic_gpu.Ref):
    """A 16-bit tile in registers, float32."""
    return plgpu.load(tile, layout=MATRIX).astype(jnp.float32)


HALF = jnp.float16
# Exponents of float32: 2^-100 and 2^100, beyond which a quotient might overflow; 1; one more; for 1 / 2^n.
SMALLEST, LARGEST = (127 - 100) << 23, (127 + 100) << 23
ONE, ONE_MORE, INVERSE_OF = 127 << 23, 1 << 23, 254 << 23
EXPONENT = 0xFF << 23


def as_half(x: jax.Array) -> jax.Array:
    """The bits of 16-bit numbers, named float16: a tile of them can become float16 where it lies."""
    return x if x.dtype == HALF else lax.bitcast_convert_type(x, HALF)


def halved(tile: _mosaic_gpu.Ref, given: Any, factor) -> Any:
    """Turns a tile of 64 tokens into float16 where it lies, each token times a factor; returns what `factor` left.

    Args:
      tile: `[64, D]` in shared memory, the bits of numbers of type `given`.
      factor: from an iterator over parts of 64 columns in float32 to `(factor or None, anything)`, one for all tokens
        or one per token.
    """
    places = [tile.at[:, pl.ds(first, CHUNK)] for first in range(0, tile.shape[1], CHUNK)]

    def wide(place):
        bits = plgpu.load(place, layout=MATRIX)
        return (bits if given == HALF else lax.bitcast_convert_type(bits, given)).astype(
            jnp.float32
        )

    scale, rest = factor(map(wide, places))
    for place in places:
        value = wide(place)
        if scale is not None:
            value = value * (across(scale) if scale.ndim else scale)
        place[...] = value.astype(HALF)
    return rest


def inverse_length(parts: Iterator[Any]):
    """For `halved`: each token is divided by its length, as `l2_normalize` does."""
    squares = sum(jnp.sum(part * part, axis=1) for part in parts)
    return lax.rsqrt(squares + EPSILON), None


def power_of_two(size):
    """The smallest power of two above `size`, from 2^-100 (of zero) to 2^100; 1 of what is not finite."""
    bits = lax.bitcast_convert_type(size, jnp.int32) & EXPONENT
    # Else the other channels, which are finite, would become infinite too.
    bits = jnp.where(bits == EXPONENT, ONE, bits + ONE_MORE)
    bits = jnp.minimum(jnp.maximum(bits, SMALLEST), LARGEST)
    return lax.bitcast_convert_type(bits, jnp.float32)


def inverse_power(power):
    """1 over a power of two."""
    bits = lax.bitcast_convert_type(power, jnp.int32)
    return lax.bitcast_convert_type(INVERSE_OF - bits, jnp.float32)


def own_unit(size):
    """What a token of that size is divided by: a zero token by 1, since its cotangent is not zero."""
    return jnp.where(size == 0.0, 1.0, power_of_two(size))


def largest(parts: Iterator[Any]):
    """The largest absolute value of each token."""
    return functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part), axis=1) for part in parts))


def inverse_size(parts: Iterator[Any]):
    """For `halved`: each token is divided by a power of two larger than all it holds, which is handed on."""
    unit = own_unit(largest(parts))
    return inverse_power(unit), unit


def inverse_size_within(parts: Iterator[Any], asked: jax.Array):
    """As `inverse_size`, but by no less than 1/64 of `asked`, a power of two above all queries.

    What a query is divided by multiplies a cotangent, which float16 still holds at 1/64; a query that small and smaller
    keeps its digits down to 2^-20 of the largest.
    """
    unit = jnp.maximum(power_of_two(largest(parts)), asked * 2.0**-6)
    return inverse_power(unit), unit


def half_keys(tile: _mosaic_gpu.Ref, given: Any, use_qk_l2norm: bool) -> None:
    """Keys of a chunk as the products take them; `commit_smem` before that."""
    if use_qk_l2norm:
        halved(tile, given, inverse_length)
    elif given != HALF:
        halved(tile, given, lambda _: (None, None))
