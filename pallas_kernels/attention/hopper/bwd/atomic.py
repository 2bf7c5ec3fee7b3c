"""dk, dv and dq in one walk over the query tiles: 5 matrix products instead of 7, and sums in no fixed order.

As `keys` up to head_dim 128. Each warpgroup also leaves its ds (64 keys x 64 queries) in shared memory; from both,
each makes half of the channels of what this block of 128 keys adds to dq. TMA adds that tile to a float32 array in
device memory (in L2), whichever block comes first: additions of float32 do not associate, so dq differs between runs in
its last bits. dk and dv have one order and repeat.

A step, per warpgroup (shared memory behind `:`):

    scores : keys queries          dp, dv : values cotangents        ds -> `slopes`        dk : queries
    dq     : slopes (both) keys    -> `shares` -> added to device memory while the next step runs

Shared memory: `4 D` bytes for each of 128 keys, `4 D stages block_q`, two buffers of ds, `4 D block_q` for the tile on
its way. At head_dim 256 the registers and the memory of a block are full without dq: `tuning` refuses.

Source: Shah et al. 2024 (FlashAttention-3, arXiv 2407.08608), appendix B.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS
from pallas_kernels.attention.hopper.bwd import keys
from pallas_kernels.attention.hopper.bwd.blocks import Block, Shapes


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """What `keys` needs, and ds and dq on their way."""
    config, dtype, dim, half = shapes.config, shapes.dtype, shapes.head_dim, shapes.head_dim // 2
    # A product reads half of the keys' channels, which must be whole columns of their swizzle; both operands of a
    # product have the same one.
    halves = _mosaic_gpu.transforms(half, dtype)
    return keys.scratch_spec(shapes) | {
        "keys": plgpu.SMEM((2, ROWS, dim), dtype, transforms=halves),
        "queries": plgpu.SMEM((config.stages, config.block_q, dim), dtype, transforms=halves),
        "slopes": plgpu.SMEM((2, 2, ROWS, config.block_q), dtype, transforms=halves),
        "shares": _mosaic_gpu.tile((2, config.block_q, half), jnp.float32),
        "slopes_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "slopes_free": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }


def share_of(
    shapes: Shapes, s: _mosaic_gpu.Scratch, half: jax.Array, buffer: jax.Array, slot: jax.Array
):
    """This block's share of dq: half of the channels of one query tile."""
    columns = shapes.head_dim // 2

    def product(accumulator):
        for owner in range(2):
            operand = s.keys.at[owner, :, pl.ds(half * columns, columns)]
            plgpu.wgmma(accumulator, s.slopes.at[buffer, owner].T, operand)
        plgpu.wgmma_wait(2)  # dk
        plgpu.barrier_arrive(s.query_free.at[slot])
        return accumulator[...]

    return pl.run_scoped(product, _mosaic_gpu.accumulator(shapes.config.block_q, columns))


def add_to(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    block: Block,
    sums: _mosaic_gpu.Ref,
    step: jax.Array,
    share,
    wg,
) -> None:
    """Adds a tile to dq in device memory; the copy ends behind the next step."""
    config, columns = shapes.config, shapes.head_dim // 2
    tile, head = keys.step_place(shapes, block, step)
    rows = pl.ds(tile * config.block_q, config.block_q)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    s.shares.at[wg][...] = share
    plgpu.commit_smem()
    box = sums.at[block.batch, rows, head, pl.ds(wg * columns, columns)]
    plgpu.copy_smem_to_gmem(s.shares.at[wg], box, reduction_op="add")


def all_three(
    shapes: Shapes, s: _mosaic_gpu.Scratch, block: Block, sums: _mosaic_gpu.Ref, wg: jax.Array
):
    """dk and dv of 64 keys; dq goes to `sums`."""

    def accumulate(dk, dv):
        def body(step, *, masked: bool):
            slot, buffer = lax.rem(step, shapes.config.stages), lax.rem(step, 2)
            (me,) = _mosaic_gpu.opaque(wg)
            plgpu.barrier_wait(s.query_ready.at[slot])
            weights, multiple = keys.weights_of(shapes, s, block, wg, me, step, slot, masked)
            ds = keys.slopes_of(shapes, s, dv, me, slot, weights, multiple)

            @pl.when(step >= 2)
            def _():
                plgpu.barrier_wait(s.slopes_free.at[buffer])

            s.slopes.at[buffer, wg][...] = ds
            # For the product that reads ds; and statistics were read from the slots, which TMA fills again.
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.slopes_ready.at[buffer])
            plgpu.wgmma(dk, ds, s.queries.at[slot])
            plgpu.wgmma_wait(1)  # dv
            plgpu.barrier_arrive(s.cotangent_free.at[slot])
            plgpu.barrier_wait(s.slopes_ready.at[buffer])
            share = share_of(shapes, s, me, buffer, slot)
            plgpu.barrier_arrive(s.slopes_free.at[buffer])
            add_to(shapes, s, block, sums, step, share, wg)

        keys.loop_over_steps(shapes, block, body)
        return dk[...], dv[...]

    tile = _mosaic_gpu.accumulator(ROWS, shapes.head_dim)
    dk, dv = pl.run_scoped(accumulate, tile, tile)
    steps, _ = keys.step_counts(shapes, block)

    # The other warpgroup still reads these keys, which dk will overwrite.
    @pl.loop(lax.max(0, steps - 2), steps)
    def _(step):
        plgpu.barrier_wait(s.slopes_free.at[lax.rem(step, 2)])

    return dk, dv


def compute_role(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    block: Block,
    outputs: _mosaic_gpu.Ref,
    sums,
    wg: jax.Array,
) -> None:
    """dk and dv of 64 keys, and half of the channels of the block's share of dq."""
    d_key, d_value = outputs
    plgpu.set_max_registers(shapes.config.compute_registers, action="increase")
    plgpu.barrier_wait(s.keys_ready)
    dk, dv = all_three(shapes, s, block, sums, wg)
    keys.write(shapes, block, s.keys, dk * shapes.scale, d_key, 0, wg)
    keys.write(shapes, block, s.values, dv, d_value, 1, wg)
    plgpu.wait_smem_to_gmem(0)
