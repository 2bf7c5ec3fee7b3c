"""From what a batch looks like (padding, documents) to what the operators read (segment ids, positions)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PADDING = -1


def padding_segment_ids(real: Bool[Array, "B T"] | Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Segment ids of a padded batch: 0 on real tokens (nonzero in `real`), -1 on padding.

    Takes Hugging Face's 2-D `attention_mask` as it is, padded on either side.
    """
    return jnp.where(real.astype(bool), 0, PADDING).astype(jnp.int32)


def right_padding_segment_ids(lengths: Int[Array, "B"], max_length: int) -> Int[Array, "B T"]:
    """Segment ids of rows whose first `lengths[b]` of `max_length` tokens are real."""
    index = jnp.arange(max_length, dtype=jnp.int32)
    return jnp.where(index[None, :] < lengths[:, None], 0, PADDING).astype(jnp.int32)


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token within its run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index - first
