"""dq of a block of 128 queries of one head: walks key tiles, as the forward kernel does.

Shared memory: `4 D (128 + kv_stages block_kv)` bytes.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS
from pallas_kernels.attention.hopper import mask as masks
from pallas_kernels.attention.hopper.bwd.blocks import (
    PER_COLUMN,
    PER_ROW,
    Block,
    Inputs,
    Shapes,
    key_box,
    query_box,
    softmax_weights,
)


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
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


def memory_role(shapes: Shapes, inputs: Inputs, s: _mosaic_gpu.Scratch, block: Block) -> None:
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


def compute_role(
    shapes: Shapes,
    inputs: Inputs,
    s: _mosaic_gpu.Scratch,
    block: Block,
    d_query: _mosaic_gpu.Ref,
    wg,
) -> None:
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
