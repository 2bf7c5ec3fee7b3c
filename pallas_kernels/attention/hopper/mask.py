"""Which keys a tile of queries visits, and the mask inside a tile: shared by the forward and the backward kernel.

A query at token `t` stands at position `t + offset`, a key at its own index. The forward kernel walks key tiles for a
tile of queries, the backward kernel for dk and dv walks query tiles for a tile of keys. Both visit a contiguous range
of tiles, of which an inner range needs no mask:

    [low, clean_low)  masked      [clean_low, clean_high)  clean      [clean_high, high)  masked

With segments the range comes from tables made of the smallest and largest id of every tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu

# Ids of padding: a query's never equals a key's.
QUERY_PADDING, KEY_PADDING = -1, -2


@dataclasses.dataclass(frozen=True)
class Mask:
    """The static part of a mask.

    Attributes:
      q_len, kv_len: true lengths, before any padding.
      is_causal: a query sees keys up to its own position.
      sliding_window: how many keys, its own included, it sees at most.
      offset: position of the first query; None if every batch row brings its own.
      segments: queries see keys of equal id.
    """

    q_len: int
    kv_len: int
    is_causal: bool = False
    sliding_window: int | None = None
    offset: int | None = 0
    segments: bool = False

    def needed(self, block_kv: int) -> bool:
        """Whether any tile of `block_kv` keys can hold a key that some query must not see."""
        return self.is_causal or self.segments or self.kv_len % block_kv != 0


class Tiles(NamedTuple):
    """A range of tiles; the clean part needs no mask."""

    low: Any
    clean_low: Any
    clean_high: Any
    high: Any


def _smaller(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else lax.min(a, b)


def _larger(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else lax.max(a, b)


def _clip(value: jax.Array, low, high):
    return _smaller(_larger(value, low), high)


def _floor(value, divisor: int):
    """Floor division, where negative values become 0."""
    value = _larger(value, 0)
    return value // divisor if isinstance(value, int) else lax.div(value, divisor)


def _ceil(value: jax.Array, divisor: int):
    return _floor(value + (divisor - 1), divisor)


def _ordered(low, clean_low, clean_high, high, count) -> Tiles:
    """Puts the four bounds in order; at least one tile, so that a kernel's prologue always has one."""
    low = _clip(low, 0, count - 1)
    high = _clip(high, low + 1, count)
    clean_low = _clip(clean_low, low, high)
    return Tiles(low, clean_low, _clip(clean_high, clean_low, high), high)


def key_tiles(mask: Mask, first: jax.Array, rows: int, offset, block_kv: int, bounds=None) -> Tiles:
    """The key tiles that queries `first .. first + rows - 1` visit.

    Args:
      first: first query token, a traced scalar.
      offset: position of query token 0.
      bounds: a row of `segment_bounds`, with segments.
    """
    count = -(-mask.kv_len // block_kv)
    position = first + offset
    low, clean_low, clean_high, high = 0, 0, mask.kv_len // block_kv, count
    if mask.is_causal:
        high = _ceil(position + rows, block_kv)
        clean_high = _smaller(_floor(position + 1, block_kv), clean_high)
    if mask.sliding_window is not None:
        low = _floor(position - mask.sliding_window + 1, block_kv)
        clean_low = _ceil(position + rows - mask.sliding_window, block_kv)
    if bounds is not None:
        low, high = _larger(low, bounds[0]), _smaller(high, bounds[1])
        clean_low, clean_high = _larger(clean_low, bounds[2]), _smaller(clean_high, bounds[3])
    return _ordered(low, clean_low, clean_high, high, count)


def query_tiles(
    mask: Mask, first: jax.Array, rows: int, offset, block_q: int, bounds=None
) -> Tiles:
    """The query tiles that see any of the keys `first .. first + rows - 1`."""
    count = -(-mask.q_len // block_q)
    token = first - offset  # the query that stands at key `first`
    # Rows of queries past the end are harmless (their weight is 0); keys past the end are not written.
    low, clean_low, clean_high, high = 0, 0, count, count
    if mask.is_causal:
        low = _floor(token, block_q)
        clean_low = _ceil(token + rows - 1, block_q)
    if mask.sliding_window is not None:
        high = _ceil(token + rows - 1 + mask.sliding_window, block_q)
        clean_high = _floor(token + mask.sliding_window, block_q)
    if bounds is not None:
        low, high = _larger(low, bounds[0]), _smaller(high, bounds[1])
        clean_low, clean_high = _larger(clean_low, bounds[2]), _smaller(clean_high, bounds[3])
    return _ordered(low, clean_low, clean_high, high, count)


def walk(tiles: Tiles, step: jax.Array, *, both_ends: bool):
    """The tile visited at `step`: masked ones first, so that one masked and one clean loop cover any range.

    Args:
      both_ends: masked tiles may stand at both ends; otherwise the order is simply `high - 1` down to `low`.
    """
    if not both_ends:
        return tiles.high - 1 - step
    at_end = tiles.high - tiles.clean_high
    masked = at_end + tiles.clean_low - tiles.low
    inner = jnp.where(step < masked, tiles.low + step - at_end, tiles.clean_low + step - masked)
    return jnp.where(step < at_end, tiles.high - 1 - step, inner)


def masked_steps(tiles: Tiles):
    """How many of the first steps of `walk` need the mask."""
    return tiles.high - tiles.clean_high + tiles.clean_low - tiles.low


def visible(
    mask: Mask,
    queries: jax.Array,
    keys: jax.Array,
    offset,
    query_ids: jax.Array | None = None,
    key_ids: jax.Array | None = None,
):
    """Boolean tile of which key each query sees; `queries` and `keys` are int32 tiles of token indices."""
    # The ids of keys that do not exist match none.
    shown = query_ids == key_ids if mask.segments else keys < mask.kv_len
    if mask.is_causal:
        shown &= keys <= queries + offset
    if mask.sliding_window is not None:
        shown &= keys > queries + (offset - mask.sliding_window)
    return shown


def indices(shape: tuple[int, int], dimension: int, first):
    """`first + i` along a dimension, as a tile of an accumulator."""
    layout = plgpu.Layout.WGMMA
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout) + first


def padded_ids(ids: jax.Array, size: int, padding: int) -> jax.Array:
    """int32 `[B, size]`: negative ids, and what is added at the end, become `padding`."""
    ids = jnp.where(ids < 0, padding, ids).astype(jnp.int32)
    return _mosaic_gpu.pad_axis(ids, 1, size, padding)


def segment_bounds(of: jax.Array, rows: int, over: jax.Array, block: int) -> jax.Array:
    """For every tile of `rows` in `of`, the range of tiles of `block` in `over` that may share an id.

    Args:
      of, over: `[B, n * rows]` and `[B, m * block]` from `padded_ids`.

    Returns:
      `[B, n, 4]` int32: first tile and one past the last (tiles whose ranges of ids do not meet are left out at both
      ends, which for packed sequences is everything outside the tile's own documents; 0, 0 where nothing meets), and
      the first run of tiles that hold one id only, the same as all of this tile's.
    """
    batch = of.shape[0]
    huge = jnp.iinfo(jnp.int32).max

    def extent(ids, width):
        ids = ids.reshape(batch, -1, width)
        smallest = jnp.where(ids < 0, huge, ids).min(-1)
        largest = jnp.where(ids < 0, -1, ids).max(-1)
        return smallest, largest, (ids == ids[:, :, :1]).all(-1) & (largest >= 0)

    left, right, alone = (x[:, :, None] for x in extent(of, rows))
    start, stop, pure = (x[:, None] for x in extent(over, block))
    meets = (left <= stop) & (start <= right)
    clean = alone & pure & (left == start)
    index = lax.broadcasted_iota(jnp.int32, meets.shape, 2)
    count = jnp.int32(meets.shape[2])
    high = jnp.where(meets, index + 1, 0).max(-1)
    low = jnp.where(meets, index, high[..., None]).min(-1)
    clean_low = jnp.where(clean, index, count).min(-1)
    ends = ~clean & (index > clean_low[..., None])
    clean_high = jnp.where(ends, index, count).min(-1)
    return jnp.stack([low, high, clean_low, clean_high], -1)
