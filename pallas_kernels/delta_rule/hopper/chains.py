"""The two chains of the gated delta rule's backward on Hopper (sm_90a), as Pallas Mosaic GPU kernels.

`states` walks the chunks of a row forwards and writes the state at the start of each (`algebra.advance`); `d_states`
walks backwards and writes the cotangent of the state at the end of each, and of the first state (`algebra.retreat`):

    N = T beta (V - since K S)               S <- whole S + K^T (until N)
    dN = until K D + P^T dO                  D <- whole D + Q^T (scale since dO) - K^T (since beta T^T dN)

A warpgroup owns 64 value columns of one head and needs nobody else. It keeps its state transposed, `[64, Dk]`, in
float32 registers, so that the left operands of the three dependent products of a chunk come from registers too. A last
warpgroup feeds chunks by TMA. One chunk ahead it makes keys, going backwards queries and dO too, float16 where they lie
(V, which no product reads, becomes that in the chain's registers), and P = scale Gamma Q K^T.

Units, precision: as in `bwd`. Layout: `Chain`; states are written as `[z, Hv, N, Dv, Dk]` in 16 bits.
Shared memory at Dk = Dv = 128, 3 chunks in flight: 157 KiB forwards, 221 KiB backwards.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS, Ref
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper.chunk import (
    HALF,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    SQUARE,
    TRANSPOSED,
    gated,
    half_keys,
    halved,
    inverse_length,
    inverse_size_within,
    product,
)
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, BackwardConfig

# Value columns of a warpgroup: the rows of a wgmma.
COLUMNS = ROWS
# Rows of `units`, powers of two: what values and states are divided by; what cotangents are; one above all queries,
# which is not used where those are normalised.
UNITS = HELD, PULLED, ASKED = range(3)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the kernels.

    Attributes:
      given: dtype of queries and keys in device memory; in shared memory they become float16.
      value_dtype: dtype of values and of the output's cotangent in device memory.
      use_qk_l2norm: queries and keys are divided by their lengths then.
      scale: multiplies what a token reads.
      segments: whether segments start inside of chunks.
    """

    rows: int
    chunks: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    given: Any
    value_dtype: DTypeLike
    use_qk_l2norm: bool
    scale: float
    segments: bool
    config: BackwardConfig

    @property
    def group(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def table_rows(self) -> int:
        return order.table_rows(segments=self.segments)

    @property
    def owners(self) -> int:
        """Warpgroups of a block of `gradients`."""
        return self.value_dim // COLUMNS

    @property
    def chain_owners(self) -> int:
        return min(self.config.chain_owners, self.owners)


# --- what the kernels share ------------------------------------------------------------------------------------------


# The casts below tell the compiler what it would find out, by a search that takes minutes or gives up.


def by_row(table: _mosaic_gpu.Ref, row: int):
    """One row of a chunk's table, where tokens are rows."""
    values = plgpu.load(table.at[row], layout=PER_ROW)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, SQUARE, [0]), MATRIX)


def by_column(table: _mosaic_gpu.Ref, row: int):
    """One row of a chunk's table, where tokens are columns."""
    values = plgpu.load(table.at[row], layout=PER_COLUMN)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, SQUARE, [1]), MATRIX)


def places():
    """Row and column of every entry."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1)
    )
    # Else masks are made once before a loop and kept in registers throughout.
    (nothing,) = _mosaic_gpu.opaque(jnp.int32(0))
    return row, column + nothing


def decayed_scores(
    shapes: Shapes, queries: jax.Array, keys: jax.Array, table: jax.Array, places=places
):
    """P of one chunk, float16."""
    scores = product(queries, keys.T)
    row, column = places()
    return (shapes.scale * gated(table, row >= column, shapes.segments) * scores).astype(HALF)


# --- the chains ------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """References of one chain: what it reads and writes in device memory."""

    query: Ref  # None going forwards
    key: Ref
    tokens: Ref  # the value going forwards, dO going backwards
    inverse: Ref
    tables: Ref
    edge: Ref  # [rows, Hv, Dv, Dk] float32: the start state, or going backwards the cotangent of the last
    spans: Ref  # int32 [rows, 3]: the row of tokens, first chunk and number of chunks of each state
    units: Ref  # [3, z, Hv] float32, rows as UNITS
    states: Ref  # written
    end: Ref  # written going backwards, else None

    @property
    def backwards(self) -> bool:
        return self.query is not None


class Place(NamedTuple):
    """Where a block of a chain stands."""

    state: jax.Array  # row of the states
    row: jax.Array  # of the tokens
    first: jax.Array  # chunk
    steps: jax.Array
    head: jax.Array
    key_head: jax.Array
    column: jax.Array  # first value column
    per_unit: jax.Array  # what the chain's tokens are multiplied by: a power of two
    asked: jax.Array  # another, above all queries


def locate(shapes: Shapes, chain: Chain) -> Place:
    """Where this block stands. Each role asks: known to both, it would be spilled before they have their registers."""
    head, state = lax.axis_index("heads"), lax.axis_index("row")
    row, first, steps = (chain.spans[state, i] for i in range(3))
    column = lax.axis_index("columns") * (shapes.chain_owners * COLUMNS)
    unit, asked = (
        chain.units[kind, row, head] for kind in (PULLED if chain.backwards else HELD, ASKED)
    )
    key_head = lax.div(head, shapes.group)
    return Place(state, row, first, steps, head, key_head, column, 1.0 / unit, asked)


def chain_scratch(shapes: Shapes, backwards: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block of a chain."""
    stages, owners, dtype = shapes.config.stages, shapes.chain_owners, HALF
    tokens = HALF if backwards else shapes.value_dtype
    ring: dict[str, Any] = {"num_barriers": stages}
    spec = {
        "keys": _mosaic_gpu.tile((stages, CHUNK, shapes.key_dim), dtype),
        "tokens": _mosaic_gpu.tile((stages, owners, CHUNK, COLUMNS), tokens),
        "inverse": _mosaic_gpu.tile((stages, *SQUARE), dtype),
        "tables": plgpu.SMEM((stages, shapes.table_rows, CHUNK), jnp.float32),
        "staged": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "ready": plgpu.Barrier(num_arrivals=3 + owners + (1 if backwards else 0), **ring),
        "prepared": plgpu.Barrier(num_barriers=2),
        "free": plgpu.Barrier(num_arrivals=owners, **ring),
    }
    if backwards:
        spec["queries"] = _mosaic_gpu.tile((stages, CHUNK, shapes.key_dim), dtype)
        spec["inside"] = _mosaic_gpu.tile((2, *SQUARE), dtype)
    return spec


def chunk_of(chain: Chain, place: Place, step: jax.Array):
    return place.first + (place.steps - 1 - step if chain.backwards else step)


def fetch(
    shapes: Shapes, chain: Chain, s: _mosaic_gpu.Scratch, place: Place, step, slot: jax.Array
) -> None:
    """Brings everything of one chunk."""
    chunk, ready = chunk_of(chain, place, step), s.ready.at[slot]
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    of_key = (place.row, tokens, place.key_head)
    plgpu.copy_gmem_to_smem(chain.key.at[of_key], s.keys.at[slot], ready)
    if chain.backwards:
        plgpu.copy_gmem_to_smem(chain.query.at[of_key], s.queries.at[slot], ready)
    for owner in range(shapes.chain_owners):
        columns = pl.ds(place.column + owner * COLUMNS, COLUMNS)
        box = chain.tokens.at[place.row, tokens, place.head, columns]
        plgpu.copy_gmem_to_smem(box, s.tokens.at[slot, owner], ready)
    of_chunk = (place.row, place.head, chunk)
    plgpu.copy_gmem_to_smem(chain.inverse.at[of_chunk], s.inverse.at[slot], ready)
    plgpu.copy_gmem_to_smem(chain.tables.at[of_chunk], s.tables.at[slot], ready)


def prepare(
    shapes: Shapes, chain: Chain, s: _mosaic_gpu.Scratch, place: Place, slot: jax.Array
) -> None:
    """Keys of a chunk, going backwards queries and dO too, as float16 where they lie.

    What a query is divided by multiplies the cotangent of what it reads.
    """
    half_keys(s.keys.at[slot], shapes.given, shapes.use_qk_l2norm)
    if chain.backwards:
        size = functools.partial(inverse_size_within, asked=place.asked)
        size = inverse_length if shapes.use_qk_l2norm else size
        length = halved(s.queries.at[slot], shapes.given, size)
        factor = place.per_unit if length is None else place.per_unit * length
        for owner in range(shapes.chain_owners):
            halved(s.tokens.at[slot, owner], shapes.value_dtype, lambda _: (factor, None))
    plgpu.commit_smem()


def feeding_role(shapes: Shapes, chain: Chain, s: _mosaic_gpu.Scratch) -> None:
    """Feeds chunks, `stages` ahead, and prepares them one chunk ahead; going backwards makes P too."""
    if shapes.chain_owners > 1:
        plgpu.set_max_registers(shapes.config.feeding_registers, action="decrease")
    place = locate(shapes, chain)
    stages, steps = shapes.config.stages, place.steps

    @pl.loop(0, lax.min(stages, steps))
    def _(step):
        fetch(shapes, chain, s, place, step, step)

    @pl.loop(0, steps)
    def _(step):
        slot, before = lax.rem(step, stages), lax.rem(step + (stages - 1), stages)
        plgpu.barrier_wait(s.ready.at[slot])
        prepare(shapes, chain, s, place, slot)
        if chain.backwards:
            inside = s.inside.at[lax.rem(step, 2)]
            inside[...] = decayed_scores(
                shapes, s.queries.at[slot], s.keys.at[slot], s.tables.at[slot]
            )
            plgpu.commit_smem()
        plgpu.barrier_arrive(s.prepared.at[lax.rem(step, 2)])

        # Awaited at every step, so that P may replace the one of two chunks ago.
        @pl.when(step >= 1)
        def _():
            plgpu.barrier_wait(s.free.at[before])

        @pl.when((step >= 1) & (step - 1 + stages < steps))
        def _():
            fetch(shapes, chain, s, place, step - 1 + stages, before)

    if _mosaic_gpu.interpreting():
        # The interpreter insists that every completed phase of a barrier is observed; the hardware does not care.
        @pl.when(steps >= 1)
        def _():
            plgpu.barrier_wait(s.free.at[lax.rem(steps - 1, stages)])


def turned(tile: _mosaic_gpu.Ref):
    """A 16-bit tile `[tokens, columns]` in registers as `[columns, tokens]`, float32."""
    value = plgpu.layout_cast(plgpu.load(tile.T, layout=TRANSPOSED), MATRIX)
    return value.astype(jnp.float32)


def replayed(
    _: Shapes,
    s: _mosaic_gpu.Scratch,
    place: Place,
    wg: jax.Array,
    slot: jax.Array,
    __,
    state: jax.Array,
    rounded: jax.Array,
):
    """The state after a chunk (`algebra.advance`)."""
    table, keys = s.tables.at[slot], s.keys.at[slot]
    recalled = product(rounded, keys.T)
    value = place.per_unit * turned(s.tokens.at[slot, wg])
    residual = value - by_column(table, order.SINCE) * recalled
    written = (by_column(table, order.BETA) * residual).astype(HALF)
    update = product(written, s.inverse.at[slot].T)
    leaving = (by_column(table, order.UNTIL) * update).astype(HALF)
    whole = s.tables[slot, order.SINCE, CHUNK - 1]
    return _mosaic_gpu.added(lambda a: plgpu.wgmma(a, leaving, keys), whole * state)


def retreated(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    _,
    wg: jax.Array,
    slot: jax.Array,
    two,
    state: jax.Array,
    rounded: jax.Array,
):
    """The cotangent of the state before a chunk (`algebra.retreat`)."""
    table, keys = s.tables.at[slot], s.keys.at[slot]
    echoed = product(rounded, keys.T)
    d_out = s.tokens.at[slot, wg]
    d_update = _mosaic_gpu.added(
        lambda a: plgpu.wgmma(a, d_out.T, s.inside.at[two]),
        by_column(table, order.UNTIL) * echoed,
    )
    d_write = product(d_update.astype(HALF), s.inverse.at[slot])
    # In units of the chunk's first decay, the largest: a strong one would leave the range of float16.
    unit = s.tables[slot, order.SINCE, 0]
    # Below that the quotient would be infinite; what is left of the state then is zero.
    per_unit = jnp.where(unit > 1e-37, 1.0 / unit, 0.0)
    since = per_unit * by_column(table, order.SINCE)
    reading = (shapes.scale * since * turned(d_out)).astype(HALF)
    recalling = (-(since * by_column(table, order.BETA)) * d_write).astype(HALF)

    def both(accumulator):
        plgpu.wgmma(accumulator, reading, s.queries.at[slot])
        plgpu.wgmma(accumulator, recalling, keys)

    whole = s.tables[slot, order.SINCE, CHUNK - 1]
    return unit * _mosaic_gpu.added(both, (whole * per_unit) * state)


def chain_role(shapes: Shapes, chain: Chain, s: _mosaic_gpu.Scratch, wg: jax.Array) -> None:
    """64 value columns of a head, from one end of the row to the other."""
    if shapes.chain_owners > 1:
        plgpu.set_max_registers(shapes.config.chain_registers, action="increase")
    place = locate(shapes, chain)
    columns = pl.ds(place.column + wg * COLUMNS, COLUMNS)
    edge = (place.state, place.head, columns)
    state = plgpu.load(chain.edge.at[edge], layout=MATRIX, optimized=False)
    move = retreated if chain.backwards else replayed

    def body(step, state):
        slot, two = lax.rem(step, shapes.config.stages), lax.rem(step, 2)
        (me,) = _mosaic_gpu.opaque(wg)
        rounded = state.astype(HALF)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.staged.at[me][...] = rounded
        plgpu.commit_smem()
        chunk = chunk_of(chain, place, step)
        box = chain.states.at[place.row, place.head, chunk, columns]
        plgpu.copy_smem_to_gmem(s.staged.at[me], box)
        plgpu.barrier_wait(s.ready.at[slot])
        plgpu.barrier_wait(s.prepared.at[two])
        state = move(shapes, s, place, me, slot, two, state, rounded)
        # Tables and tokens were read from the slot: order those reads before TMA fills it again.
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.free.at[slot])
        return state

    state = lax.fori_loop(0, place.steps, body, state)
    if chain.backwards:
        chain.end.at[edge][...] = state
    # Shared memory is the block's only as long as it runs; device memory is complete when the kernel is.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def run_chain(shapes: Shapes, name: str, arrays: dict[str, jax.Array]):
    """`states`, and going backwards `end`."""
    backwards, owners = "query" in arrays, shapes.chain_owners
    like = (shapes.rows, shapes.value_heads, shapes.chunks, shapes.value_dim, shapes.key_dim)
    out_type: Any = {"states": jax.ShapeDtypeStruct(like, HALF)}
    if backwards:
        out_type["end"] = jax.ShapeDtypeStruct(arrays["edge"].shape, jnp.float32)

    def kernel(*refs, **scratch):
        named = dict(zip([*arrays, *out_type], refs, strict=True))
        chain = Chain(**{field: named.get(field) for field in Chain._fields})
        s, wg = _mosaic_gpu.Scratch(scratch), lax.axis_index("warpgroup")
        pl.when(wg < owners)(lambda: chain_role(shapes, chain, s, wg))
        pl.when(wg == owners)(lambda: feeding_role(shapes, chain, s))

    return plgpu.kernel(
        kernel,
        out_type=tuple(out_type.values()),
        scratch_types=chain_scratch(shapes, backwards),
        grid=(shapes.value_heads, shapes.owners // owners, arrays["edge"].shape[0]),
        grid_names=("heads", "columns", "row"),
        num_threads=owners + 1,
        thread_name="warpgroup",
        kernel_name=name,
        **_mosaic_gpu.kernel_options(),
    )(*arrays.values())
