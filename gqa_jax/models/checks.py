"""What the decoder refuses before it computes anything."""

from typing import Any

import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from gqa_jax.cache.checks import check_room, checked_lengths
from gqa_jax.config import DecoderConfig
from pallas_kernels import as_int32


def checked_tokens(tokens: Any) -> Any:
    """`tokens` as int32; raises unless it is an integer array `[B, T]` with T >= 1."""
    tokens = as_int32("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"`tokens` must have shape [B, T] with T >= 1, got {tokens.shape}")
    return tokens


def checked_marks(tokens: Array, positions: Any, segment_ids: Any) -> tuple[Any, Any]:
    """Positions and segment ids (or None) as int32; raises unless they have the shapes that go with `tokens`."""
    positions = as_int32("positions", positions)
    segment_ids = as_int32("segment_ids", segment_ids)
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(
            f"`segment_ids` must have the shape of `tokens`, {tokens.shape}, got {segment_ids.shape}"
        )
    if positions is not None and positions.shape not in (tokens.shape, (3, *tokens.shape)):
        raise ValueError(
            f"`positions` must have shape {tokens.shape} or {(3, *tokens.shape)}, got {positions.shape}"
        )
    return positions, segment_ids


def check_token_range(tokens: Array, vocab_size: int, real: Array | None) -> None:
    """Raises where a real token (all, if `real` is None) is no id; cannot see inside `jit`."""
    if isinstance(tokens, Tracer) or isinstance(real, Tracer):
        return
    ids = np.asarray(
        tokens
    )  # numpy, because inside `jit` even constants become tracers in jax.numpy
    outside = (ids < 0) | (ids >= vocab_size)
    if real is not None:
        outside = outside & np.asarray(real)
    if outside.any():
        raise ValueError(
            f"`tokens` must lie in [0, vocab_size={vocab_size}), got {ids[outside][0]}"
        )


def check_cache(cache: tuple, num_entries: int, tokens: Array, lengths: Any) -> Any:
    """`lengths` as int32, or None; raises unless `tokens` and `lengths` fit the cache, whose entries may be stacked."""
    if not isinstance(cache, tuple | list) or not all(hasattr(e, "batch_size") for e in cache):
        kind = type(cache).__name__
        raise TypeError(f"`cache` must be a tuple of caches, as `init_cache` made, got {kind}")
    if len(cache) != num_entries:
        raise ValueError(
            f"`cache` must have {num_entries} entries, as `init_cache` made, got {len(cache)}"
        )
    batch, num_new = tokens.shape
    lengths = checked_lengths(lengths, batch, num_new)
    for entry in cache:
        if entry.batch_size != batch:
            raise ValueError(f"`tokens` must have the cache's {entry.batch_size} rows, got {batch}")
        check_room(entry, lengths, num_new)
    return lengths


def pattern_length(config: DecoderConfig) -> int:
    """Length of the shortest run of layers that, repeated, gives all of them.

    Raises:
      ValueError: there is none shorter than the whole.
    """
    kinds = [(kind, config.is_moe(i)) for i, kind in enumerate(config.layers)]
    for length in range(1, len(kinds) // 2 + 1):
        if len(kinds) % length == 0 and kinds == kinds[:length] * (len(kinds) // length):
            return length
    raise ValueError(
        "`layers` (and `moe_layers`) must repeat a pattern at least twice when `scan_layers=True`, "
        f"got {config.layers}" + ("" if config.moe_layers is None else f" and {config.moe_layers}")
    )
