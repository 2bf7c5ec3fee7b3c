"""Decoding state as explicit pytrees: hand them to a jitted step, donate them, use what comes back.

Every row of a batch has its own length. The key/value cache is head-major, `[B, K, S, D]`, because XLA then
reads it with one einsum and writes it in place.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
      key: `[B, K, S, D]`, after position embedding; S is the capacity.
      value: `[B, K, S, D]`.
      length: `[B]` int32, tokens held per row.
    """

    key: Float[Array, "B K S D"]
    value: Float[Array, "B K S D"]
    length: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S, the number of tokens that a row can hold."""
        return self.key.shape[2]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.key.shape[0]

    def append(
        self,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
    ) -> "KVCache":
        """The cache with the first `lengths[b]` of T new tokens written behind each row's old ones.

        Tokens beyond the capacity are not written; `check_room` says so where that can be known, and
        `overflowed` finds the rows where it cannot.
        """
        num_new = key.shape[1]
        offset = jnp.arange(num_new, dtype=jnp.int32)[None, :]
        slot = jnp.where(offset < lengths[:, None], self.length[:, None] + offset, self.capacity)

        def write(rows: Array, new: Array) -> Array:
            put = jax.vmap(lambda row, at, x: row.at[:, at].set(x, mode="drop"))
            return put(rows, slot, jnp.swapaxes(new, 1, 2).astype(rows.dtype))

        length = (self.length + lengths).astype(jnp.int32)
        return KVCache(write(self.key, key), write(self.value, value), length)

    def overflowed(self) -> Array:
        """`[B]` bool: rows to which more tokens were appended than they can hold."""
        return self.length > self.capacity

    def reset(self) -> "KVCache":
        """The same memory, no tokens."""
        return dataclasses.replace(self, length=jnp.zeros_like(self.length))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetState:
    """All that a Gated DeltaNet layer remembers; its size does not depend on the number of tokens.

    Attributes:
      conv: `[B, W, Hk, 2 Dk + n Dv]`, the last W inputs of the convolution, oldest first.
      state: `[B, Hv, Dk, Dv]` float32.
      length: `[B]` int32, tokens seen per row.
    """

    conv: Float[Array, "B W Hk F"]
    state: Float[Array, "B Hv Dk Dv"]
    length: Int[Array, "B"]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.state.shape[0]

    def reset(self) -> "GatedDeltaNetState":
        """The same memory, no tokens."""
        return jax.tree.map(jnp.zeros_like, self)


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
    if not isinstance(cache, KVCache):
        return
    if num_new > cache.capacity:
        raise ValueError(
            f"`cache` must hold at least T={num_new} tokens, got capacity {cache.capacity}"
        )
    held = _read(cache.length)
    added = np.asarray(num_new) if lengths is None else _read(lengths)
    if held is not None and added is not None and (held + added).max() > cache.capacity:
        raise ValueError(
            f"`cache` must hold {(held + added).max()} tokens after this step, got capacity {cache.capacity}"
        )


def _read(array: Array) -> np.ndarray | None:
    """The values, where they can be known now."""
    return None if isinstance(array, Tracer) else np.asarray(array)
