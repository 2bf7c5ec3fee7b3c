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

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._precision import EPSILON
from pallas_kernels.causal_conv.hopper.tile import (
    Inputs,
    Shapes,
    Tile,
    fetch,
    matrix,
    per_channel,
    place_state,
    sigmoid,
)
from pallas_kernels.causal_conv.tuning import HALO, ROWS, slab


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and the barrier of one block."""
    spec: dict[str, Any] = {"ready": plgpu.Barrier(num_arrivals=1 + (shapes.width > 1))}
    for dim in {shapes.key_dim, shapes.value_dim}:
        spec[f"inputs_{dim}"] = plgpu.SMEM((HALO + ROWS, dim), shapes.dtype)
        spec[f"made_{dim}"] = plgpu.SMEM((ROWS, dim), shapes.dtype)
    return spec


def convolve(
    shapes: Shapes, inputs: Inputs, tile: _mosaic_gpu.Ref, made, place, normalise: bool
) -> None:
    """The block's outputs in shared memory."""
    row, start, head, channels = place
    dim = tile.shape[1]
    layout, count = matrix(dim), slab(dim)
    on = Tile((count, dim), layout)
    weights = [per_channel(inputs.weight, (w, head, channels), layout) for w in range(shapes.width)]
    bias = None if inputs.bias is None else per_channel(inputs.bias, (head, channels), layout)

    @pl.loop(0, ROWS // count)
    def _(index):
        offset = index * count
        seen = None
        if inputs.taps is not None:
            tokens = pl.ds(start + offset, count)
            seen = plgpu.load(inputs.taps.at[row, tokens], layout=layout.reduce(1), optimized=False)
        total = on.zeros() if bias is None else on.down(bias)
        for lag in range(shapes.width):
            window = on.load(tile, HALO - lag + offset).astype(jnp.float32)
            if seen is not None:
                window = jnp.where(on.across(seen & (1 << lag)) != 0, window, 0.0)
            total = total + on.down(weights[shapes.width - 1 - lag]) * window
        out = total * sigmoid(total)
        if seen is not None:  # a real token sees itself
            out = jnp.where(on.across(seen & 1) != 0, out, 0.0)
        if normalise:
            out = out * on.across(lax.rsqrt(jnp.sum(out * out, axis=1) + EPSILON))
        made.at[pl.ds(offset, count)][...] = out.astype(shapes.dtype)


def block(shapes: Shapes, inputs: Inputs, outputs: _mosaic_gpu.Ref, s: _mosaic_gpu.Scratch) -> None:
    """`ROWS` tokens of one head of queries, keys or values."""
    row, tile_index, part = (lax.axis_index(name) for name in ("row", "tile", "part"))
    start = tile_index * ROWS
    head, member = shapes.part(part)
    query, key, value = outputs

    def run(dim, first_channel, normalise):
        tile, made = getattr(s, f"inputs_{dim}"), getattr(s, f"made_{dim}")
        place = (row, start, head, pl.ds(first_channel, dim))
        fetch(shapes, inputs, tile, place, s.ready)
        plgpu.barrier_wait(s.ready)
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
    mixed: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None,
    taps: jax.Array | None,
    first: jax.Array | None,
    initial_state: jax.Array | None,
    key_dim: int,
    value_dim: int,
    use_qk_l2norm: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(query, key, value)`; arguments as for `causal_conv1d_qkv`, and from `reference.taps`:

    Args:
      taps: None, or `[B, T']` int32, T' >= T a multiple of `ROWS`: bit l says whether a token sees the one l before it.
      first: None, or `[B]` int32: where the initial state ends; needed with `taps` and `initial_state`.
    """
    batch, length = mixed.shape[:2]
    width, heads, channels = weight.shape
    group = (channels - 2 * key_dim) // value_dim
    shapes = Shapes(
        batch,
        length,
        heads,
        width,
        key_dim,
        value_dim,
        group,
        mixed.dtype,
        taps is not None,
        initial_state is not None,
        bias is not None,
        use_qk_l2norm,
    )
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
        grid=shapes.grid(ROWS),
        grid_names=("row", "tile", "part"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="causal_conv_qkv",
        **_mosaic_gpu.kernel_options(),
    )(*operands)
