"""Decode steps of Gated DeltaNet on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: the walk over the state of `delta_rule/step/mosaic_gpu.py`, whose tokens come from a convolution instead of
from memory. While the state is on its way, a block convolves query and key of its key head, one to four channels per
thread, and its own columns of the value, applies SiLU and leaves them in shared memory in float32; decay and write
strength are scalars that every thread makes from their logits.

Memory: the state as there, in place. `mixed` and the window before it are read by every block of a key head, from L2
except for the first. The new window goes to an array of its own, because other blocks may still read the old one: query
and key channels are written by the first block of a key head, value channels by the block that owns them.

Shared memory: that of the walk, its tokens in float32: `T (2 Dk + columns)` values.

Source: the layer of Gated Delta Networks (arXiv 2412.06464, section 3.4), token by token.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels.delta_rule.step.mosaic_gpu import Block, Shapes
from pallas_kernels.deltanet import algebra
from pallas_kernels.deltanet.algebra import Inputs


class Convolved:
    """Tokens by convolution: `refs` are the leaves of `Inputs` with the structure `tree`, `outputs` the new windows."""

    arrivals = 0

    def __init__(
        self,
        allow_negative_eigenvalues: bool,
        tree: Any,
        shapes: Shapes,
        refs: Sequence[Any],
        outputs: Sequence[Any],
    ):
        self.allow_negative_eigenvalues, self.shapes = allow_negative_eigenvalues, shapes
        self.inputs: Inputs = tree.unflatten(refs)
        (self.windows,) = outputs
        self.width = self.inputs.conv_kernel.shape[0]

    def scratch(self) -> dict[str, Any]:
        length, columns = self.shapes.length, self.shapes.config.columns
        return {
            "query_key": plgpu.SMEM((length, 2 * self.shapes.key_dim), jnp.float32),
            "value": plgpu.SMEM((length, columns), jnp.float32),
        }

    def start(self, s: _mosaic_gpu.Scratch, block: Block) -> tuple[Any, Any, Any]:
        shapes, inner = self.shapes, lax.rem(block.head, self.shapes.group)
        key_dim, columns = shapes.key_dim, shapes.config.columns
        both = plgpu.Layout.WG_STRIDED(
            (2 * key_dim,), vec_size=2 * key_dim // _mosaic_gpu.WARPGROUP
        )
        shared, first = pl.ds(0, 2 * key_dim), (block.tile == 0) & (inner == 0)
        own = pl.ds(2 * key_dim + inner * shapes.value_dim + block.tile * columns, columns)
        self._convolve(block, shared, both, s.query_key)
        self._convolve(block, own, block.per_column, s.value)
        plgpu.commit_smem()
        pl.when(first)(lambda: self._leave_window(block, shared, both))
        self._leave_window(block, own, block.per_column)
        return (
            s.query_key.at[:, pl.ds(0, key_dim)],
            s.query_key.at[:, pl.ds(key_dim, key_dim)],
            s.value,
        )

    def _load(self, ref: _mosaic_gpu.Ref, block: Block, channels, layout, *place) -> jax.Array:
        key_head = lax.div(block.head, self.shapes.group)
        return plgpu.load(ref.at[*place, key_head, channels], layout=layout, optimized=False)

    def _convolve(self, block: Block, channels, layout, target: _mosaic_gpu.Ref) -> None:
        """SiLU of the convolution of some channels, at every token."""
        inputs, width = self.inputs, self.width
        wide = lambda *place: self._load(*place).astype(jnp.float32)
        at = (block, channels, layout)
        taps = [wide(inputs.conv_kernel, *at, w) for w in range(width)]
        bias = None if inputs.conv_bias is None else wide(inputs.conv_bias, *at)
        history = [wide(inputs.conv_state, *at, block.slot, w) for w in range(1, width)]
        for t in range(self.shapes.length):
            history.append(wide(inputs.mixed, *at, block.row, t))
            found = algebra.convolve(taps, history[-width:], bias)
            if inputs.lengths is None:
                target.at[t][...] = found
                continue
            real = t < inputs.lengths[block.row]

            def write(value, t=t):
                target.at[t][...] = value

            pl.when(real)(functools.partial(write, found))
            nothing = plgpu.layout_cast(jnp.zeros_like(found), layout)
            pl.when(jnp.logical_not(real))(functools.partial(write, nothing))

    def _leave_window(self, block: Block, channels, layout) -> None:
        """The last W inputs, `lengths` tokens later."""
        inputs, width = self.inputs, self.width
        at = (block, channels, layout)
        key_head = lax.div(block.head, self.shapes.group)

        def copy(i, source, *place):
            target = self.windows.at[block.row, i, key_head, channels]
            target[...] = self._load(source, *at, *place)

        for i in range(width):
            if inputs.lengths is None:
                place = self.shapes.length + i  # in the window before, then in the tokens
                if place < width:
                    copy(i, inputs.conv_state, block.slot, place)
                else:
                    copy(i, inputs.mixed, block.row, place - width)
                continue
            place = inputs.lengths[block.row] + i
            before = functools.partial(copy, i, inputs.conv_state, block.slot, place)
            after = functools.partial(copy, i, inputs.mixed, block.row, place - width)
            pl.when(place < width)(before)
            pl.when(place >= width)(after)

    def gates(self, _: _mosaic_gpu.Scratch, block: Block, t: int) -> tuple[jax.Array, jax.Array]:
        inputs, group = self.inputs, self.shapes.group
        key_head, inner = lax.div(block.head, group), lax.rem(block.head, group)
        wide = lambda ref, *place: ref[place].astype(jnp.float32)
        g, beta = algebra.gates(
            wide(inputs.logits, block.row, t, key_head, inner),
            wide(inputs.logits, block.row, t, key_head, group + inner),
            wide(inputs.A_log, key_head, inner),
            wide(inputs.dt_bias, key_head, inner),
            allow_negative_eigenvalues=self.allow_negative_eigenvalues,
            sigmoid=algebra.sigmoid,
            softplus=algebra.softplus,
        )
        if inputs.lengths is not None:
            real = t < inputs.lengths[block.row]
            g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)
        return g, beta
