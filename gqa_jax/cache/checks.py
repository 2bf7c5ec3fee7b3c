"""Checks of the arguments of a decode or prefill step."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pallas_kernels import as_int32

LOST = (
    2**30
)  # the length of a lost row: more than any capacity, and further steps do not make it wrap round


Rows = dict[str, tuple[int | None, ...]]


def check_step(x: Any, cache: Any, lengths: Any, *, width: int, rows: Rows) -> Any:
    """`lengths` as int32, or None; raises for a step that cannot be right, before anything is computed.

    Args:
      x, cache, lengths: of the step.
      width: M.
      rows: shape of one row of each array that the layer's cache must have; None means any size.

    Raises:
      ValueError: `x` or `lengths` has the wrong shape or range, the cache is of other sizes, or (where its lengths can
        be read) a row would overflow.
      TypeError: `x` is no array of floats, `lengths` no array of integers, `cache` another layer's or no cache.
    """
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"`x` must be an array, got {type(x).__name__}")
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != width:
        raise ValueError(f"`x` must have shape [B, T, M={width}] with T >= 1, got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating point, got {x.dtype}")
    for name, row in rows.items():
        held = getattr(cache, name, None)
        if held is None or not hasattr(cache, "batch_size"):
            kind = type(cache).__name__
            raise TypeError(f"`cache` must be what this layer's `init_cache` made, got {kind}")
        sizes = zip((None, *row), held.shape, strict=False)
        if held.ndim != 1 + len(row) or any(want not in (None, size) for want, size in sizes):
            expected = ", ".join("any" if size is None else str(size) for size in (None, *row))
            raise ValueError(f"`cache.{name}` must have shape [{expected}], got {held.shape}")
    if x.shape[0] != cache.batch_size:
        raise ValueError(
            f"`x` must have the cache's batch size {cache.batch_size}, got {x.shape[0]} rows"
        )
    lengths = checked_lengths(lengths, *x.shape[:2])
    if cache.max_tokens is not None and x.shape[1] > cache.max_tokens:
        raise ValueError(
            f"`cache` must hold at least T={x.shape[1]} tokens, got capacity {cache.max_tokens}"
        )
    check_room(cache, lengths, x.shape[1])
    return lengths


def checked_lengths(lengths: Any, batch: int, num_new: int) -> Any:
    """`lengths` as int32 (None stays), after what can be known now about its shape and range."""
    lengths = as_int32("lengths", lengths)
    if lengths is None:
        return None
    if lengths.shape != (batch,):
        raise ValueError(f"`lengths` must have shape [B={batch}], got {lengths.shape}")
    known = _read(lengths)
    if known is not None and ((known < 0) | (known > num_new)).any():
        raise ValueError(f"`lengths` must lie in [0, T={num_new}], got {known.tolist()}")
    return lengths


def check_room(cache: Any, lengths: Any, num_new: int) -> None:
    """Raises where the step could not fit, or, as far as lengths can be read, does not."""
    limit = cache.max_tokens
    if limit is None:
        return
    held, needed = _read(cache.length), num_new
    added = np.asarray(num_new) if lengths is None else _read(lengths)
    if held is not None and added is not None:
        needed = max(needed, int((held + added).max()))
    if needed > limit:
        raise ValueError(f"`cache` must hold {needed} tokens after this step, got capacity {limit}")


def check_size(name: str, size: Any) -> None:
    """Raises unless `size` is an integer, and less than the length of lost rows."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"`{name}` must be an int, got {size!r}")
    if size >= LOST:
        raise ValueError(f"`{name}` must be less than 2^30, got {size}")


def _read(array: Array) -> np.ndarray | None:
    """The values, where they can be known now."""
    return None if isinstance(array, Tracer) else np.asarray(array)
