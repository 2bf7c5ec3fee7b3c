"""Hugging Face transformers (5.17 and newer) with our attention and our gated delta rule.

    interop.huggingface.register_attention("gqa_jax")
    model.set_attn_implementation("gqa_jax")           # or from_pretrained(..., attn_implementation="gqa_jax")
    with interop.huggingface.patch_gated_delta(model): ...

Nothing is ignored: an argument that is not supported raises. During inference lengths are padded to a few sizes
(masked, so that results do not change), and generation with a growing cache compiles O(log T) times.
"""

import sys
import threading
from collections.abc import Callable

import jax.numpy as jnp
import torch
from torch import Tensor

import pallas_kernels
from interop.bucketing import bucket_length, pad_to
from interop.operators import draw_seed, dropout_key, gated_delta_rule, gated_delta_rule_step
from interop.torch_function import wrap

_CHUNKED, _RECURRENT = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"


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
) -> tuple[Tensor, None]:
    """What transformers calls: query `[B, N, T, D]`, key and value `[B, K, S, D]`; returns `([B, T, N, D], None)`.

    Without a mask, T > 1 queries of a causal module are aligned to the first key (so are static caches prefilled).

    Raises:
      NotImplementedError: attention weights, position biases or packed sequences by offsets are asked for.
    """
    _refuse_unsupported(kwargs)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = num_queries > 1 and attention_mask is None and bool(is_causal)
    if is_causal and num_keys > num_queries:  # what lies behind the last query is not visible
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    elif attention_mask is not None and attention_mask.shape[-1] > num_keys:
        attention_mask = attention_mask[..., :num_keys]
    query = query.transpose(1, 2)
    if _may_pad(query, key, value):
        query, key, value, attention_mask = _bucket(query, key, value, attention_mask, is_causal)
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    head_major = key.is_contiguous()  # a cache: leave it as it lies, XLA reads it either way
    if not head_major:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    out = _attention(
        query, key, value, sinks=s_aux, mask=attention_mask if boolean else None,
        bias=None if boolean else attention_mask, dropout_seed=draw_seed(query, dropout, None), dropout_rate=dropout,
        scale=scaling, is_causal=is_causal, sliding_window=sliding_window if is_causal else None,
        logits_soft_cap=softcap, head_major=head_major,
    )  # fmt: skip
    return out[:, :num_queries], None


def _refuse_unsupported(kwargs: dict) -> None:
    for name, instead in (
        ("output_attentions", "use attn_implementation='eager' to see the weights"),
        ("position_bias", "pass an additive attention mask"),
        ("cu_seq_lens_q", "pass position_ids, from which transformers makes a block mask"),
        ("cu_seq_lens_k", "pass position_ids, from which transformers makes a block mask"),
        ("head_mask", "no head can be masked"),
    ):
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"gqa_jax attention does not support `{name}`: {instead}")


def _may_pad(*tensors: Tensor) -> bool:
    """Training has fixed shapes, and a compiler sees only the ones it is given: only eager inference pads."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


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
    query, key, value, *, mask=None, bias=None, sinks=None, dropout_seed=None, dropout_rate=0.0, scale=None,
    is_causal=False, sliding_window=None, logits_soft_cap=None, head_major=False,
):  # fmt: skip
    if head_major:
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return pallas_kernels.gqa_attention(
        query, key, value, mask=mask, bias=bias, sinks=sinks, dropout_key=dropout_key(dropout_seed),
        dropout_rate=dropout_rate, scale=scale, is_causal=is_causal, sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
    )  # fmt: skip


_attention = wrap(
    _jax_attention,
    name="huggingface_attention",
    static_argnames=(
        "dropout_rate", "scale", "is_causal", "sliding_window", "logits_soft_cap", "head_major",
    ),
)  # fmt: skip


# Gated delta rule --------------------------------------------------------------------------------------------------


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What Qwen3-Next and Qwen3.5 call over sequences; key heads may be repeated by the caller or not.

    Args:
      chunk_size: of transformers' own algorithm; our result does not depend on it and our operator picks its own.
      cu_seqlens: `[num_sequences + 1]` offsets of sequences packed in one row.
      **kwargs: what transformers hands through every layer; nothing in it concerns the delta rule.

    Raises:
      NotImplementedError: states of packed sequences.
      ValueError: `cu_seqlens` with more than one row.
    """
    del chunk_size, kwargs
    length = query.shape[1]
    segment_ids = None
    if cu_seqlens is not None:
        segment_ids = _segments(cu_seqlens, query, initial_state, output_final_state)
    if length > 1 and _may_pad(query, key, value, g, beta):
        padded = bucket_length(length)  # g = 0 and beta = 0 on the pads leave the state as it is
        query, key, value, g, beta = (
            pad_to(x, padded, dim=1) for x in (query, key, value, g, beta)
        )
        if segment_ids is not None and padded > length:
            segment_ids = torch.cat(
                (segment_ids, segment_ids[:, -1:].expand(-1, padded - length)), 1
            )
    if initial_state is not None and length == 1:
        out, state = gated_delta_rule_step(
            query, key, value, g, beta, initial_state, use_qk_l2norm=use_qk_l2norm_in_kernel
        )
    else:
        out, state = gated_delta_rule(
            query, key, value, g, beta, initial_state=initial_state, segment_ids=segment_ids,
            use_qk_l2norm=use_qk_l2norm_in_kernel,
        )  # fmt: skip
    return out[:, :length], state if output_final_state else None


def _segments(
    cu_seqlens: Tensor, query: Tensor, initial_state: Tensor | None, output_final_state: bool
) -> Tensor:
    if initial_state is not None or output_final_state:
        raise NotImplementedError(
            "gqa_jax has no states of packed sequences here: use interop.gated_delta_rule, or one sequence per row"
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"`query` must have one row when `cu_seqlens` is given, got {query.shape[0]}"
        )
    tokens = torch.arange(query.shape[1], dtype=cu_seqlens.dtype, device=query.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)[None]


def recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options
) -> tuple[Tensor, Tensor | None]:
    """What Qwen3-Next and Qwen3.5 call while they decode; arguments as for `chunk_gated_delta_rule`."""
    return chunk_gated_delta_rule(query, key, value, g, beta, **options)


class GatedDeltaPatch:
    """Our gated delta rule in the modelling files of transformers, until `undo()` or the end of a `with` block."""

    def __init__(self, files: list):
        self._files = files
        self._active = True

    def undo(self) -> None:
        """Puts back what was there once nobody else patches the same file; a second call does nothing."""
        if self._active:
            self._active = False
            _release(self._files)

    def __enter__(self) -> "GatedDeltaPatch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


_originals: dict[
    str, tuple[int, dict[str, Callable]]
] = {}  # file -> (patches in force, what was there)
_originals_lock = threading.Lock()


def patch_gated_delta(model: torch.nn.Module) -> GatedDeltaPatch:
    """Lets the Gated DeltaNet layers of a transformers model call our gated delta rule.

    The layers call functions of their modelling file, so every model of the same family in this process is patched.
    Use it in a `with` block, or keep it for good by not undoing it.

    Args:
      model: a Qwen3-Next or Qwen3.5 model, or one of their layers.

    Raises:
      ValueError: no module of the model calls a gated delta rule that we know.

    Example:
      >>> with interop.huggingface.patch_gated_delta(model):  # doctest: +SKIP
      ...     model.generate(ids)
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    found = sorted(
        (f for f in files if hasattr(f, _CHUNKED) and hasattr(f, _RECURRENT)),
        key=lambda f: f.__name__,
    )
    if not found:
        raise ValueError(
            f"`model` must have Gated DeltaNet layers whose file defines {_CHUNKED} and {_RECURRENT} (transformers "
            f"5.17 or newer), got {type(model).__name__}"
        )
    ours = {_CHUNKED: chunk_gated_delta_rule, _RECURRENT: recurrent_gated_delta_rule}
    with _originals_lock:
        for file in found:
            count, original = _originals.get(file.__name__, (0, {}))
            if count == 0:
                original = {name: getattr(file, name) for name in ours}
                for name, function in ours.items():
                    setattr(file, name, function)
            _originals[file.__name__] = (count + 1, original)
    return GatedDeltaPatch(found)


def _release(files: list) -> None:
    with _originals_lock:
        for file in files:
            count, original = _originals.pop(file.__name__)
            if count > 1:
                _originals[file.__name__] = (count - 1, original)
                continue
            for name, function in original.items():
                setattr(file, name, function)
