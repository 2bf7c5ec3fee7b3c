"""What a chunk is before any state is known, on Hopper (sm_90a): the table of its gates and its triangular inverse.

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

The gates are summed as two floats each (`algebra.two_float_cumsum`), in six steps through shared memory.

Keys come as bfloat16 or float16 and become float16 in their tile, divided by their length if the caller wants that.
Layout: key `[z, N 64, Hk, D]`, gates `[z, Hv, N, 64]` (`order.gates`), T `[z, Hv, N, 64, 64]`, beta not folded in,
tables `[z, Hv, N, 5 or 6, 64]` (rows: `order.HIGH` to `order.SEGMENT`). Units: natural logarithms; exponents are masked
before `exp`. Shared memory: `128 D + 42 KiB + 1.5 KiB n`.

Source: Yang et al., Gated Delta Networks (arXiv 2412.06464), section 3.3; docs/gated_delta_rule.md.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import algebra, order
from pallas_kernels.delta_rule.hopper.chunk import (
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
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, LEVELS


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

    @property
    def table_rows(self) -> int:
        return order.table_rows(segments=self.segments)


class Inputs(NamedTuple):
    """References to device memory; `segment` is None where nothing is packed in place."""

    key: Any
    g: Any
    beta: Any
    segment: Any = None


class Prologue(NamedTuple):
    """What the walks over chunks read besides the tokens.

    Attributes:
      inverse: T `[z, Hv, N, 64, 64]`.
      tables: `[z, Hv, N, order.table_rows(...), 64]` float32.
    """

    inverse: Any
    tables: Any


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of one block."""
    return {
        "keys": _mosaic_gpu.tile((CHUNK, shapes.key_dim), HALF),
        "tables": plgpu.SMEM((shapes.group, shapes.table_rows, CHUNK), jnp.float32),
        # In turn; in front of each 64 sums there are 64 zeros.
        "sums": plgpu.SMEM((2, 2, 2 * CHUNK), jnp.float32),
        "lower": _mosaic_gpu.tile((2, *SQUARE), HALF),
        # Two, so that a warp may write the next while another still multiplies by this one.
        "inverse": _mosaic_gpu.tile((2, *SQUARE), HALF),
        "made": _mosaic_gpu.tile(SQUARE, shapes.result),
        "ready": plgpu.Barrier(num_arrivals=1 + shapes.group * (3 if shapes.segments else 2)),
    }


def split(value: jax.Array):
    """A float32 matrix as the sum of two float16."""
    high = value.astype(jnp.float16)
    return high, (value - high.astype(jnp.float32)).astype(jnp.float16)


def inverted(s: _mosaic_gpu.Scratch, lower: jax.Array):
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


def rounded(s: _mosaic_gpu.Scratch, inverse: jax.Array, dtype):
    """`inverse` in 16 bits as `inverse (I - E)`, E what rounding alone would take from it."""
    lost = inverse - inverse.astype(dtype).astype(jnp.float32)
    # Not the tile of the Newton step, which other warps may still be reading.
    stored = s.inverse.at[1 - LEVELS % 2]
    stored[...] = lost.astype(jnp.float16)
    plgpu.commit_smem()
    return (inverse - product(inverse.astype(jnp.float16), stored)).astype(dtype)


def zeros():
    """A zero per token, laid out like what is not constant."""
    return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), PER_ROW)


def summed(s: _mosaic_gpu.Scratch, gates):
    """`algebra.two_float_cumsum` of a chunk's gates."""
    high, low = gates, zeros()
    for step in range(LEVELS):
        sums, before = s.sums.at[step % 2], pl.ds(CHUNK - 2**step, CHUNK)
        for row, part in enumerate((high, low)):
            sums.at[row, pl.ds(CHUNK, CHUNK)][...] = part
        plgpu.commit_smem()
        others = (plgpu.load(sums.at[row, before], layout=PER_ROW) for row in range(2))
        high, low = algebra.two_float_add(high, low, *others)
    return high, low


def complete(shapes: Shapes, s: _mosaic_gpu.Scratch, table) -> None:
    """Makes the table of a chunk whose gates lie where their sums will; `commit_smem` before it leaves."""
    rows = lambda row: plgpu.load(table.at[row], layout=PER_ROW)
    high, low = summed(s, rows(order.HIGH))
    table.at[order.HIGH][...] = high
    table.at[order.LOW][...] = low
    plgpu.commit_smem()
    last = CHUNK - 1
    until = jnp.exp((table[order.HIGH, last] - high) + (table[order.LOW, last] - low))
    since = jnp.exp(high + low)
    if shapes.segments:
        segment = rows(order.SEGMENT)
        until = jnp.where(segment == table[order.SEGMENT, last], until, 0.0)
        since = jnp.where(segment == 0.0, since, 0.0)
    table.at[order.UNTIL][...] = until
    table.at[order.SINCE][...] = since


def role(shapes: Shapes, inputs: Inputs, outputs: Prologue, s: _mosaic_gpu.Scratch) -> None:
    """One chunk of one key head."""
    head, chunk, row = (lax.axis_index(name) for name in ("heads", "chunk", "row"))
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(inputs.key.at[row, tokens, head], s.keys, s.ready)
    for index in range(shapes.group):
        place, table = (row, head * shapes.group + index, chunk), s.tables.at[index]
        plgpu.copy_gmem_to_smem(inputs.g.at[place], table.at[order.HIGH], s.ready)
        plgpu.copy_gmem_to_smem(inputs.beta.at[place], table.at[order.BETA], s.ready)
        if shapes.segments:
            segment = inputs.segment.at[row, chunk]
            plgpu.copy_gmem_to_smem(segment, table.at[order.SEGMENT], s.ready)
    for buffer in range(2):
        for part in range(2):
            s.sums.at[buffer, part, pl.ds(0, CHUNK)][...] = zeros()
    plgpu.barrier_wait(s.ready)
    half_keys(s.keys, shapes.given, shapes.use_qk_l2norm)
    plgpu.commit_smem()
    overlap = product(s.keys, s.keys.T)

    @pl.loop(0, shapes.group)
    def _(index):
        row_place, column_place = places()
        table = s.tables.at[index]
        complete(shapes, s, table)
        decay = gated(table, row_place > column_place, shapes.segments)
        beta = across(plgpu.load(table.at[order.BETA], layout=PER_ROW))
        inverse = rounded(s, inverted(s, beta * (decay * overlap)), shapes.result)
        # The last head's tile has left before this one's is written, by whichever warp.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        s.made[...] = inverse
        plgpu.commit_smem()
        place = (row, head * shapes.group + index, chunk)
        plgpu.copy_smem_to_gmem(s.made, outputs.inverse.at[place])
        plgpu.copy_smem_to_gmem(table, outputs.tables.at[place])

    plgpu.wait_smem_to_gmem(0)


def prologue(
    key: jax.Array, gates: order.Gates, *, use_qk_l2norm: bool = False, dtype: DTypeLike = HALF
) -> Prologue:
    """T, in `dtype`, and the table of gates of every chunk.

    Args:
      key: `[z, N 64, Hk, D]`, bfloat16 or float16, D a multiple of 64 up to 256; products take it as float16.
      gates: `order.gates`.
      use_qk_l2norm: keys are divided by their length first; else it is at most 1.
    """
    rows, length, key_heads, key_dim = key.shape
    value_heads, chunks = gates.g.shape[1:3]
    shapes = Shapes(
        rows,
        chunks,
        key_heads,
        value_heads // key_heads,
        key_dim,
        key.dtype,
        use_qk_l2norm,
        dtype,
        gates.segment is not None,
    )
    assert length == chunks * CHUNK
    given = [as_half(key), *(array for array in gates if array is not None)]

    def delta_rule_prologue(*references, **scratch):
        inputs, outputs = Inputs(*references[: len(given)]), Prologue(*references[len(given) :])
        role(shapes, inputs, outputs, _mosaic_gpu.Scratch(scratch))

    of_chunk = (rows, value_heads, chunks)
    found = plgpu.kernel(
        delta_rule_prologue,
        out_type=(
            jax.ShapeDtypeStruct((*of_chunk, *SQUARE), dtype),
            jax.ShapeDtypeStruct((*of_chunk, shapes.table_rows, CHUNK), jnp.float32),
        ),
        scratch_types=scratch_spec(shapes),
        grid=(key_heads, chunks, rows),
        grid_names=("heads", "chunk", "row"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="delta_rule_prologue",
        **_mosaic_gpu.kernel_options(),
    )(*given)
    return Prologue(*found)
