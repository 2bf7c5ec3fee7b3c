"""Convolution, SiLU, split into heads and l2 norm on Hopper (sm_90a), as one Pallas Mosaic GPU kernel.

Algorithm: a block makes `ROWS` tokens of one head of queries, keys or values: the W shifted products of its channels,
bias, SiLU and, for queries and keys, the division by the length of the row, in float32 in registers, `slab` tokens at a
time. Rows are not shifted between registers: each shift is a read of its own of the tile in shared memory.

Layout: a warp owns whole rows, so that the sum of squares stays inside a warp; a thread holds 4 neighbouring channels
(`Shapes.matrix`), and the lanes that are served together read neighbouring ones: no bank twice.

Memory: the tile comes by TMA out of `[B, T, Hk, F]` with the tokens before it, which other blocks have in the L2 cache,
and leaves by TMA into `[B, T, heads, dim]`; copies leave out what lies beyond T. So every input is read once from
device memory and every output written once. Channels of `mixed` beyond the filter's are never touched.

Which tap is seen comes as one bit per token and lag (`reference.taps`), so packed documents and padding need no other
rule here. The initial state takes the place of what stands before a row's first real token, in shared memory.

Shared memory: `(2 ROWS + HALO) dim` values for each of the (one or two) dims. Source: the short convolution of Mamba
(arXiv 2312.00752, section 3.4), as in Gated Delta Networks (arXiv 2412.06464, section 3.4).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._l2norm import EPSILON
from pallas_kernels.causal_conv.tuning import HALO, ROWS, slab

VECTOR = 4  # values of a thread that lie side by side


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about one kernel."""

    batch: int
    length: int
    heads: int
    width: int
    key_dim: int
    value_dim: int
    group: int
    dtype: Any
    taps: bool
    state: bool
    bias: bool
    use_qk_l2norm: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        # The last is the fastest: blocks that run together read whole tokens.
        tiles = _mosaic_gpu.round_up(self.length, ROWS) // ROWS
        return (self.batch, tiles, self.heads * (2 + self.group))


def matrix(dim: int) -> Any:
    """Register layout of `[slab, dim]`: a warp owns whole rows."""
    lanes = 8 if dim == 96 else min(32, dim // VECTOR)  # side by side; the others take further rows
    rows = 32 // lanes
    columns = lanes * VECTOR
    if rows == 1:
        tiling = plgpu.Tiling(((4, columns), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and the barrier of one block."""
    spec: dict[str, Any] = {"ready": plgpu.Barrier(num_arrivals=1 + (shapes.width > 1))}
    for dim in {shapes.key_dim, shapes.value_dim}:
        spec[f"inputs_{dim}"] = plgpu.SMEM((HALO + ROWS, dim), shapes.dtype)
        spec[f"made_{dim}"] = plgpu.SMEM((ROWS, dim), shapes.dtype)
    return spec


class Inputs:
    """References by name; None where the call has no such operand."""

    def __init__(self, shapes: Shapes, references):
        rest = list(references)
        self.mixed, self.weight = rest.pop(0), rest.pop(0)
        self.bias = rest.pop(0) if shapes.bias else None
        self.taps = rest.pop(0) if shapes.taps else None
        self.first = rest.pop(0) if shapes.taps and shapes.state else None
        self.state = rest.pop(0) if shapes.state else None


def per_channel(ref, place, layout):
    """One value per channel of a block, in float32."""
    return plgpu.load(ref.at[place], layout=layout.reduce(0), optimized=False).astype(jnp.float32)


def fetch(shapes: Shapes, inputs: Inputs, s, tile, place) -> None:
    """The block's inputs and those before it in shared memory."""
    row, start, head, channels = place
    plgpu.copy_gmem_to_smem(
        inputs.mixed.at[row, pl.ds(start, ROWS), head, channels],
        tile.at[pl.ds(HALO, ROWS)],
        s.ready,
    )
    if shapes.width > 1:
        # The first block copies anything: nothing, or the initial state, stands before it.
        before = pl.ds(jnp.maximum(start - HALO, 0), HALO)
        plgpu.copy_gmem_to_smem(
            inputs.mixed.at[row, before, head, channels], tile.at[pl.ds(0, HALO)], s.ready
        )
    plgpu.barrier_wait(s.ready)


def place_state(shapes: Shapes, inputs: Inputs, tile, place) -> None:
    """The initial state, or zeros, where it ends at the row's first real token."""
    row, start, head, channels = place
    if shapes.width == 1 or (shapes.taps and not shapes.state):
        return  # nothing before the first real token is seen
    dim = tile.shape[1]
    layout = matrix(dim)
    first = jnp.int32(0) if inputs.first is None else inputs.first[row]

    @pl.when((first > start - shapes.width) & (first < start + ROWS + shapes.width))
    def _():
        for lag in range(1, shapes.width):
            local = HALO + first - lag - start
            if inputs.state is None:
                value = plgpu.layout_cast(jnp.zeros((dim,), shapes.dtype), layout.reduce(0))
            else:
                value = per_channel(
                    inputs.state, (row, shapes.width - lag, head, channels), layout
                ).astype(shapes.dtype)

            @pl.when((local >= 0) & (local < HALO + ROWS))
            def _(local=local, value=value):
                tile.at[local][...] = value

        plgpu.commit_smem()


def convolve(shapes: Shapes, inputs: Inputs, tile, made, place, normalise: bool) -> None:
    """The block's outputs in shared memory."""
    row, start, head, channels = place
    dim = tile.shape[1]
    layout, count = matrix(dim), slab(dim)
    shape = (count, dim)
    down = lambda x: lax.broadcast_in_dim(x, shape, [1])
    across = lambda x: lax.broadcast_in_dim(x, shape, [0])
    taps = [per_channel(inputs.weight, (w, head, channels), layout) for w in range(shapes.width)]
    bias = None if inputs.bias is None else per_channel(inputs.bias, (head, channels), layout)

    @pl.loop(0, ROWS // count)
    def _(index):
        offset = index * count
        seen = None
        if inputs.taps is not None:
            seen = plgpu.load(
                inputs.taps.at[row, pl.ds(start + offset, count)],
                layout=layout.reduce(1),
                optimized=False,
            )
        total = jnp.zeros(shape, jnp.float32) if bias is None else down(bias)
        total = plgpu.layout_cast(total, layout)
        for lag in range(shapes.width):
            window = plgpu.load(tile.at[pl.ds(HALO - lag + offset, count)], layout=layout)
            window = window.astype(jnp.float32)
            if seen is not None:
                window = jnp.where(across(seen & (1 << lag)) != 0, window, 0.0)
            total = total + down(taps[shapes.width - 1 - lag]) * window
        out = silu(total)
        if seen is not None:  # a real token sees itself
            out = jnp.where(across(seen & 1) != 0, out, 0.0)
        if normalise:
            out = out * across(lax.rsqrt(jnp.sum(out * out, axis=1) + EPSILON))
        made.at[pl.ds(offset, count)][...] = out.astype(shapes.dtype)


def sigmoid(x):
    """`1 / (1 + exp(-x))`; a reciprocal as the square of a root, because a division takes ten instructions."""
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return root * root


def silu(x):
    """`x sigmoid(x)`."""
    return x * sigmoid(x)


def block(shapes: Shapes, inputs: Inputs, outputs, s) -> None:
    """`ROWS` tokens of one head of queries, keys or values."""
    row, tile_index, part = (lax.axis_index(name) for name in ("row", "tile", "part"))
    start = tile_index * ROWS
    head, member = lax.div(part, 2 + shapes.group), lax.rem(part, 2 + shapes.group)
    query, key, value = outputs

    def run(dim, first_channel, normalise):
        tile, made = getattr(s, f"inputs_{dim}"), getattr(s, f"made_{dim}")
        place = (row, start, head, pl.ds(first_channel, dim))
        fetch(shapes, inputs, s, tile, place)
        place_state(shapes, inputs, tile, place)
        convolve(shapes, inputs, tile, made, place, normalise)
        plgpu.commit_smem()
        return made

    tokens = pl.ds(start, ROWS)

    @pl.when(member < 2)
    def _():
        made = run(shapes.key_dim, member * shapes.key_dim, shapes.use_qk_l2norm)
        for index, target in enumerate((query, key)):
            store = lambda target=target: plgpu.copy_smem_to_gmem(
                made, target.at[row, tokens, head]
            )
            pl.when(member == index)(store)

    @pl.when(member >= 2)
    def _():
        first_channel = 2 * shapes.key_dim + (member - 2) * shapes.value_dim
        made = run(shapes.value_dim, first_channel, False)
        plgpu.copy_smem_to_gmem(made, value.at[row, tokens, head * shapes.group + member - 2])

    plgpu.wait_smem_to_gmem(0)


def forward(
    mixed: jax.Array, weight: jax.Array, *, bias: jax.Array | None, taps: jax.Array | None,
    first: jax.Array | None, initial_state: jax.Array | None, key_dim: int, value_dim: int,
    use_qk_l2norm: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`(query, key, value)`; arguments as for `causal_conv1d_qkv`, and from `reference.taps`:

    Args:
      taps: None, or `[B, T']` int32, T' >= T a multiple of `ROWS`: bit l says whether a token sees the one l before it.
      first: None, or `[B]` int32: where the initial state ends; needed with `taps` and `initial_state`.
    """
    batch, length = mixed.shape[:2]
    width, heads, channels = weight.shape
    group = (channels - 2 * key_dim) // value_dim
    shapes = Shapes(
        batch, length, heads, width, key_dim, value_dim, group, mixed.dtype,
        taps is not None, initial_state is not None, bias is not None, use_qk_l2norm,
    )  # fmt: skip
    if taps is None or initial_state is None:
        first = None
    operands = [x for x in (mixed, weight, bias, taps, first, initial_state) if x is not None]

    def causal_conv_qkv(*references, **scratch):
        *inputs, query, key, value = references
        s = _mosaic_gpu.Scratch(scratch)
        block(shapes, Inputs(shapes, inputs), (query, key, value), s)

    struct = jax.ShapeDtypeStruct
    return plgpu.kernel(
        causal_conv_qkv,
        out_type=(
            struct((batch, length, heads, key_dim), mixed.dtype),
            struct((batch, length, heads, key_dim), mixed.dtype),
            struct((batch, length, heads * group, value_dim), mixed.dtype),
        ),
        scratch_types=scratch_spec(shapes),
        grid=shapes.grid,
        grid_names=("row", "tile", "part"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="causal_conv_qkv",
        **_mosaic_gpu.kernel_options(),
    )(*operands)
