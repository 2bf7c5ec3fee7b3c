"""Arguments that transformers hands through every layer: refused ones, inert ones, documents."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# They concern the cache, the loss, what a model collects, or how another implementation computes the same result.
_INERT = frozenset(
    (
        "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k", "max_length_q",
        "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
        "position_ids", "return_dict", "seq_idx", "use_cache",
    )
)  # fmt: skip


def refuse_unknown(what: str, kwargs: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    """Raises `NotImplementedError` for an argument that could matter: neither None nor False, nor known to be inert."""
    for name, value in kwargs.items():
        if name in _INERT or value is None or value is False:
            continue
        way_out = instead.get(name, "leave it out, or use another implementation for this call")
        raise NotImplementedError(f"gqa_jax {what} does not support `{name}`: {way_out}")


def documents(kwargs: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Ids `[B, T]` of the documents packed in rows, from `cu_seq_lens_q` and `_k`, or `seq_idx`; None where neither is.

    Args:
      kwargs: of a layer.
      like: `[B, T, ...]`.

    Raises:
      ValueError: offsets with more than one row, or that differ between queries and keys; ids of another shape.
    """
    offsets = [kwargs.get(f"cu_seq_lens_{side}") for side in "qk"]
    present = [x for x in offsets if x is not None]
    batch, length = like.shape[:2]
    if present:
        if len(present) == 2 and _differ(*present):
            raise ValueError(
                f"`cu_seq_lens_k` must equal `cu_seq_lens_q` {offsets[0]}, got {offsets[1]}"
            )
        return ids_of_offsets("cu_seq_lens_q", present[0], like)
    ids = kwargs.get("seq_idx")
    if ids is not None and ids.shape != (batch, length):
        raise ValueError(f"`seq_idx` must have shape {(batch, length)}, got {tuple(ids.shape)}")
    return ids


def ids_of_offsets(name: str, offsets: Tensor, like: Tensor) -> Tensor:
    """`[1, T]`: which sequence a token is of; what lies behind the last offset is one more."""
    if like.shape[0] != 1:
        raise ValueError(f"`query` must have one row when `{name}` is given, got {like.shape[0]}")
    tokens = torch.arange(like.shape[1], dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), tokens, right=True, out_int32=True)[None]


def ids_of_positions(position_ids: Any, batch: int, length: int) -> Tensor | None:
    """Ids `[B, T]` where positions `[B or 1, T]` start again (transformers' rule); None where they never do.

    A compiler cannot look, and gets ids in any case.
    """
    from transformers.masking_utils import find_packed_sequence_indices

    if not isinstance(position_ids, Tensor) or length < 2:
        return None
    if position_ids.dim() != 2 or position_ids.shape not in ((batch, length), (1, length)):
        return None
    ids = find_packed_sequence_indices(position_ids)
    return None if ids is None else ids.to(torch.int32).expand(batch, -1)


def may_pad(*tensors: Tensor) -> bool:
    """Training has fixed shapes, and a compiler sees only the ones it is given: only eager inference pads."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _differ(first: Tensor, second: Tensor) -> bool:
    """Values are read on a CPU only: looking would wait for a GPU, or break the graph."""
    if first is second:
        return False
    readable = first.device.type == "cpu" and not torch.compiler.is_compiling()
    return first.shape != second.shape or (readable and not torch.equal(first, second))
