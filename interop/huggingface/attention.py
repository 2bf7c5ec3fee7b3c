"""Our attention behind transformers' `attn_implementation`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import torch
from torch import Tensor

import pallas_kernels
from interop.autocast import autocast
from interop.bucketing import bucket_length, pad_to
from interop.dropout import draw_seed, dropout_key
from interop.huggingface.arguments import documents, ids_of_positions, may_pad, refuse_unknown
from interop.torch_function import wrap

_INSTEAD = {
    "position_bias": "pass an additive attention mask",
    "head_mask": "no head can be masked",
}


def register_attention(name: str = "gqa_jax") -> None:
    """Registers our attention, and the boolean masks it needs, under a name for `attn_implementation`.

    Supports grouped heads, padding, packed and sliding-window masks, additive masks, soft caps, sinks (`s_aux`),
    dropout, dynamic and static caches, training, `torch.compile(fullgraph=True)`.

    Args:
      name: of letters, digits and `_`; must not be one of transformers' own.

    Raises:
      ValueError: the name is taken by another implementation.
      ImportError: transformers is missing or too old.

    Example:
      >>> import interop.huggingface
      >>> interop.huggingface.register_attention("gqa_jax")
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        AttentionMaskInterface,
        sdpa_mask,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not name.isidentifier():
        raise ValueError(f"`name` must be made of letters, digits and `_`, got {name!r}")
    taken = {
        *ALL_ATTENTION_FUNCTIONS.valid_keys(),
        *ALL_MASK_ATTENTION_FUNCTIONS.valid_keys(),
        "eager",
    }
    if name in taken and ALL_ATTENTION_FUNCTIONS.get(name) is not attention_forward:
        raise ValueError(f"`name` must be free, got {name!r}, which transformers already knows")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: query `[B, N, T, D]`, key and value `[B, K, S, D]`.

    Without a mask, T > 1 queries of a causal module are aligned to the first key (so are static caches prefilled).

    Args:
      attention_mask: `[B or 1, N or 1, T, S]`, boolean or additive.
      **kwargs: what transformers hands through every layer. `cu_seq_lens_q`, `cu_seq_lens_k` or `seq_idx` name the
        documents of a row; without them and without a mask, `position_ids` that start again do. `output_attentions`
        gives the weights, in O(T S) memory.

    Returns:
      `[B, T, N, D]`, and the weights `[B, N, T, S]` (after dropout) if they are asked for, else None.

    Raises:
      NotImplementedError: position or head masks, documents with a cache, or an argument that we do not know.
      ValueError: documents of another shape than the queries.
    """
    refuse_unknown("attention", kwargs, _INSTEAD)
    query, key, value = autocast(query, key, value)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = num_queries > 1 and attention_mask is None and bool(is_causal)
    query = query.transpose(1, 2)
    ids = _documents(query, num_keys, kwargs, look=is_causal)
    if is_causal and num_keys > num_queries:  # what lies behind the last query is not visible
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    elif attention_mask is not None and attention_mask.shape[-1] > num_keys:
        attention_mask = attention_mask[..., :num_keys]
    if may_pad(query, key, value):
        query, key, value, attention_mask = _bucket(query, key, value, attention_mask, is_causal)
        ids = None if ids is None else pad_to(ids, query.shape[1], dim=1, value=-1)
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    head_major = key.is_contiguous()  # a cache: leave it as it lies, XLA reads it either way
    if not head_major:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    out = _attention(
        query,
        key,
        value,
        sinks=s_aux,
        mask=attention_mask if boolean else None,
        segment_ids=ids,
        bias=None if boolean else attention_mask,
        dropout_seed=draw_seed(query, dropout, None),
        dropout_rate=dropout,
        scale=scaling,
        is_causal=is_causal,
        sliding_window=sliding_window if is_causal else None,
        logits_soft_cap=softcap,
        head_major=head_major,
        with_weights=_wants_weights(module, kwargs),
    )
    if not isinstance(out, tuple):
        return out[:, :num_queries], None
    out, weights = out
    weights = pad_to(weights[:, :, :num_queries, :num_keys], num_keys, dim=3)
    return out[:, :num_queries], weights


def _documents(
    query: Tensor, num_keys: int, kwargs: Mapping[str, Any], *, look: bool
) -> Tensor | None:
    """Ids `[B, T]` of queries and keys, or None for one document per row."""
    batch, length = query.shape[:2]
    ids = documents(kwargs, query)
    if ids is not None and num_keys != length:
        raise NotImplementedError(
            f"gqa_jax attention cannot pack documents with a cache (of {num_keys} keys): give use_cache=False"
        )
    if ids is None and look and num_keys == length and not torch.compiler.is_compiling():
        ids = ids_of_positions(kwargs.get("position_ids"), batch, length)
    return None if ids is None else ids.to(torch.int32)


def _wants_weights(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> bool:
    wants = kwargs.get("output_attentions")
    if wants is None:
        wants = getattr(getattr(module, "config", None), "output_attentions", None)
    return bool(wants)


def _bucket(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Lengths rounded up: query `[B, T, N, D]`, key and value `[B, K, S, D]`, masked where they were padded."""
    num_queries, num_keys = query.shape[1], key.shape[2]
    rows = num_queries if num_queries == 1 else bucket_length(num_queries)
    columns = bucket_length(num_keys)
    query = pad_to(query, rows, dim=1)
    if columns > num_keys:
        key, value = pad_to(key, columns, dim=2), pad_to(value, columns, dim=2)
        if mask is None and not is_causal:
            mask = torch.ones((1, 1, num_queries, num_keys), dtype=torch.bool, device=query.device)
    if mask is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = pad_to(pad_to(mask, columns, dim=3, value=hidden), rows, dim=2, value=hidden)
    return query, key, value, mask


def _jax_attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    segment_ids=None,
    sinks=None,
    dropout_seed=None,
    head_major=False,
    with_weights=False,
    **options,
):
    if head_major:
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    options |= dict(
        mask=mask,
        bias=bias,
        sinks=sinks,
        query_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        dropout_key=dropout_key(dropout_seed),
    )
    out = pallas_kernels.gqa_attention(query, key, value, **options)
    if not with_weights:
        return out
    batch, length, groups = key.shape[:3]
    each = jnp.broadcast_to(jnp.eye(length, dtype=query.dtype)[:, None], (length, groups, length))
    weights = pallas_kernels.gqa_attention(  # of values that are 1 at their own key
        query,
        key,
        jnp.broadcast_to(each, (batch, *each.shape)),
        **options,
        implementation="reference",
    )
    return out, jnp.swapaxes(weights, 1, 2)


_attention = wrap(
    _jax_attention,
    name="huggingface_attention",
    static_argnames=(
        "dropout_rate",
        "scale",
        "is_causal",
        "sliding_window",
        "logits_soft_cap",
        "head_major",
        "with_weights",
    ),
    warn_after=128,  # one function serves every model of the process
)
