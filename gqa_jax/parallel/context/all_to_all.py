"""Tokens are traded for heads, attention runs on whole rows, heads are traded back (DeepSpeed-Ulysses, 2309.14509)."""

from collections.abc import Callable
from typing import Any

from jax import lax

from gqa_jax.parallel.context.all_gather import gather_marks
from gqa_jax.parallel.context.marks import Marks
from pallas_kernels import AttentionOutput


def attention(
    query, key, value, marks: Marks, *, axis_name: Any, attend: Callable[..., AttentionOutput]
) -> AttentionOutput:
    """Attention with `heads / n` heads of every token on each device.

    Args:
      attend: `attend(query, key, value, marks)` over the tokens gathered along `axis_name`; it may be a ring along
        another axis.

    Raises:
      ValueError: key/value heads that the axis does not divide.
    """
    devices = lax.axis_size(axis_name)
    if key.shape[2] % devices:
        raise ValueError(
            f"mode 'a2a' must have a multiple of {devices} key/value heads on each device (axis {axis_name!r}), got "
            f"{key.shape[2]}; use 'all_gather' or 'ring', or fewer tensor-parallel devices"
        )

    def to_heads(x):
        return lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)

    def to_tokens(x):
        return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, tiled=True)

    all_marks = gather_marks(marks, axis_name)
    if marks.dropout is not None:
        first = lax.axis_index(axis_name) * (query.shape[2] // devices)
        all_marks = all_marks._replace(dropout=marks.dropout.from_head(first))
    out, lse = attend(to_heads(query), to_heads(key), to_heads(value), all_marks)
    return AttentionOutput(to_tokens(out), to_tokens(lse))
