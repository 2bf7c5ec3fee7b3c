"""A row of tokens as attention takes it: in which order, with which positions, and who sees whom."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gqa_jax.config import AttentionConfig
from gqa_jax.layers import masks, records


@dataclasses.dataclass(frozen=True)
class Row:
    """What attention works on, for the tokens of this device.

    Attributes:
      x: `[B, T, M]`, in the order of attention.
      positions: `[B, T]` or `[3, B, T]`, for the rotary embedding.
      segment_ids: `[B, T]`, or None.
      mask: as of the call, in the order of `x`; or None.
      order: `[B, T]`, which token of the call stands where in `x`; None for the order of the call.
    """

    x: Float[Array, "B T M"]
    positions: Array
    segment_ids: Array | None = None
    mask: Array | None = None
    order: Array | None = None

    @classmethod
    def of(
        cls,
        x: Array,
        positions: Array | None,
        segment_ids: Array | None,
        mask: Array | None,
        config: AttentionConfig,
    ) -> "Row":
        """The row of a call on one device; with a sliding window the tokens of a segment stand next to each other."""
        if positions is None and segment_ids is not None:
            positions = masks.positions_in_segments(segment_ids)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        if segment_ids is None or config.sliding_window is None:
            return cls(x, positions, segment_ids, mask)
        order = masks.order_by_segment(segment_ids)
        x, segment_ids, rotary, mask = masks.reordered(order, x, segment_ids, positions, mask)
        assert rotary is not None
        return cls(x, rotary, segment_ids, mask, order)

    @property
    def marks(self) -> dict[str, Any]:
        """Arguments of the operator: who sees whom."""
        ids = self.segment_ids
        return dict(query_segment_ids=ids, kv_segment_ids=ids, mask=self.mask)

    def largest_logits(
        self, query: Array, key: Array, config: AttentionConfig, **marks: Array | None
    ) -> Float[Array, "K R"]:
        """`records.max_logits` with the layer's scale, causality and window."""
        return records.max_logits(
            query,
            key,
            scale=config.scale,
            is_causal=config.is_causal,
            sliding_window=config.sliding_window,
            **(marks or dict(segment_ids=self.segment_ids, mask=self.mask)),
        )

    def restore(self, out: Array) -> Array:
        """The output in the order of the call."""
        return out if self.order is None else masks.take(out, jnp.argsort(self.order, axis=1))
