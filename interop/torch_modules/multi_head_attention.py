"""torchtune's `MultiHeadAttention`, `KVCache` and contexts of caches, same arguments and errors, over our attention.

Two differences: without a mask a cache is read causally, as torchtune's documentation promises (its code then shows
every query all slots, also those that nothing was written to), and the error for a dropout rate prints that rate.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interop.autocast import autocast
from interop.operators import attention

_log = logging.getLogger(__name__)


class KVCache(nn.Module):
    """Keys and values `[B, G, S, D]` in buffers that are not saved; `update` appends.

    Attributes:
      k_cache, v_cache: `[B, G, S, D]`, zero where nothing was written.
      cache_pos: `[S]`, the slots that the next tokens go to.
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_pos: Tensor

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("cache_pos", torch.arange(max_seq_len), persistent=False)
        self.batch_size = batch_size

    @property
    def size(self) -> int:
        """Tokens held."""
        return int(self.cache_pos[0].item())

    def reset(self) -> None:
        """Forgets all tokens."""
        self.k_cache.zero_()
        self.v_cache.zero_()
        self.cache_pos -= self.cache_pos[0].clone()

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `[B, G, T, D]` behind what is there; returns the whole buffers.

        Raises:
          ValueError: more rows than the cache has.
          AssertionError: more tokens than it has room for.
        """
        rows, _, length, _ = k_val.shape
        if rows > self.k_cache.shape[0]:
            raise ValueError(
                f"The current cache has been setup with a batch size of {self.k_cache.shape[0]}, but found new key "
                f"tensors with batch size {rows}!"
            )
        fits = self.cache_pos[0] + length <= self.k_cache.shape[2]
        if torch.compiler.is_compiling():  # a message that reads a tensor would break the graph
            torch.ops.aten._assert_async.msg(fits, "the tokens exceed the cache's `max_seq_len`")
        else:
            assert fits, (
                f"{self.size} tokens and {length} more exceed the cache's {self.k_cache.shape[2]}"
            )
        slots = self.cache_pos[:length]
        self.k_cache[:rows, :, slots] = k_val
        self.v_cache[:rows, :, slots] = v_val
        self.cache_pos.add_(length)
        return self.k_cache, self.v_cache


class MultiHeadAttention(nn.Module):
    """Drop-in for `torchtune.modules.MultiHeadAttention`: injected projections, rotary embedding, norms and cache.

    Arguments are torchtune's, keyword-only: `embed_dim`, `num_heads`, `num_kv_heads`, `head_dim`, `q_proj`, `k_proj`,
    `v_proj`, `output_proj`, `pos_embeddings`, `q_norm`, `k_norm`, `kv_cache`, `max_seq_len`, `is_causal`,
    `attn_dropout`. The rotary embedding comes before the norms.

    Raises:
      ValueError: `num_heads` not a multiple of `num_kv_heads`, `embed_dim` not of `num_heads`, a dropout rate
        outside [0, 1], one norm without the other.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        pos_embeddings: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        kv_cache: KVCache | None = None,
        max_seq_len: int = 4096,
        is_causal: bool = True,
        attn_dropout: float = 0.0,
    ):
        super().__init__()
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})"
            )
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads})"
            )
        if attn_dropout < 0 or attn_dropout > 1:
            raise ValueError(f"attn_dropout ({attn_dropout}) must be between 0.0 and 1.0")
        if bool(q_norm) ^ bool(k_norm):
            raise ValueError("q and k norm must be set together")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.attn_dropout, self.max_seq_len, self.is_causal = attn_dropout, max_seq_len, is_causal
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj
        self.output_proj = output_proj
        self.q_norm, self.k_norm, self.pos_embeddings = q_norm, k_norm, pos_embeddings
        self.kv_cache = kv_cache
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Makes a cache and enables it; if there is one already, warns and leaves everything as it is."""
        if self.kv_cache is not None:
            _log.warning(
                "Key value caches are already setup. You cannot call ``setup_caches()`` twice. Skipping."
            )
            return
        device = next(iter(self.parameters()), torch.empty(0)).device
        self.kv_cache = KVCache(
            batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype
        ).to(device)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empties the cache.

        Raises:
          RuntimeError: there is none.
        """
        if self.kv_cache is None:
            raise RuntimeError("Key value caches are not setup. Call ``setup_caches()`` first.")
        self.kv_cache.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attends from x to y (`y=x` is self-attention; None reads the cache alone).

        Args:
          x: `[B, T, embed_dim]`.
          y: `[B, S, embed_dim]`.
          mask: `[B, T, S]`, or `[B, T, max_seq_len]` with an enabled cache: boolean, True where a query (row) may
            attend, or floating, added to the logits. None means causal if `is_causal`, else everything; with an
            enabled cache, of what was written: x follows what was there before (or, where y is None, is the last of
            it).
          input_pos: `[B, T]` or `[T]`, handed to the rotary embedding.

        Returns:
          `[B, T, embed_dim]`.

        Raises:
          ValueError: no y and no enabled cache, or a mask that is no boolean or floating tensor of three axes.
        """
        _check_mask(mask)
        batch, length, _ = x.shape
        query = self._rotate(self.q_proj(x).view(batch, length, self.num_heads, -1), input_pos)
        query = _normed(query, self.q_norm)
        cache = self.kv_cache if self.cache_enabled else None
        if y is None:
            if cache is None:
                raise ValueError(
                    "Must provide y input or use kv_cache to enable streaming decoding"
                )
            key, value = (
                cache.k_cache[:batch].transpose(1, 2),
                cache.v_cache[:batch].transpose(1, 2),
            )
        else:
            groups = (y.shape[0], y.shape[1], self.num_kv_heads, -1)
            key = _normed(self._rotate(self.k_proj(y).view(groups), input_pos), self.k_norm)
            value = self.v_proj(y).view(groups)
            if cache is not None:
                key, value = cache.update(key.transpose(1, 2), value.transpose(1, 2))
                key, value = key[:batch].transpose(1, 2), value[:batch].transpose(1, 2)
        if mask is None and cache is not None:
            before = length if y is None else y.shape[1]
            mask = _visible(cache, length, before=before, is_causal=self.is_causal)[None]
        boolean = mask is None or mask.dtype == torch.bool
        heads = None if mask is None else mask[:, None]
        query, key, value = autocast(query, key.to(query.dtype), value.to(query.dtype))
        rate = self.attn_dropout if self.training else 0.0
        out = attention(
            query,
            key,
            value,
            mask=heads if boolean else None,
            bias=None if boolean else heads,
            is_causal=mask is None and self.is_causal,
            dropout_rate=rate if rate < 1.0 else 0.0,
        )
        if rate == 1.0:  # nothing is left
            out = nn.functional.dropout(out, 1.0)
        return self.output_proj(out.reshape(batch, length, -1))

    def _rotate(self, heads: Tensor, input_pos: Tensor | None) -> Tensor:
        if self.pos_embeddings is None:
            return heads
        return self.pos_embeddings(heads, input_pos=input_pos)


def _normed(heads: Tensor, norm: Callable | None) -> Tensor:
    """torchtune hands its norms `[B, N, T, D]`."""
    return heads if norm is None else norm(heads.transpose(1, 2)).transpose(1, 2)


def _check_mask(mask: Any) -> None:
    if mask is None:
        return
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 3
        or not (mask.dtype == torch.bool or mask.is_floating_point())
    ):
        raise ValueError(
            "mask must be a boolean or floating tensor [B, T, S], got "
            f"{getattr(mask, 'dtype', type(mask).__name__)} {tuple(getattr(mask, 'shape', ()))}"
        )


def _visible(cache: KVCache, length: int, *, before: int, is_causal: bool) -> Tensor:
    """`[T, max_seq_len]`: slots that were written and, if causal, are not later than the query.

    The first of the T queries stands `before` slots ahead of the next one to be written.
    """
    end = cache.cache_pos[0]
    slots = torch.arange(cache.k_cache.shape[2], device=end.device)
    written = (slots < end).expand(length, -1)
    if not is_causal:
        return written
    queries = end - before + torch.arange(length, device=end.device)
    return written & (slots <= queries[:, None])


# Contexts ----------------------------------------------------------------------------------------------------------


def _cached_layers(model: nn.Module) -> list[Any]:
    """Layers of the model that have a cache: ours, and torchtune's own."""
    return [m for m in model.modules() if isinstance(getattr(m, "kv_cache", None), nn.Module)]


def _check_caches(model: nn.Module, wanted: bool, name: str) -> None:
    if bool(_cached_layers(model)) != wanted:
        rule = "must have caches: set them up first" if wanted else "must not have caches already"
        raise ValueError(f"`model` {rule}, before {name}")


@contextlib.contextmanager
def disable_kv_cache(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no caches; afterwards they go on where they stood.

    Raises:
      ValueError: no layer has a cache.
    """
    _check_caches(model, True, "disable_kv_cache")
    states = [(layer, layer.cache_enabled) for layer in _cached_layers(model)]
    if not any(enabled for _, enabled in states):
        _log.warning("The caches are disabled already.")
    for layer, _ in states:
        layer.cache_enabled = False
    try:
        yield
    finally:
        for layer, enabled in states:
            layer.cache_enabled = enabled


@contextlib.contextmanager
def local_kv_cache(
    model: nn.Module,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    encoder_max_seq_len: int | None = None,
    decoder_max_seq_len: int | None = None,
) -> Iterator[None]:
    """Inside, the model has enabled caches; afterwards none.

    A model with a `setup_caches` of torchtune's signature makes them itself; in any other each of our layers gets one
    of `decoder_max_seq_len` tokens.

    Args:
      model: with layers of ours, or a decoder of torchtune's.
      batch_size, dtype: as for `MultiHeadAttention.setup_cache`.
      device: where the caches are.
      encoder_max_seq_len, decoder_max_seq_len: tokens; the first is for `setup_caches` alone.

    Raises:
      ValueError: a layer has a cache already, or a length that the model needs or cannot use.
    """
    _check_caches(model, False, "local_kv_cache")
    setup = getattr(model, "setup_caches", None)
    if setup is None and (decoder_max_seq_len is None or encoder_max_seq_len is not None):
        raise ValueError(
            "a model without `setup_caches` must be given `decoder_max_seq_len` and no `encoder_max_seq_len`, got "
            f"{decoder_max_seq_len} and {encoder_max_seq_len}"
        )
    with torch.device(device):
        if setup is not None:
            lengths = dict(
                encoder_max_seq_len=encoder_max_seq_len, decoder_max_seq_len=decoder_max_seq_len
            )
            setup(batch_size, dtype, **lengths)
        elif decoder_max_seq_len is not None:
            for layer in model.modules():
                if isinstance(layer, MultiHeadAttention):
                    layer.setup_cache(batch_size, dtype, decoder_max_seq_len)
    try:
        yield
    finally:
        delete_kv_caches(model)


def delete_kv_caches(model: nn.Module) -> None:
    """Removes the caches of all layers.

    Raises:
      ValueError: no layer has one.
    """
    _check_caches(model, True, "delete_kv_caches")
    for layer in _cached_layers(model):
        layer.kv_cache, layer.cache_enabled = None, False
