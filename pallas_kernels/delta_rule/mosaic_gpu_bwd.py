"""Backward of the gated delta rule on Hopper (sm_90a), as three Pallas Mosaic GPU kernels without atomics.

Derivation (docs/gated_delta_rule.md; `algebra.advance`, `retreat`, `chunk_gradients`), for a chunk that starts in state
S and whose end state has cotangent D. Decays: Gamma inside the chunk, `since` its start, `until` its end, `whole`.

    E = V - since K S        N = T (beta E)        P = scale Gamma Q K^T        S <- whole S + K^T (until N)
    dN = until K D + P^T dO        dR = T^T dN        D <- whole D + Q^T (scale since dO) - K^T (since beta dR)
    dV = beta dR        dP = dO N^T        dL = -tril(dR N^T)        dbeta = rows(dR E + dL Gamma K K^T)

`states` and `d_states` (`mosaic_gpu_chains`) walk the chunks of a row and write the state at the start of each chunk
and the cotangent of the state at its end, in 16 bits.
`gradients` (`mosaic_gpu_gradients`) makes the rest, one chunk of one key head to a block. dg is the sum over
`i >= t > j` of what acts between tokens j and i (`algebra.corner_sum`, there a product of a triangle of ones with the
sum of two 16-bit matrices), plus what acts between a token and the chunk's edges, whose sums over tokens are left to
XLA: no term is added to be subtracted again.

Units: gates, states, sums and accumulators in float32, 16-bit operands of every product, decays masked before `exp`,
beta applied in float32. Every sum has one order, so results repeat bit for bit.
Layout: query, key `[z, N 64, Hk, Dk]`, value `[z, N 64, Hv, Dv]`, T `[z, Hv, N, 64, 64]`, states `[z, Hv, N, Dv, Dk]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import algebra, order
from pallas_kernels.delta_rule.mosaic_gpu_chains import Shapes, run_chain
from pallas_kernels.delta_rule.mosaic_gpu_chunk import CHUNK
from pallas_kernels.delta_rule.mosaic_gpu_gradients import (
    AT_READER,
    AT_WRITER,
    D_BETA,
    D_GATE,
    INNER,
    run_gradients,
)  # fmt: skip
from pallas_kernels.delta_rule.mosaic_gpu_tuning import BackwardConfig


class Gradients(NamedTuple):
    """Cotangents of the operands (16-bit), and in float32 of g and beta `[z, Hv, L]` and of the start state."""

    query: Any
    key: Any
    value: Any
    g: Any
    beta: Any
    state: Any


def stacked(tables: order.Tables) -> jax.Array:
    """The rows of `order.stacked` that the backward reads, `[z, Hv, N, 6, 64]` float32: one copy brings them all."""
    segment = jnp.zeros_like(tables.beta)
    if tables.segment is not None:
        segment += tables.segment[:, None].astype(jnp.float32)
    rows = (
        tables.decay_high, tables.decay_low, segment, tables.beta, tables.until_end,
        tables.since_start,
    )  # fmt: skip
    return jnp.stack([x.reshape(*x.shape[:2], -1, CHUNK) for x in rows], axis=3)


def _shapes(query, value, tables: order.Tables, config: BackwardConfig, scale: float) -> Shapes:
    rows, length, key_heads, key_dim = query.shape
    return Shapes(
        rows, length // CHUNK, key_heads, value.shape[2], key_dim, value.shape[3], query.dtype, scale,
        tables.segment is not None, config,
    )  # fmt: skip


def _edge(state):
    return jnp.swapaxes(state.astype(jnp.float32), -1, -2)


def _spans(shapes: Shapes, spans):
    if spans is not None:
        return spans
    row = jnp.arange(shapes.rows, dtype=jnp.int32)
    return jnp.stack([row, jnp.zeros_like(row), jnp.full_like(row, shapes.chunks)], axis=1)


def _d_states(shapes: Shapes, query, key, d_out, inverse, tables, d_final, spans):
    """The cotangents of every chunk's end state (transposed, 16-bit), and of the start states."""
    arrays = {
        "query": query, "key": key, "tokens": d_out, "inverse": inverse, "tables": tables,
        "edge": _edge(d_final), "spans": spans,
    }  # fmt: skip
    d_states, d_start = run_chain(shapes, "delta_rule_d_states", arrays)
    return d_states, jnp.swapaxes(d_start, -1, -2)


def retreat(
    query: jax.Array, key: jax.Array, d_out: jax.Array, *, config: BackwardConfig, scale: float, tables: order.Tables,
    inverse: jax.Array, d_final: jax.Array,
) -> jax.Array:  # fmt: skip
    """The cotangent of the start state `[z, Hv, Dk, Dv]` float32 alone; arguments as in `backward`."""
    shapes = _shapes(query, d_out, tables, config, scale)
    table, spans = stacked(tables), _spans(shapes, None)
    return _d_states(shapes, query, key, d_out, inverse, table, d_final, spans)[1]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, config: BackwardConfig, scale: float, tables: order.Tables,
    inverse: jax.Array, start_state: jax.Array, d_out: jax.Array, d_final: jax.Array, spans: jax.Array | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of rows of whole chunks; tokens that do not exist are zero, their g and beta too.

    Args:
      query, key, value: `[z, N 64, Hk, Dk]` twice and `[z, N 64, Hv, Dv]`, bfloat16 or float16; Dk 64 or 128, Dv too.
      tables: the gates, as `order.tables` makes them.
      inverse: T, `[z, Hv, N, 64, 64]` in the operands' dtype, beta not folded in.
      start_state: `[rows, Hv, Dk, Dv]` float32.
      d_out, d_final: cotangents of the output `[z, N 64, Hv, Dv]` (operands' dtype) and of the last states (float32).
      spans: int32 `[rows, 3]`, the row of tokens, first chunk and number of chunks of each state, disjoint; None where
        state z walks all of row z. Gradients of chunks that no span holds are undefined.
    """
    shapes = _shapes(query, value, tables, config, scale)
    table, spans = stacked(tables), _spans(shapes, spans)
    replay = {
        "key": key, "tokens": value, "inverse": inverse, "tables": table, "edge": _edge(start_state),
        "spans": spans,
    }  # fmt: skip
    (states,) = run_chain(shapes, "delta_rule_states", replay)
    d_states, d_start = _d_states(shapes, query, key, d_out, inverse, table, d_final, spans)
    arrays = {
        "query": query, "key": key, "value": value, "d_out": d_out, "inverse": inverse, "tables": table,
        "states": states, "d_states": d_states,
    }  # fmt: skip
    dq, dk, dv, sums = run_gradients(shapes, arrays)
    sums = sums.sum(axis=3)  # [z, Hv, N, 5, 64]
    through = tables.whole * sums[..., INNER, :].sum(-1)
    d_g = sums[..., D_GATE, :] + algebra.suffix_from(sums[..., AT_READER, :])
    d_g += algebra.prefix_before(sums[..., AT_WRITER, :]) + through[..., None]
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    return Gradients(dq, dk, dv, flat(d_g), flat(sums[..., D_BETA, :]), d_start)
