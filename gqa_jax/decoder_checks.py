"""What the decoder refuses before it computes anything."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from gqa_jax.config import DecoderConfig


def check_token_shape(tokens: Any) -> None:
    """Raises unless `tokens` is an integer array `[B, T]` with T >= 1."""
    if not hasattr(tokens, "dtype"):
        raise TypeError(f"`tokens` must be an array, got {type(tokens).__name__}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"`tokens` must be an integer array, got {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"`tokens` must have shape [B, T] with T >= 1, got {tokens.shape}")


def check_marks(tokens: Array, positions: Array | None, segment_ids: Array | None) -> None:
    """Raises unless positions and segment ids have the shapes that go with `tokens`."""
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(
            f"`segment_ids` must have the shape of `tokens`, {tokens.shape}, got {segment_ids.shape}"
        )
    if positions is not None and positions.shape not in (tokens.shape, (3, *tokens.shape)):
        raise ValueError(
            f"`positions` must have shape {tokens.shape} or {(3, *tokens.shape)}, got {positions.shape}"
        )


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


def check_cache(cache: tuple, num_entries: int, tokens: Array, lengths: Array | None) -> None:
    """Raises unless `tokens` and `lengths` fit the cache; entries may be stacked over a leading axis."""
    if len(cache) != num_entries:
        raise ValueError(
            f"`cache` must have {num_entries} entries, as `init_cache` made, got {len(cache)}"
        )
    batch, num_new = tokens.shape
    if lengths is not None:
        if not hasattr(lengths, "dtype"):
            raise TypeError(f"`lengths` must be an array, got {type(lengths).__name__}")
        if lengths.shape != (batch,):
            raise ValueError(f"`lengths` must have shape [B={batch}], got {lengths.shape}")
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"`lengths` must be an integer array, got {lengths.dtype}")
        if not isinstance(lengths, Tracer):
            counts = np.asarray(lengths)
            if ((counts < 0) | (counts > num_new)).any():
                raise ValueError(f"`lengths` must lie in [0, T={num_new}], got {counts.tolist()}")
    added = None
    if not isinstance(lengths, Tracer):
        added = np.asarray(num_new if lengths is None else lengths)
    for entry in cache:
        if entry.batch_size != batch:
            raise ValueError(f"`tokens` must have the cache's {entry.batch_size} rows, got {batch}")
        limit = entry.max_tokens
        if limit is None:
            continue
        needed = num_new
        if added is not None and not isinstance(entry.length, Tracer):
            needed = max(needed, int((np.asarray(entry.length) + added).max()))
        if needed > limit:
            raise ValueError(
                f"`cache` must hold {needed} tokens after this step, got capacity {limit}"
            )


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
