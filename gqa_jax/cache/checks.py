"""What a step may be given."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


def check_step(x: Array, cache, lengths: Array | None) -> None:
    """Raises for a step that cannot be right, before anything is computed.

    Raises:
      ValueError: the batch is not the cache's, `lengths` has the wrong shape or range, or (where the cache's
        lengths can be read) a row would overflow.
      TypeError: `lengths` is not integer.
    """
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"`x` must have shape [B, T, M] with T >= 1, got {x.shape}")
    if x.shape[0] != cache.batch_size:
        raise ValueError(
            f"`x` must have the cache's batch size {cache.batch_size}, got {x.shape[0]} rows"
        )
    num_new = x.shape[1]
    if lengths is not None:
        if lengths.shape != (x.shape[0],):
            raise ValueError(f"`lengths` must have shape [B={x.shape[0]}], got {lengths.shape}")
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"`lengths` must be an integer array, got {lengths.dtype}")
        known = _read(lengths)
        if known is not None and ((known < 0) | (known > num_new)).any():
            raise ValueError(f"`lengths` must lie in [0, T={num_new}], got {known.tolist()}")
    limit = cache.max_tokens
    if limit is None:
        return
    if num_new > limit:
        raise ValueError(f"`cache` must hold at least T={num_new} tokens, got capacity {limit}")
    held = _read(cache.length)
    added = np.asarray(num_new) if lengths is None else _read(lengths)
    if held is not None and added is not None and (held + added).max() > limit:
        raise ValueError(
            f"`cache` must hold {(held + added).max()} tokens after this step, got capacity {limit}"
        )


def _read(array: Array) -> np.ndarray | None:
    """The values, where they can be known now."""
    return None if isinstance(array, Tracer) else np.asarray(array)
