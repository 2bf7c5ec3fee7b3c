"""Decode steps of Gated DeltaNet on any NVIDIA GPU since Ampere (sm_80), through Pallas' Triton backend.

Algorithm: the walk over the state of `delta_rule/step/triton.py`, whose tokens come from a convolution instead of from
memory: a block convolves query and key of its key head and its own columns of the value, applies SiLU and makes decay
and write strength from their logits, all in registers and float32.

Memory: the state as there, in place. `mixed` and the window before it are read by every block of a key head, from L2
except for the first. The new window goes to an array of its own, because other blocks may still read the old one: query
and key channels are written by the first block of a key head, value channels by the block that owns them.

Source: the layer of Gated Delta Networks (arXiv 2412.06464, section 3.4), token by token.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.delta_rule.algebra import Token
from pallas_kernels.delta_rule.step.triton import Block, Shapes, wide
from pallas_kernels.deltanet import algebra
from pallas_kernels.deltanet.algebra import Inputs


def convolved(
    allow_negative_eigenvalues: bool,
    tree: Any,
    shapes: Shapes,
    block: Block,
    refs: Sequence[Any],
    outputs: Sequence[Any],
):
    """Tokens by convolution: `refs` are the leaves of `Inputs` with the structure `tree`, `outputs` the new windows."""
    inputs: Inputs = tree.unflatten(refs)
    (windows,) = outputs
    width, group, key_dim = inputs.conv_kernel.shape[0], shapes.group, shapes.key_dim
    key_head, inner = block.head // group, block.head % group
    columns = shapes.config.columns
    own = pl.ds(2 * key_dim + inner * shapes.value_dim + block.tile * columns, columns)
    parts = (pl.ds(0, key_dim), pl.ds(key_dim, key_dim), own)
    first = (block.tile == 0) & (inner == 0)
    if block.real is not None:
        first = first & block.real
    for channels, mask in zip(parts, (first, first, block.real), strict=True):
        _leave_window(shapes, block, inputs, windows, (key_head, channels), mask)

    def features(channels):
        """A function of t: SiLU of the convolution of some channels."""
        taps = [wide(inputs.conv_kernel[w, key_head, channels]) for w in range(width)]
        bias = None if inputs.conv_bias is None else wide(inputs.conv_bias[key_head, channels])
        history = [inputs.conv_state[block.slot, w, key_head, channels] for w in range(1, width)]
        history += [inputs.mixed[block.row, t, key_head, channels] for t in range(shapes.length)]
        history = [wide(x) for x in history]
        return lambda t: algebra.convolve(taps, history[t : t + width], bias)

    features_of_parts = [features(channels) for channels in parts]

    def token(t: int) -> Token:
        query, key, value = (of_part(t) for of_part in features_of_parts)
        g, beta = algebra.gates(
            wide(inputs.logits[block.row, t, key_head, inner]),
            wide(inputs.logits[block.row, t, key_head, group + inner]),
            wide(inputs.A_log[key_head, inner]),
            wide(inputs.dt_bias[key_head, inner]),
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            sigmoid=algebra.sigmoid,
            softplus=algebra.softplus,
        )
        if inputs.lengths is not None:
            real = t < inputs.lengths[block.row]
            query, key, value, g, beta = (
                jnp.where(real, x, 0.0) for x in (query, key, value, g, beta)
            )
        return Token(query, key, value, jnp.broadcast_to(jnp.exp(g), (key_dim,)), beta)

    return token


def _leave_window(shapes: Shapes, block: Block, inputs: Inputs, windows, channels, mask) -> None:
    """Writes the last W inputs of some channels (a key head and a slice)."""
    width = inputs.conv_kernel.shape[0]
    before = lambda place: inputs.conv_state[block.slot, place, *channels]
    after = lambda place: inputs.mixed[block.row, place - width, *channels]
    for i in range(width):
        if inputs.lengths is None:
            place = shapes.length + i  # in the window before, then in the tokens
            x = before(place) if place < width else after(place)
        else:
            place = inputs.lengths[block.row] + i
            inside = before(jnp.minimum(place, width - 1)), after(jnp.maximum(place, width))
            x = jnp.where(place < width, *inside)
        # A masked store wants indices with a shape.
        plt.store(windows.at[block.row, np.int32(i), *channels], x, mask=mask)
