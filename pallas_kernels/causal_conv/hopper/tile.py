"""What the convolution kernels say about a tile in the same words: its layout, its inputs, what stands before it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels.causal_conv.tuning import HALO

VECTOR = 4  # values of a thread that lie side by side


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about one kernel."""

    batch: int
    length: int
    heads: int
    width: int
    key_dim: int
    value_dim: int
    group: int
    dtype: DTypeLike
    taps: bool
    state: bool
    bias: bool
    use_qk_l2norm: bool

    @property
    def parts(self) -> int:
        """Heads of queries, keys and values."""
        return self.heads * (2 + self.group)

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Blocks of `rows` tokens. The last axis is the fastest: blocks that run together read whole tokens."""
        return (self.batch, _mosaic_gpu.round_up(self.length, rows) // rows, self.parts)

    def part(self, index) -> tuple[Any, Any]:
        """Key head, and place among its queries (0), keys (1) and values."""
        return lax.div(index, 2 + self.group), lax.rem(index, 2 + self.group)


def lanes(dim: int) -> int:
    """Lanes of a warp that lie side by side; the others take further rows."""
    return min(32, dim // VECTOR)


def base_rows(dim: int) -> int:
    """Rows that four warps cover at once."""
    return 4 * (32 // lanes(dim))


def matrix(dim: int) -> Any:
    """Register layout of `[rows, dim]`, rows a multiple of `base_rows`: a warp owns whole rows."""
    rows, columns = base_rows(dim), lanes(dim) * VECTOR
    if rows == 4:
        tiling = plgpu.Tiling(((4, columns), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((rows, columns), (rows // 4, columns), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Values of `shape` in registers, spread as `layout` says."""

    shape: tuple[int, int]
    layout: Any

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

    def load(self, ref, first: jax.Array):
        """The rows of a shared-memory tile from `first` on."""
        return plgpu.load(ref.at[pl.ds(first, self.shape[0])], layout=self.layout)

    def down(self, value: jax.Array):
        """One value per channel, for all rows."""
        return plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, [1]), self.layout)

    def across(self, value: jax.Array):
        """One value per row, for all channels."""
        return plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, [0]), self.layout)


class Inputs:
    """References by name; None where the call has no such operand."""

    def __init__(self, shapes: Shapes, references):
        rest = list(references)
        self.mixed, self.weight = rest.pop(0), rest.pop(0)
        self.bias = rest.pop(0) if shapes.bias else None
        self.taps = rest.pop(0) if shapes.taps else None
        self.first = rest.pop(0) if shapes.taps and shapes.state else None
        self.state = rest.pop(0) if shapes.state else None


def per_channel(ref: _mosaic_gpu.Ref, place, layout):
    """One value per channel of a block, in float32."""
    return plgpu.load(ref.at[place], layout=layout.reduce(0), optimized=False).astype(jnp.float32)


def fetch(shapes: Shapes, inputs: Inputs, tile: _mosaic_gpu.Ref, place, ready) -> None:
    """Starts to copy the block's inputs, and those before it, into shared memory."""
    row, start, head, channels = place
    rows = tile.shape[0] - HALO
    plgpu.copy_gmem_to_smem(
        inputs.mixed.at[row, pl.ds(start, rows), head, channels],
        tile.at[pl.ds(HALO, rows)],
        ready,
    )
    if shapes.width > 1:
        # The first block copies anything: nothing, or the initial state, stands before it.
        before = pl.ds(jnp.maximum(start - HALO, 0), HALO)
        plgpu.copy_gmem_to_smem(
            inputs.mixed.at[row, before, head, channels], tile.at[pl.ds(0, HALO)], ready
        )


def place_state(shapes: Shapes, inputs: Inputs, tile: _mosaic_gpu.Ref, place) -> None:
    """The initial state, or zeros, where it ends at the row's first real token."""
    row, start, head, channels = place
    if shapes.width == 1 or (shapes.taps and not shapes.state):
        return  # nothing before the first real token is seen
    size, dim = tile.shape
    layout = matrix(dim)
    first = jnp.int32(0) if inputs.first is None else inputs.first[row]

    @pl.when((first > start - shapes.width) & (first < start + size))
    def _():
        for lag in range(1, shapes.width):
            local = HALO + first - lag - start
            if inputs.state is None:
                value = plgpu.layout_cast(jnp.zeros((dim,), shapes.dtype), layout.reduce(0))
            else:
                value = per_channel(
                    inputs.state, (row, shapes.width - lag, head, channels), layout
                ).astype(shapes.dtype)

            @pl.when((local >= 0) & (local < size))
            def _(local=local, value=value):
                tile.at[local][...] = value

        plgpu.commit_smem()


def sigmoid(x):
    """`1 / (1 + exp(-x))`; a reciprocal as the square of a root, because a division takes ten instructions."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root
