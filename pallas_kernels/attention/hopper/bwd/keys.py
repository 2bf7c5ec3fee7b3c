"""dk and dv of a block of keys: walks the query tiles of every query head of the group.

Tiles are transposed (keys are rows), so that weights and ds are born in the layout of a left operand. Up to head_dim
128 each compute warpgroup owns 64 of the keys. Where dk and dv of 64 keys do not fit into the registers of one, two
share them (`BackwardConfig.split`): the first computes weights and dv, and the second, which gets the weights through
shared memory, ds and dk.

Shared memory: `4 D` bytes for every key of the block plus `4 D stages block_q`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS
from pallas_kernels.attention.hopper import mask as masks
from pallas_kernels.attention.hopper.bwd.blocks import (
    MATRIX,
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


def step_counts(shapes: Shapes, block: Block):
    """Steps of a block, and how many of the first need the mask: every tile for every query head of the group."""
    tiles = block.tiles
    return (
        (tiles.high - tiles.low) * shapes.group,
        masks.masked_steps(tiles) * shapes.group,
    )


def step_place(shapes: Shapes, block: Block, step: jax.Array):
    """(query tile, query head) of a step."""
    tile = masks.walk(block.tiles, lax.div(step, shapes.group), both_ends=True)
    return tile, block.head * shapes.group + lax.rem(step, shapes.group)


def memory_role(shapes: Shapes, inputs: Inputs, s: _mosaic_gpu.Scratch, block: Block) -> None:
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
    steps, _ = step_counts(shapes, block)

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, config.stages)
        tile, head = step_place(shapes, block, step)
        rows = pl.ds(tile * config.block_q, config.block_q)

        # Up to head_dim 128 output gradients are free before queries.
        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.cotangent_free.at[slot])

        ready = s.cotangent_ready.at[slot]
        plgpu.copy_gmem_to_smem(
            inputs.cotangent.at[batch, rows, head], s.cotangents.at[slot], ready
        )
        plgpu.copy_gmem_to_smem(inputs.delta.at[batch, head, rows], s.delta.at[slot], ready)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.query_free.at[slot])

        ready = s.query_ready.at[slot]
        query = query_box(shapes, inputs.query, batch, rows, head)
        plgpu.copy_gmem_to_smem(query, s.queries.at[slot], ready)
        plgpu.copy_gmem_to_smem(inputs.lse.at[batch, head, rows], s.lse.at[slot], ready)
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(inputs.query_ids.at[batch, rows], s.query_ids.at[slot], ready)

    if _mosaic_gpu.interpreting():
        # The interpreter insists that every completed phase of a barrier is observed; the hardware does not care.
        @pl.loop(lax.max(0, steps - config.stages), steps)
        def _(step):
            plgpu.barrier_wait(s.query_free.at[lax.rem(step, config.stages)])
            plgpu.barrier_wait(s.cotangent_free.at[lax.rem(step, config.stages)])


def transposed_weights(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    block: Block,
    owner: jax.Array,
    step: jax.Array,
    slot: jax.Array,
    scores: jax.Array,
    masked: bool,
):
    """Weights, and what ds is a multiple of, of one tile whose rows are keys."""
    config = shapes.config
    shape = (ROWS, config.block_q)
    shown = None
    if masked:
        tile, _ = step_place(shapes, block, step)
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
    lse = plgpu.load(s.lse.at[slot], layout=PER_COLUMN)
    return softmax_weights(shapes, scores, lax.broadcast_in_dim(lse, shape, [1]), shown)


def minus_delta(shapes: Shapes, s: _mosaic_gpu.Scratch, slot: jax.Array):
    """The value at which the accumulator of dp starts, so that the product itself yields dp - delta."""
    delta = plgpu.load(s.delta.at[slot], layout=PER_COLUMN)
    shape = (ROWS, shapes.config.block_q)
    return plgpu.layout_cast(lax.broadcast_in_dim(-delta, shape, [1]), MATRIX)


def loop_over_steps(shapes: Shapes, block: Block, body) -> None:
    """Runs `body(step, masked=...)`: masked steps first."""
    steps, masked = step_counts(shapes, block)
    if shapes.mask.is_causal or shapes.mask.segments:
        lax.fori_loop(0, masked, lambda step, _: body(step, masked=True), None)
        lax.fori_loop(masked, steps, lambda step, _: body(step, masked=False), None)
    else:
        lax.fori_loop(0, steps, lambda step, _: body(step, masked=False), None)


def weights_of(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    block: Block,
    owner,
    keys: jax.Array,
    step: jax.Array,
    slot: jax.Array,
    masked: bool,
):
    """`transposed_weights` of a step, from its scores.

    Args:
      owner: which 64 keys of the block.
      keys: the same, as an opaque index of the operand.
    """

    def score(accumulator):
        plgpu.wgmma(accumulator, s.keys.at[keys], s.queries.at[slot].T)
        return accumulator[...]

    tile = _mosaic_gpu.accumulator(ROWS, shapes.config.block_q)
    scores = pl.run_scoped(score, tile)
    return transposed_weights(shapes, s, block, owner, step, slot, scores, masked)


def slopes_of(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    dv,
    keys: jax.Array,
    slot: jax.Array,
    weights: jax.Array,
    multiple,
):
    """ds in the input dtype; the product that adds to dv stays in flight."""
    rounded = weights.astype(shapes.dtype)
    plgpu.barrier_wait(s.cotangent_ready.at[slot])

    def products(accumulator):
        accumulator[...] = minus_delta(shapes, s, slot)
        plgpu.wgmma(accumulator, s.values.at[keys], s.cotangents.at[slot].T)
        plgpu.wgmma(dv, rounded, s.cotangents.at[slot])
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=1)

    tile = _mosaic_gpu.accumulator(ROWS, shapes.config.block_q)
    return (multiple * pl.run_scoped(products, tile)).astype(shapes.dtype)


def both_halves(shapes: Shapes, s: _mosaic_gpu.Scratch, block: Block, wg: jax.Array):
    """dk and dv of 64 keys, both in this warpgroup's registers."""

    def accumulate(dk, dv):
        def body(step, *, masked: bool):
            slot = lax.rem(step, shapes.config.stages)
            (me,) = _mosaic_gpu.opaque(wg)
            plgpu.barrier_wait(s.query_ready.at[slot])
            weights, multiple = weights_of(shapes, s, block, wg, me, step, slot, masked)
            ds = slopes_of(shapes, s, dv, me, slot, weights, multiple)
            plgpu.wgmma(dk, ds, s.queries.at[slot])
            # Statistics were read from the slots: order those reads before TMA fills them again.
            plgpu.commit_smem()
            plgpu.wgmma_wait(1)  # dv
            plgpu.barrier_arrive(s.cotangent_free.at[slot])
            plgpu.wgmma_wait(0)  # dk
            plgpu.barrier_arrive(s.query_free.at[slot])

        loop_over_steps(shapes, block, body)
        return dk[...], dv[...]

    tile = _mosaic_gpu.accumulator(ROWS, shapes.head_dim)
    return pl.run_scoped(accumulate, tile, tile)


def value_half(shapes: Shapes, s: _mosaic_gpu.Scratch, block: Block):
    """Split: weights, handed on through shared memory, and dv."""
    config = shapes.config

    def accumulate(dv):
        def body(step, *, masked: bool):
            slot, buffer = lax.rem(step, config.stages), lax.rem(step, 2)
            (own,) = _mosaic_gpu.opaque(lax.rem(step, 1))
            plgpu.barrier_wait(s.query_ready.at[slot])

            weights, multiple = weights_of(shapes, s, block, 0, own, step, slot, masked)
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
        steps, _ = step_counts(shapes, block)

        @pl.loop(lax.max(0, steps - 2), steps)
        def _(step):
            plgpu.barrier_wait(s.multiples_free.at[lax.rem(step, 2)])

    return dv


def key_half(shapes: Shapes, s: _mosaic_gpu.Scratch, block: Block):
    """Split: ds from the other warpgroup's weights, and dk."""
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

        steps, _ = step_counts(shapes, block)
        lax.fori_loop(0, steps, body, None)
        return dk[...]

    return pl.run_scoped(accumulate, _mosaic_gpu.accumulator(ROWS, shapes.head_dim))


def write(
    shapes: Shapes,
    block: Block,
    source: _mosaic_gpu.Ref,
    value: jax.Array,
    target: _mosaic_gpu.Ref,
    which: int,
    owner,
) -> None:
    """Brings dk (`which=0`) or dv (1) of 64 keys to device memory through the tile that nobody reads any more."""
    rows = pl.ds(block.first + owner * ROWS, ROWS)
    source.at[owner][...] = value.astype(shapes.dtype)
    plgpu.commit_smem()
    box = key_box(shapes, target, block.batch, rows, block.head, which)
    plgpu.copy_smem_to_gmem(source.at[owner], box)


def compute_role(
    shapes: Shapes, s: _mosaic_gpu.Scratch, block: Block, outputs: _mosaic_gpu.Ref, wg: jax.Array
) -> None:
    """dk and dv of a warpgroup's keys, or when split one of the two."""
    d_key, d_value = outputs
    plgpu.set_max_registers(shapes.config.compute_registers, action="increase")
    plgpu.barrier_wait(s.keys_ready)
    if shapes.split:
        # Each half reuses the tile that only it reads.
        @pl.when(wg == 0)
        def _():
            dv = value_half(shapes, s, block)
            write(shapes, block, s.keys, dv, d_value, 1, 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            dk = key_half(shapes, s, block)
            write(shapes, block, s.values, dk * shapes.scale, d_key, 0, 0)
            plgpu.wait_smem_to_gmem(0)

        return
    dk, dv = both_halves(shapes, s, block, wg)
    write(shapes, block, s.keys, dk * shapes.scale, d_key, 0, wg)
    write(shapes, block, s.values, dv, d_value, 1, wg)
    plgpu.wait_smem_to_gmem(0)
