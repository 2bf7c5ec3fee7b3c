"""Decode steps of the gated delta rule on any NVIDIA GPU since Ampere (sm_80), through Pallas' Triton backend.

Algorithm: a block holds all Dk rows of `columns` columns of one head's state in registers, in float32, for all T
tokens; columns do not depend on each other. A token decays the state, takes both sums over Dk (what the state says
about the key, and what the query reads) from it at once, and adds the update: `algebra.write_and_read`.

Memory: the state is read once and written once, in place (`input_output_aliases`); a row without a slot touches none of
it. Query, key, value, gates: `T (2 Dk + columns + 2)` numbers per block, from L2 except for the first. Offsets are 64
bits wide where the pool is larger than 4 GiB (Pallas sees to it).

Source: the rule of Gated Delta Networks (arXiv 2412.06464, section 3.3), token by token.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _dispatch
from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule.step_tuning import StepConfig

_INTERPRET: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels traced inside on the CPU, by Pallas' interpreter."""
    before = _INTERPRET.set(True)
    try:
        with _dispatch.assume_compute_capability("8.0"):
            yield
    finally:
        _INTERPRET.reset(before)


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
    config: StepConfig

    @property
    def tiles(self) -> int:
        return self.value_dim // self.config.columns

    @property
    def grid(self) -> tuple[int]:
        # One axis: CUDA limits the other two to 65,535 blocks.
        return (self.rows * self.value_heads * self.tiles,)


def kernel(shapes: Shapes, *refs: Any) -> None:
    """One block: `columns` columns of one head of one row."""
    query, key, value, g, beta, *others = refs
    slots = others.pop(0) if shapes.slots else None
    state, out, state_out, *states = others
    block = pl.program_id(0)
    tile, head = block % shapes.tiles, block // shapes.tiles % shapes.value_heads
    row = block // (shapes.tiles * shapes.value_heads)
    key_head = head // (shapes.value_heads // shapes.key_heads)
    columns = pl.ds(tile * shapes.config.columns, shapes.config.columns)
    slot, real = row, None
    if slots is not None:
        slot = slots[row]
        real = (slot >= 0) & (slot < shapes.num_slots)
        slot = jnp.where(real, slot, 0)

    tile_shape = (shapes.key_dim, shapes.config.columns)
    wide = lambda x: x.astype(jnp.float32)
    spread = lambda x, axis: jax.lax.broadcast_in_dim(x, tile_shape, [axis])

    place = (slot, head, slice(None), columns)
    other = None if real is None else 0.0
    held = wide(plt.load(state.at[place], mask=real, other=other))
    for t in range(shapes.length):
        decay = jnp.exp(wide(g[row, t, key_head if shapes.per_channel else head]))
        held, read = algebra.write_and_read(
            held, wide(query[row, t, key_head]), wide(key[row, t, key_head]), wide(value[row, t, head, columns]),
            jnp.broadcast_to(decay, (shapes.key_dim,)), wide(beta[row, t, head]), scale=shapes.scale,
            use_qk_l2norm=shapes.use_qk_l2norm, spread=spread,
        )  # fmt: skip
        if real is not None:
            read = jnp.where(real, read, 0.0)
        out[row, t, head, columns] = read.astype(out.dtype)
        if states:
            shown = held if real is None else jnp.where(real, held, 0.0)
            states[0][row, t, head, :, columns] = shown.astype(states[0].dtype)
    plt.store(state_out.at[place], held.astype(state_out.dtype), mask=real)


def step(
    query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array, *,
    slots: jax.Array | None, scale: float, use_qk_l2norm: bool, return_states: bool, config: StepConfig,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """`(out, state after, states or None)`; arguments as for `gated_delta_rule_step`, the state's dtype kept."""
    rows, length, key_heads, key_dim = query.shape
    value_heads, value_dim = value.shape[2:]
    shapes = Shapes(
        rows, length, key_heads, value_heads, key_dim, value_dim, state.shape[0], slots is not None,
        return_states, g.ndim == 4, scale, use_qk_l2norm, config,
    )  # fmt: skip
    operands = [query, key, value, g, beta]
    if slots is not None:
        operands.append(slots.astype(jnp.int32))
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (value, state)]
    if return_states:
        outputs.append(jax.ShapeDtypeStruct((rows, length, *state.shape[1:]), state.dtype))
    out, after, *states = pl.pallas_call(
        functools.partial(kernel, shapes),
        out_shape=outputs,
        grid=shapes.grid,
        input_output_aliases={len(operands): 1},
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=_INTERPRET.get(),
        name="gated_delta_rule_step",
    )(*operands, state)
    return out, after, states[0] if states else None
