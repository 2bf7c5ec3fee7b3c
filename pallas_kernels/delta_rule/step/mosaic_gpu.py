"""Decode steps of the gated delta rule on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: one warpgroup per block holds all Dk rows of `columns` columns of one head's state in registers, in float32,
for all T tokens; columns do not depend on each other. A token decays the state, takes both sums over Dk (what the state
says about the key, and what the query reads) from it at once, and adds the update: `algebra.write_and_read`.

Source: where the tokens come from is not the walk's business. It asks a `Source` for queries, keys and values in shared
memory, and for the decay and the write strength of each token. `Loaded` copies them;
`deltanet/mosaic_gpu.py` makes them by a convolution.

Layout: a warp owns a quarter of the columns and all rows, so both sums stay inside a warp: a few additions in a thread,
then shuffles. A thread holds 4 neighbouring columns of `Dk columns / 512` rows (`Shapes.matrix`).

Memory: the state comes and goes by TMA through one tile of shared memory, is read once and written once, and is updated
in place: the kernel takes a reference to it. A row without a slot touches none of it. Units: g is a natural logarithm.

Shared memory: `Dk columns` state values, and `T (2 Dk + 2 columns)` token values: at Dk = 128, 64 columns, float32,
33 KiB, so that blocks of several heads share a multiprocessor and their copies overlap; there is no pipeline inside a
block.

Rule: section 3.3 of Gated Delta Networks (arXiv 2412.06464), token by token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule.algebra import Token, write_and_read
from pallas_kernels.delta_rule.step.tuning import Shapes


def matrix_layout(columns: int, dtype: DTypeLike) -> Any:
    """Register layout of a `[Dk, columns]` tile of a state of this type.

    The swizzle of a shared-memory tile moves 16-byte pieces by the number of their row modulo 8. A warp's columns
    are `pieces` of them wide, so the lanes that are served together take every `pieces`-th row: no bank twice.
    """
    of_warp = columns // 4
    lanes = of_warp // 4  # side by side; the others take further rows
    pieces = of_warp * jnp.dtype(dtype).itemsize // 16
    tiling = plgpu.Tiling(((32 // lanes, columns), (pieces, of_warp), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -5, -2), vector_dim=-1)


class Block(NamedTuple):
    """Which columns of the state one block advances.

    Attributes:
      row, head, tile: of the grid; slot: the row's place in the pool.
      columns: slice of Dv.
      matrix, per_row, per_column: register layouts of `[Dk, columns]`, `[Dk]` and `[columns]`.
    """

    row: jax.Array
    head: jax.Array
    tile: jax.Array
    slot: jax.Array
    columns: Any
    matrix: Any
    per_row: Any
    per_column: Any


class Source(Protocol):
    """Where the tokens of a block come from; made inside the kernel from `(shapes, inputs, outputs)`.

    Attributes:
      arrivals: how many copies `start` sends to the barrier `ready`.
    """

    arrivals: int

    def scratch(self) -> dict[str, Any]:
        """Shared memory by name."""
        ...

    def start(self, s: _mosaic_gpu.Scratch, block: Block) -> tuple[Any, Any, Any]:
        """References of query and key `[T, Dk]` and value `[T, columns]`, full once the copies sent by it arrive."""
        ...

    def gates(self, s: _mosaic_gpu.Scratch, block: Block, t: int) -> tuple[jax.Array, jax.Array]:
        """`(g, beta)` of token t: the log decay, a scalar or `[Dk]` in the layout `per_row`, and a scalar."""
        ...


class Loaded:
    """Tokens as `gated_delta_rule_step` takes them: `inputs` are query, key, value, g and beta."""

    def __init__(self, shapes: Shapes, inputs: Sequence[Any], _: Sequence[Any]):
        self.shapes = shapes
        self.query, self.key, self.value, self.g, self.beta = inputs
        self.per_channel = len(self.g.shape) == 4
        self.arrivals = 3 + self.per_channel

    def scratch(self) -> dict[str, Any]:
        length, columns = self.shapes.length, self.shapes.config.columns
        channels = (length, self.shapes.key_dim)
        spec = {
            "query": plgpu.SMEM(channels, self.query.dtype),
            "key": plgpu.SMEM(channels, self.key.dtype),
            "value": plgpu.SMEM((length, columns), self.value.dtype),
        }
        if self.per_channel:
            spec["g"] = plgpu.SMEM(channels, self.g.dtype)
        return spec

    def start(self, s: _mosaic_gpu.Scratch, block: Block) -> tuple[Any, Any, Any]:
        tokens = (block.row, pl.ds(0, self.shapes.length))
        key_head = lax.div(block.head, self.shapes.group)
        plgpu.copy_gmem_to_smem(self.query.at[*tokens, key_head], s.query, s.ready)
        plgpu.copy_gmem_to_smem(self.key.at[*tokens, key_head], s.key, s.ready)
        plgpu.copy_gmem_to_smem(self.value.at[*tokens, block.head, block.columns], s.value, s.ready)
        if self.per_channel:
            plgpu.copy_gmem_to_smem(self.g.at[*tokens, key_head], s.g, s.ready)
        return s.query, s.key, s.value

    def gates(self, s: _mosaic_gpu.Scratch, block: Block, t: int) -> tuple[jax.Array, jax.Array]:
        place = (block.row, t, block.head)
        if self.per_channel:
            return _vector(s.g.at[t], block.per_row), self.beta[place]
        return self.g[place], self.beta[place]


def scratch_spec(shapes: Shapes, source: Source, state_dtype, out_dtype) -> dict[str, Any]:
    """Shared memory and the barrier of one block."""
    columns = shapes.config.columns
    return source.scratch() | {
        "out": plgpu.SMEM((shapes.length, columns), out_dtype),
        "state": _mosaic_gpu.tile((shapes.key_dim, columns), state_dtype),
        "ready": plgpu.Barrier(num_arrivals=1 + source.arrivals),
    }


def _vector(ref: _mosaic_gpu.Ref, layout) -> jax.Array:
    """A vector of shared memory in float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def advance(
    shapes: Shapes,
    source: Source,
    block: Block,
    s: _mosaic_gpu.Scratch,
    state: _mosaic_gpu.Ref,
    states: _mosaic_gpu.Ref,
) -> None:
    """All tokens of one row with a slot."""
    place = (block.slot, block.head, slice(None), block.columns)
    plgpu.copy_gmem_to_smem(state.at[place], s.state, s.ready)
    queries, keys, values = source.start(s, block)
    plgpu.barrier_wait(s.ready)

    def spread(x, axis):
        tile = lax.broadcast_in_dim(x, (shapes.key_dim, shapes.config.columns), [axis])
        return plgpu.layout_cast(tile, block.matrix)

    def token(t: int) -> Token:
        g, beta = source.gates(s, block, t)
        if not g.shape:
            g = plgpu.layout_cast(jnp.full((shapes.key_dim,), g, jnp.float32), block.per_row)
        query, key = (_vector(ref.at[t], block.per_row) for ref in (queries, keys))
        return Token(query, key, _vector(values.at[t], block.per_column), jnp.exp(g), beta)

    held = plgpu.load(s.state, layout=block.matrix).astype(jnp.float32)
    for t in range(shapes.length):
        held, read = write_and_read(
            held, token(t), scale=shapes.scale, use_qk_l2norm=shapes.use_qk_l2norm, spread=spread
        )
        s.out.at[t][...] = read.astype(s.out.dtype)
        if shapes.states or t == shapes.length - 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            s.state[...] = held.astype(s.state.dtype)
            plgpu.commit_smem()
        if shapes.states:
            plgpu.copy_smem_to_gmem(s.state, states.at[block.row, t, block.head, :, block.columns])
    plgpu.copy_smem_to_gmem(s.state, state.at[place])


def pad(shapes: Shapes, block: Block, s: _mosaic_gpu.Scratch, states: _mosaic_gpu.Ref) -> None:
    """Zeros for a row without a slot."""
    zeros = jnp.zeros((shapes.config.columns,), s.out.dtype)
    for t in range(shapes.length):
        s.out.at[t][...] = plgpu.layout_cast(zeros, block.per_column)
    if shapes.states:
        nothing = jnp.zeros((shapes.key_dim, shapes.config.columns), s.state.dtype)
        s.state[...] = plgpu.layout_cast(nothing, block.matrix)
        plgpu.commit_smem()
        for t in range(shapes.length):
            plgpu.copy_smem_to_gmem(s.state, states.at[block.row, t, block.head, :, block.columns])


def walk(
    shapes: Shapes,
    source: Source,
    s: _mosaic_gpu.Scratch,
    state: jax.Array,
    slots: jax.Array | None,
    out: _mosaic_gpu.Ref,
    states,
) -> None:
    """One block: `columns` columns of one head of one row."""
    row, head, tile = (lax.axis_index(name) for name in ("row", "head", "tile"))
    columns = pl.ds(tile * shapes.config.columns, shapes.config.columns)
    matrix = matrix_layout(shapes.config.columns, state.dtype)
    layouts = (matrix, matrix.reduce(1), matrix.reduce(0))
    here = lambda slot: Block(row, head, tile, slot, columns, *layouts)
    if slots is None:
        advance(shapes, source, here(row), s, state, states)
    else:
        slot = slots[row]
        real = (slot >= 0) & (slot < state.shape[0])
        pl.when(real)(lambda: advance(shapes, source, here(slot), s, state, states))
        pl.when(jnp.logical_not(real))(lambda: pad(shapes, here(slot), s, states))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s.out, out.at[row, pl.ds(0, shapes.length), head, columns])
    plgpu.wait_smem_to_gmem(0)


def launch(
    shapes: Shapes,
    source: Callable[..., Source],
    inputs: Sequence[jax.Array],
    state: jax.Array,
    slots: jax.Array | None,
    *,
    out_dtype,
    name: str,
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
) -> tuple[Any, ...]:
    """Runs the walk over tokens of `source`; returns `(out, state after, states or None, *outputs)`.

    Args:
      shapes: of the call.
      source: makes the `Source` of a block from `(shapes, inputs, outputs)`.
      inputs: what the source reads.
      state: `[P, Hv, Dk, Dv]`, advanced in place.
      slots: `[rows]` int32, or None.
      out_dtype: of `out`, `[rows, T, Hv, Dv]`.
      name: of the kernel.
      outputs: what the source writes.
    """
    pool = jax.new_ref(state)
    heads = (shapes.rows, shapes.length, shapes.value_heads)
    results = [jax.ShapeDtypeStruct((*heads, shapes.value_dim), out_dtype)]
    if shapes.states:
        results.append(
            jax.ShapeDtypeStruct((*heads, shapes.key_dim, shapes.value_dim), state.dtype)
        )
    operands = [pool, *inputs, *([] if slots is None else [slots])]

    def kernel(*refs):
        given, made = refs[: len(operands)], refs[len(operands) :]
        tokens = source(shapes, given[1 : 1 + len(inputs)], made[len(results) :])
        refs_of_walk = (
            given[0],
            None if slots is None else given[-1],
            made[0],
            made[1] if shapes.states else None,
        )
        pl.run_scoped(
            lambda **scratch: walk(shapes, tokens, _mosaic_gpu.Scratch(scratch), *refs_of_walk),
            **scratch_spec(shapes, tokens, state.dtype, out_dtype),
        )

    grid = (shapes.rows, shapes.value_heads, shapes.tiles)
    mesh = plgpu.Mesh(grid=grid, grid_names=("row", "head", "tile"))
    run: Any = pl.kernel(
        kernel,
        out_type=[*results, *outputs],
        mesh=mesh,
        name=name,
        **_mosaic_gpu.kernel_options(),
    )
    made = run(*operands)
    states = made[1] if shapes.states else None
    return made[0], jax.freeze(pool), states, *made[len(results) :]
