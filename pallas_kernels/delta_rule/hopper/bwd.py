"""Backward of the gated delta rule on Hopper (sm_90a), as three Pallas Mosaic GPU kernels without atomics.

Derivation (docs/gated_delta_rule.md; `algebra.advance`, `retreat`, `chunk_gradients`), for a chunk that starts in state
S and whose end state has cotangent D. Decays: Gamma inside the chunk, `since` its start, `until` its end, `whole`.

    E = V - since K S        N = T (beta E)        P = scale Gamma Q K^T        S <- whole S + K^T (until N)
    dN = until K D + P^T dO        dR = T^T dN        D <- whole D + Q^T (scale since dO) - K^T (since beta dR)
    dV = beta dR        dP = dO N^T        dL = -tril(dR N^T)        dbeta = rows(dR E + dL Gamma K K^T)

`states` and `d_states` (`chains`) walk the chunks of a row and write the state at the start of each chunk
and the cotangent of the state at its end, in 16 bits.
`gradients` (`gradients`) makes the rest, one chunk of one key head to a block. dg is the sum over
`i >= t > j` of what acts between tokens j and i (`algebra.corner_sum`, there a product of a triangle of ones with the
sum of two 16-bit matrices), plus what acts between a token and the chunk's edges, whose sums over tokens are left to
XLA: no term is added to be subtracted again.

Precision: gates, states, sums and accumulators in float32, float16 operands of every product, decays masked before
`exp`, beta applied in float32. Every sum has one order, so results repeat bit for bit. Queries, keys and dO become
float16 in the tiles that hold them: queries and keys divided by their lengths or, not normalised, a query by a power of
two, which multiplies its dO.

Units: values and states are divided by `held`, cotangents by `pulled`, powers of two per head, so that float16 holds
them whatever their size: the backward is linear in what values and states hold, and in the cotangents.
Layout: query, key `[z, N 64, Hk, Dk]`, value `[z, N 64, Hv, Dv]`, T `[z, Hv, N, 64, 64]`, states `[z, Hv, N, Dv, Dk]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import algebra
from pallas_kernels.delta_rule.hopper.chains import PULLED, Shapes, run_chain
from pallas_kernels.delta_rule.hopper.chunk import CHUNK, as_half
from pallas_kernels.delta_rule.hopper.gradients import (
    AT_READER,
    AT_WRITER,
    D_BETA,
    D_GATE,
    INNER,
    run_gradients,
)
from pallas_kernels.delta_rule.hopper.tuning import BackwardConfig
from pallas_kernels.delta_rule.order import SINCE


class Gradients(NamedTuple):
    """Cotangents of query, key, value in their dtypes, and in float32 of g, beta `[z, Hv, L]` and the start state."""

    query: Any
    key: Any
    value: Any
    g: Any
    beta: Any
    state: Any


def _shapes(
    query: jax.Array,
    value: jax.Array,
    config: BackwardConfig,
    scale: float,
    segments: bool,
    use_qk_l2norm: bool,
) -> Shapes:
    rows, length, key_heads, key_dim = query.shape
    return Shapes(
        rows,
        length // CHUNK,
        key_heads,
        value.shape[2],
        key_dim,
        value.shape[3],
        query.dtype,
        value.dtype,
        use_qk_l2norm,
        scale,
        segments,
        config,
    )


def _spans(shapes: Shapes, spans):
    if spans is not None:
        return spans
    row = jnp.arange(shapes.rows, dtype=jnp.int32)
    return jnp.stack([row, jnp.zeros_like(row), jnp.full_like(row, shapes.chunks)], axis=1)


def _units(held: jax.Array, pulled: jax.Array, asked):
    return jnp.stack([held, pulled, jnp.ones_like(held) if asked is None else asked])


def _of_states(unit: jax.Array, spans: jax.Array):
    """The units `[z, Hv]` of rows of tokens as those of their states, to multiply `[rows, Hv, Dk, Dv]`."""
    return unit[spans[:, 0]][:, :, None, None]


def _edge(state: jax.Array):
    return jnp.swapaxes(state, -1, -2)


def _d_states(
    shapes: Shapes,
    query: jax.Array,
    key: jax.Array,
    d_out: jax.Array,
    inverse: jax.Array,
    tables: jax.Array,
    d_final: jax.Array,
    units,
    spans: jax.Array,
):
    """The cotangents of every chunk's end state (transposed, 16-bit, in units of `pulled`), and of the start states."""
    pulled = _of_states(units[PULLED], spans)
    arrays = {
        "query": as_half(query),
        "key": as_half(key),
        "tokens": as_half(d_out),
        "inverse": inverse,
        "tables": tables,
        "edge": _edge(d_final / pulled),
        "spans": spans,
        "units": units,
    }
    d_states, d_start = run_chain(shapes, "delta_rule_d_states", arrays)
    return d_states, _edge(d_start) * pulled


def retreat(
    query: jax.Array,
    key: jax.Array,
    d_out: jax.Array,
    *,
    config: BackwardConfig,
    scale: float,
    tables: jax.Array,
    segments: bool,
    use_qk_l2norm: bool,
    inverse: jax.Array,
    d_final: jax.Array,
    pulled: jax.Array,
    asked: jax.Array | None = None,
) -> jax.Array:
    """The cotangent of the start state `[z, Hv, Dk, Dv]` float32 alone; arguments as in `backward`."""
    shapes = _shapes(query, d_out, config, scale, segments, use_qk_l2norm)
    units, spans = _units(pulled, pulled, asked), _spans(shapes, None)
    return _d_states(shapes, query, key, d_out, inverse, tables, d_final, units, spans)[1]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    config: BackwardConfig,
    scale: float,
    tables: jax.Array,
    segments: bool,
    use_qk_l2norm: bool,
    inverse: jax.Array,
    start_state: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
    held: jax.Array,
    pulled: jax.Array,
    asked: jax.Array | None = None,
    spans: jax.Array | None = None,
) -> Gradients:
    """Gradients of rows of whole chunks; tokens that do not exist are zero, their g and beta too.

    Args:
      query, key: `[z, N 64, Hk, Dk]`, bfloat16 or float16, both the same; Dk 64 or 128.
      value: `[z, N 64, Hv, Dv]`, bfloat16 or float16; Dv 64 or 128.
      tables: the gates, as the prologue makes them.
      segments: whether segments start inside of chunks.
      use_qk_l2norm: queries and keys are divided by their lengths first; else a key's is at most 1, a query's any.
      inverse: T, `[z, Hv, N, 64, 64]` float16, beta not folded in.
      start_state: `[rows, Hv, Dk, Dv]` float32.
      d_out, d_final: cotangents of the output `[z, N 64, Hv, Dv]` (the value's dtype) and of the last states (float32).
      held: `[z, Hv]` float32, a power of two that no value and start state exceeds, the same for the value heads of a
        key head, whose gradients are added up.
      pulled: the same for the cotangents: above `d_final` and `d_out`, this times `asked`.
      asked: the same for the queries; None where they are normalised.
      spans: int32 `[rows, 3]`, the row of tokens, first chunk and number of chunks of each state, disjoint; None where
        state z walks all of row z. Gradients of chunks that no span holds are undefined.
    """
    shapes = _shapes(query, value, config, scale, segments, use_qk_l2norm)
    units, spans = _units(held, pulled, asked), _spans(shapes, spans)
    replay = {
        "key": as_half(key),
        "tokens": value,
        "inverse": inverse,
        "tables": tables,
        "edge": _edge(start_state / _of_states(held, spans)),
        "spans": spans,
        "units": units,
    }
    (states,) = run_chain(shapes, "delta_rule_states", replay)
    d_states, d_start = _d_states(shapes, query, key, d_out, inverse, tables, d_final, units, spans)
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "d_out": d_out,
        "inverse": inverse,
        "tables": tables,
        "units": units,
        "states": states,
        "d_states": d_states,
    }
    dq, dk, dv, sums = run_gradients(shapes, arrays)
    sums = sums.sum(axis=3)  # [z, Hv, N, 5, 64]
    through = tables[..., SINCE, -1] * sums[..., INNER, :].sum(-1)
    d_g = sums[..., D_GATE, :] + algebra.suffix_from(sums[..., AT_READER, :])
    d_g += algebra.prefix_before(sums[..., AT_WRITER, :]) + through[..., None]
    flat = lambda x: x.reshape(*x.shape[:2], -1) * (held * pulled)[..., None]
    return Gradients(dq, dk, dv, flat(d_g), flat(sums[..., D_BETA, :]), d_start)
