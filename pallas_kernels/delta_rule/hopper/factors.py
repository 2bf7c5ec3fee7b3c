"""How operands enter the gated delta rule's `gradients` on Hopper, as its products take them, and its results leave it.

Queries and keys become float16 in their tiles, divided by their lengths; not normalised, a query is divided by a power
of two (`inverse_size_within`), which multiplies its dO. By what else an array is multiplied, on its way in or out,
waits in shared memory, a number per token in the rows of `factors`. At the end the tiles still hold q^ and k^, along
which the norm lets no gradient pass:

    dq = (dq^ - q^ (q^ . dq^)) / |q|        |q| = sqrt(sum q^2 + 1e-6), and nothing for zeros.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._precision import EPSILON
from pallas_kernels.delta_rule.hopper.chains import COLUMNS, Shapes, by_row
from pallas_kernels.delta_rule.hopper.chunk import (
    CHUNK,
    MATRIX,
    PER_ROW,
    across,
    as_half,
    half_keys,
    halved,
    inverse_size_within,
    wide,
)

# Rows of `factors`: what each of these is multiplied by.
VALUE, D_OUT, D_VALUE, D_QUERY, D_KEY = range(5)
ROWS = D_KEY + 1


def unit_length(parts):
    """For `halved`: each token is divided by its length; hands on what its gradient is multiplied by, 0 for zeros."""
    squares = sum(jnp.sum(part * part, axis=1) for part in parts)
    inverse = lax.rsqrt(squares + EPSILON)
    return inverse, jnp.where(squares == 0.0, 0.0, inverse)


def prepare_queries(
    shapes: Shapes, s, held: jax.Array, pulled: jax.Array, asked: jax.Array
) -> None:
    """Queries as the products take them, and every factor but that of dk."""
    factors = s.factors.at[0]
    inverse = functools.partial(inverse_size_within, asked=asked)
    inverse = unit_length if shapes.use_qk_l2norm else inverse
    size = halved(s.queries.at[0], shapes.given, inverse)
    if shapes.use_qk_l2norm:
        factors.at[D_OUT][...] = per_token(1.0 / pulled)
        factors.at[D_QUERY][...] = (held * pulled) * size
    else:  # what a query was divided by multiplies the cotangent of what it reads
        factors.at[D_OUT][...] = size / pulled
        factors.at[D_QUERY][...] = (held * pulled) / size
    factors.at[VALUE][...] = per_token(1.0 / held)
    factors.at[D_VALUE][...] = per_token(pulled)


def prepare_keys(shapes: Shapes, s, held: jax.Array, pulled: jax.Array) -> None:
    """Keys as the products take them, and the factor of dk."""
    keys, factor = s.keys.at[0], s.factors.at[0, D_KEY]
    if shapes.use_qk_l2norm:
        factor[...] = (held * pulled) * halved(keys, shapes.given, unit_length)
    else:
        half_keys(keys, shapes.given, False)
        factor[...] = per_token(held * pulled)


def prepare_d_out(shapes: Shapes, own: Any) -> None:
    """dO of a value head as the products take it."""
    factor = plgpu.load(own.factors.at[D_OUT], layout=PER_ROW)
    halved(own.d_outs, shapes.value_dtype, lambda _: (factor, None))


def value(own: Any):
    """V of a value head in registers, in units of the states."""
    return by_row(own.factors, VALUE) * wide(own.values)


def per_token(number):
    """The same number for every token."""
    return plgpu.layout_cast(jnp.full((CHUNK,), number), PER_ROW)


def finish(shapes: Shapes, own: Any, name: str, factor: int, gradient) -> None:
    """Replaces q^ in its tile by dq in the caller's dtype, given that of q^; likewise k^.

    By 64 columns: of a whole tile q^ would stay in registers between its two uses, and others be spilled.
    """
    tile = getattr(own, name)
    parts = [
        (
            tile.at[:, pl.ds(first, COLUMNS)],
            lax.slice(gradient, (0, first), (CHUNK, first + COLUMNS)),
        )
        for first in range(0, shapes.key_dim, COLUMNS)
    ]
    along = None
    if shapes.use_qk_l2norm:
        along = sum((part * wide(place)).sum(axis=1) for place, part in parts)
        along = plgpu.layout_cast(across(along), MATRIX)
    for place, part in parts:
        if along is not None:
            part = part - along * wide(place)
        place[...] = as_half((by_row(own.factors, factor) * part).astype(shapes.given))
