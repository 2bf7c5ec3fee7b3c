"""The chunk form's algebra: what every chunked implementation of the gated delta rule shares.

Derived in docs/gated_delta_rule.md. Letters: `z` independent lanes (batch times segments), `h` key heads, `n` value
heads per key head, `C` tokens of a chunk. Everything is float32 (float64 for float64 inputs); exponents are
masked before `exp`, so no entry ever overflows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._precision import EPSILON
from pallas_kernels._precision import l2_normalize as l2_normalize

BLOCK = 16  # width of the substitution inside the triangular inverse


def matmul(spec: str, *operands):
    """`einsum` without reduced-precision passes on any device."""
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def for_values(x: jax.Array, value_heads):
    """A key head's `[z, h, ...]` once for each of its n value heads, `[z, h, n, ...]`.

    Products whose operands have all batch axes in common need no transposes around them, which cost more than copies.
    """
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], value_heads, *x.shape[2:]))


def segment_starts(segment_ids):
    """`(starts, real)`, both `[B, T]` bool: real tokens that begin a new segment; tokens that are not padding.

    Padding (a negative id) is transparent: a token is compared with the last real token before it. A row's first
    real token continues the initial state, so it is no start.
    """
    real = segment_ids >= 0
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    last_real = jax.lax.cummax(jnp.where(real, place, -1), axis=1)
    previous = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return real & (previous >= 0) & (previous_id != segment_ids), real


def _two_sum(a, b):
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def two_float_add(high: jax.Array, low: jax.Array, other_high, other_low):
    """The sum of two unevaluated sums of two floats, as one."""
    total, error = _two_sum(high, other_high)
    error = error + low + other_low
    high = total + error
    return high, error - (high - total)


def two_float_cumsum(x: jax.Array):
    """Cumulative sum over the last axis as `(high, low)`, an unevaluated sum of two floats.

    A decay between two tokens is a difference of cumulative sums; after one step of -60 a plain float32 sum has
    lost the digits of every later gate.
    """
    high, low = x, jnp.zeros_like(x)
    shift, length = 1, x.shape[-1]
    while shift < length:
        pad = [(0, 0)] * (x.ndim - 1) + [(shift, 0)]
        before_high = jnp.pad(high[..., :-shift], pad)
        before_low = jnp.pad(low[..., :-shift], pad)
        high, low = two_float_add(high, low, before_high, before_low)
        shift *= 2
    return high, low


class Gates(NamedTuple):
    """Decays inside one chunk, all in [0, 1] for g <= 0.

    Attributes:
      between: `[..., C, C]`, decay from token j to token i >= j of the same segment, else 0.
      since_start: `[..., C]`, decay from the chunk's initial state to a token; 0 once a segment has started.
      until_end: `[..., C]`, decay from a token to the chunk's end; 0 unless the segment reaches the end.
      whole: `[...]`, decay of the state over the chunk; 0 if a segment starts inside.
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array
    whole: jax.Array


def gates(g: jax.Array, segment: jax.Array | None = None) -> Gates:
    """Decays of one chunk.

    Args:
      g: `[z, h, n, C]` log decays.
      segment: None, or `[z, C]` int32: how many segments have started in the chunk up to each token.
    """
    # The barrier keeps XLA from repeating the sums for each of the C^2 differences.
    high, low = jax.lax.optimization_barrier(two_float_cumsum(g))
    visible = np.tril(np.ones((g.shape[-1],) * 2, bool))
    visible = jnp.asarray(visible).reshape((1,) * (g.ndim - 1) + visible.shape)
    exponent = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    until_end = jnp.exp((high[..., -1:] - high) + (low[..., -1:] - low))
    since_start = jnp.exp(high + low)
    whole = since_start[..., -1]
    if segment is not None:
        segment = segment[:, None, None]
        visible = visible & (segment[..., :, None] == segment[..., None, :])
        until_end = jnp.where(segment == segment[..., -1:], until_end, 0.0)
        since_start = jnp.where(segment == 0, since_start, 0.0)
        whole = since_start[..., -1]
    between = jnp.where(visible, jnp.exp(jnp.where(visible, exponent, 0.0)), 0.0)
    return Gates(between, since_start, until_end, whole)


def strictly_lower(x: jax.Array):
    """`x` below its diagonal, zero elsewhere."""
    mask = jnp.asarray(np.tril(np.ones(x.shape[-2:], bool), -1))
    return jnp.where(mask.reshape((1,) * (x.ndim - 2) + mask.shape), x, 0.0)


def unit_lower_inverse(lower: jax.Array):
    """`(I + lower)^-1` of strictly lower triangular `[..., C, C]`, C a power of two.

    Diagonal blocks of 16 by substitution, then merges `[[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']]`. A Neumann
    series over the whole chunk would overflow for correlated keys.
    """
    size = lower.shape[-1]
    width = min(BLOCK, size)
    inverse = _substitute(_blocks(lower, width, below=0))
    while width < size:
        upper_left, lower_right = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _blocks(lower, width, below=1)
        corner = -matmul(
            "...ij,...jk->...ik", lower_right, matmul("...ij,...jk->...ik", corner, upper_left)
        )
        top = jnp.concatenate([upper_left, jnp.zeros_like(corner)], axis=-1)
        bottom = jnp.concatenate([corner, lower_right], axis=-1)
        inverse = jnp.concatenate([top, bottom], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


def _blocks(matrix: jax.Array, width: int, *, below):
    """Blocks of `width` on the diagonal (`below=0`), or those under every even one (`below=1`): `[..., m, w, w]`."""
    columns = range(0, matrix.shape[-1], width * (1 + below))
    return jnp.stack(
        [matrix[..., c + below * width : c + (below + 1) * width, c : c + width] for c in columns],
        axis=-3,
    )


def _substitute(lower: jax.Array):
    """Row i of the inverse is `e_i - sum_{j < i} lower[i, j] row_j`; a loop, which compiles sooner than 15 copies."""
    size = lower.shape[-1]
    identity = jnp.eye(size, dtype=lower.dtype).reshape((1,) * (lower.ndim - 2) + (size, size))

    def row(i, rows):
        weights = jnp.swapaxes(jax.lax.dynamic_slice_in_dim(lower, i, 1, axis=-2), -1, -2)
        earlier = jnp.sum(weights * rows, axis=-2, keepdims=True)
        unit = jax.lax.dynamic_slice_in_dim(rows, i, 1, axis=-2)
        return jax.lax.dynamic_update_slice_in_dim(rows, unit - earlier, i, axis=-2)

    # `zeros_like`: a loop's carry must vary over a mesh (under `shard_map`) as what is added to it does.
    return jax.lax.fori_loop(1, size, row, jnp.zeros_like(lower) + identity)


def prefix_before(x: jax.Array):
    """`y[t] = sum_{j < t} x[j]` over the last axis."""
    mask = np.triu(np.ones((x.shape[-1],) * 2), 1)
    return matmul("...j,jt->...t", x, jnp.asarray(mask, x.dtype))


def suffix_from(x: jax.Array):
    """`y[t] = sum_{i >= t} x[i]` over the last axis."""
    mask = np.tril(np.ones((x.shape[-1],) * 2))
    return matmul("...i,it->...t", x, jnp.asarray(mask, x.dtype))


def corner_sum(x: jax.Array):
    """`y[t] = sum_{i >= t > j} x[i, j]`: the gradient of a decay that acts between j and i, without cancellation."""
    columns = prefix_before(x)  # [..., i, t]
    mask = jnp.asarray(np.tril(np.ones(x.shape[-2:], bool)))
    return jnp.sum(jnp.where(mask.reshape((1,) * (x.ndim - 2) + mask.shape), columns, 0.0), axis=-2)


def folded_key(key: jax.Array, decay: Gates, inverse: jax.Array):
    """X = T^T (until_end K), `[z, h, n, C, Dk]`: where a token's write R lands in the state at the chunk's end.

    With keys that agree and a large beta, T K cancels here exactly; summing K^T (T R) would cancel in every chunk's
    state instead, and nothing but a decay forgets that rounding.
    """
    return matmul("zhnij,zhnik->zhnjk", inverse, decay.until_end[..., None] * key[:, :, None])


def chunk_inverse(overlap, beta: jax.Array, decay: Gates):
    """T = (I + strictly_lower(beta Gamma K K^T))^-1, `[z, h, n, C, C]`, from the overlap K K^T `[z, h, C, C]`."""
    return unit_lower_inverse(strictly_lower(beta[..., None] * decay.between * overlap[:, :, None]))


class Terms(NamedTuple):
    """What of a chunk does not depend on the state; all chunks can have it at once.

    Attributes:
      readers: `[z, h, C or 2 C, Dk]`: the keys, then the queries where outputs are wanted.
      landing: `[z, h, n, Dk or Dk + C, C]`: X^T, then Ph = P T; where writes land in the state, and in the outputs.
      inverse: `[z, h, n, C, C]`, T.
    """

    readers: jax.Array
    landing: jax.Array
    inverse: jax.Array


def chunk_terms(
    query,
    key: jax.Array,
    beta: jax.Array,
    decay: Gates,
    scale: float,
    *,
    inverse: jax.Array | None = None,
) -> Terms:
    """Terms of a chunk; `query=None` where only the state is wanted, `inverse=None` where T is not known yet.

    Keys and queries, and what multiplies T, lie in one operand each: two large products cost less than four.
    """
    size = key.shape[-2]
    readers = key if query is None else jnp.concatenate([key, query], axis=-2)
    overlap = matmul("zhik,zhjk->zhij", readers, key)
    if inverse is None:
        inverse = chunk_inverse(overlap[..., :size, :], beta, decay)
    landing = jnp.swapaxes(decay.until_end[..., None] * key[:, :, None], -1, -2)
    if query is not None:
        scores = scale * decay.between * overlap[:, :, None, size:]
        landing = jnp.concatenate([landing, scores], axis=-2)
    return Terms(readers, matmul("zhnij,zhnjl->zhnil", landing, inverse), inverse)


def advance(
    state: jax.Array, terms: Terms, value: jax.Array, beta: jax.Array, decay: Gates, scale: float
):
    """`(state, out)` of one chunk, out `[z, h, n, C, Dv]` or None. Beta multiplies in float32 outside of T.

    The chain: two dependent products, all that the next chunk waits for.
    """
    size, key_dim = value.shape[-2], state.shape[-2]
    readers = for_values(terms.readers, value.shape[2])
    read = matmul("zhnck,zhnkv->zhncv", readers, state)
    since = decay.since_start[..., None]
    write = beta[..., None] * (value - since * read[..., :size, :])
    landed = matmul("zhnij,zhnjv->zhniv", terms.landing, write)
    after = decay.whole[..., None, None] * state + landed[..., :key_dim, :]
    if read.shape[-2] == size:
        return after, None
    return after, scale * since * read[..., size:, :] + landed[..., key_dim:, :]


class ChunkGradients(NamedTuple):
    """Cotangents of one chunk's inputs, in their shapes."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    g: jax.Array
    beta: jax.Array


class Echo(NamedTuple):
    """What of a chunk's cotangents does not depend on that of its final state.

    Attributes:
      landing: `[z, h, n, C, Dk]`, X.
      scores: `[z, h, n, C, C]`, P, by which outputs read the updates.
      write: `[z, h, n, C, Dv]`, Ph^T dO, the outputs' share of the cotangent of R = beta E.
      state: `[z, h, n, Dk, Dv]`, scale Q^T (since dO), the outputs' share of that of the initial state.
    """

    landing: jax.Array
    scores: jax.Array
    write: jax.Array
    state: jax.Array


def chunk_echo(
    d_out: jax.Array,
    query: jax.Array,
    key: jax.Array,
    decay: Gates,
    inverse: jax.Array,
    scale: float,
) -> Echo:
    """The cotangents that outputs send back inside their own chunk."""
    scores = scale * decay.between * matmul("zhik,zhjk->zhij", query, key)[:, :, None]
    folded = matmul("zhnij,zhnjl->zhnil", scores, inverse)
    carried = scale * decay.since_start[..., None] * d_out
    return Echo(
        folded_key(key, decay, inverse),
        scores,
        matmul("zhnij,zhniv->zhnjv", folded, d_out),
        matmul("zhnck,zhncv->zhnkv", for_values(query, d_out.shape[2]), carried),
    )


def retreat(d_state: jax.Array, echo: Echo, key: jax.Array, beta: jax.Array, decay: Gates):
    """`(d_state before the chunk, d_write)`; d_write belongs to R = beta E. The chain of the backward."""
    d_write = matmul("zhnck,zhnkv->zhncv", echo.landing, d_state) + echo.write
    forgotten = (decay.since_start * beta)[..., None] * d_write
    d_before = decay.whole[..., None, None] * d_state + echo.state
    keys = for_values(key, d_write.shape[2])
    return d_before - matmul("zhnck,zhncv->zhnkv", keys, forgotten), d_write


def chunk_gradients(
    d_out: jax.Array,
    d_state: jax.Array,
    d_write: jax.Array,
    echo: Echo,
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    decay: Gates,
    inverse: jax.Array,
    scale: float,
) -> ChunkGradients:
    """Gradients of one chunk's inputs from its initial state, and the cotangents of its outputs, end and writes."""
    since, until = decay.since_start[..., None], decay.until_end[..., None]
    recalled = matmul("zhnck,zhnkv->zhncv", for_values(key, value.shape[2]), state)
    residual = value - since * recalled
    update = matmul("zhnij,zhnjv->zhniv", inverse, beta[..., None] * residual)
    d_residual = beta[..., None] * d_write

    gated_overlap = strictly_lower(decay.between * matmul("zhik,zhjk->zhij", key, key)[:, :, None])
    d_lower = -strictly_lower(matmul("zhniv,zhnjv->zhnij", d_write, update))
    d_inside = matmul("zhniv,zhnjv->zhnij", d_out, update)
    d_beta = jnp.sum(d_write * residual, -1) + jnp.sum(d_lower * gated_overlap, -1)

    d_carried = scale * since * matmul("zhncv,zhnkv->zhnck", d_out, state)
    d_landed = until * matmul("zhncv,zhnkv->zhnck", update, d_state)
    d_scores = jnp.sum(scale * decay.between * d_inside, axis=2)
    d_overlap = jnp.sum(beta[..., None] * decay.between * d_lower, axis=2)
    d_query = jnp.sum(d_carried, axis=2) + matmul("zhij,zhjk->zhik", d_scores, key)
    d_key = (
        jnp.sum(d_landed - matmul("zhncv,zhnkv->zhnck", since * d_residual, state), axis=2)
        + matmul("zhij,zhik->zhjk", d_scores, query)
        + matmul("zhij,zhjk->zhik", d_overlap + jnp.swapaxes(d_overlap, -1, -2), key)
    )

    at_reader = jnp.sum(query[:, :, None] * d_carried, -1)
    at_reader -= jnp.sum(since * d_residual * recalled, -1)
    at_writer = jnp.sum(key[:, :, None] * d_landed, -1)
    pairs = d_lower * beta[..., None] * gated_overlap + strictly_lower(d_inside * echo.scores)
    through = decay.whole * jnp.sum(d_state * state, (-1, -2))
    d_g = corner_sum(pairs) + suffix_from(at_reader) + prefix_before(at_writer) + through[..., None]
    return ChunkGradients(d_query, d_key, d_residual, d_g, d_beta)


class Token(NamedTuple):
    """One token of one head as a decode kernel holds it, in float32.

    Attributes:
      query, key, decay: `[Dk]`; the decay itself, not its logarithm.
      value: `[columns]`.
      beta: a scalar.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    decay: jax.Array
    beta: jax.Array


def write_and_read(state: jax.Array, token: Token, *, scale: float, use_qk_l2norm: bool, spread):
    """One token on `[Dk, columns]` of a state: `(state after it, output [columns])`.

    Every sum over Dk is one over the rows of a `[Dk, columns]` tile, lengths of query and key included (equal in all
    columns), so that a kernel needs one kind of sum. `spread(x, axis)` repeats a vector that lies along `axis` over the
    tile.
    """
    down = lambda row: spread(row, 0)
    total = lambda tile: jnp.sum(tile, axis=0)

    def inverse_length(x):
        return jax.lax.rsqrt(total(down(x * x)) + EPSILON) if use_qk_l2norm else 1.0

    query, key = token.query, token.key
    of_key, of_query = inverse_length(key), inverse_length(query)
    state = state * down(token.decay)
    update = token.beta * (token.value - of_key * total(state * down(key)))
    state = state + down(key) * spread(of_key * update, 1)
    return state, scale * of_query * total(state * down(query))
