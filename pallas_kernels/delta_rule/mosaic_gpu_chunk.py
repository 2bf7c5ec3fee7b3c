"""What the delta rule kernels say about a chunk in the same words: layouts of its matrices, gates, products."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.mosaic_gpu_tuning import CHUNK

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


def gated(tables, visible, segments: bool):
    """Decay between the tokens of a chunk where `visible`, else 0; `tables` holds the rows of `order.stacked`."""
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


def product(left, right):
    """A product of 64 rows and 64 columns, waited for."""

    def run(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(run, _mosaic_gpu.accumulator(*SQUARE))
