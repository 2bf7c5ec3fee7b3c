"""Decode steps of the gated delta rule on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: one warpgroup per block holds all Dk rows of `columns` columns of one head's state in registers, in float32,
for all T tokens; columns do not depend on each other. A token decays the state, takes both sums over Dk (what the state
says about the key, and what the query reads) from it at once, and adds the update: `algebra.write_and_read`.

Layout: a warp owns a quarter of the columns and all rows, so both sums stay inside a warp: a few additions in a thread,
then shuffles. A thread holds 4 neighbouring columns of `Dk columns / 512` rows (`Shapes.matrix`).

Memory: the state comes and goes by TMA through one tile of shared memory, is read once and written once, and is updated
in place: the kernel takes a reference to it. A row without a slot touches none of it. Units: g is a natural logarithm.

Shared memory: `Dk columns` state values, and `T (2 Dk + 2 columns)` token values: at Dk = 128, 64 columns, float32,
33 KiB, so that blocks of several heads share a multiprocessor and their copies overlap; there is no pipeline inside a
block.

Source: the rule of Gated Delta Networks (arXiv 2412.06464, section 3.3), token by token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule.step_tuning import StepConfig


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about one kernel."""

    rows: int
    length: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    num_slots: int
    slots: bool
    states: bool
    per_channel: bool
    scale: float
    use_qk_l2norm: bool
    state_dtype: Any
    config: StepConfig

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.rows, self.value_heads, self.value_dim // self.config.columns)

    @property
    def matrix(self) -> Any:
        """Register layout of a `[Dk, columns]` tile.

        The swizzle of a shared-memory tile moves 16-byte pieces by the number of their row modulo 8. A warp's columns
        are `pieces` of them wide, so the lanes that are served together take every `pieces`-th row: no bank twice.
        """
        columns = self.config.columns // 4  # of one warp
        lanes = columns // 4  # side by side; the others take further rows
        pieces = columns * self.state_dtype.itemsize // 16
        tiling = plgpu.Tiling(((32 // lanes, self.config.columns), (pieces, columns), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -5, -2), vector_dim=-1)

    @property
    def per_row(self) -> Any:
        """Register layout of what belongs to the rows, `[Dk]`."""
        return self.matrix.reduce(1)

    @property
    def per_column(self) -> Any:
        """Register layout of what belongs to the columns, `[columns]`."""
        return self.matrix.reduce(0)


def scratch_spec(shapes: Shapes, tokens) -> dict[str, Any]:
    """Shared memory and the barrier of one block."""
    query, key, value, g = tokens
    columns = shapes.config.columns
    spec = {
        "query": plgpu.SMEM((shapes.length, shapes.key_dim), query.dtype),
        "key": plgpu.SMEM((shapes.length, shapes.key_dim), key.dtype),
        "value": plgpu.SMEM((shapes.length, columns), value.dtype),
        "out": plgpu.SMEM((shapes.length, columns), value.dtype),
        "state": _mosaic_gpu.tile((shapes.key_dim, columns), shapes.state_dtype),
        "ready": plgpu.Barrier(num_arrivals=4 + shapes.per_channel),
    }
    if shapes.per_channel:
        spec["g"] = plgpu.SMEM((shapes.length, shapes.key_dim), g.dtype)
    return spec


def advance(shapes: Shapes, inputs, states, s, place, row, head, columns) -> None:
    """All tokens of one row with a slot."""
    query, key, value, g, beta, state = inputs
    key_head = lax.div(head, shapes.value_heads // shapes.key_heads)
    tokens = pl.ds(0, shapes.length)
    plgpu.copy_gmem_to_smem(state.at[place], s.state, s.ready)
    plgpu.copy_gmem_to_smem(query.at[row, tokens, key_head], s.query, s.ready)
    plgpu.copy_gmem_to_smem(key.at[row, tokens, key_head], s.key, s.ready)
    plgpu.copy_gmem_to_smem(value.at[row, tokens, head, columns], s.value, s.ready)
    if shapes.per_channel:
        plgpu.copy_gmem_to_smem(g.at[row, tokens, key_head], s.g, s.ready)
    plgpu.barrier_wait(s.ready)

    def channels(ref, t):
        x = plgpu.load(ref.at[t], layout=shapes.per_row, optimized=False)
        return x.astype(jnp.float32)

    def everywhere(scalar):
        return plgpu.layout_cast(jnp.full((shapes.key_dim,), scalar, jnp.float32), shapes.per_row)

    def spread(x, axis):
        tile = lax.broadcast_in_dim(x, (shapes.key_dim, shapes.config.columns), [axis])
        return plgpu.layout_cast(tile, shapes.matrix)

    held = plgpu.load(s.state, layout=shapes.matrix).astype(jnp.float32)
    for t in range(shapes.length):
        log_decay = channels(s.g, t) if shapes.per_channel else everywhere(g[row, t, head])
        held, read = algebra.write_and_read(
            held, channels(s.query, t), channels(s.key, t),
            plgpu.load(s.value.at[t], layout=shapes.per_column, optimized=False).astype(jnp.float32),
            jnp.exp(log_decay), beta[row, t, head], scale=shapes.scale, use_qk_l2norm=shapes.use_qk_l2norm,
            spread=spread,
        )  # fmt: skip
        s.out.at[t][...] = read.astype(s.out.dtype)
        if shapes.states or t == shapes.length - 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            s.state[...] = held.astype(s.state.dtype)
            plgpu.commit_smem()
        if shapes.states:
            plgpu.copy_smem_to_gmem(s.state, states.at[row, t, head, :, columns])
    plgpu.copy_smem_to_gmem(s.state, state.at[place])


def pad(shapes: Shapes, states, s, row, head, columns) -> None:
    """Zeros for a row without a slot."""
    zeros = jnp.zeros((shapes.config.columns,), s.out.dtype)
    for t in range(shapes.length):
        s.out.at[t][...] = plgpu.layout_cast(zeros, shapes.per_column)
    if shapes.states:
        nothing = jnp.zeros((shapes.key_dim, shapes.config.columns), s.state.dtype)
        s.state[...] = plgpu.layout_cast(nothing, shapes.matrix)
        plgpu.commit_smem()
        for t in range(shapes.length):
            plgpu.copy_smem_to_gmem(s.state, states.at[row, t, head, :, columns])


def block(shapes: Shapes, refs: tuple[Any, ...], **scratch: Any) -> None:
    """One block: `columns` columns of one head of one row."""
    *inputs, out = refs[: len(refs) - shapes.states]
    states = refs[-1] if shapes.states else None
    slots = inputs.pop() if shapes.slots else None
    s = _mosaic_gpu.Scratch(scratch)
    row, head = lax.axis_index("row"), lax.axis_index("head")
    columns = pl.ds(lax.axis_index("tile") * shapes.config.columns, shapes.config.columns)

    def run(slot):
        place = (slot, head, slice(None), columns)
        advance(shapes, inputs, states, s, place, row, head, columns)

    if slots is None:
        run(row)
    else:
        slot = slots[row]
        real = (slot >= 0) & (slot < shapes.num_slots)
        pl.when(real)(lambda: run(slot))
        pl.when(jnp.logical_not(real))(lambda: pad(shapes, states, s, row, head, columns))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s.out, out.at[row, pl.ds(0, shapes.length), head, columns])
    plgpu.wait_smem_to_gmem(0)


def step(
    query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array, *,
    slots: jax.Array | None, scale: float, use_qk_l2norm: bool, return_states: bool, config: StepConfig,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """`(out, state after, states or None)`; arguments as for `gated_delta_rule_step`, the state's dtype kept."""
    rows, length, key_heads, key_dim = query.shape
    value_heads, value_dim = value.shape[2:]
    shapes = Shapes(
        rows, length, key_heads, value_heads, key_dim, value_dim, state.shape[0], slots is not None,
        return_states, g.ndim == 4, scale, use_qk_l2norm, jnp.dtype(state.dtype), config,
    )  # fmt: skip
    pool = jax.new_ref(state)
    operands = [query, key, value, g.astype(jnp.float32), beta.astype(jnp.float32), pool]
    if slots is not None:
        operands.append(slots.astype(jnp.int32))
    outputs = [jax.ShapeDtypeStruct(value.shape, value.dtype)]
    if return_states:
        outputs.append(jax.ShapeDtypeStruct((rows, length, *state.shape[1:]), state.dtype))

    def kernel(*refs):
        scratch = scratch_spec(shapes, operands[:4])
        pl.run_scoped(functools.partial(block, shapes, refs), **scratch)

    mesh = plgpu.Mesh(grid=shapes.grid, grid_names=("row", "head", "tile"))
    run: Any = pl.kernel(
        kernel,
        out_type=outputs,
        mesh=mesh,
        name="gated_delta_rule_step",
        **_mosaic_gpu.kernel_options(),
    )
    out, *states = run(*operands)
    return out, jax.freeze(pool), states[0] if states else None
