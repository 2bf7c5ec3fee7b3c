"""Decode steps of the gated delta rule on any NVIDIA GPU since Ampere (sm_80), through Pallas' Triton backend.

Algorithm: a block holds all Dk rows of `columns` columns of one head's state in registers, in float32, for all T
tokens; columns do not depend on each other. A token decays the state, takes both sums over Dk (what the state says
about the key, and what the query reads) from it at once, and adds the update: `algebra.write_and_read`.

Source: where the tokens come from is not the walk's business: it asks a `Source` for them. `loaded` reads them;
`deltanet/triton.py` makes them by a convolution.

Memory: the state is read once and written once, in place (`input_output_aliases`); a row without a slot touches none of
it. Query, key, value, gates: `T (2 Dk + columns + 2)` numbers per block, from L2 except for the first. Offsets are 64
bits wide where the pool is larger than 4 GiB (Pallas sees to it).

Rule: section 3.3 of Gated Delta Networks (arXiv 2412.06464), token by token.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _dispatch
from pallas_kernels.delta_rule.algebra import Token, write_and_read
from pallas_kernels.delta_rule.step.tuning import Shapes


def interpreted() -> contextlib.AbstractContextManager[None]:
    """Runs the kernels traced inside on the CPU, by Pallas' interpreter."""
    return _dispatch.targeting(_dispatch.Target("cpu", "8.0", interpret=True))


class Block(NamedTuple):
    """Which columns of the state one block advances.

    Attributes:
      row, head, tile: of the call; columns: the slice of Dv.
      slot: the row's place in the pool, one that exists also for a padding row.
      real: whether the row has a slot; None without slots.
    """

    row: jax.Array
    head: jax.Array
    tile: jax.Array
    columns: Any
    slot: jax.Array
    real: jax.Array | None


# `source(shapes, block, inputs, outputs)` begins a block and returns what yields its token t.
Source = Callable[[Shapes, Block, Sequence[Any], Sequence[Any]], Callable[[int], Token]]


def wide(x: jax.Array) -> jax.Array:
    """In float32, in which everything is computed."""
    return x.astype(jnp.float32)


def loaded(shapes: Shapes, block: Block, inputs: Sequence[Any], _: Sequence[Any]):
    """Tokens as `gated_delta_rule_step` takes them: `inputs` are query, key, value, g and beta."""
    query, key, value, g, beta = inputs
    row, head, key_head = block.row, block.head, block.head // shapes.group

    def token(t: int) -> Token:
        decay = jnp.exp(wide(g[row, t, key_head if len(g.shape) == 4 else head]))
        return Token(
            wide(query[row, t, key_head]),
            wide(key[row, t, key_head]),
            wide(value[row, t, head, block.columns]),
            jnp.broadcast_to(decay, (shapes.key_dim,)),
            wide(beta[row, t, head]),
        )

    return token


def locate(shapes: Shapes, slots: jax.Array | None, num_slots: int) -> Block:
    """The block that runs here."""
    place = pl.program_id(0)
    tile, head = place % shapes.tiles, place // shapes.tiles % shapes.value_heads
    row = place // (shapes.tiles * shapes.value_heads)
    slot, real = row, None
    if slots is not None:
        slot = slots[row]
        real = (slot >= 0) & (slot < num_slots)
        slot = jnp.where(real, slot, 0)
    columns = pl.ds(tile * shapes.config.columns, shapes.config.columns)
    return Block(row, head, tile, columns, slot, real)


def walk(shapes: Shapes, block: Block, token, state, out: jax.Array, state_out, states) -> None:
    """One block: `columns` columns of one head of one row."""
    tile_shape = (shapes.key_dim, shapes.config.columns)
    spread = lambda x, axis: jax.lax.broadcast_in_dim(x, tile_shape, [axis])
    place = (block.slot, block.head, slice(None), block.columns)
    other = None if block.real is None else 0.0
    held = wide(plt.load(state.at[place], mask=block.real, other=other))
    for t in range(shapes.length):
        held, read = write_and_read(
            held,
            token(t),
            scale=shapes.scale,
            use_qk_l2norm=shapes.use_qk_l2norm,
            spread=spread,
        )
        if block.real is not None:
            read = jnp.where(block.real, read, 0.0)
        out[block.row, t, block.head, block.columns] = read.astype(out.dtype)
        if states is not None:
            shown = held if block.real is None else jnp.where(block.real, held, 0.0)
            states[block.row, t, block.head, :, block.columns] = shown.astype(states.dtype)
    plt.store(state_out.at[place], held.astype(state_out.dtype), mask=block.real)


def launch(
    shapes: Shapes,
    source: Source,
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
      source: see `Source`.
      inputs: what the source reads.
      state: `[P, Hv, Dk, Dv]`, advanced in place.
      slots: `[rows]` int32, or None.
      out_dtype: of `out`, `[rows, T, Hv, Dv]`.
      name: of the kernel.
      outputs: what the source writes.
    """
    heads = (shapes.rows, shapes.length, shapes.value_heads)
    results = [
        jax.ShapeDtypeStruct((*heads, shapes.value_dim), out_dtype),
        jax.ShapeDtypeStruct(state.shape, state.dtype),
    ]
    if shapes.states:
        results.append(
            jax.ShapeDtypeStruct((*heads, shapes.key_dim, shapes.value_dim), state.dtype)
        )
    operands = [state, *inputs, *([] if slots is None else [slots])]

    def kernel(*refs):
        given, made = refs[: len(operands)], refs[len(operands) :]
        block = locate(shapes, None if slots is None else given[-1], state.shape[0])
        token = source(shapes, block, given[1 : 1 + len(inputs)], made[len(results) :])
        out, state_out, *states = made[: len(results)]
        walk(shapes, block, token, given[0], out, state_out, states[0] if states else None)

    out, after, *made = pl.pallas_call(
        kernel,
        out_shape=[*results, *outputs],
        # One axis: CUDA limits the other two to 65,535 blocks.
        grid=(shapes.rows * shapes.value_heads * shapes.tiles,),
        input_output_aliases={0: 1},
        compiler_params=plt.CompilerParams(num_warps=shapes.config.warps, num_stages=1),
        interpret=_dispatch.target().interpret is not None,
        name=name,
    )(*operands)
    states = made.pop(0) if shapes.states else None
    return out, after, states, *made
