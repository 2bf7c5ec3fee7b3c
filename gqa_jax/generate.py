"""Text generation: prefill, then a decode loop inside one `jit`, with the cache donated throughout.

Both jitted functions take the decoder as `nnx.split` gives it, because the default `nnx.jit` copies every parameter
that is not donated on every call.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax import tensor_parallel
from gqa_jax.cache import Policy
from gqa_jax.decoder import Decoder, DecoderCache
from gqa_jax.sampling import Sampling, make_sampling, sample
from gqa_jax.sharding import MeshAxes

Prompts = Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: `[B, max_new_tokens]` int32, the new tokens only, then `pad_token`.
      lengths: `[B]` int32, how many there are; a stop token counts.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]

    def to_lists(self) -> list[list[int]]:
        """The new tokens of each row, without padding."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


class StreamStep(NamedTuple):
    """What `stream` yields.

    Attributes:
      tokens: `[B]` int32, the newest token of each row; `pad_token` where the row had ended before.
      active: `[B]` bool, rows for which this token counts.
    """

    tokens: np.ndarray
    active: np.ndarray


class _Progress(NamedTuple):
    """The decode loop's own state: `active` rows still generate, `step` tokens are done."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    active: Bool[Array, "B"]
    step: Int[Array, ""]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampling", "stop_tokens", "pad_token", "key"],
    meta_fields=["axes"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rules:
    """What stays the same from token to token; `axes` are the decoder's."""

    sampling: Sampling
    stop_tokens: Int[Array, "n"]
    pad_token: Int[Array, ""]
    key: Array | None
    axes: MeshAxes | None


def generate(
    decoder: Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    prompt_lengths: Int[Array, "B"] | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    pad_token: int = 0,
    cache_dtype=None,
    cache_policy: Policy = "full",
) -> Generation:
    """Continues each prompt.

    Args:
      decoder: any `Decoder`; one with `axes` runs on the mesh of `jax.set_mesh`, and every device has the tokens.
      prompts: lists of token ids of any lengths >= 1, or one integer array `[B, T]`.
      max_new_tokens: upper limit per row.
      prompt_lengths: `[B]`, real tokens of each row of a right-padded array; None means all.
      temperature: 0 takes the most likely token; otherwise it divides the logits.
      top_k, top_p: filters, see `sampling.make_sampling`.
      stop_tokens: ids that end a row (and are its last token).
      key: `jax.random` key, needed (and used) when `temperature` is positive; the draw of token i depends on it and
        on i only.
      max_length: capacity of the cache, at least the longest prompt and the new tokens; None means just that. Fix
        it, and calls with other prompts do not recompile the decode loop.
      prefill_chunk: prompts enter the cache in pieces of so many tokens; bounds the memory of prefill, and its
        compilations: prompts of any length share one. None means one piece.
      pad_token: fills `tokens` behind a row's end.
      cache_dtype, cache_policy: see `Decoder.init_cache`.

    Returns:
      `Generation(tokens, lengths)`.

    Raises:
      TypeError, ValueError: naming the argument.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gqa_jax import AttentionConfig, Decoder, DecoderConfig
      >>> attention = AttentionConfig(model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
      >>> config = DecoderConfig(
      ...     vocab_size=32, model_dim=16, layers=("full_attention",), attention=attention, intermediate_size=24
      ... )
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> generate(decoder, [[1, 2, 3], [4]], max_new_tokens=5).tokens.shape
      (2, 5)
    """
    graphdef, params, cache, logits, rules = _start(
        decoder, prompts, prompt_lengths, max_new_tokens, temperature, top_k, top_p, stop_tokens,
        key, max_length, prefill_chunk, pad_token, cache_dtype, cache_policy,
    )  # fmt: skip
    progress, _ = _decode(graphdef, params, cache, logits, rules, max_new_tokens=max_new_tokens)
    return Generation(progress.tokens, progress.lengths)


def stream(
    decoder: Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    prompt_lengths: Int[Array, "B"] | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    pad_token: int = 0,
    cache_dtype=None,
    cache_policy: Policy = "full",
) -> Iterator[StreamStep]:
    """As `generate`, one token of every row at a time; the same tokens. Arguments are checked on the call.

    Yields:
      `StreamStep(tokens, active)`, until every row has ended or has `max_new_tokens`.
    """
    graphdef, params, cache, logits, rules = _start(
        decoder, prompts, prompt_lengths, max_new_tokens, temperature, top_k, top_p, stop_tokens,
        key, max_length, prefill_chunk, pad_token, cache_dtype, cache_policy,
    )  # fmt: skip

    def steps(cache: DecoderCache) -> Iterator[StreamStep]:
        was_active = np.ones((logits.shape[0],), bool)
        progress = _first(logits, rules, max_new_tokens=max_new_tokens)
        for i in range(max_new_tokens):
            yield StreamStep(np.asarray(progress.tokens[:, i]), was_active)
            was_active = np.asarray(progress.active)
            if i + 1 == max_new_tokens or not was_active.any():
                return
            progress, cache = _advance(graphdef, params, cache, progress, rules)

    return steps(cache)


def _start(
    decoder, prompts, prompt_lengths, max_new_tokens, temperature, top_k, top_p, stop_tokens, key,
    max_length, prefill_chunk, pad_token, cache_dtype, cache_policy,
):  # fmt: skip
    """Checks everything, fills the cache, and returns what the loop needs."""
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive int, got {value!r}")
    vocab_size = decoder.config.vocab_size
    outside = [token for token in stop_tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"`stop_tokens` must lie in [0, vocab_size={vocab_size}), got {outside[0]}"
        )
    sampling = make_sampling(temperature, top_k=top_k, top_p=top_p)
    if sampling.temperature is not None and key is None:
        raise ValueError(f"`key` must be given when `temperature={temperature}`, got None")
    if top_k is not None and top_k > vocab_size:
        raise ValueError(f"`top_k` must be at most vocab_size={vocab_size}, got {top_k}")
    tokens, lengths = _pad_prompts(prompts, prompt_lengths, vocab_size)
    if decoder.axes is not None:
        tensor_parallel.check_rows(tokens, decoder.axes.without_seq, decoder, name="prompts")
    longest = tokens.shape[1]
    needed = longest + max_new_tokens
    if max_length is not None and max_length < needed:
        raise ValueError(
            f"`max_length` must hold the longest prompt and `max_new_tokens`, {longest} + {max_new_tokens}, "
            f"got {max_length}"
        )
    chunk = prefill_chunk or longest
    capacity = max(max_length or needed, chunk)  # a chunk must fit, even where it is mostly padding
    graphdef, params = nnx.split(decoder)
    capacity = tensor_parallel.divisible_capacity(capacity, decoder.axes)
    sizes = dict(batch=len(lengths), capacity=capacity, dtype=cache_dtype, policy=cache_policy)
    cache = _empty_cache(graphdef, params, **sizes)
    logits = jnp.zeros((), jnp.float32)
    for start in range(0, longest, chunk):
        piece = tokens[:, start : start + chunk]
        piece = np.pad(piece, ((0, 0), (0, chunk - piece.shape[1])))
        real = np.clip(lengths - start, 0, chunk).astype(np.int32)
        newest, cache = _prefill(graphdef, params, cache, jnp.asarray(piece), jnp.asarray(real))
        logits = newest if start == 0 else jnp.where((real > 0)[:, None], newest, logits)
    rules = _Rules(
        sampling=sampling,
        stop_tokens=jnp.asarray(list(stop_tokens), jnp.int32),
        pad_token=jnp.asarray(pad_token, jnp.int32),
        key=None if sampling.temperature is None else key,
        axes=decoder.axes,
    )
    return graphdef, params, cache, logits, rules


def _pad_prompts(prompts, prompt_lengths, vocab_size) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one right-padded int32 array `[B, longest]` and their lengths."""
    if hasattr(prompts, "shape"):
        tokens = np.asarray(prompts)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"`prompts` must have shape [B, T], B and T >= 1, got {tokens.shape}")
        lengths = np.full((tokens.shape[0],), tokens.shape[1], np.int64)
        if prompt_lengths is not None:
            lengths = np.asarray(prompt_lengths)
            if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
                raise ValueError(
                    f"`prompt_lengths` must be integers of shape [B={tokens.shape[0]}], got {lengths.dtype} "
                    f"of shape {lengths.shape}"
                )
            if (lengths < 1).any() or (lengths > tokens.shape[1]).any():
                raise ValueError(
                    f"`prompt_lengths` must lie in [1, T={tokens.shape[1]}], got {lengths.tolist()}"
                )
    else:
        if prompt_lengths is not None:
            raise ValueError(
                "`prompt_lengths` must be None for prompts given as lists, which have their own"
            )
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int64)
        if lengths.size == 0 or (lengths < 1).any():
            raise ValueError(
                f"`prompts` must hold at least one prompt of at least one token, got lengths {lengths.tolist()}"
            )
        longest = int(lengths.max())
        rows = [np.asarray(prompt) for prompt in prompts]
        tokens = np.stack([np.pad(row, (0, longest - row.size)) for row in rows])
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"`prompts` must hold integers, got {tokens.dtype}")
    tokens = tokens[:, : lengths.max()]
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(f"`prompts` must lie in [0, vocab_size={vocab_size}), got {outside[0]}")
    return tokens.astype(np.int32), lengths


@functools.partial(jax.jit, static_argnames=("graphdef", "batch", "capacity", "dtype", "policy"))
def _empty_cache(graphdef, params, *, batch, capacity, dtype, policy) -> DecoderCache:
    """Allocated where it belongs: on a mesh no device ever holds it whole."""
    decoder = nnx.merge(graphdef, params)
    cache = decoder.init_cache(batch, capacity, dtype=dtype, policy=policy)
    return cache if decoder.axes is None else tensor_parallel.shard_cache(cache, decoder)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def _prefill(graphdef, params, cache, tokens, lengths) -> tuple[Array, DecoderCache]:
    """Logits `[B, V]` of each row's last token, and the cache."""
    decoder = nnx.merge(graphdef, params)
    logits, cache = decoder.step(tokens, cache, lengths=lengths, last_only=True)
    return logits[:, 0], cache


def _record(progress: _Progress, logits: Float[Array, "B V"], rules: _Rules) -> _Progress:
    """Draws the next token of every row that still generates; on a mesh every device knows them all."""
    return tensor_parallel.on_every_device(_draw, progress, logits, rules, axes=rules.axes)


def _draw(progress: _Progress, logits: Float[Array, "B V"], rules: _Rules) -> _Progress:
    key = None if rules.key is None else jax.random.fold_in(rules.key, progress.step)
    token = sample(logits, sampling=rules.sampling, key=key)
    token = jnp.where(progress.active, token, rules.pad_token)
    stopped = (token[:, None] == rules.stop_tokens[None, :]).any(axis=1)
    return _Progress(
        tokens=jax.lax.dynamic_update_index_in_dim(progress.tokens, token, progress.step, axis=1),
        lengths=progress.lengths + progress.active.astype(jnp.int32),
        active=progress.active & ~stopped,
        step=progress.step + 1,
    )


def _next(graphdef, params, cache, progress, rules) -> tuple[_Progress, DecoderCache]:
    """Feeds the newest token of every row that still generates, and draws the one after it."""
    decoder = nnx.merge(graphdef, params)
    newest = jax.lax.dynamic_slice_in_dim(progress.tokens, progress.step - 1, 1, axis=1)
    logits, cache = decoder.step(newest, cache, lengths=progress.active.astype(jnp.int32))
    return _record(progress, logits[:, 0], rules), cache


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def _first(logits: Float[Array, "B V"], rules: _Rules, *, max_new_tokens: int) -> _Progress:
    batch = logits.shape[0]
    empty = _Progress(
        tokens=jnp.full((batch, max_new_tokens), rules.pad_token, jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        active=jnp.ones((batch,), jnp.bool_),
        step=jnp.zeros((), jnp.int32),
    )
    return _record(empty, logits, rules)


_advance = jax.jit(_next, static_argnames=("graphdef",), donate_argnames=("cache", "progress"))


@functools.partial(
    jax.jit, static_argnames=("graphdef", "max_new_tokens"), donate_argnames=("cache",)
)
def _decode(
    graphdef, params, cache, logits, rules, *, max_new_tokens
) -> tuple[_Progress, DecoderCache]:
    """All tokens after the prefill; the cache comes back so that its donated buffers have an owner."""

    def more(carry):
        progress, _ = carry
        return (progress.step < max_new_tokens) & progress.active.any()

    def body(carry):
        progress, cache = carry
        return _next(graphdef, params, cache, progress, rules)

    progress = _first(logits, rules, max_new_tokens=max_new_tokens)
    progress, cache = jax.lax.while_loop(more, body, (progress, cache))
    # The compiler chooses the layout of a loop's carry by itself; every device shall have the tokens whole.
    return tensor_parallel.on_every_device(lambda x: x, progress, axes=rules.axes), cache
