"""Between the layout of the caller and tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._inert import finite_part
from pallas_kernels._precision import compute_dtype
from pallas_kernels.attention import algebra, tuning


class Problem(NamedTuple):
    """A request in tile form. Lengths are padded to whole blocks; a dimension of size 1 may broadcast."""

    query: jax.Array  # [B, K, R, T, D], NaN for infinity
    key: jax.Array  # [B, K, S, D], NaN somewhere in a token of which anything is not finite
    value: jax.Array  # [B, K, S, Dv], there 0
    bias: jax.Array | None  # [B|1, K|1, R|1, T|1, S|1]
    mask: jax.Array | None  # the same
    queries: algebra.Tokens  # [B|1, T]
    keys: algebra.Tokens  # [B|1, S]
    key_exists: jax.Array | None  # [1, S]; None where no key is padding
    seeds: jax.Array | None


class At(NamedTuple):
    """A tile: indices of its blocks of batch rows, key/value heads, queries and keys."""

    batch: jax.Array
    heads: jax.Array
    queries: jax.Array
    keys: jax.Array


def block_sizes(inputs: algebra.Inputs) -> tuning.Blocks:
    batch, q_len, num_heads, _ = inputs.query.shape
    kv_len, num_kv_heads = inputs.key.shape[1:3]
    return tuning.blocks(batch, num_kv_heads, num_heads // num_kv_heads, q_len, kv_len)


def block_counts(problem: Problem, size: tuning.Blocks) -> tuple[int, int, int, int]:
    """Numbers of blocks: batch rows, key/value heads, queries, keys."""
    batch, num_kv_heads, _, q_len, _ = problem.query.shape
    kv_len = problem.key.shape[2]
    return (
        batch // size.batch,
        num_kv_heads // size.heads,
        q_len // size.queries,
        kv_len // size.keys,
    )


def make_problem(
    inputs: algebra.Inputs,
    context: algebra.Context,
    options: algebra.Options,
    size: tuning.Blocks,
) -> Problem:
    num_kv_heads = inputs.key.shape[2]
    q_len = -(-inputs.query.shape[1] // size.queries) * size.queries
    kv_len = -(-inputs.key.shape[1] // size.keys) * size.keys
    # bfloat16 products accumulate exactly in float32; float16 would overflow where float32 logits do not.
    dtype = inputs.query.dtype
    dtype = dtype if dtype == jnp.bfloat16 else compute_dtype(dtype)

    def matrix(array):
        """`[B|1, N|1, T|1, S|1]` to `[B|1, K|1, R|1, T|1, S|1]`, padded."""
        if array is None:
            return None
        heads = (1, 1) if array.shape[1] == 1 else (num_kv_heads, -1)
        array = array.reshape(array.shape[0], *heads, *array.shape[2:])
        for axis, length in ((3, q_len), (4, kv_len)):
            if array.shape[axis] > 1:
                array = _pad(array, axis, length)
        return array

    def padded(tokens, length):
        # Repeating the last token keeps the minimum and maximum of its block.
        return tokens.map(lambda array: _pad(array, 1, length, mode="edge"))

    def heads_first(array):
        return jnp.swapaxes(_pad(array, 1, kv_len), 1, 2).astype(dtype)

    nan = lambda array: jnp.asarray(jnp.nan, array.dtype)
    query = jnp.where(jnp.isfinite(inputs.query), inputs.query, nan(inputs.query))
    is_finite = jnp.isfinite(inputs.key) & _in_channels(
        jnp.isfinite(inputs.value), inputs.key.shape[-1]
    )
    key = jnp.where(is_finite, inputs.key, nan(inputs.key))
    queries, keys = algebra.tokens(inputs, context, options)
    exists = None
    if kv_len != inputs.key.shape[1]:
        exists = (jnp.arange(kv_len) < inputs.key.shape[1])[None]
    return Problem(
        split_queries(query, num_kv_heads, q_len).astype(dtype),
        heads_first(key),
        heads_first(finite_part(inputs.value)),
        matrix(inputs.bias),
        matrix(context.mask),
        padded(queries, q_len),
        padded(keys, kv_len),
        exists,
        context.dropout_seeds,
    )


def _in_channels(holds: jax.Array, channels: int) -> jax.Array:
    """`holds [..., E]` in `[..., channels]`: true all along a row if it was before. A sum over E would cost more."""
    missing = -holds.shape[-1] % channels
    holds = jnp.pad(holds, [(0, 0)] * (holds.ndim - 1) + [(0, missing)], constant_values=True)
    return holds.reshape(*holds.shape[:-1], -1, channels).all(-2)


def _pad(array: jax.Array, axis: int, length: int, **options) -> jax.Array:
    missing = length - array.shape[axis]
    if missing == 0:
        return array
    return jnp.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)], **options)


def split_queries(array: jax.Array, num_kv_heads: int, length: int, fill=0.0) -> jax.Array:
    """`[B, T, N, E]` to `[B, K, R, length, E]`."""
    array = array.reshape(*array.shape[:2], num_kv_heads, -1, array.shape[-1])
    return _pad(array.transpose(0, 2, 3, 1, 4), 3, length, constant_values=fill)


def join_queries(tiles: jax.Array, problem: Problem, size: tuning.Blocks, length: int):
    """Stacked tiles `[.., batch, heads, R, queries, E]` to `[B, length, N, E]`."""
    batches, heads, rows, _ = block_counts(problem, size)
    tiles = tiles.reshape(batches, heads, rows, *tiles.shape[-5:])
    whole = tiles.transpose(0, 3, 2, 6, 1, 4, 5, 7)
    batch, num_kv_heads, group, padded, _ = problem.query.shape
    return whole.reshape(batch, padded, num_kv_heads * group, -1)[:, :length]


def join_keys(tiles: jax.Array, problem: Problem, size: tuning.Blocks, length: int):
    """Stacked `[heads and batch blocks, key blocks, batch, heads, E, keys]` to `[B, length, K, E]`."""
    batches, heads, _, columns = block_counts(problem, size)
    tiles = tiles.reshape(batches, heads, columns, *tiles.shape[-4:])
    whole = tiles.transpose(0, 3, 2, 6, 1, 4, 5)
    batch, num_kv_heads, padded, _ = problem.key.shape
    return whole.reshape(batch, padded, num_kv_heads, -1)[:, :length]


def fold(tile: jax.Array) -> jax.Array:
    """`[b, k, R, t, ...]` to `[b, k, R * t, ...]`."""
    return tile.reshape(*tile.shape[:2], -1, *tile.shape[4:])


def start_of(array: jax.Array, place, sizes) -> list[jax.Array]:
    """Where a block begins: dimensions of size 1 broadcast, those beyond `sizes` are taken whole."""
    starts = [
        0 if array.shape[d] == 1 or d >= len(sizes) else place[d] * sizes[d]
        for d in range(array.ndim)
    ]
    return [lax.convert_element_type(start, jnp.int32) for start in starts]


def take(array: jax.Array, place, sizes) -> jax.Array:
    """The block of `array` at block indices `place`."""
    extent = tuple(
        array.shape[d] if array.shape[d] == 1 or d >= len(sizes) else sizes[d]
        for d in range(array.ndim)
    )
    return lax.dynamic_slice(array, start_of(array, place, sizes), extent)


def tile_tokens(problem: Problem, size: tuning.Blocks, at: At):
    """Tokens of a tile's queries and of its keys."""

    def cut(tokens, block, length):
        return tokens.map(lambda array: take(array, (at.batch, block), (size.batch, length)))

    return cut(problem.queries, at.queries, size.queries), cut(problem.keys, at.keys, size.keys)


def take_keys(array: jax.Array, size: tuning.Blocks, at: At) -> jax.Array:
    """`[b, k, s, ...]` of a tile of keys or values."""
    return take(array, (at.batch, at.heads, at.keys), (size.batch, size.heads, size.keys))
