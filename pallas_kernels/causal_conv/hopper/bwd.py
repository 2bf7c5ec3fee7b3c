"""The gradient of convolution, SiLU, split and l2 norm on Hopper (sm_90a), as one Pallas Mosaic GPU kernel.

Algorithm: a block makes d_mixed of `backward_rows` tokens of one head, and their part of the filter's gradient:

1. It makes p = conv + bias again, a = SiLU(p), and goes back through the norm, with s = sum a^2, r = (s + 1e-6)^-1/2,
   and through SiLU:

       d_a = r (d_out - a r^2 sum(a d_out)),  0 where s = 0,
       d_p = d_a sigmoid(p) (1 + p (1 - sigmoid(p))),

   of its own tokens and of those after it that see them (W - 1, rounded up), which the next block makes as well; d_p
   stays in shared memory in float32. While x and d_p are in registers, `d_weight += d_p x`, `d_bias += d_p` over the
   block's own tokens.
2. d_x[t] = sum_l weight[W - 1 - l] d_p[t + l], over the tokens that see t, by reads that are shifted in shared memory.

Layout, taps and the initial state: as in `fwd`. The gradients of filter and bias leave as one float32 part
per block, which the caller adds up, always in the same order. The initial state's own gradient is not made here.

Memory: the inputs and d_out once from device memory, d_mixed once into it, and W + 1 float32 rows per block. d_mixed
takes the place of d_out in shared memory. Shared memory at 128 channels of 16 bits: 72 KiB, three blocks on a
multiprocessor.

Source: the chain rule; see `fwd`.
"""

import dataclasses
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
    base_rows,
    fetch,
    lanes,
    matrix,
    per_channel,
    place_state,
    sigmoid,
)
from pallas_kernels.causal_conv.tuning import HALO, backward_slab


def after(shapes: Shapes, dim: int) -> int:
    """Tokens after a block's own whose d_p it makes too."""
    return _mosaic_gpu.round_up(shapes.width - 1, base_rows(dim))


def scratch_spec(shapes: Shapes, rows: int) -> dict[str, Any]:
    """Shared memory and the barrier of one block."""
    spec: dict[str, Any] = {"ready": plgpu.Barrier(num_arrivals=2 + (shapes.width > 1))}
    for dim in {shapes.key_dim, shapes.value_dim}:
        count = rows + after(shapes, dim)
        spec[f"inputs_{dim}"] = plgpu.SMEM((HALO + count, dim), shapes.dtype)
        spec[f"d_out_{dim}"] = plgpu.SMEM((count, dim), shapes.dtype)
        spec[f"d_sum_{dim}"] = plgpu.SMEM((count, dim), jnp.float32)
    return spec


class Block:
    """One block's work on a tile of `rows` own tokens."""

    def __init__(
        self, shapes: Shapes, inputs: Inputs, s: _mosaic_gpu.Scratch, place, rows: int, dim: int
    ):
        self.shapes, self.inputs, self.place, self.rows = shapes, inputs, place, rows
        self.tile, self.d_out, self.d_sum = (
            getattr(s, f"{name}_{dim}") for name in ("inputs", "d_out", "d_sum")
        )
        self.dim, self.layout = dim, matrix(dim)
        _, _, head, channels = place
        weight, bias = inputs.weight, inputs.bias
        self.weights = [
            per_channel(weight, (w, head, channels), self.layout) for w in range(shapes.width)
        ]
        self.bias = None if bias is None else per_channel(bias, (head, channels), self.layout)

    def seen(self, offset, count: int):
        """Which taps `count` tokens see, or None where all do."""
        if self.inputs.taps is None:
            return None
        row, start, *_ = self.place
        tokens = pl.ds(start + offset, count)
        return plgpu.load(
            self.inputs.taps.at[row, tokens], layout=self.layout.reduce(1), optimized=False
        )

    def d_sums(self, offset, count: int, normalise: bool):
        """Step 1 for `count` tokens: `(d_p, the W inputs that made p)` in float32, d_p also in shared memory."""
        shapes = self.shapes
        on = Tile((count, self.dim), self.layout)
        seen = self.seen(offset, count)
        windows = []
        total = on.zeros() if self.bias is None else on.down(self.bias)
        for lag in range(shapes.width):
            window = on.load(self.tile, HALO - lag + offset).astype(jnp.float32)
            if seen is not None:
                window = jnp.where(on.across(seen & (1 << lag)) != 0, window, 0.0)
            total = total + on.down(self.weights[shapes.width - 1 - lag]) * window
            windows.append(window)
        gate = sigmoid(total)
        gradient = on.load(self.d_out, offset).astype(jnp.float32)
        if normalise:
            out = total * gate
            squared = jnp.sum(out * out, axis=1)
            inverse = jnp.where(squared == 0.0, 0.0, lax.rsqrt(squared + EPSILON))
            along = jnp.sum(out * gradient, axis=1) * inverse * inverse
            gradient = on.across(inverse) * (gradient - out * on.across(along))
        gradient = gradient * gate * (1.0 + total * (1.0 - gate))
        if seen is not None:  # a real token sees itself
            gradient = jnp.where(on.across(seen & 1) != 0, gradient, 0.0)
        self.d_sum.at[pl.ds(offset, count)][...] = gradient
        return gradient, windows

    def filters(self, normalise: bool):
        """Step 1 for all tokens; the gradients of the W taps, then of the bias, over the block's own."""
        count, base = backward_slab(self.dim), base_rows(self.dim)
        on = Tile((base, self.dim), self.layout)

        def folded(product):
            parts = (product[i : i + base] for i in range(0, count, base))
            return sum(parts, start=on.zeros())

        def step(index, sums):
            gradient, windows = self.d_sums(index * count, count, normalise)
            products = [gradient * window for window in reversed(windows)]
            if self.bias is not None:
                products.append(gradient)
            return tuple(a + folded(b) for a, b in zip(sums, products, strict=True))

        sums = tuple(on.zeros() for _ in range(self.shapes.width + (self.bias is not None)))
        sums = lax.fori_loop(0, self.rows // count, step, sums)
        for offset in range(self.rows, self.rows + after(self.shapes, self.dim), base):
            self.d_sums(offset, base, normalise)
        return [jnp.sum(total, axis=0) for total in sums]

    def d_inputs(self) -> None:
        """Step 2, into the place of d_out."""
        count = backward_slab(self.dim)
        on = Tile((count, self.dim), self.layout)

        @pl.loop(0, self.rows // count)
        def _(index):
            offset = index * count
            total = on.zeros()
            for lag in range(self.shapes.width):
                gradient = on.load(self.d_sum, offset + lag)
                seen = self.seen(offset + lag, count)
                if seen is not None:
                    gradient = jnp.where(on.across(seen & (1 << lag)) != 0, gradient, 0.0)
                total = total + on.down(self.weights[self.shapes.width - 1 - lag]) * gradient
            seen = self.seen(offset, count)
            if seen is not None:  # on padding the initial state may stand, which real tokens see
                total = jnp.where(on.across(seen & 1) != 0, total, 0.0)
            self.d_out.at[pl.ds(offset, count)][...] = total.astype(self.shapes.dtype)


def block(
    shapes: Shapes,
    inputs: Inputs,
    cotangents,
    outputs: _mosaic_gpu.Ref,
    s: _mosaic_gpu.Scratch,
    rows: int,
) -> None:
    """`rows` tokens of one head of queries, keys or values."""
    row, tile_index, part = (lax.axis_index(name) for name in ("row", "tile", "part"))
    start = tile_index * rows
    head, member = shapes.part(part)
    d_query, d_key, d_value = cotangents
    d_mixed, d_weight, *d_bias = outputs

    def run(dim, first_channel, sources, normalise):
        channels = pl.ds(first_channel, dim)
        place = (row, start, head, channels)
        work = Block(shapes, inputs, s, place, rows, dim)
        fetch(shapes, inputs, work.tile, place, s.ready)
        tokens = pl.ds(start, rows + after(shapes, dim))
        for chosen, source, source_head in sources:
            copy = lambda source=source, source_head=source_head: plgpu.copy_gmem_to_smem(
                source.at[row, tokens, source_head], work.d_out, s.ready
            )
            copy() if chosen is None else pl.when(chosen)(copy)
        plgpu.barrier_wait(s.ready)
        place_state(shapes, inputs, work.tile, place)
        sums = work.filters(normalise)
        plgpu.commit_smem()
        work.d_inputs()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            work.d_out.at[pl.ds(0, rows)], d_mixed.at[row, pl.ds(start, rows), head, channels]
        )
        for part_of_bias in d_bias:
            part_of_bias.at[row, tile_index, head, channels][...] = sums.pop()
        for w, total in enumerate(sums):
            d_weight.at[row, tile_index, w, head, channels][...] = total

    @pl.when(member < 2)
    def _():
        sources = ((member == 0, d_query, head), (member == 1, d_key, head))
        run(shapes.key_dim, member * shapes.key_dim, sources, shapes.use_qk_l2norm)

    @pl.when(member >= 2)
    def _():
        sources = ((None, d_value, head * shapes.group + member - 2),)
        run(
            shapes.value_dim,
            2 * shapes.key_dim + (member - 2) * shapes.value_dim,
            sources,
            False,
        )

    plgpu.wait_smem_to_gmem(0)


def _options(shapes: Shapes) -> dict[str, Any]:
    """As for every kernel, with room to add up what each thread has of the filter's gradient."""
    options = _mosaic_gpu.kernel_options()
    values = max(dim // lanes(dim) for dim in (shapes.key_dim, shapes.value_dim))  # of a thread
    room = 4 * values * _mosaic_gpu.WARPGROUP
    parameters = dataclasses.replace(options["compiler_params"], reduction_scratch_bytes=room)
    return options | {"compiler_params": parameters}


def backward(
    mixed: jax.Array,
    weight: jax.Array,
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
    *,
    bias: jax.Array | None,
    taps: jax.Array | None,
    first: jax.Array | None,
    initial_state: jax.Array | None,
    key_dim: int,
    value_dim: int,
    use_qk_l2norm: bool,
    rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`(d_mixed [B, T, Hk, C], d_weight [B, W, Hk, C], d_bias [B, Hk, C] or None)`, the last two in float32, per row.

    Args:
      mixed, weight, bias, taps, first, initial_state: as for `fwd.forward`; taps longer than T by
        at least what `tuning.AFTER` says.
      cotangents: of query, key and value, in their dtype.
      rows: tokens of a block.
    """
    batch, length = mixed.shape[:2]
    width, heads, channels = weight.shape
    shapes = Shapes(
        batch,
        length,
        heads,
        width,
        key_dim,
        value_dim,
        (channels - 2 * key_dim) // value_dim,
        mixed.dtype,
        taps is not None,
        initial_state is not None,
        bias is not None,
        use_qk_l2norm,
    )
    if taps is None or initial_state is None:
        first = None
    operands = [x for x in (mixed, weight, bias, taps, first, initial_state) if x is not None]
    tiles = shapes.grid(rows)[1]
    struct = jax.ShapeDtypeStruct
    outputs = [
        struct((batch, length, heads, channels), mixed.dtype),
        struct((batch, tiles, width, heads, channels), jnp.float32),
    ]
    if bias is not None:
        outputs.append(struct((batch, tiles, heads, channels), jnp.float32))

    def causal_conv_qkv_backward(*references, **scratch):
        rest = list(references)
        made = rest[len(operands) + 3 :]
        inputs = Inputs(shapes, rest[: len(operands)])
        s = _mosaic_gpu.Scratch(scratch)
        block(shapes, inputs, rest[len(operands) : len(operands) + 3], made, s, rows)

    d_mixed, *parts = plgpu.kernel(
        causal_conv_qkv_backward,
        out_type=tuple(outputs),
        scratch_types=scratch_spec(shapes, rows),
        grid=shapes.grid(rows),
        grid_names=("row", "tile", "part"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="causal_conv_qkv_backward",
        **_options(shapes),
    )(*operands, *cotangents)
    d_weight, *d_bias = (jnp.sum(part, axis=1) for part in parts)
    return d_mixed, d_weight, d_bias[0] if d_bias else None
