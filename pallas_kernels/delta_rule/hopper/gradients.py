"""Everything that one chunk of the gated delta rule leaves to its tokens, as a Pallas Mosaic GPU kernel for Hopper.

`gradients`: a block owns one chunk of one key head, each of its warpgroups 64 value columns of every value head in
turn. All that it makes is linear in the value columns, so the warpgroups meet once, to add dq and dk; the sums over the
value heads of a key head stay in registers. The derivation is in `bwd`.

Everything comes as the caller gave it and leaves as he gets it (`factors`): queries and keys become float16
where they lie, once per block, so does dO for every value head, and V, which no product reads, only in registers.

Shared memory at Dk = Dv = 128: 217 KiB. There dq and dk hold 128 registers of each thread, and every product needs most
of the others: `owner` says how nothing is spilled. A warpgroup fetches the next value head itself when it is
done with this one, whose tiles it would need: one more warpgroup for that would leave 168 registers to each of three
where `setmaxnreg` is ignored (JAX 0.12), and 1792 bytes would be spilled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper import factors
from pallas_kernels.delta_rule.hopper.chains import COLUMNS, UNITS, Shapes, by_row, decayed_scores
from pallas_kernels.delta_rule.hopper.chunk import (
    CHUNK,
    HALF,
    MATRIX,
    PER_ROW,
    SQUARE,
    as_half,
    gated,
    product,
    wide,
)
from pallas_kernels.delta_rule.hopper.owner import COLUMN, ROW, Owner, Place, locate

# Rows of `sums`, what comes out per token.
D_BETA, D_GATE, AT_READER, AT_WRITER, INNER = range(5)


class Chunk(NamedTuple):
    """References of `gradients`: what it reads and writes in device memory."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    inverse: Any
    tables: Any
    units: Any  # [3, z, Hv] float32, rows as UNITS
    states: Any
    d_states: Any
    d_query: Any
    d_key: Any
    d_value: Any
    sums: Any  # [z, Hv, N, owners, 5, 64] float32


def gradient_scratch(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of a block of `gradients`."""
    owners, dtype = shapes.owners, HALF
    of_key, of_value, square = (
        (CHUNK, shapes.key_dim),
        (owners, CHUNK, COLUMNS),
        (owners, *SQUARE),
    )
    return {
        "queries": _mosaic_gpu.tile((1, *of_key), dtype),
        "keys": _mosaic_gpu.tile((1, *of_key), dtype),
        "values": _mosaic_gpu.tile(of_value, shapes.value_dtype),
        "d_outs": _mosaic_gpu.tile(of_value, dtype),
        "states": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "d_states": _mosaic_gpu.tile((owners, COLUMNS, shapes.key_dim), dtype),
        "inverse": _mosaic_gpu.tile(square, dtype),
        "tables": plgpu.SMEM((owners, shapes.table_rows, CHUNK), jnp.float32),
        "left": _mosaic_gpu.tile(square, dtype),
        "updates": _mosaic_gpu.tile(of_value, dtype),
        "right": _mosaic_gpu.tile(square, dtype),
        "spare": _mosaic_gpu.tile(square, dtype),
        "sums": plgpu.SMEM((owners, INNER + 1, CHUNK), jnp.float32),
        "factors": plgpu.SMEM((1, factors.ROWS, CHUNK), jnp.float32),
        "positions": plgpu.SMEM((owners, 2, CHUNK), jnp.int32),
        "keys_ready": plgpu.Barrier(num_arrivals=2),
        "ready": plgpu.Barrier(num_arrivals=6, num_barriers=owners),
        "met": plgpu.Barrier(num_arrivals=owners),
    }


def fetch_keys(chunk: Chunk, s: _mosaic_gpu.Scratch, place: Place) -> None:
    """Brings the queries and keys of the chunk."""
    plgpu.copy_gmem_to_smem(chunk.query.at[place.of_key], s.queries.at[0], s.keys_ready)
    plgpu.copy_gmem_to_smem(chunk.key.at[place.of_key], s.keys.at[0], s.keys_ready)


def fetch_head(shapes: Shapes, chunk: Chunk, s: _mosaic_gpu.Scratch, place: Place, member) -> None:
    """Brings what a warpgroup needs of a value head."""
    head, wg = place.key_head * shapes.group + member, place.wg
    of_value, of_chunk = place.of_value(head), (place.row, head, place.index)
    for array, target, box in (
        (chunk.states, s.states, (*of_chunk, of_value[-1])),
        (chunk.value, s.values, of_value),
        (chunk.inverse, s.inverse, of_chunk),
        (chunk.tables, s.tables, of_chunk),
        (chunk.d_states, s.d_states, (*of_chunk, of_value[-1])),
        (chunk.d_out, s.d_outs, of_value),
    ):
        plgpu.copy_gmem_to_smem(array.at[box], target.at[wg], s.ready.at[wg])


def head_gradients(shapes: Shapes, own: Owner, d_query: jax.Array, d_key: jax.Array, store) -> None:
    """Adds a value head's part of dq and dk to the accumulators, hands dV to `store`, and fills the sums.

    Half of the registers hold dq and dk: what is needed twice waits in shared memory.
    """
    factors.prepare_d_out(shapes, own)
    d_write = write_gradients(shapes, own, d_key)
    recall_gradients(shapes, own, d_write, d_key, store)
    rounded = d_write.astype(HALF)
    inverse_gradients(shapes, own, rounded, d_key)
    read_gradients(shapes, own, d_query, d_key)


def write_gradients(shapes: Shapes, own: Owner, d_key: _mosaic_gpu.Ref):
    """The updates N, their use in the chunk's end state, and dR."""
    table = own.tables
    own.right[...] = decayed_scores(shapes, own.queries, own.keys, table, own.places)
    recalled = product(own.keys, own.states.T)
    # Without its decay: a strong one would leave the range of float16.
    own.spare[...] = recalled.astype(HALF)
    residual = factors.value(own) - by_row(table, order.SINCE) * recalled
    own.left[...] = (by_row(table, order.BETA) * residual).astype(HALF)
    plgpu.commit_smem()
    update = product(own.inverse, own.left)
    own.updates[...] = update.astype(HALF)
    leaving = (by_row(table, order.UNTIL) * update).astype(HALF)
    plgpu.commit_smem()

    plgpu.wgmma(d_key, leaving, own.d_states)
    echoed = product(own.keys, own.d_states.T)
    own.sums.at[AT_WRITER][...] = (leaving.astype(jnp.float32) * echoed).sum(axis=1)
    d_update = _mosaic_gpu.added(
        lambda a: plgpu.wgmma(a, own.right.T, own.d_outs), by_row(table, order.UNTIL) * echoed
    )
    own.left[...] = d_update.astype(HALF)
    plgpu.commit_smem()
    return product(own.inverse.T, own.left)


def recall_gradients(
    shapes: Shapes, own: Owner, d_write: jax.Array, d_key: _mosaic_gpu.Ref, store
) -> None:
    """dV, and what the recall of the chunk's first state leaves: parts of dk, dbeta and dg."""
    table = own.tables
    since = plgpu.load(table.at[order.SINCE], layout=PER_ROW)
    beta = plgpu.load(table.at[order.BETA], layout=PER_ROW)
    recalled = since * (d_write * wide(own.spare)).sum(axis=1)
    own.sums.at[AT_READER][...] = -beta * recalled
    own.sums.at[D_BETA][...] = (d_write * factors.value(own)).sum(axis=1) - recalled
    d_residual = by_row(table, order.BETA) * d_write
    d_value = by_row(own.factors, factors.D_VALUE) * d_residual
    own.values[...] = d_value.astype(shapes.value_dtype)
    plgpu.commit_smem()
    store(own.values)
    plgpu.wgmma(d_key, (-by_row(table, order.SINCE) * d_residual).astype(HALF), own.states)
    # Else this operand and those of the next product would take more registers than there are: all were serialised.
    plgpu.wgmma_wait(0)


def inverse_gradients(
    shapes: Shapes, own: Owner, d_write: jax.Array, d_key: _mosaic_gpu.Ref
) -> None:
    """dL and what it leaves: parts of dk, dbeta and dg. T has been used for the last time: its tile is free."""
    table = own.tables
    row, column = own.places()
    # From here on -dL, times the decay, then times beta.
    d_lower = product(d_write, own.updates.T)
    d_lower = gated(table, row > column, shapes.segments) * d_lower
    overlap = product(own.keys, own.keys.T)
    d_beta = plgpu.load(own.sums.at[D_BETA], layout=PER_ROW) - (d_lower * overlap).sum(axis=1)
    own.sums.at[D_BETA][...] = d_beta
    d_lower = by_row(table, order.BETA) * d_lower
    d_overlap = (-d_lower).astype(HALF)
    own.left[...] = d_overlap
    split(own.inverse, own.spare, -(d_lower * overlap))
    plgpu.commit_smem()
    plgpu.wgmma(d_key, d_overlap, own.keys)
    plgpu.wgmma(d_key, own.left.T, own.keys)
    own.sums.at[D_GATE][...] = corner_sum(own)


def read_gradients(
    shapes: Shapes, own: Owner, d_query: _mosaic_gpu.Ref, d_key: _mosaic_gpu.Ref
) -> None:
    """What the output's cotangent leaves: dq, and parts of dk and dg."""
    table = own.tables
    row, column = own.places()
    d_inside = product(own.d_outs, own.updates.T)
    # Behind this barrier every warp has its products, and the tiles may be written.
    plgpu.commit_smem()
    pairs = jnp.where(row > column, d_inside * wide(own.right), 0.0)
    split(own.inverse, own.spare, pairs)
    row, column = own.places()
    d_scores = shapes.scale * gated(table, row >= column, shapes.segments) * d_inside
    d_scores = d_scores.astype(HALF)
    own.right[...] = d_scores
    plgpu.commit_smem()
    plgpu.wgmma(d_query, d_scores, own.keys)
    plgpu.wgmma(d_key, own.right.T, own.queries)
    d_gate = plgpu.load(own.sums.at[D_GATE], layout=PER_ROW)
    own.sums.at[D_GATE][...] = d_gate + corner_sum(own)

    d_carried = shapes.scale * by_row(table, order.SINCE) * wide(own.d_outs)
    plgpu.wgmma(d_query, d_carried.astype(HALF), own.states)
    at_reader = (d_carried * product(own.queries, own.states.T)).sum(axis=1)
    at_reader += plgpu.load(own.sums.at[AT_READER], layout=PER_ROW)
    own.sums.at[AT_READER][...] = at_reader
    inner = None
    for first in range(0, shapes.key_dim, COLUMNS):
        part = (slice(None), pl.ds(first, COLUMNS))
        more = (wide(own.states.at[part]) * wide(own.d_states.at[part])).sum(axis=1)
        inner = more if inner is None else inner + more
    own.sums.at[INNER][...] = inner


def split(high_tile, low_tile, value: jax.Array) -> None:
    """Stores a float32 matrix as the sum of two 16-bit ones."""
    high = value.astype(high_tile.dtype)
    high_tile[...] = high
    low_tile[...] = (value - high.astype(jnp.float32)).astype(low_tile.dtype)


def corner_sum(own: Owner):
    """`y[t] = sum_{i >= t > j} pairs[i, j]` of a strictly lower triangular matrix, as `split` left it."""
    row, column = own.places()
    ones = jnp.where(column >= row, 1.0, 0.0).astype(own.inverse.dtype)

    def below(accumulator):
        plgpu.wgmma(accumulator, ones, own.inverse)
        plgpu.wgmma(accumulator, ones, own.spare)
        return accumulator[...]

    sums = pl.run_scoped(below, _mosaic_gpu.accumulator(*SQUARE))
    row, column = own.places()
    return jnp.where(column < row, sums, 0.0).sum(axis=1)


def gradient_role(shapes: Shapes, chunk: Chunk, s: _mosaic_gpu.Scratch, wg: jax.Array) -> None:
    """Every value head of the key head in turn, then dq and dk; of two warpgroups one has the queries, one the keys."""
    first = locate(wg)
    pl.when(wg == 0)(lambda: fetch_keys(chunk, s, first))
    fetch_head(shapes, chunk, s, first, 0)
    for axis in (ROW, COLUMN):
        place = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=PER_ROW)
        s.positions.at[wg, axis][...] = place
    unit = (first.row, first.key_head * shapes.group)
    held, pulled, asked = (chunk.units[kind, *unit] for kind in UNITS)
    plgpu.barrier_wait(s.keys_ready)
    pl.when(wg == 0)(lambda: factors.prepare_queries(shapes, s, held, pulled, asked))
    pl.when(wg == shapes.owners - 1)(lambda: factors.prepare_keys(shapes, s, held, pulled))
    plgpu.commit_smem()
    if shapes.owners > 1:
        plgpu.barrier_arrive(s.met)
        plgpu.barrier_wait(s.met)

    def accumulate(d_query, d_key):
        def body(member, _):
            own = Owner(s, wg)
            plgpu.barrier_wait(s.ready.at[wg])

            def store(tile):
                place = own.locate()
                box = place.of_value(place.key_head * shapes.group + member)
                plgpu.copy_smem_to_gmem(tile, chunk.d_value.at[box])

            head_gradients(shapes, own, d_query, d_key, store)
            # Its last product has been waited for, all before with it; behind this every warp is done.
            plgpu.commit_smem()
            place, following = own.locate(), member + 1
            head = place.key_head * shapes.group + member
            sums = chunk.sums.at[place.row, head, place.index, place.wg]
            plgpu.copy_smem_to_gmem(own.sums, sums)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch = lambda: fetch_head(shapes, chunk, s, own.locate(), following)
            pl.when(following < shapes.group)(fetch)

        lax.fori_loop(0, shapes.group, body, None)
        return d_query[...], d_key[...]

    part = _mosaic_gpu.accumulator(CHUNK, shapes.key_dim)
    d_query, d_key = pl.run_scoped(accumulate, part, part)

    def write(gradient, name, factor, target):
        own = Owner(s, wg)
        factors.finish(shapes, own, name, factor, gradient)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(getattr(own, name), target.at[own.locate().of_key])
        # Shared memory is the block's only as long as it runs.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    of_query = ("queries", factors.D_QUERY, chunk.d_query)
    of_key = ("keys", factors.D_KEY, chunk.d_key)
    if shapes.owners == 1:
        write(d_query, *of_query)
        write(d_key, *of_key)
        return

    def meet(kept, given, *place):
        """Sums of two 16-bit numbers cross shared memory: more digits than the result has."""
        high = given.astype(HALF)
        s.states.at[wg][...] = high
        s.d_states.at[wg][...] = (given - high.astype(jnp.float32)).astype(HALF)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.met)
        plgpu.barrier_wait(s.met)
        for part in (s.states, s.d_states):
            kept += plgpu.load(part.at[1 - wg], layout=MATRIX).astype(jnp.float32)
        write(kept, *place)

    pl.when(wg == 0)(lambda: meet(d_query, d_key, *of_query))
    pl.when(wg == 1)(lambda: meet(d_key, d_query, *of_key))


def run_gradients(shapes: Shapes, arrays: dict[str, jax.Array]):
    """`(dq, dk, dV, sums)` of the arrays in `Chunk`: three finished, the sums in units `held pulled`."""
    struct = jax.ShapeDtypeStruct
    arrays = arrays | {name: as_half(arrays[name]) for name in ("query", "key", "d_out")}
    of_chunk = (shapes.rows, shapes.value_heads, shapes.chunks)
    out_type = (
        struct(arrays["query"].shape, HALF),
        struct(arrays["key"].shape, HALF),
        struct(arrays["value"].shape, shapes.value_dtype),
        struct((*of_chunk, shapes.owners, INNER + 1, CHUNK), jnp.float32),
    )
    names = Chunk._fields[: len(arrays)]

    def kernel(*refs, **scratch):
        chunk, s = Chunk(*refs), _mosaic_gpu.Scratch(scratch)
        gradient_role(shapes, chunk, s, lax.axis_index("warpgroup"))

    d_query, d_key, *rest = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=gradient_scratch(shapes),
        grid=(shapes.key_heads, shapes.chunks, shapes.rows),
        grid_names=("heads", "chunk", "row"),
        num_threads=shapes.owners,
        thread_name="warpgroup",
        kernel_name="delta_rule_gradients",
        **_mosaic_gpu.kernel_options(),
    )(*(arrays[name] for name in names))
    given = lambda x: x if x.dtype == shapes.given else lax.bitcast_convert_type(x, shapes.given)
    return given(d_query), given(d_key), *rest
