"""From what a batch looks like (padding, documents) to what the operators read (segment ids, positions)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import as_int32

PADDING = -1


def padding_segment_ids(real: Bool[Array, "B T"] | Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Segment ids of a padded batch: 0 on real tokens (nonzero in `real`), -1 on padding.

    Takes Hugging Face's 2-D `attention_mask` as it is, padded on either side.
    """
    return jnp.where(real.astype(bool), 0, PADDING).astype(jnp.int32)


def right_padding_segment_ids(lengths: Int[Array, "B"], max_length: int) -> Int[Array, "B T"]:
    """Segment ids of rows whose first `lengths[b]` of `max_length` tokens are real."""
    lengths = as_int32("lengths", lengths)
    index = jnp.arange(max_length, dtype=jnp.int32)
    return jnp.where(index[None, :] < lengths[:, None], 0, PADDING).astype(jnp.int32)


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of the same id stand before each token in its row, whatever stands between them.

    Example:
      >>> positions_in_segments(jnp.asarray([[0, 0, -1, 0, 1, 0, 1]]))
      Array([[0, 1, 0, 2, 0, 3, 1]], dtype=int32)
    """
    segment_ids = as_int32("segment_ids", segment_ids)
    order = jnp.argsort(segment_ids, axis=1, stable=True)
    counted = _index_in_run(take(segment_ids, order))
    return take(counted, jnp.argsort(order, axis=1))


def _index_in_run(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token within its run of equal ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index - first


def order_by_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """An order of each row in which the tokens of a segment follow each other; rows in which they do keep theirs."""
    apart = (positions_in_segments(segment_ids) != _index_in_run(segment_ids)) & (segment_ids >= 0)
    last = jnp.iinfo(segment_ids.dtype).max
    return _order(apart, jnp.where(segment_ids < 0, last, segment_ids))


def order_without_gaps(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The same, moving padding only: an id that returns behind another one is a new segment."""
    real = segment_ids >= 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    last = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    previous = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    same = take(segment_ids, jnp.maximum(previous, 0)) == segment_ids
    return _order(real & (previous >= 0) & (previous < index - 1) & same, (~real).astype(jnp.int32))


def _order(apart: Bool[Array, "B T"], key: Int[Array, "B T"]) -> Int[Array, "B T"]:
    index = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape)
    return jnp.where(apart.any(axis=1)[:, None], jnp.argsort(key, axis=1, stable=True), index)


def take(x: Array, order: Int[Array, "B T"]) -> Array:
    """`x[b, order[b, t]]` of `[B, T, ...]`."""
    at = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1, mode="clip")


def reordered(
    order: Int[Array, "B T"], x: Array, ids: Array, positions: Array | None, mask: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """`[B, T, M]`, ids `[B, T]`, positions `[B, T]` or `[3, B, T]` and mask `[B or 1, N or 1, T, T]` in an order."""
    if positions is not None:
        in_order = lambda p: take(p, order)
        positions = (jax.vmap(in_order) if positions.ndim == 3 else in_order)(positions)
    if mask is not None:
        at = order[:, None, :, None]
        mask = jnp.take_along_axis(mask, at, axis=2, mode="clip")
        mask = jnp.take_along_axis(mask, jnp.swapaxes(at, 2, 3), axis=3, mode="clip")
    return take(x, order), take(ids, order), positions, mask


def hide_padding(x: Float[Array, "B T M"], segment_ids: Int[Array, "B T"] | None) -> Array:
    """`x` with 0 on padding: what stands there, NaN too, must not meet a weight (its gradient would be 0 * NaN)."""
    if segment_ids is None:
        return x
    return jnp.where((segment_ids < 0)[..., None], jnp.zeros((), x.dtype), x)


def document_segment_ids(document_lengths: Int[Array, "B J"], max_length: int) -> Int[Array, "B T"]:
    """Segment ids of packed rows: 0, 1, ... per document, -1 behind the last.

    Args:
      document_lengths: `[B, J]`, lengths of each row's documents in order; zeros are documents of no tokens.
      max_length: T.

    Example:
      >>> document_segment_ids(jnp.asarray([[2, 3, 0]]), 6)
      Array([[ 0,  0,  1,  1,  1, -1]], dtype=int32)
    """
    ends = jnp.cumsum(as_int32("document_lengths", document_lengths), axis=1)
    index = jnp.arange(max_length, dtype=jnp.int32)
    before = (index[None, :, None] >= ends[:, None, :]).sum(axis=-1, dtype=jnp.int32)
    return jnp.where(index[None, :] < ends[:, -1:], before, PADDING)


def cu_seqlens_segment_ids(cu_seqlens: Int[Array, "J"], total: int) -> Int[Array, "1 T"]:
    """Segment ids of one packed row whose documents start and end at `cu_seqlens` (`[0, l0, l0 + l1, ...]`).

    Example:
      >>> cu_seqlens_segment_ids(jnp.asarray([0, 2, 5]), 6)
      Array([[ 0,  0,  1,  1,  1, -1]], dtype=int32)
    """
    cu_seqlens = as_int32("cu_seqlens", cu_seqlens)
    return document_segment_ids((cu_seqlens[1:] - cu_seqlens[:-1])[None], total)


def attention_mask(
    query_len: int,
    kv_len: int | None = None,
    *,
    is_causal: bool = False,
    sliding_window: int | None = None,
    prefix_length: int = 0,
    query_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Who sees whom, as a picture: True where the query (row) may attend to the key (column).

    The operators need no such array: hand them the same arguments instead, and they compute in O(T) memory. Only
    `prefix_length` has no argument there; pass the mask itself.

    Args:
      query_len, kv_len: T and S; None means S = T.
      is_causal: keys at later positions are hidden.
      sliding_window: exactly this many keys are visible, self included.
      prefix_length: keys among the first so many are visible to all, later or not (prefix language model).
      query_segment_ids, kv_segment_ids: `[B, T]` and `[B, S]`; tokens see within equal ids; negative ids are padding.
        The second defaults to the first.
      query_positions, kv_positions: `[B, T]` and `[B, S]`; None means the index.

    Returns:
      `[B, 1, T, S]`, B = 1 without segment ids or positions. Masks combine with `&` and `|`.

    Raises:
      ValueError: a window without causality, or ids and positions of the keys missing where S differs from T.

    Example:
      >>> attention_mask(3, is_causal=True, sliding_window=2)[0, 0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]], dtype=int32)
    """
    query_segment_ids = as_int32("query_segment_ids", query_segment_ids)
    kv_segment_ids = as_int32("kv_segment_ids", kv_segment_ids)
    query_positions = as_int32("query_positions", query_positions)
    kv_positions = as_int32("kv_positions", kv_positions)
    kv_len = query_len if kv_len is None else kv_len
    if sliding_window is not None and (sliding_window < 1 or not is_causal):
        raise ValueError(
            "`sliding_window` must be a positive number of keys (self included) and needs `is_causal=True`, "
            f"got sliding_window={sliding_window}, is_causal={is_causal}"
        )
    kv_segment_ids = query_segment_ids if kv_segment_ids is None else kv_segment_ids
    kv_positions = query_positions if kv_positions is None else kv_positions
    index = lambda length: jnp.arange(length, dtype=jnp.int32)[None, :]
    of_queries = index(query_len) if query_positions is None else query_positions
    of_keys = index(kv_len) if kv_positions is None else kv_positions
    for name, array, length in (
        ("query_segment_ids", query_segment_ids, query_len),
        ("kv_segment_ids", kv_segment_ids, kv_len),
        ("query_positions", of_queries, query_len),
        ("kv_positions", of_keys, kv_len),
    ):
        if array is not None and (array.ndim != 2 or array.shape[1] != length):
            raise ValueError(f"`{name}` must have shape [B, {length}], got {array.shape}")
    distance = of_queries[:, :, None] - of_keys[:, None, :]
    visible = distance >= 0 if is_causal else jnp.ones_like(distance, bool)
    if sliding_window is not None:
        visible = visible & (distance < sliding_window)
    if prefix_length:
        visible = visible | (of_keys < prefix_length)[:, None, :]
    if query_segment_ids is not None and kv_segment_ids is not None:
        same = query_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        visible = visible & same & (query_segment_ids >= 0)[:, :, None]
    return visible[:, None]


def block_causal_mask(
    document_lengths: Int[Array, "B J"], max_length: int
) -> Bool[Array, "B 1 T T"]:
    """The causal mask within each document of packed rows; as a picture, see `attention_mask`."""
    ids = document_segment_ids(document_lengths, max_length)
    return attention_mask(max_length, is_causal=True, query_segment_ids=ids)
