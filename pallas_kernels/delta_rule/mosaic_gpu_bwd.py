"""Backward of the gated delta rule on Hopper (sm_90a), as three Pallas Mosaic GPU kernels without atomics.

Derivation (docs/gated_delta_rule.md; `algebra.advance`, `retreat`, `chunk_gradients`), for a chunk that starts in state
S and whose end state has cotangent D. Decays: Gamma inside the chunk, `since` its start, `until` its end, `whole`.

    E = V - since K S        N = T (beta E)        P = scale Gamma Q K^T        S <- whole S + K^T (until N)
    dN = until K D + P^T dO        dR = T^T dN        D <- whole D + Q^T (scale since dO) - K^T (since beta dR)
    dV = beta dR        dP = dO N^T        dL = -tril(dR N^T)        dbeta = rows(dR E + dL Gamma K K^T)

`states`: walks the chunks forwards and writes the state at the start of each, 16-bit. `d_states`: walks backwards and
writes the cotangent of the state at the end of each, and of the first state. In both a warpgroup owns 64 value columns
of one head and needs nobody else: it keeps them transposed, `[64 value columns, Dk]`, in float32 registers, so that the
left operands of its three dependent products per chunk come from registers too. A last warpgroup feeds chunks by TMA
and, going backwards, makes P one chunk ahead.
`gradients`: a block owns one chunk of one key head, each of its warpgroups 64 value columns of every value head in
turn. All that it makes is linear in the value columns, so the warpgroups meet once, to add dq and dk; the sums over the
value heads of a key head stay in registers. dg is the sum over `i >= t > j` of what acts between tokens j and i
(`algebra.corner_sum`, here a product of a triangle of ones with the sum of two 16-bit matrices), plus what acts between
a token and the chunk's edges, whose sums over tokens are left to XLA: no term is added to be subtracted again.

Units: gates, states, sums and accumulators in float32, 16-bit operands of every product, decays masked before `exp`,
beta applied in float32. Every sum has one order, so results repeat bit for bit.
Layout: query, key `[z, N 64, Hk, Dk]`, value `[z, N 64, Hv, Dv]`, T `[z, Hv, N, 64, 64]`, states `[z, Hv, N, Dv, Dk]`.
Shared memory at Dk = Dv = 128: 222 KiB (chains, 3 chunks in flight), 206 KiB (gradients).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS
from pallas_kernels.delta_rule import algebra

MATRIX, TRANSPOSED, PER_ROW, PER_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA_TRANSPOSED,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)
# Tokens of a chunk, and value columns of a warpgroup: both are the rows of a wgmma somewhere.
CHUNK = COLUMNS = ROWS
SQUARE = (CHUNK, CHUNK)
# Rows of the table of one chunk.
HIGH, LOW, SINCE, UNTIL, BETA, SEGMENT = range(6)
# Rows of what `gradients` returns per token.
D_BETA, D_GATE, AT_READER, AT_WRITER, INNER = range(5)


class Gradients(NamedTuple):
    """Cotangents of the operands (16-bit), and in float32 of g and beta `[z, Hv, L]` and of the start state."""

    query: Any
    key: Any
    value: Any
    g: Any
    beta: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Config:
    """How the backward kernels are tiled.

    Attributes:
      chain_owners: warpgroups of a block of the two chains, 64 value columns each: 1 spreads a head over more blocks.
      stages: chunks in flight in the chains.
      compute_registers, memory_registers: per thread, after `setmaxnreg`, in blocks of two compute warpgroups.
    """

    chain_owners: int = 2
    stages: int = 3
    compute_registers: int = 208
    memory_registers: int = 88


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the kernels."""

    rows: int
    chunks: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: Any
    scale: float
    segments: bool
    config: Config

    @property
    def group(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def owners(self) -> int:
        """Warpgroups of a block of `gradients`."""
        return self.value_dim // COLUMNS

    @property
    def chain_owners(self) -> int:
        return min(self.config.chain_owners, self.owners)


# --- what the kernels share ------------------------------------------------------------------------------------------


# The casts below tell the compiler what it would find out, by a search that takes minutes or gives up.


def by_row(table, row: int):
    """One row of a chunk's table, where tokens are rows."""
    values = plgpu.load(table.at[row], layout=PER_ROW)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, SQUARE, [0]), MATRIX)


def by_column(table, row: int):
    """One row of a chunk's table, where tokens are columns."""
    # The compiler would merge two loads of one row into one, which then would need two layouts.
    (again,) = _mosaic_gpu.opaque(jnp.int32(row))
    values = plgpu.load(table.at[again], layout=PER_COLUMN)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, SQUARE, [1]), MATRIX)


def places():
    """Row and column of every entry."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1))


def between(shapes: Shapes, table, visible):
    """Decay between the tokens of a chunk where `visible`, else 0."""
    exponent = by_row(table, HIGH) - by_column(table, HIGH)
    exponent += by_row(table, LOW) - by_column(table, LOW)
    if shapes.segments:
        visible = visible & (by_row(table, SEGMENT) == by_column(table, SEGMENT))
    return jnp.where(visible, jnp.exp(jnp.where(visible, exponent, 0.0)), 0.0)


def product(left, right, columns: int = CHUNK):
    """`left @ right` in float32, 64 rows; waits for every product in flight."""

    def run(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(run, _mosaic_gpu.accumulator(ROWS, columns))


def decayed_scores(shapes: Shapes, queries, keys, table):
    """P of one chunk, in the operands' dtype."""
    scores = product(queries, keys.T)
    row, column = places()
    return (shapes.scale * between(shapes, table, row >= column) * scores).astype(shapes.dtype)


# --- the chains ------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """References of one chain: what it reads and writes in device memory."""

    query: Any  # None going forwards
    key: Any
    tokens: Any  # the value going forwards, dO going backwards
    inverse: Any
    tables: Any
    edge: Any  # [rows, Hv, Dv, Dk] float32: the start state, or going backwards the cotangent of the last
    spans: Any  # int32 [rows, 3]: the row of tokens, first chunk and number of chunks of each state
    states: Any  # written
    end: Any  # written going backwards, else None

    @property
    def backwards(self) -> bool:
        return self.query is not None


class Place(NamedTuple):
    """Where a block of a chain stands."""

    state: Any  # row of the states
    row: Any  # of the tokens
    first: Any  # chunk
    steps: Any
    head: Any
    key_head: Any
    column: Any  # first value column


def locate(shapes: Shapes, chain: Chain) -> Place:
    head, state = lax.axis_index("heads"), lax.axis_index("row")
    row, first, steps = (chain.spans[state, i] for i in range(3))
    column = lax.axis_index("columns") * (shapes.chain_owners * COLUMNS)
    return Place(state, row, first, steps, head, lax.div(head, shapes.group), column)


def chain_scratch(shapes: Shapes, backwards: bool) -> dict[str, Any]:
    """Shared memory and barriers of a block of a chain."""
    stages, owners, dtype = shapes.config.stages, shapes.chain_owners, shapes.dtype
    ring: dict[str, Any] = {"num_barriers": stages}
    spec = {
        "keys": _mosaic_gpu.tile((stages, CHUNK, shapes.key_dim), dtype),
        "tokens": _mosaic_gpu.tile((stages, owners, CHUNK, COLUMNS), dtype),
        "inverse": _mosaic_gpu.tile((stages, *SQUARE), dtype),
        "tables": plgpu.SMEM((stages, SEGMENT + 1, CHUNK), jnp.float32),
        "staged": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "ready": plgpu.Barrier(num_arrivals=3 + owners + (1 if backwards else 0), **ring),
        "free": plgpu.Barrier(num_arrivals=owners, **ring),
    }
    if backwards:
        spec["queries"] = _mosaic_gpu.tile((stages, CHUNK, shapes.key_dim), dtype)
        spec["inside"] = _mosaic_gpu.tile((2, *SQUARE), dtype)
        spec["inside_ready"] = plgpu.Barrier(num_barriers=2)
    return spec


def chunk_of(chain: Chain, place: Place, step):
    return place.first + (place.steps - 1 - step if chain.backwards else step)


def fetch(shapes: Shapes, chain: Chain, s, place: Place, step, slot) -> None:
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


def feeding_role(shapes: Shapes, chain: Chain, s, place: Place) -> None:
    """Feeds chunks, `stages` ahead; going backwards also makes P, one chunk ahead."""
    stages, steps = shapes.config.stages, place.steps
    if shapes.chain_owners > 1:
        plgpu.set_max_registers(shapes.config.memory_registers, action="decrease")

    @pl.loop(0, lax.min(stages, steps))
    def _(step):
        fetch(shapes, chain, s, place, step, step)

    @pl.loop(0, steps)
    def _(step):
        slot, before = lax.rem(step, stages), lax.rem(step + (stages - 1), stages)
        if chain.backwards:
            plgpu.barrier_wait(s.ready.at[slot])
            inside = s.inside.at[lax.rem(step, 2)]
            inside[...] = decayed_scores(
                shapes, s.queries.at[slot], s.keys.at[slot], s.tables.at[slot]
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.inside_ready.at[lax.rem(step, 2)])

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


def turned(tile):
    """A 16-bit tile `[tokens, columns]` in registers as `[columns, tokens]`, float32."""
    value = plgpu.layout_cast(plgpu.load(tile.T, layout=TRANSPOSED), MATRIX)
    return value.astype(jnp.float32)


def replayed(shapes: Shapes, s, wg, slot, _, state, rounded):
    """The state after a chunk (`algebra.advance`)."""
    table, keys = s.tables.at[slot], s.keys.at[slot]
    recalled = product(rounded, keys.T)
    residual = turned(s.tokens.at[slot, wg]) - by_column(table, SINCE) * recalled
    written = (by_column(table, BETA) * residual).astype(shapes.dtype)
    update = product(written, s.inverse.at[slot].T)
    leaving = (by_column(table, UNTIL) * update).astype(shapes.dtype)
    whole = s.tables[slot, SINCE, CHUNK - 1]
    return _mosaic_gpu.added(lambda a: plgpu.wgmma(a, leaving, keys), whole * state)


def retreated(shapes: Shapes, s, wg, slot, step, state, rounded):
    """The cotangent of the state before a chunk (`algebra.retreat`)."""
    table, keys, buffer = s.tables.at[slot], s.keys.at[slot], lax.rem(step, 2)
    echoed = product(rounded, keys.T)
    plgpu.barrier_wait(s.inside_ready.at[buffer])
    d_out = s.tokens.at[slot, wg]
    d_update = _mosaic_gpu.added(
        lambda a: plgpu.wgmma(a, d_out.T, s.inside.at[buffer]), by_column(table, UNTIL) * echoed
    )
    d_write = product(d_update.astype(shapes.dtype), s.inverse.at[slot])
    since = by_column(table, SINCE)
    reading = (shapes.scale * since * turned(d_out)).astype(shapes.dtype)
    recalling = (-(since * by_column(table, BETA)) * d_write).astype(shapes.dtype)

    def both(accumulator):
        plgpu.wgmma(accumulator, reading, s.queries.at[slot])
        plgpu.wgmma(accumulator, recalling, keys)

    return _mosaic_gpu.added(both, s.tables[slot, SINCE, CHUNK - 1] * state)


def chain_role(shapes: Shapes, chain: Chain, s, place: Place, wg) -> None:
    """64 value columns of a head, from one end of the row to the other."""
    if shapes.chain_owners > 1:
        plgpu.set_max_registers(shapes.config.compute_registers, action="increase")
    columns = pl.ds(place.column + wg * COLUMNS, COLUMNS)
    edge = (place.state, place.head, columns)
    state = plgpu.load(chain.edge.at[edge], layout=MATRIX, optimized=False)
    move = retreated if chain.backwards else replayed

    def body(step, state):
        slot = lax.rem(step, shapes.config.stages)
        (me,) = _mosaic_gpu.opaque(wg)
        rounded = state.astype(shapes.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.staged.at[me][...] = rounded
        plgpu.commit_smem()
        chunk = chunk_of(chain, place, step)
        box = chain.states.at[place.row, place.head, chunk, columns]
        plgpu.copy_smem_to_gmem(s.staged.at[me], box)
        plgpu.barrier_wait(s.ready.at[slot])
        state = move(shapes, s, me, slot, step, state, rounded)
        # Tables and tokens were read from the slot: order those reads before TMA fills it again.
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.free.at[slot])
        return state

    state = lax.fori_loop(0, place.steps, body, state)
    if chain.backwards:
        chain.end.at[edge][...] = state
    plgpu.wait_smem_to_gmem(0)


def run_chain(shapes: Shapes, name: str, arrays: dict[str, jax.Array]):
    """`states`, and going backwards `end`."""
    backwards, owners = "query" in arrays, shapes.chain_owners
    like = (shapes.rows, shapes.value_heads, shapes.chunks, shapes.value_dim, shapes.key_dim)
    out_type: Any = {"states": jax.ShapeDtypeStruct(like, shapes.dtype)}
    if backwards:
        out_type["end"] = jax.ShapeDtypeStruct(arrays["edge"].shape, jnp.float32)

    def kernel(*refs, **scratch):
        named = dict(zip([*arrays, *out_type], refs, strict=True))
        chain = Chain(**{field: named.get(field) for field in Chain._fields})
        place = locate(shapes, chain)
        s, wg = _mosaic_gpu.Scratch(scratch), lax.axis_index("warpgroup")
        pl.when(wg < owners)(lambda: chain_role(shapes, chain, s, place, wg))
        pl.when(wg == owners)(lambda: feeding_role(shapes, chain, s, place))

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


# --- gradients of a chunk --------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """References of `gradients`: what it reads and writes in device memory."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    inverse: Any
    tables: Any
    states: Any
    d_states: Any
    d_query: Any
    d_key: Any
    d_value: Any
    sums: Any  # [z, Hv, N, owners, 5, 64] float32


def gradient_scratch(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of a block of `gradients`."""
    owners, dtype = shapes.owners, shapes.dtype
    of_key, of_value, square = (
        (CHUNK, shapes.key_dim),
        (owners, CHUNK, COLUMNS),
        (owners, *SQUARE),
    )
    return {
        "queries": _mosaic_gpu.tile(of_key, dtype),
        "keys": _mosaic_gpu.tile(of_key, dtype),
        "values": _mosaic_gpu.tile(of_value, dtype),
        "d_outs": _mosaic_gpu.tile(of_value, dtype),
        "states": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "d_states": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "inverse": _mosaic_gpu.tile(square, dtype),
        "tables": plgpu.SMEM((owners, SEGMENT + 1, CHUNK), jnp.float32),
        "left": _mosaic_gpu.tile(square, dtype),
        "updates": _mosaic_gpu.tile(of_value, dtype),
        "right": _mosaic_gpu.tile(square, dtype),
        "sums": plgpu.SMEM((owners, INNER + 1, CHUNK), jnp.float32),
        "keys_ready": plgpu.Barrier(num_arrivals=2),
        "ready": plgpu.Barrier(num_arrivals=6, num_barriers=owners),
        "free": plgpu.Barrier(num_barriers=owners),
        "met": plgpu.Barrier(num_arrivals=owners),
    }


class Owner:
    """The tiles of one warpgroup."""

    def __init__(self, s, wg):
        self.queries, self.keys = s.queries, s.keys
        for name in (
            "values", "d_outs", "states", "d_states", "inverse", "tables", "left", "updates", "right", "sums",
        ):  # fmt: skip
            setattr(self, name, getattr(s, name).at[wg])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def gradient_memory_role(shapes: Shapes, chunk: Chunk, s, row, index, key_head) -> None:
    """Brings queries and keys, then every value head, to each warpgroup when it is done with the one before."""
    if shapes.owners > 1:
        plgpu.set_max_registers(24, action="decrease")
    tokens = pl.ds(index * CHUNK, CHUNK)
    of_key = (row, tokens, key_head)
    plgpu.copy_gmem_to_smem(chunk.query.at[of_key], s.queries, s.keys_ready)
    plgpu.copy_gmem_to_smem(chunk.key.at[of_key], s.keys, s.keys_ready)

    @pl.loop(0, shapes.group)
    def _(member):
        head = key_head * shapes.group + member
        for owner in range(shapes.owners):
            ready, columns = s.ready.at[owner], pl.ds(owner * COLUMNS, COLUMNS)

            @pl.when(member >= 1)
            def _(owner=owner):
                plgpu.barrier_wait(s.free.at[owner])

            of_value, of_chunk = (row, tokens, head, columns), (row, head, index)
            for array, target, place in (
                (chunk.states, s.states, (*of_chunk, columns)),
                (chunk.value, s.values, of_value),
                (chunk.inverse, s.inverse, of_chunk),
                (chunk.tables, s.tables, of_chunk),
                (chunk.d_states, s.d_states, (*of_chunk, columns)),
                (chunk.d_out, s.d_outs, of_value),
            ):
                plgpu.copy_gmem_to_smem(array.at[place], target.at[owner], ready)

    if _mosaic_gpu.interpreting():
        for owner in range(shapes.owners):
            plgpu.barrier_wait(s.free.at[owner])


def head_gradients(shapes: Shapes, own: Owner, d_query, d_key, store) -> None:
    """Adds a value head's part of dq and dk to the accumulators, hands dV to `store`, and fills the sums."""
    table, dtype = own.tables, shapes.dtype
    wide = lambda tile: plgpu.load(tile, layout=MATRIX).astype(jnp.float32)
    own.right[...] = decayed_scores(shapes, own.queries, own.keys, table)

    residual = wide(own.values) - by_row(table, SINCE) * product(own.keys, own.states.T)
    own.left[...] = (by_row(table, BETA) * residual).astype(dtype)
    plgpu.commit_smem()
    update = product(own.inverse, own.left)
    own.updates[...] = update.astype(dtype)
    leaving = (by_row(table, UNTIL) * update).astype(dtype)
    plgpu.commit_smem()

    plgpu.wgmma(d_key, leaving, own.d_states)
    echoed = product(own.keys, own.d_states.T)
    own.sums.at[AT_WRITER][...] = (leaving.astype(jnp.float32) * echoed).sum(axis=1)
    d_update = _mosaic_gpu.added(
        lambda a: plgpu.wgmma(a, own.right.T, own.d_outs), by_row(table, UNTIL) * echoed
    )
    own.left[...] = d_update.astype(dtype)
    plgpu.commit_smem()
    d_write = product(own.inverse.T, own.left)

    d_residual = by_row(table, BETA) * d_write
    at_reader = -(d_residual * (wide(own.values) - residual)).sum(axis=1)
    d_beta = (d_write * residual).sum(axis=1)
    own.values[...] = d_residual.astype(dtype)
    plgpu.commit_smem()
    store(own.values)
    plgpu.wgmma(d_key, (-by_row(table, SINCE) * d_residual).astype(dtype), own.states)

    # From here on -dL, to save a negation.
    d_lower = product(d_write.astype(dtype), own.updates.T)
    row, column = places()
    decay = between(shapes, table, row > column)
    overlap = decay * product(own.keys, own.keys.T)
    own.sums.at[D_BETA][...] = d_beta - (d_lower * overlap).sum(axis=1)
    pairs = -(by_row(table, BETA) * overlap * d_lower)
    d_overlap = (-(by_row(table, BETA) * decay) * d_lower).astype(dtype)
    own.left[...] = d_overlap
    plgpu.commit_smem()
    plgpu.wgmma(d_key, d_overlap, own.keys)
    plgpu.wgmma(d_key, own.left.T, own.keys)

    d_inside = product(own.d_outs, own.updates.T)
    pairs += jnp.where(row > column, d_inside * wide(own.right), 0.0)
    d_scores = (shapes.scale * between(shapes, table, row >= column) * d_inside).astype(dtype)
    own.right[...] = d_scores
    plgpu.commit_smem()
    plgpu.wgmma(d_query, d_scores, own.keys)
    plgpu.wgmma(d_key, own.right.T, own.queries)

    d_carried = shapes.scale * by_row(table, SINCE) * wide(own.d_outs)
    plgpu.wgmma(d_query, d_carried.astype(dtype), own.states)
    at_reader += (d_carried * product(own.queries, own.states.T)).sum(axis=1)
    own.sums.at[AT_READER][...] = at_reader
    own.sums.at[D_GATE][...] = corner_sum(shapes, own, pairs)
    own.sums.at[INNER][...] = (wide(own.states) * wide(own.d_states)).sum(axis=1)


def corner_sum(shapes: Shapes, own: Owner, pairs):
    """`y[t] = sum_{i >= t > j} pairs[i, j]` of a strictly lower triangular matrix."""
    high = pairs.astype(shapes.dtype)
    # Every warp has its products behind it, so the tiles may be written.
    plgpu.commit_smem()
    own.left[...] = high
    own.right[...] = (pairs - high.astype(jnp.float32)).astype(shapes.dtype)
    plgpu.commit_smem()
    row, column = places()
    ones = jnp.where(column >= row, 1.0, 0.0).astype(shapes.dtype)

    def below(accumulator):
        plgpu.wgmma(accumulator, ones, own.left)
        plgpu.wgmma(accumulator, ones, own.right)
        return accumulator[...]

    sums = pl.run_scoped(below, _mosaic_gpu.accumulator(*SQUARE))
    return jnp.where(column < row, sums, 0.0).sum(axis=1)


def gradient_role(shapes: Shapes, chunk: Chunk, s, row, index, key_head, wg) -> None:
    """Every value head of the key head in turn, then dq and dk."""
    if shapes.owners > 1:
        plgpu.set_max_registers(240, action="increase")
    plgpu.barrier_wait(s.keys_ready)
    tokens, columns = pl.ds(index * CHUNK, CHUNK), pl.ds(wg * COLUMNS, COLUMNS)

    def accumulate(d_query, d_key):
        def body(member, _):
            (me,) = _mosaic_gpu.opaque(wg)
            own, head = Owner(s, me), key_head * shapes.group + member
            plgpu.barrier_wait(s.ready.at[me])

            def store(tile):
                plgpu.copy_smem_to_gmem(tile, chunk.d_value.at[row, tokens, head, columns])

            head_gradients(shapes, own, d_query, d_key, store)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own.sums, chunk.sums.at[row, head, index, me])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s.free.at[me])

        lax.fori_loop(0, shapes.group, body, None)
        return d_query[...], d_key[...]

    part = _mosaic_gpu.accumulator(CHUNK, shapes.key_dim)
    d_query, d_key = pl.run_scoped(accumulate, part, part)

    def write(value, staged, target):
        staged[...] = value.astype(shapes.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target.at[row, tokens, key_head])
        plgpu.wait_smem_to_gmem(0)

    if shapes.owners == 1:
        write(d_query, s.queries, chunk.d_query)
        write(d_key, s.keys, chunk.d_key)
        return

    def meet(kept, given, staged, target):
        """Sums of two 16-bit numbers cross shared memory: more digits than the result has."""
        high = given.astype(shapes.dtype)
        s.states.at[wg][...] = high
        s.d_states.at[wg][...] = (given - high.astype(jnp.float32)).astype(shapes.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.met)
        plgpu.barrier_wait(s.met)
        for part in (s.states, s.d_states):
            kept += plgpu.load(part.at[1 - wg], layout=MATRIX).astype(jnp.float32)
        write(kept, staged, target)

    pl.when(wg == 0)(lambda: meet(d_query, d_key, s.queries, chunk.d_query))
    pl.when(wg == 1)(lambda: meet(d_key, d_query, s.keys, chunk.d_key))


def run_gradients(shapes: Shapes, arrays: dict[str, jax.Array]):
    """`(dq, dk, dV, sums)`."""
    struct, dtype = jax.ShapeDtypeStruct, shapes.dtype
    of_chunk = (shapes.rows, shapes.value_heads, shapes.chunks)
    out_type = (
        struct(arrays["query"].shape, dtype),
        struct(arrays["key"].shape, dtype),
        struct(arrays["value"].shape, dtype),
        struct((*of_chunk, shapes.owners, INNER + 1, CHUNK), jnp.float32),
    )
    names = Chunk._fields[: len(arrays)]

    def kernel(*refs, **scratch):
        chunk, s = Chunk(*refs), _mosaic_gpu.Scratch(scratch)
        wg = lax.axis_index("warpgroup")
        place = tuple(lax.axis_index(name) for name in ("row", "chunk", "heads"))
        owners = shapes.owners
        pl.when(wg < owners)(lambda: gradient_role(shapes, chunk, s, *place, wg))
        pl.when(wg == owners)(lambda: gradient_memory_role(shapes, chunk, s, *place))

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=gradient_scratch(shapes),
        grid=(shapes.key_heads, shapes.chunks, shapes.rows),
        grid_names=("heads", "chunk", "row"),
        num_threads=shapes.owners + 1,
        thread_name="warpgroup",
        kernel_name="delta_rule_gradients",
        **_mosaic_gpu.kernel_options(),
    )(*(arrays[name] for name in names))


# --- the backward ----------------------------------------------------------------------------------------------------


def stacked(tables) -> jax.Array:
    """Everything that one chunk of one head needs side by side, `[z, Hv, N, 6, 64]` float32: one copy brings it all."""
    beta = tables.beta
    segment = jnp.zeros_like(beta)
    if tables.segment is not None:
        segment += tables.segment[:, None].astype(jnp.float32)
    rows = (
        tables.decay_high, tables.decay_low, tables.since_start, tables.until_end, beta, segment,
    )  # fmt: skip
    return jnp.stack([x.reshape(*x.shape[:2], -1, CHUNK) for x in rows], axis=3)


def _shapes(query, value, tables, config: Config, scale: float) -> Shapes:
    rows, length, key_heads, key_dim = query.shape
    return Shapes(
        rows, length // CHUNK, key_heads, value.shape[2], key_dim, value.shape[3], query.dtype, scale,
        tables.segment is not None, config,
    )  # fmt: skip


def _edge(state):
    return jnp.swapaxes(state.astype(jnp.float32), -1, -2)


def _spans(shapes: Shapes, spans):
    if spans is not None:
        return spans
    row = jnp.arange(shapes.rows, dtype=jnp.int32)
    return jnp.stack([row, jnp.zeros_like(row), jnp.full_like(row, shapes.chunks)], axis=1)


def _d_states(shapes: Shapes, query, key, d_out, inverse, tables, d_final, spans):
    """The cotangents of every chunk's end state (transposed, 16-bit), and of the start states."""
    arrays = {
        "query": query, "key": key, "tokens": d_out, "inverse": inverse, "tables": tables,
        "edge": _edge(d_final), "spans": spans,
    }  # fmt: skip
    d_states, d_start = run_chain(shapes, "delta_rule_d_states", arrays)
    return d_states, jnp.swapaxes(d_start, -1, -2)


def retreat(
    query: jax.Array, key: jax.Array, d_out: jax.Array, *, config: Config, scale: float, tables, inverse: jax.Array,
    d_final: jax.Array,
) -> jax.Array:  # fmt: skip
    """The cotangent of the start state `[z, Hv, Dk, Dv]` float32 alone; arguments as in `backward`."""
    shapes = _shapes(query, d_out, tables, config, scale)
    table, spans = stacked(tables), _spans(shapes, None)
    return _d_states(shapes, query, key, d_out, inverse, table, d_final, spans)[1]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, config: Config, scale: float, tables, inverse: jax.Array,
    start_state: jax.Array, d_out: jax.Array, d_final: jax.Array, spans: jax.Array | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of rows of whole chunks; tokens that do not exist are zero, their g and beta too.

    Args:
      query, key, value: `[z, N 64, Hk, Dk]` twice and `[z, N 64, Hv, Dv]`, bfloat16 or float16; Dk 64 or 128, Dv too.
      tables: the gates, as `order.tables` makes them.
      inverse: T, `[z, Hv, N, 64, 64]` in the operands' dtype, beta not folded in.
      start_state: `[rows, Hv, Dk, Dv]` float32.
      d_out, d_final: cotangents of the output `[z, N 64, Hv, Dv]` (operands' dtype) and of the last states (float32).
      spans: int32 `[rows, 3]`, the row of tokens, first chunk and number of chunks of each state, disjoint; None where
        state z walks all of row z. Gradients of chunks that no span holds are undefined.
    """
    shapes = _shapes(query, value, tables, config, scale)
    table, spans = stacked(tables), _spans(shapes, spans)
    replay = {
        "key": key, "tokens": value, "inverse": inverse, "tables": table, "edge": _edge(start_state),
        "spans": spans,
    }  # fmt: skip
    (states,) = run_chain(shapes, "delta_rule_states", replay)
    d_states, d_start = _d_states(shapes, query, key, d_out, inverse, table, d_final, spans)
    arrays = {
        "query": query, "key": key, "value": value, "d_out": d_out, "inverse": inverse, "tables": table,
        "states": states, "d_states": d_states,
    }  # fmt: skip
    dq, dk, dv, sums = run_gradients(shapes, arrays)
    sums = sums.sum(axis=3)  # [z, Hv, N, 5, 64]
    through = tables.whole * sums[..., INNER, :].sum(-1)
    d_g = sums[..., D_GATE, :] + algebra.suffix_from(sums[..., AT_READER, :])
    d_g += algebra.prefix_before(sums[..., AT_WRITER, :]) + through[..., None]
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    return Gradients(dq, dk, dv, flat(d_g), flat(sums[..., D_BETA, :]), d_start)
