"""Backward attention on Hopper (sm_90a), as two Pallas Mosaic GPU kernels without atomics.

Derivation (Dao 2023, algorithm 2), with scores s = scale q k, weights p = exp(s - lse), delta = sum(dout * out) - dlse:

    dv = p^T dout        dp = dout v^T        ds = p (dp - delta)        dk = scale ds^T q        dq = scale ds k

`dk_dv`: a block owns 128 keys of one key/value head and walks the query tiles of every query head of the group, so that
dk and dv are summed over the group on chip, in float32, in a fixed order, and written once. Tiles are transposed (keys
are rows): weights and ds are born in the layout of a left operand. Up to head_dim 128 each compute warpgroup owns 64 of
the keys. At 256, dk and dv of 64 keys fill the registers of two warpgroups, so the first computes weights and dv, and
the second, which gets the weights through shared memory, ds and dk.

`dq`: a block owns 128 queries of one head and walks key tiles, as the forward kernel does.

Together 7 matrix products where 5 are the least; in exchange every sum has one order, so results repeat bit for bit.

Units: scores, statistics and sums in float32, weights by `exp2`; weights and ds rounded to the input dtype as operands.
Layout: as in the forward kernel; gradients may go straight into `d_qkv [B, T, K, R + 2, D]`. Shared memory: `4 D` bytes
for every key of the block plus `4 D stages block_q` (dk_dv), `4 D (128 + kv_stages block_kv)` (dq).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import LOG2E, ROWS
from pallas_kernels.attention import mosaic_gpu_mask as masks
from pallas_kernels.attention.mosaic_gpu_tuning import BackwardConfig

MATRIX, PER_ROW, PER_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


class Gradients(NamedTuple):
    """Gradients of an attention call; `sinks` is None without sinks."""

    query: Any
    key: Any
    value: Any
    sinks: Any


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the two kernels."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
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
        return self.head_dim > 128

    @property
    def block_keys(self) -> int:
        """Keys of one block of `dk_dv`."""
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

    query: Any
    key: Any
    value: Any
    cotangent: Any  # [B, T, N, D]
    lse: Any  # [B, N, T'], log2 units, +inf where a row sees nothing or does not exist
    delta: Any  # [B, N, T']
    offsets: Any
    query_ids: Any
    key_ids: Any
    bounds: Any


class Block(NamedTuple):
    """Where one block stands."""

    batch: Any
    head: Any  # of the queries (dq) or of the keys (dk_dv)
    first: Any  # first token of its rows
    offset: Any
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


def query_box(shapes: Shapes, array, batch, rows, head):
    """Rows of one query head, in `[B, T, N, D]` or in the fused buffer."""
    if shapes.fused:
        return array.at[batch, rows, lax.div(head, shapes.group), lax.rem(head, shapes.group)]
    return array.at[batch, rows, head]


def key_box(shapes: Shapes, array, batch, rows, kv_head, which: int):
    """Rows of the key (`which=0`) or value (1) of one head."""
    if shapes.fused:
        return array.at[batch, rows, kv_head, shapes.group + which]
    return array.at[batch, rows, kv_head]


def softmax_weights(shapes: Shapes, scores, lse, shown):
    """Softmax weights of a tile, and what ds is a multiple of: the weights times the slope of the soft cap."""
    factor = shapes.scale * LOG2E
    if shapes.soft_cap is not None:
        scores = jnp.tanh(scores * (shapes.scale / shapes.soft_cap))
        factor = shapes.soft_cap * LOG2E
    weights = jnp.exp2(scores * factor - lse)
    if shown is not None:
        weights = jnp.where(shown, weights, 0.0)
    if shapes.soft_cap is None:
        return weights, weights
    return weights, weights * (1.0 - scores * scores)


# --- dk and dv -------------------------------------------------------------------------------------------------------


def key_scratch(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of a block of `dk_dv`."""
    config, dtype, dim = shapes.config, shapes.dtype, shapes.head_dim
    owners = 1 if shapes.split else 2  # tiles of 64 keys in a block
    segments = 1 if shapes.mask.segments else 0
    ring: dict[str, Any] = {"num_barriers": config.stages}
    spec = {
        "keys": _mosaic_gpu.tile((owners, ROWS, dim), dtype),
        "values": _mosaic_gpu.tile((owners, ROWS, dim), dtype),
        "queries": _mosaic_gpu.tile((config.stages, config.block_q, dim), dtype),
        "cotangents": _mosaic_gpu.tile((config.stages, config.block_q, dim), dtype),
        "lse": plgpu.SMEM((config.stages, config.block_q), jnp.float32),
        "delta": plgpu.SMEM((config.stages, config.block_q), jnp.float32),
        "keys_ready": plgpu.Barrier(num_arrivals=owners * (2 + segments)),
        "query_ready": plgpu.Barrier(num_arrivals=2 + segments, **ring),
        "cotangent_ready": plgpu.Barrier(num_arrivals=2, **ring),
        "query_free": plgpu.Barrier(num_arrivals=2, **ring),
        "cotangent_free": plgpu.Barrier(num_arrivals=2, **ring),
    }
    if segments:
        spec["key_ids"] = plgpu.SMEM((owners, ROWS), jnp.int32)
        spec["query_ids"] = plgpu.SMEM((config.stages, config.block_q), jnp.int32)
    if shapes.split:
        spec["multiples"] = _mosaic_gpu.tile((2, ROWS, config.block_q), dtype)
        spec["multiples_ready"] = plgpu.Barrier(num_barriers=2)
        spec["multiples_free"] = plgpu.Barrier(num_barriers=2)
    return spec


def key_steps(shapes: Shapes, block: Block):
    """Steps of a block, and how many of the first need the mask: every tile for every query head of the group."""
    tiles = block.tiles
    return (
        (tiles.high - tiles.low) * shapes.group,
        masks.masked_steps(tiles) * shapes.group,
    )


def key_step(shapes: Shapes, block: Block, step):
    """(query tile, query head) of a step."""
    tile = masks.walk(block.tiles, lax.div(step, shapes.group), both_ends=True)
    return tile, block.head * shapes.group + lax.rem(step, shapes.group)


def key_memory_role(shapes: Shapes, inputs: Inputs, s, block: Block) -> None:
    """Brings the block's keys and values once, then queries and output gradients, `stages` tiles ahead."""
    config, batch = shapes.config, block.batch
    plgpu.set_max_registers(config.memory_registers, action="decrease")
    for owner in range(1 if shapes.split else 2):
        rows = pl.ds(block.first + owner * ROWS, ROWS)
        for which, (array, target) in enumerate(((inputs.key, s.keys), (inputs.value, s.values))):
            box = key_box(shapes, array, batch, rows, block.head, which)
            plgpu.copy_gmem_to_smem(box, target.at[owner], s.keys_ready)
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(
                inputs.key_ids.at[batch, rows], s.key_ids.at[owner], s.keys_ready
            )
    steps, _ = key_steps(shapes, block)

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, config.stages)
        tile, head = key_step(shapes, block, step)
        rows = pl.ds(tile * config.block_q, config.block_q)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.query_free.at[slot])

        ready = s.query_ready.at[slot]
        query = query_box(shapes, inputs.query, batch, rows, head)
        plgpu.copy_gmem_to_smem(query, s.queries.at[slot], ready)
        plgpu.copy_gmem_to_smem(inputs.lse.at[batch, head, rows], s.lse.at[slot], ready)
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(inputs.query_ids.at[batch, rows], s.query_ids.at[slot], ready)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.cotangent_free.at[slot])

        ready = s.cotangent_ready.at[slot]
        plgpu.copy_gmem_to_smem(
            inputs.cotangent.at[batch, rows, head], s.cotangents.at[slot], ready
        )
        plgpu.copy_gmem_to_smem(inputs.delta.at[batch, head, rows], s.delta.at[slot], ready)

    if _mosaic_gpu.interpreting():
        # The interpreter insists that every completed phase of a barrier is observed; the hardware does not care.
        @pl.loop(lax.max(0, steps - config.stages), steps)
        def _(step):
            plgpu.barrier_wait(s.query_free.at[lax.rem(step, config.stages)])
            plgpu.barrier_wait(s.cotangent_free.at[lax.rem(step, config.stages)])


def transposed_weights(shapes: Shapes, s, block: Block, owner, step, slot, scores, masked: bool):
    """Weights, and what ds is a multiple of, of one tile whose rows are keys."""
    config = shapes.config
    shape = (ROWS, config.block_q)
    lse = plgpu.load(s.lse.at[slot], layout=PER_COLUMN)
    shown = None
    if masked:
        tile, _ = key_step(shapes, block, step)
        keys = masks.indices(shape, 0, block.first + owner * ROWS)
        queries = masks.indices(shape, 1, tile * config.block_q)
        ids = (None, None)
        if shapes.mask.segments:
            ids = (
                lax.broadcast_in_dim(
                    plgpu.load(s.query_ids.at[slot], layout=PER_COLUMN), shape, [1]
                ),
                lax.broadcast_in_dim(plgpu.load(s.key_ids.at[owner], layout=PER_ROW), shape, [0]),
            )
        shown = masks.visible(shapes.mask, queries, keys, block.offset, *ids)
    return softmax_weights(shapes, scores, lax.broadcast_in_dim(lse, shape, [1]), shown)


def minus_delta(shapes: Shapes, s, slot):
    """The value at which the accumulator of dp starts, so that the product itself yields dp - delta."""
    delta = plgpu.load(s.delta.at[slot], layout=PER_COLUMN)
    shape = (ROWS, shapes.config.block_q)
    return plgpu.layout_cast(lax.broadcast_in_dim(-delta, shape, [1]), MATRIX)


def loop_over_steps(shapes: Shapes, block: Block, body) -> None:
    """Runs `body(step, masked=...)`: masked steps first."""
    steps, masked = key_steps(shapes, block)
    if shapes.mask.is_causal or shapes.mask.segments:
        lax.fori_loop(0, masked, lambda step, _: body(step, masked=True), None)
        lax.fori_loop(masked, steps, lambda step, _: body(step, masked=False), None)
    else:
        lax.fori_loop(0, steps, lambda step, _: body(step, masked=False), None)


def key_role(shapes: Shapes, s, block: Block, wg):
    """dk and dv of 64 keys, both in this warpgroup's registers."""
    config = shapes.config
    tile = (ROWS, config.block_q)

    def accumulate(dk, dv):
        def body(step, *, masked: bool):
            slot = lax.rem(step, config.stages)
            (me,) = _mosaic_gpu.opaque(wg)
            plgpu.barrier_wait(s.query_ready.at[slot])

            def score(accumulator):
                plgpu.wgmma(accumulator, s.keys.at[me], s.queries.at[slot].T)
                return accumulator[...]

            scores = pl.run_scoped(score, _mosaic_gpu.accumulator(*tile))
            weights, multiple = transposed_weights(shapes, s, block, wg, step, slot, scores, masked)
            rounded = weights.astype(shapes.dtype)
            plgpu.barrier_wait(s.cotangent_ready.at[slot])

            def products(accumulator):
                accumulator[...] = minus_delta(shapes, s, slot)
                plgpu.wgmma(accumulator, s.values.at[me], s.cotangents.at[slot].T)
                plgpu.wgmma(dv, rounded, s.cotangents.at[slot])
                return plgpu.wgmma_accumulator_load(accumulator, wait_n=1)

            ds = multiple * pl.run_scoped(products, _mosaic_gpu.accumulator(*tile))
            plgpu.wgmma(dk, ds.astype(shapes.dtype), s.queries.at[slot])
            # Statistics were read from the slots: order those reads before TMA fills them again.
            plgpu.commit_smem()
            plgpu.wgmma_wait(1)  # dv
            plgpu.barrier_arrive(s.cotangent_free.at[slot])
            plgpu.wgmma_wait(0)  # dk
            plgpu.barrier_arrive(s.query_free.at[slot])

        loop_over_steps(shapes, block, body)
        return dk[...], dv[...]

    dim = shapes.head_dim
    return pl.run_scoped(
        accumulate, _mosaic_gpu.accumulator(ROWS, dim), _mosaic_gpu.accumulator(ROWS, dim)
    )


def value_half(shapes: Shapes, s, block: Block):
    """head_dim 256: weights, handed on through shared memory, and dv."""
    config = shapes.config

    def accumulate(dv):
        def body(step, *, masked: bool):
            slot, buffer = lax.rem(step, config.stages), lax.rem(step, 2)
            (own,) = _mosaic_gpu.opaque(lax.rem(step, 1))
            plgpu.barrier_wait(s.query_ready.at[slot])

            def score(accumulator):
                plgpu.wgmma(accumulator, s.keys.at[own], s.queries.at[slot].T)
                return accumulator[...]

            scores = pl.run_scoped(score, _mosaic_gpu.accumulator(ROWS, config.block_q))
            weights, multiple = transposed_weights(shapes, s, block, 0, step, slot, scores, masked)
            rounded = weights.astype(shapes.dtype)

            @pl.when(step >= 2)
            def _():
                plgpu.barrier_wait(s.multiples_free.at[buffer])

            s.multiples.at[buffer][...] = multiple.astype(shapes.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.multiples_ready.at[buffer])
            plgpu.barrier_arrive(s.query_free.at[slot])
            plgpu.barrier_wait(s.cotangent_ready.at[slot])
            plgpu.wgmma(dv, rounded, s.cotangents.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s.cotangent_free.at[slot])

        loop_over_steps(shapes, block, body)
        return dv[...]

    dv = pl.run_scoped(accumulate, _mosaic_gpu.accumulator(ROWS, shapes.head_dim))
    if _mosaic_gpu.interpreting():
        steps, _ = key_steps(shapes, block)

        @pl.loop(lax.max(0, steps - 2), steps)
        def _(step):
            plgpu.barrier_wait(s.multiples_free.at[lax.rem(step, 2)])

    return dv


def key_half(shapes: Shapes, s, block: Block):
    """head_dim 256: ds from the other warpgroup's weights, and dk."""
    config = shapes.config

    def accumulate(dk):
        def body(step, _):
            slot, buffer = lax.rem(step, config.stages), lax.rem(step, 2)
            (own,) = _mosaic_gpu.opaque(lax.rem(step, 1))
            plgpu.barrier_wait(s.cotangent_ready.at[slot])

            def product(accumulator):
                accumulator[...] = minus_delta(shapes, s, slot)
                plgpu.wgmma(accumulator, s.values.at[own], s.cotangents.at[slot].T)
                return accumulator[...]

            dp = pl.run_scoped(product, _mosaic_gpu.accumulator(ROWS, config.block_q))
            plgpu.barrier_wait(s.multiples_ready.at[buffer])
            multiple = plgpu.load(s.multiples.at[buffer], layout=MATRIX)
            ds = multiple.astype(jnp.float32) * dp
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.multiples_free.at[buffer])
            plgpu.barrier_arrive(s.cotangent_free.at[slot])
            plgpu.barrier_wait(s.query_ready.at[slot])
            plgpu.wgmma(dk, ds.astype(shapes.dtype), s.queries.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s.query_free.at[slot])

        steps, _ = key_steps(shapes, block)
        lax.fori_loop(0, steps, body, None)
        return dk[...]

    return pl.run_scoped(accumulate, _mosaic_gpu.accumulator(ROWS, shapes.head_dim))


def key_compute_role(shapes: Shapes, s, block: Block, outputs, wg) -> None:
    d_key, d_value = outputs
    plgpu.set_max_registers(shapes.config.compute_registers, action="increase")
    plgpu.barrier_wait(s.keys_ready)

    def write(source, value, target, which, owner):
        rows = pl.ds(block.first + owner * ROWS, ROWS)
        source.at[owner][...] = value.astype(shapes.dtype)
        plgpu.commit_smem()
        box = key_box(shapes, target, block.batch, rows, block.head, which)
        plgpu.copy_smem_to_gmem(source.at[owner], box)

    if shapes.split:
        # Each half reuses the tile that only it reads.
        @pl.when(wg == 0)
        def _():
            dv = value_half(shapes, s, block)
            write(s.keys, dv, d_value, 1, 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            dk = key_half(shapes, s, block)
            write(s.values, dk * shapes.scale, d_key, 0, 0)
            plgpu.wait_smem_to_gmem(0)

        return
    dk, dv = key_role(shapes, s, block, wg)
    write(s.keys, dk * shapes.scale, d_key, 0, wg)
    write(s.values, dv, d_value, 1, wg)
    plgpu.wait_smem_to_gmem(0)


# --- dq --------------------------------------------------------------------------------------------------------------


def query_scratch(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of a block of `dq`."""
    config, dtype, dim = shapes.config, shapes.dtype, shapes.head_dim
    segments = 1 if shapes.mask.segments else 0
    ring: dict[str, Any] = {"num_barriers": config.kv_stages}
    value_ring: dict[str, Any] = {"num_barriers": config.value_stages}
    spec = {
        "queries": _mosaic_gpu.tile((2, ROWS, dim), dtype),
        "cotangents": _mosaic_gpu.tile((2, ROWS, dim), dtype),
        "keys": _mosaic_gpu.tile((config.kv_stages, config.block_kv, dim), dtype),
        "values": _mosaic_gpu.tile((config.value_stages, config.block_kv, dim), dtype),
        "query_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "key_ready": plgpu.Barrier(num_arrivals=1 + segments, **ring),
        "value_ready": plgpu.Barrier(**value_ring),
        "key_free": plgpu.Barrier(num_arrivals=2, **ring),
        "value_free": plgpu.Barrier(num_arrivals=2, **value_ring),
    }
    if segments:
        spec["key_ids"] = plgpu.SMEM((config.kv_stages, config.block_kv), jnp.int32)
    return spec


def query_memory_role(shapes: Shapes, inputs: Inputs, s, block: Block) -> None:
    """Feeds keys and values, `kv_stages` tiles ahead."""
    config, batch = shapes.config, block.batch
    kv_head = lax.div(block.head, shapes.group)
    steps = block.tiles.high - block.tiles.low
    plgpu.set_max_registers(config.memory_registers, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        slot, value_slot = (lax.rem(step, n) for n in (config.kv_stages, config.value_stages))
        tile = masks.walk(block.tiles, step, both_ends=True)
        rows = pl.ds(tile * config.block_kv, config.block_kv)

        @pl.when(step >= config.kv_stages)
        def _():
            plgpu.barrier_wait(s.key_free.at[slot])

        key = key_box(shapes, inputs.key, batch, rows, kv_head, 0)
        plgpu.copy_gmem_to_smem(key, s.keys.at[slot], s.key_ready.at[slot])
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(
                inputs.key_ids.at[batch, rows], s.key_ids.at[slot], s.key_ready.at[slot]
            )

        @pl.when(step >= config.value_stages)
        def _():
            plgpu.barrier_wait(s.value_free.at[value_slot])

        value = key_box(shapes, inputs.value, batch, rows, kv_head, 1)
        plgpu.copy_gmem_to_smem(value, s.values.at[value_slot], s.value_ready.at[value_slot])

    if _mosaic_gpu.interpreting():

        @pl.loop(lax.max(0, steps - config.kv_stages), steps)
        def _(step):
            plgpu.barrier_wait(s.key_free.at[lax.rem(step, config.kv_stages)])

        @pl.loop(lax.max(0, steps - config.value_stages), steps)
        def _(step):
            plgpu.barrier_wait(s.value_free.at[lax.rem(step, config.value_stages)])


def query_role(shapes: Shapes, inputs: Inputs, s, block: Block, d_query, wg) -> None:
    """dq of 64 queries."""
    config, batch, dim = shapes.config, block.batch, shapes.head_dim
    plgpu.set_max_registers(config.compute_registers, action="increase")
    first = block.first + wg * ROWS
    rows, ready = pl.ds(first, ROWS), s.query_ready.at[wg]
    box = query_box(shapes, inputs.query, batch, rows, block.head)
    plgpu.copy_gmem_to_smem(box, s.queries.at[wg], ready)
    plgpu.copy_gmem_to_smem(
        inputs.cotangent.at[batch, rows, block.head], s.cotangents.at[wg], ready
    )
    per_row = functools.partial(plgpu.load, layout=PER_ROW, optimized=False)
    lse = per_row(inputs.lse.at[batch, block.head, rows])
    delta = per_row(inputs.delta.at[batch, block.head, rows])
    query_ids = per_row(inputs.query_ids.at[batch, rows]) if shapes.mask.segments else None
    plgpu.barrier_wait(ready)
    shape = (ROWS, config.block_kv)

    def visible(step, slot):
        tile = masks.walk(block.tiles, step, both_ends=True)
        queries = masks.indices(shape, 0, first)
        keys = masks.indices(shape, 1, tile * config.block_kv)
        ids = (None, None)
        if query_ids is not None:
            ids = (
                lax.broadcast_in_dim(query_ids, shape, [0]),
                lax.broadcast_in_dim(plgpu.load(s.key_ids.at[slot], layout=PER_COLUMN), shape, [1]),
            )
        return masks.visible(shapes.mask, queries, keys, block.offset, *ids)

    def accumulate(dq):
        def body(step, _, *, masked: bool):
            slot, value_slot = (lax.rem(step, n) for n in (config.kv_stages, config.value_stages))
            me, value_slot = _mosaic_gpu.opaque(wg, value_slot)
            plgpu.barrier_wait(s.key_ready.at[slot])
            plgpu.barrier_wait(s.value_ready.at[value_slot])

            def weigh(scores):
                shown = visible(step, slot) if masked else None
                spread = lax.broadcast_in_dim(lse, shape, [0])
                return softmax_weights(shapes, scores, spread, shown)[1]

            def together(scores_ref, dp_ref):
                plgpu.wgmma(scores_ref, s.queries.at[me], s.keys.at[slot].T)
                plgpu.wgmma(dp_ref, s.cotangents.at[me], s.values.at[value_slot].T)
                multiple = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
                return multiple, dp_ref[...]

            tile = _mosaic_gpu.accumulator(*shape)
            multiple, dp = pl.run_scoped(together, tile, tile)
            plgpu.barrier_arrive(s.value_free.at[value_slot])
            ds = multiple * (dp - lax.broadcast_in_dim(delta, shape, [0]))
            plgpu.wgmma(dq, ds.astype(shapes.dtype), s.keys.at[slot])
            if shapes.mask.segments:  # order the reads of the ids before TMA fills the slot again
                plgpu.commit_smem()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s.key_free.at[slot])

        steps = block.tiles.high - block.tiles.low
        edge = 0
        if shapes.mask.needed(config.block_kv):
            edge = masks.masked_steps(block.tiles)
            lax.fori_loop(0, edge, functools.partial(body, masked=True), None)
        lax.fori_loop(edge, steps, functools.partial(body, masked=False), None)
        return dq[...]

    dq = pl.run_scoped(accumulate, _mosaic_gpu.accumulator(ROWS, dim))
    s.queries.at[wg][...] = (dq * shapes.scale).astype(shapes.dtype)
    plgpu.commit_smem()
    box = query_box(shapes, d_query, batch, rows, block.head)
    plgpu.copy_smem_to_gmem(s.queries.at[wg], box)
    plgpu.wait_smem_to_gmem(0)


# --- the kernels -----------------------------------------------------------------------------------------------------


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array, *,
    config: BackwardConfig, scale: float, d_lse: jax.Array | None = None, is_causal: bool = False,
    sliding_window: int | None = None, offset: int | jax.Array = 0, query_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None, sinks: jax.Array | None = None, logits_soft_cap: float | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of `mosaic_gpu_fwd.forward`; the options are its own.

    Args:
      out, lse: what the forward returned.
      d_out: gradient of the output `[B, T, N, D]`.
      d_lse: gradient of lse `[B, T, N]`, or None for zero.
    """
    mask = masks.Mask(
        query.shape[1], key.shape[1], is_causal, sliding_window,
        offset if isinstance(offset, int) else None, query_segment_ids is not None,
    )  # fmt: skip
    shapes = Shapes(
        query.shape[0], query.shape[2], key.shape[2], query.shape[3], query.dtype, mask, scale,
        logits_soft_cap, False, config,
    )  # fmt: skip
    statistics, d_sinks = _statistics(shapes, out, lse, d_out, d_lse, sinks)
    q_rows, kv_rows = _mosaic_gpu.round_up(mask.q_len, 8), _mosaic_gpu.round_up(mask.kv_len, 8)
    query, d_out = (_mosaic_gpu.pad_axis(x, 1, q_rows) for x in (query, d_out))
    key, value = (_mosaic_gpu.pad_axis(x, 1, kv_rows) for x in (key, value))
    arrays = (query, key, value, d_out, *statistics)
    tables = _tables(shapes, offset, query_segment_ids, kv_segment_ids)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    dk, dv = _run(shapes, "dk_dv", arrays, tables, (like(key), like(value)))
    (dq,) = _run(shapes, "dq", arrays, tables, (like(query),))
    q_len, kv_len = mask.q_len, mask.kv_len
    return Gradients(dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len], d_sinks)


def backward_qkv(
    qkv: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array, *, config: BackwardConfig, scale: float,
    d_lse: jax.Array | None = None, is_causal: bool = False, sliding_window: int | None = None,
    offset: int | jax.Array = 0, segment_ids: jax.Array | None = None, sinks: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """As `backward`, for `mosaic_gpu_fwd.forward_qkv`: `(d_qkv, d_sinks)`, both kernels writing into one buffer."""
    batch, length, num_kv_heads, width, head_dim = qkv.shape
    mask = masks.Mask(
        length, length, is_causal, sliding_window, offset if isinstance(offset, int) else None,
        segment_ids is not None,
    )  # fmt: skip
    shapes = Shapes(
        batch, num_kv_heads * (width - 2), num_kv_heads, head_dim, qkv.dtype, mask, scale, logits_soft_cap, True,
        config,
    )  # fmt: skip
    statistics, d_sinks = _statistics(shapes, out, lse, d_out, d_lse, sinks)
    rows = _mosaic_gpu.round_up(length, 8)
    qkv, d_out = (_mosaic_gpu.pad_axis(x, 1, rows) for x in (qkv, d_out))
    tables = _tables(shapes, offset, segment_ids, segment_ids)
    d_qkv = jax.new_ref(lax.empty(qkv.shape, qkv.dtype))
    for which in ("dk_dv", "dq"):
        _run(shapes, which, (qkv, d_out, *statistics), tables, d_qkv)
    return d_qkv[...][:, :length], d_sinks


def _statistics(shapes: Shapes, out, lse, d_out, d_lse, sinks):
    """Per row `[B, N, T']`: lse in log2 units and delta; and the gradient of the sinks."""
    lse, rows = jnp.swapaxes(lse, 1, 2), shapes.query_rows
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.swapaxes(product.sum(-1), 1, 2)
    if d_lse is not None:
        delta = delta - jnp.swapaxes(d_lse, 1, 2)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        weight = jnp.where(jnp.isneginf(lse), 0.0, weight)
        d_sinks = -(weight * delta).sum((0, 2)).astype(sinks.dtype)
    # A row that sees nothing, or does not exist, gets weights exp2(s - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    lse = _mosaic_gpu.pad_axis(lse, 2, rows, jnp.inf)
    return (lse, _mosaic_gpu.pad_axis(delta, 2, rows)), d_sinks


def _tables(shapes: Shapes, offset, query_ids, key_ids) -> dict[str, dict[str, jax.Array]]:
    """For each kernel its optional inputs by name."""
    mask, config = shapes.mask, shapes.config
    shared: dict[str, jax.Array] = {}
    if mask.offset is None:
        shared["offsets"] = jnp.asarray(offset, jnp.int32)
    tables = {"dk_dv": dict(shared), "dq": dict(shared)}
    if mask.segments:
        queries = masks.padded_ids(query_ids, shapes.query_rows, masks.QUERY_PADDING)
        keys = masks.padded_ids(key_ids, shapes.key_rows, masks.KEY_PADDING)
        ids = {"query_ids": queries, "key_ids": keys}
        over_queries = masks.segment_bounds(keys, shapes.block_keys, queries, config.block_q)
        over_keys = masks.segment_bounds(queries, 2 * ROWS, keys, config.block_kv)
        tables["dk_dv"] |= ids | {"bounds": over_queries}
        tables["dq"] |= ids | {"bounds": over_keys}
    return tables


def _run(shapes: Shapes, which: str, arrays, tables, target):
    """One of the two kernels; `target` is the fused gradient to write into, or the types of separate ones."""
    optional = tables[which]
    mask, config = shapes.mask, shapes.config
    names = ("offsets", "query_ids", "key_ids", "bounds")

    def attention_backward(*refs, **scratch):
        if shapes.fused:
            refs, outputs = refs[:-1], [refs[-1]] * 2
            refs = refs[:1] * 3 + refs[1:]
        else:
            refs, outputs = refs[: -len(target)], list(refs[-len(target) :])
        extra = dict(zip(optional, refs[6:], strict=True))
        inputs = Inputs(*refs[:6], **{name: extra.get(name) for name in names})
        s, wg = _mosaic_gpu.Scratch(scratch), lax.axis_index("warpgroup")
        if which == "dk_dv":
            block = locate(shapes, inputs, masks.query_tiles, shapes.block_keys, config.block_q)
            pl.when(wg < 2)(lambda: key_compute_role(shapes, s, block, outputs, wg))
            pl.when(wg == 2)(lambda: key_memory_role(shapes, inputs, s, block))
        else:
            block = locate(shapes, inputs, masks.key_tiles, 2 * ROWS, config.block_kv)
            pl.when(wg < 2)(lambda: query_role(shapes, inputs, s, block, outputs[0], wg))
            pl.when(wg == 2)(lambda: query_memory_role(shapes, inputs, s, block))

    keys = which == "dk_dv"
    blocks = -(-mask.kv_len // shapes.block_keys) if keys else -(-mask.q_len // (2 * ROWS))
    run = plgpu.kernel(
        attention_backward,
        out_type=() if shapes.fused else target,
        scratch_types=key_scratch(shapes) if keys else query_scratch(shapes),
        grid=(shapes.num_kv_heads if keys else shapes.num_heads, shapes.batch, blocks),
        grid_names=("heads", "batch", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=f"attention_backward_{which}",
        **_mosaic_gpu.kernel_options(),
    )
    return run(*arrays, *optional.values(), *([target] if shapes.fused else []))
