"""Our gated delta rule inside transformers' Gated DeltaNet layers."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pallas_kernels
from interop.autocast import autocast
from interop.bucketing import bucket_length, pad_to
from interop.huggingface.arguments import (
    documents,
    ids_of_offsets,
    ids_of_positions,
    may_pad,
    refuse_unknown,
)
from interop.operators import gated_delta_rule, gated_delta_rule_step
from interop.torch_function import wrap

_CHUNKED, _RECURRENT = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
_CONVOLUTION = "causal_conv1d_fn"


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
    seq_idx: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What Qwen3-Next and Qwen3.5 call over sequences; key heads may be repeated by the caller or not.

    Args:
      chunk_size: of transformers' own algorithm; our result does not depend on it and our operator picks its own.
      cu_seqlens: `[num_sequences + 1]` offsets of sequences packed in one row.
      seq_idx: `[B, T]`, the same by ids; negative ids are padding.
      **kwargs: what transformers hands through every layer and does not concern the delta rule.

    Raises:
      NotImplementedError: states of packed sequences, or an argument that we do not know.
      ValueError: `cu_seqlens` with more than one row.
    """
    del chunk_size
    refuse_unknown("gated delta rule", kwargs, {})
    length, dtype = query.shape[1], query.dtype
    ids = seq_idx if cu_seqlens is None else ids_of_offsets("cu_seqlens", cu_seqlens, query)
    if ids is not None and (initial_state is not None or output_final_state):
        raise NotImplementedError(
            "gqa_jax has no states of packed sequences here: use use_cache=False, interop.gated_delta_rule, or one "
            "sequence per row"
        )
    if not query.dtype == key.dtype == value.dtype:
        query, key, value = query.float(), key.float(), value.float()
    if length > 1 and may_pad(query, key, value, g, beta):
        padded = bucket_length(length)  # g = 0 and beta = 0 on the pads leave the state as it is
        query, key, value, g, beta = (
            pad_to(x, padded, dim=1) for x in (query, key, value, g, beta)
        )
        ids = None if ids is None else pad_to(ids, padded, dim=1, value=-1)
    if initial_state is not None and length == 1:
        out, state = gated_delta_rule_step(
            query, key, value, g, beta, initial_state, use_qk_l2norm=use_qk_l2norm_in_kernel
        )
    else:
        out, state = gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            segment_ids=ids,
            use_qk_l2norm=use_qk_l2norm_in_kernel,
        )
    return out[:, :length].to(dtype), state if output_final_state else None


def recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options
) -> tuple[Tensor, Tensor | None]:
    """What Qwen3-Next and Qwen3.5 call while they decode; arguments as for `chunk_gated_delta_rule`."""
    return chunk_gated_delta_rule(query, key, value, g, beta, **options)


def causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs,
) -> Tensor:
    """The convolution before the gated delta rule, over rows that hold several documents.

    Args:
      hidden_states: `[B, F, T]`.
      weight, bias: `[F, W]` and `[F]`.
      activation: of transformers' names.
      **kwargs: `seq_idx` `[B, T]` or `cu_seq_lens_q` name the documents; the rest as for `chunk_gated_delta_rule`.

    Raises:
      NotImplementedError, ValueError: as for `chunk_gated_delta_rule`.
    """
    from transformers.activations import ACT2FN

    refuse_unknown("causal convolution", kwargs, {})
    dtype, length = hidden_states.dtype, hidden_states.shape[2]
    x = hidden_states.to(weight.dtype).transpose(1, 2)
    ids = documents(kwargs, x)
    if ids is None:
        ids = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
    x, weight, bias = autocast(x, weight, bias)
    if may_pad(x, weight):
        padded = bucket_length(length)
        x, ids = pad_to(x, padded, dim=1), pad_to(ids, padded, dim=1, value=-1)
    out = _conv(x, weight, ids.to(torch.int32), bias=bias, silu=activation in ("silu", "swish"))
    out = out[:, :length].transpose(1, 2)
    if activation not in (None, "silu", "swish"):
        out = ACT2FN[activation](out)
    return out.to(dtype)


def _jax_conv(x, weight, segment_ids, *, bias=None, silu=False):
    return pallas_kernels.causal_conv1d(
        x, weight.T, bias=bias, activation="silu" if silu else None, segment_ids=segment_ids
    ).out


_conv = wrap(_jax_conv, name="huggingface_causal_conv1d", static_argnames=("silu",), warn_after=128)


# What a modelling file is given ------------------------------------------------------------------------------------


def _packed_conv(original: Callable) -> Callable:
    """The file's convolution, and ours where documents are packed."""

    @functools.wraps(original)
    def convolve(hidden_states, weight, bias=None, activation=None, **kwargs):
        packed = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q"))
        run = causal_conv1d if packed else original
        return run(hidden_states, weight, bias, activation=activation, **kwargs)

    return convolve


def _decoder_layer(original: Callable) -> Callable:
    """A decoder layer's `forward` that tells its Gated DeltaNet which documents `position_ids` means."""

    @functools.wraps(original)
    def forward(self, hidden_states, *args, **kwargs):
        named = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q"))
        cached = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        looks = not (
            cached and torch.compiler.is_compiling()
        )  # with a cache they are refused, if they are seen
        if (
            hasattr(self, "linear_attn")
            and not named
            and looks
            and kwargs.get("attention_mask") is None
        ):
            batch, length = hidden_states.shape[:2]
            kwargs["seq_idx"] = ids_of_positions(kwargs.get("position_ids"), batch, length)
        return original(self, hidden_states, *args, **kwargs)

    return forward


def _mixer(original: Callable) -> Callable:
    """A Gated DeltaNet's `forward` to which padding, wherever it is, is as if it were not there.

    The original is right where padding comes first: it runs on rows in that order.
    """

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        cache = kwargs.pop("cache", cache_params)
        ids = documents(kwargs, hidden_states)
        if ids is not None:
            kwargs |= dict(seq_idx=ids, cu_seq_lens_q=None, cu_seq_lens_k=None)
        if attention_mask is None:
            return original(self, hidden_states, cache, attention_mask, **kwargs)
        real = attention_mask != 0
        _check_continuation(self, cache, real)
        order = torch.argsort(real.to(torch.int32), dim=1, stable=True)
        if ids is not None:
            kwargs["seq_idx"] = ids.masked_fill(~real, -1).gather(1, order)
        tokens = order[..., None].expand(hidden_states.shape)
        out = original(
            self, hidden_states.gather(1, tokens), cache, real.gather(1, order), **kwargs
        )
        return torch.zeros_like(out).scatter(1, tokens, out)

    return forward


def _check_continuation(layer: torch.nn.Module, cache: Any, real: Tensor) -> None:
    if cache is None or torch.compiler.is_compiling() or bool(real.all()):
        return
    if cache.has_previous_state(layer.layer_idx):
        raise NotImplementedError(
            "gqa_jax does not support `attention_mask` with padding among tokens that continue a cache: give each row "
            "the same number of new tokens"
        )


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


_Change = tuple[Any, str, Callable, Callable]  # owner, attribute, what was there, what is there now
_originals: dict[
    str, tuple[int, list[_Change]]
] = {}  # file -> (patches in force, what they changed)
_originals_lock = threading.Lock()


def patch_gated_delta(model: torch.nn.Module) -> GatedDeltaPatch:
    """Lets the Gated DeltaNet layers of a transformers model call our gated delta rule.

    The layers call functions of their modelling file, so every model of the same family in this process is patched.
    Use it in a `with` block, or keep it for good by not undoing it. Patched layers also keep packed documents and
    padding apart, which transformers' own do not (a module whose `forward` was replaced before, as by accelerate's
    hooks, does so for `cu_seq_lens_q` and `seq_idx` alone).

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
        (f for f in files if all(hasattr(f, x) for x in (_CHUNKED, _RECURRENT, _CONVOLUTION))),
        key=lambda f: f.__name__,
    )
    if not found:
        raise ValueError(
            f"`model` must have Gated DeltaNet layers whose file defines {_CHUNKED}, {_RECURRENT} and {_CONVOLUTION} "
            f"(transformers 5.17 or newer), got {type(model).__name__}"
        )
    with _originals_lock:
        for file in found:
            count, changes = _originals.get(file.__name__, (0, []))
            if count == 0:
                changes = _changes(file)
                for owner, name, _, replacement in changes:
                    setattr(owner, name, replacement)
            _originals[file.__name__] = (count + 1, changes)
    return GatedDeltaPatch(found)


def _changes(file: Any) -> list[_Change]:
    """Functions of a modelling file, and `forward` of its Gated DeltaNet and of the decoder layers that hold one."""
    replacement = {
        _CHUNKED: chunk_gated_delta_rule,
        _RECURRENT: recurrent_gated_delta_rule,
        _CONVOLUTION: _packed_conv(getattr(file, _CONVOLUTION)),
    }
    changes: list[_Change] = [
        (file, name, getattr(file, name), replacement[name]) for name in replacement
    ]
    for layer in vars(file).values():
        if not (inspect.isclass(layer) and issubclass(layer, torch.nn.Module)):
            continue
        forward = vars(layer).get("forward")
        if forward is None:
            continue
        names = inspect.unwrap(forward).__code__.co_names
        for mark, change in ((_CHUNKED, _mixer), ("linear_attn", _decoder_layer)):
            if mark in names:
                changes.append((layer, "forward", forward, change(forward)))
    return changes


def _release(files: list) -> None:
    with _originals_lock:
        for file in files:
            count, changes = _originals.pop(file.__name__)
            if count > 1:
                _originals[file.__name__] = (count - 1, changes)
                continue
            for owner, name, original, _ in changes:
                setattr(owner, name, original)
