"""What layers record while they run, under `nnx.capture`: the largest attention logits, for QK-clip."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import as_int32

# keys per step of the loop in `max_logits`: bounds its memory at T * 512 logits per head
KEY_BLOCK = 512

Recorded = dict[
    str, tuple[jax.Array, ...]
]  # name -> values of one layer, in the order of its calls


class MaxLogits(nnx.Intermediate):
    """The variable type under which `SelfAttention` records `max_logits` `[K, R]` inside `nnx.capture`."""


def is_recording(layer: nnx.Module) -> bool:
    """Whether a forward pass of `layer` runs inside `nnx.capture` of `MaxLogits`."""
    return any(type(captured) is MaxLogits for captured in getattr(layer, "__captures__", ()))


def start_records(layer: object) -> None:
    """Empties what a copy of a layer has collected, so that `records` gives what its next call adds."""
    for variable in _captures(layer):
        variable.set_value({})


def add_records(layer: object, values: list[Recorded]) -> None:
    """Adds what `records` returned for a copy of the layer, which started empty, to what the layer has."""
    for variable, value in zip(_captures(layer), values, strict=True):
        held = variable.get_value()
        variable.set_value(
            held | {name: (*held.get(name, ()), *new) for name, new in value.items()}
        )


def records(layer: object) -> list[Recorded]:
    """What `nnx.capture` has collected in a layer so far, of every type, as values.

    `jax.checkpoint` and `lax.scan` work on copies of the layer, out of which only values come.
    """
    return [variable.get_value() for variable in _captures(layer)]


def put_records(layer: object, values: list[Recorded]) -> None:
    """Puts what `records` returned for a copy of the layer into the layer."""
    for variable, value in zip(_captures(layer), values, strict=True):
        variable.set_value(value)


def _captures(layer: Any) -> list[nnx.Variable]:
    modules = (module for _, module in nnx.iter_modules(layer))
    return [variable for module in modules for variable in getattr(module, "__captures__", ())]


def max_logits(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    *,
    scale: float | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    mask: Bool[Array, "B N T S"] | None = None,
) -> Float[Array, "K R"]:
    """The largest scaled logit of each head over all visible pairs of a batch, before any soft cap; O(T) memory.

    Args:
      query, key: as attention reads them.
      scale, is_causal, sliding_window, segment_ids, mask: as attention has them.
      positions: by which causality and window go; None means the index.
      kv_segment_ids, kv_positions: of the keys, where these are not the tokens of the queries.

    Returns:
      `[K, R]` float32, without gradient; -inf for a head that sees nothing.
    """
    query, key = jax.lax.stop_gradient((query, key))
    positions, kv_positions = (
        as_int32("positions", positions),
        as_int32("kv_positions", kv_positions),
    )
    segment_ids = as_int32("segment_ids", segment_ids)
    kv_segment_ids = as_int32("kv_segment_ids", kv_segment_ids)
    batch, length, num_heads, head_dim = query.shape
    groups = key.shape[2]
    factor = head_dim**-0.5 if scale is None else scale
    grouped = query.reshape(batch, length, groups, num_heads // groups, head_dim)
    num_keys = key.shape[1]
    block = min(KEY_BLOCK, num_keys)
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    kv_positions = positions if kv_positions is None else kv_positions
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids

    def largest(start: Array) -> Array:
        # The last block is moved back inside the row; its overlap is counted twice, which a maximum does not mind.
        begin = jnp.minimum(start, num_keys - block)
        slice_keys = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, begin, block, axis)
        logits = jnp.einsum(
            "btkrd,bskd->bkrts",
            grouped,
            slice_keys(key, 1),
            preferred_element_type=jnp.float32,
            precision="highest",
        )
        distance = positions[:, :, None] - slice_keys(kv_positions, 1)[:, None, :]
        visible = (distance >= 0) if is_causal else jnp.ones_like(distance, bool)
        if sliding_window is not None:
            visible &= distance < sliding_window
        visible = visible[:, None]
        if segment_ids is not None:
            of_keys = slice_keys(kv_segment_ids, 1)[:, None, None, :]
            of_queries = segment_ids[:, None, :, None]
            visible = visible & (of_keys == of_queries) & (of_queries >= 0)
        if mask is not None:
            visible = visible & slice_keys(mask, 3)
        visible = jnp.broadcast_to(visible, (batch, num_heads, length, block))
        seen = jnp.where(visible.reshape(logits.shape), logits * factor, -jnp.inf)
        return seen.max(axis=(0, 3, 4))

    return jax.lax.map(largest, jnp.arange(0, num_keys, block, dtype=jnp.int32)).max(axis=0)
