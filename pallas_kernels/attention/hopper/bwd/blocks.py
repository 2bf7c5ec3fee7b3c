"""What the backward kernels share: their static shapes, where a block stands, the weights of a tile."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import LOG2E, ROWS, Ref
from pallas_kernels.attention.hopper import mask as masks
from pallas_kernels.attention.hopper.tuning import BackwardConfig

MATRIX, PER_ROW, PER_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the kernels."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike
    mask: masks.Mask
    scale: float
    soft_cap: float | None
    fused: bool
    config: BackwardConfig

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def split(self) -> bool:
        """Whether dk and dv of the same keys live in different warpgroups."""
        return self.config.split

    @property
    def block_keys(self) -> int:
        """Keys of one block that makes dk and dv."""
        return ROWS if self.split else 2 * ROWS

    @property
    def query_rows(self) -> int:
        """Rows of the statistics: a multiple of every query tile."""
        return _mosaic_gpu.round_up(self.mask.q_len, 2 * ROWS)

    @property
    def key_rows(self) -> int:
        return _mosaic_gpu.round_up(self.mask.kv_len, 2 * ROWS)


class Inputs(NamedTuple):
    """References to device memory; None where the call has no such input."""

    query: Ref
    key: Ref
    value: Ref
    cotangent: Ref  # [B, T, N, D]
    lse: Ref  # [B, N, T'], log2 units, +inf where a row sees nothing or does not exist
    delta: Ref  # [B, N, T']
    offsets: Ref
    query_ids: Ref
    key_ids: Ref
    bounds: Ref


class Block(NamedTuple):
    """Where one block stands."""

    batch: jax.Array
    head: jax.Array  # of the queries (dq) or of the keys (dk_dv)
    first: jax.Array  # first token of its rows
    offset: jax.Array | int
    tiles: masks.Tiles


def locate(shapes: Shapes, inputs: Inputs, tiles, rows: int, block: int) -> Block:
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "heads", "tile"))
    if tiles is masks.key_tiles:
        # Longest first: with a causal mask the last queries see most keys (and the first keys are seen most).
        tile = (-(-shapes.mask.q_len // rows) - 1) - tile
    offset = inputs.offsets[batch] if shapes.mask.offset is None else shapes.mask.offset
    bounds = None
    if shapes.mask.segments:
        bounds = tuple(inputs.bounds[batch, tile, i] for i in range(4))
    first = tile * rows
    found = tiles(shapes.mask, first, rows, offset, block, bounds)
    return Block(batch, head, first, offset, found)


def query_box(shapes: Shapes, array: _mosaic_gpu.Ref, batch: jax.Array, rows, head: jax.Array):
    """Rows of one query head, in `[B, T, N, D]` or in the fused buffer."""
    if shapes.fused:
        return array.at[batch, rows, lax.div(head, shapes.group), lax.rem(head, shapes.group)]
    return array.at[batch, rows, head]


def key_box(shapes: Shapes, array: _mosaic_gpu.Ref, batch: jax.Array, rows, kv_head, which: int):
    """Rows of the key (`which=0`) or value (1) of one head."""
    if shapes.fused:
        return array.at[batch, rows, kv_head, shapes.group + which]
    return array.at[batch, rows, kv_head]


def softmax_weights(shapes: Shapes, scores: jax.Array, lse: jax.Array, shown):
    """Softmax weights of a tile, and what ds is a multiple of: the weights times the slope of the soft cap."""
    factor, hidden = shapes.scale * LOG2E, -jnp.inf
    if shapes.soft_cap is not None:
        scores = jnp.tanh(scores * (shapes.scale / shapes.soft_cap))
        # Finite: the slope takes its square times a weight of 0.
        factor, hidden = shapes.soft_cap * LOG2E, -1e10
    if shown is not None:
        # Before the exponential, so that ids are done with when the statistics are read.
        scores = jnp.where(shown, scores, hidden)
    weights = jnp.exp2(scores * factor - lse)
    if shapes.soft_cap is None:
        return weights, weights
    return weights, weights * (1.0 - scores * scores)
