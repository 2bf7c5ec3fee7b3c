"""The triangular inverse of every chunk on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: T = (I + L)^-1 with L the strictly lower part of `beta_i Gamma_ij (K K^T)_ij`, so that the chain that walks
from chunk to chunk multiplies by T instead of solving. A block is one warpgroup and makes, for one chunk of one key
head, `K K^T` once and T for each of its value heads. A matrix of unit lower triangular blocks of width w on its
diagonal, inverted, becomes that of width 2w by

    T <- T - T L T    on the places (odd block, even block before it),

two products of the whole matrix, from w = 1 (no product) to 32. This is the blockwise inverse, not a Neumann series:
every entry is made once, and is bounded by 2 for keys of length 1. Products take float16 operands, whose rounding adds
up to 1e-3 for keys that are all alike; one step of Newton, `T <- T - (T (I + L) - I) T` with L and T in the bracket as
sums of two float16, takes that far below what 16 bits can hold.

Rounding to 16 bits then is not left to chance. T meets keys and cotangents that may be nearly the same for all tokens;
with beta near 1 its columns then add up to `1 - beta`, and errors E made entry by entry would be large against that.
As `T (I - E)`, which rounds to the same large entries and lets the small ones below make up for them, T is off by a
rounding relative to whatever it leaves.

Keys come as bfloat16 or float16 and become float16 in their tile, divided by their length if the caller wants that.
Layout: key `[z, N 64, Hk, D]`, tables `[z, Hv, N, 6, 64]` (`order.stacked`), result `[z, Hv, N, 64, 64]`, beta not
folded in. Units: natural logarithms; exponents are masked before `exp`. Shared memory: `128 D + 40 KiB + 1 KiB n`.

Source: Yang et al., Gated Delta Networks (arXiv 2412.06464), section 3.3; docs/gated_delta_rule.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.mosaic_gpu_chunk import (
    HALF,
    PER_ROW,
    SQUARE,
    across,
    as_half,
    gated,
    half_keys,
    places,
    product,
)
from pallas_kernels.delta_rule.mosaic_gpu_tuning import CHUNK, LEVELS


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the kernel."""

    rows: int
    chunks: int
    key_heads: int
    group: int
    key_dim: int
    given: Any
    use_qk_l2norm: bool
    result: Any
    segments: bool


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of one block."""
    return {
        "keys": _mosaic_gpu.tile((CHUNK, shapes.key_dim), HALF),
        "tables": plgpu.SMEM((shapes.group, order.BETA + 1, CHUNK), jnp.float32),
        "lower": _mosaic_gpu.tile((2, *SQUARE), HALF),
        # Two, so that a warp may write the next while another still multiplies by this one.
        "inverse": _mosaic_gpu.tile((2, *SQUARE), HALF),
        "made": _mosaic_gpu.tile(SQUARE, shapes.result),
        "ready": plgpu.Barrier(num_arrivals=1 + shapes.group),
    }


def split(value):
    """A float32 matrix as the sum of two float16."""
    high = value.astype(jnp.float16)
    return high, (value - high.astype(jnp.float32)).astype(jnp.float16)


def inverted(s, lower):
    """(I + lower)^-1 of a float32 matrix in registers."""
    row, column = places()
    # Two places meet in the merge of width 2^level if that is the highest bit in which row and column differ.
    apart = jnp.where(row > column, row ^ column, 0)
    one = jnp.where(row == column, 1.0, 0.0)
    high, low = split(lower)
    s.lower.at[0][...] = high
    s.lower.at[1][...] = low

    def merge(level, inverse):
        half, stored = inverse.astype(jnp.float16), s.inverse.at[lax.rem(level, 2)]
        stored[...] = half
        plgpu.commit_smem()
        corner = product(half, s.lower.at[0]).astype(jnp.float16)
        corner = product(corner, stored)
        return jnp.where(lax.shift_right_logical(apart, level) == 1, -corner, inverse)

    # A loop: written out, the masks of all levels would live in registers at once.
    inverse = lax.fori_loop(1, LEVELS, merge, jnp.where(apart == 1, -lower, one))
    high, low = split(inverse)
    stored = s.inverse.at[LEVELS % 2]
    stored[...] = high
    plgpu.commit_smem()

    def bracket(accumulator):
        plgpu.wgmma(accumulator, high, s.lower.at[0])
        plgpu.wgmma(accumulator, low, s.lower.at[0])
        plgpu.wgmma(accumulator, high, s.lower.at[1])

    error = _mosaic_gpu.added(bracket, inverse - one)
    return inverse - product(error.astype(jnp.float16), stored)


def rounded(s, inverse, dtype):
    """`inverse` in 16 bits as `inverse (I - E)`, E what rounding alone would take from it."""
    lost = inverse - inverse.astype(dtype).astype(jnp.float32)
    # Not the tile of the Newton step, which other warps may still be reading.
    stored = s.inverse.at[1 - LEVELS % 2]
    stored[...] = lost.astype(jnp.float16)
    plgpu.commit_smem()
    return (inverse - product(inverse.astype(jnp.float16), stored)).astype(dtype)


def role(shapes: Shapes, key, tables, result, s) -> None:
    """One chunk of one key head."""
    head, chunk, row = (lax.axis_index(name) for name in ("heads", "chunk", "row"))
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(key.at[row, tokens, head], s.keys, s.ready)
    for index in range(shapes.group):
        box = tables.at[row, head * shapes.group + index, chunk, pl.ds(0, order.BETA + 1)]
        plgpu.copy_gmem_to_smem(box, s.tables.at[index], s.ready)
    plgpu.barrier_wait(s.ready)
    half_keys(s.keys, shapes.given, shapes.use_qk_l2norm)
    plgpu.commit_smem()
    overlap = product(s.keys, s.keys.T)

    @pl.loop(0, shapes.group)
    def _(index):
        row_place, column_place = places()
        table = s.tables.at[index]
        decay = gated(table, row_place > column_place, shapes.segments)
        beta = across(plgpu.load(table.at[order.BETA], layout=PER_ROW))
        inverse = rounded(s, inverted(s, beta * (decay * overlap)), shapes.result)
        # The last head's tile has left before this one's is written, by whichever warp.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        s.made[...] = inverse
        plgpu.commit_smem()
        place = result.at[row, head * shapes.group + index, chunk]
        plgpu.copy_smem_to_gmem(s.made, place)

    plgpu.wait_smem_to_gmem(0)


def inverse(
    key: jax.Array, stacked: jax.Array, *, segments: bool, use_qk_l2norm: bool = False, dtype: Any = HALF
) -> jax.Array:  # fmt: skip
    """T of every chunk, `[z, Hv, N, 64, 64]` in `dtype`.

    Args:
      key: `[z, N 64, Hk, D]`, bfloat16 or float16, D a multiple of 64 up to 256; products take it as float16.
      stacked: `order.stacked`.
      segments: whether segments start inside of chunks.
      use_qk_l2norm: keys are divided by their length first; else it is at most 1.
    """
    rows, length, key_heads, key_dim = key.shape
    value_heads, chunks = stacked.shape[1:3]
    shapes = Shapes(
        rows, chunks, key_heads, value_heads // key_heads, key_dim, key.dtype, use_qk_l2norm, dtype,
        segments,
    )  # fmt: skip
    assert length == chunks * CHUNK

    def delta_rule_inverse(*references, **scratch):
        key, stacked, result = references
        role(shapes, key, stacked, result, _mosaic_gpu.Scratch(scratch))

    return plgpu.kernel(
        delta_rule_inverse,
        out_type=jax.ShapeDtypeStruct((rows, value_heads, chunks, *SQUARE), dtype),
        scratch_types=scratch_spec(shapes),
        grid=(key_heads, chunks, rows),
        grid_names=("heads", "chunk", "row"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="delta_rule_inverse",
        **_mosaic_gpu.kernel_options(),
    )(as_half(key), stacked)
