"""Text generation: prefill, then a decode loop inside one `jit`, with the cache donated throughout.

Both jitted functions take the decoder as `nnx.split` gives it, because the default `nnx.jit` copies every parameter
that is not donated on every call.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.cache import Policy
from gqa_jax.config_checks import require
from gqa_jax.models.decoder import Decoder, DecoderCache
from gqa_jax.models.prompts import Prompts, pad_prompts
from gqa_jax.models.sampling import Sampling, as_int, make_sampling, sample
from gqa_jax.parallel import caches
from gqa_jax.parallel.decoder import check_rows
from gqa_jax.parallel.sharding import MeshAxes


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of `generate` besides the decoder and the prompts."""

    max_new_tokens: int
    prompt_lengths: Any = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: int | Iterable[int] | None = None
    key: Array | None = None
    max_length: int | None = None
    prefill_chunk: int | None = None
    pad_token: int | None = None
    cache_dtype: Any = None
    cache_policy: Policy = "full"

    def __post_init__(self):
        for name in ("max_new_tokens", "prefill_chunk", "max_length"):
            value = getattr(self, name)
            if value is not None or name == "max_new_tokens":
                value = as_int(name, value, "a positive int", minimum=1)
                object.__setattr__(self, name, value)
        policies = get_args(Policy)
        require(
            self.cache_policy in policies,
            f"`cache_policy` must be one of {policies}, got {self.cache_policy!r}",
        )
        try:
            floating = jnp.issubdtype(jnp.dtype(self.cache_dtype or float), jnp.floating)
        except TypeError:
            floating = False
        require(
            floating, f"`cache_dtype` must be None or a floating dtype, got {self.cache_dtype!r}"
        )


def generate(
    decoder: Decoder,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    prompt_lengths: Int[Array, "B"] | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Iterable[int] | None = None,
    key: Array | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    pad_token: int | None = None,
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
      stop_tokens: id or ids that end a row (and are its last token); None means those of `decoder.config`, which
        `checkpoint.load_hf` takes from `generation_config.json` and `config.json`; () means none.
      key: `jax.random` key, needed (and used) when `temperature` is positive; the draw of token i depends on it and
        on i only.
      max_length: capacity of the cache, at least the longest prompt and the new tokens; None means just that. Fix
        it, and calls with other prompts do not recompile the decode loop.
      prefill_chunk: prompts enter the cache in pieces of so many tokens; bounds the memory of prefill, and its
        compilations: prompts of any length share one. None means one piece.
      pad_token: fills `tokens` behind a row's end; None means that of `decoder.config`, else its first stop token,
        else 0.
      cache_dtype, cache_policy: see `Decoder.init_cache`.

    The temperature and filters that `generation_config.json` proposes are not applied: nothing is drawn unless you ask.

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
    options = _Options(
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        key=key,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        pad_token=pad_token,
        cache_dtype=cache_dtype,
        cache_policy=cache_policy,
    )
    start = _start(decoder, prompts, options)
    progress, _ = _decode(*start, max_new_tokens=options.max_new_tokens)
    return Generation(progress.tokens, progress.lengths)


def stream(
    decoder: Decoder, prompts: Prompts, max_new_tokens: int, **options: Any
) -> Iterator[StreamStep]:
    """As `generate`, with its options, one token of every row at a time; the same tokens.

    Arguments are checked on the call.

    Yields:
      `StreamStep(tokens, active)`, until every row has ended or has `max_new_tokens`.
    """
    checked = _Options(max_new_tokens=max_new_tokens, **options)
    limit = checked.max_new_tokens
    graphdef, params, cache, logits, rules = _start(decoder, prompts, checked)

    def steps(cache: DecoderCache) -> Iterator[StreamStep]:
        was_active = np.ones((logits.shape[0],), bool)
        progress = _first(logits, rules, max_new_tokens=limit)
        for i in range(limit):
            yield StreamStep(np.asarray(progress.tokens[:, i]), was_active)
            was_active = np.asarray(progress.active)
            if i + 1 == limit or not was_active.any():
                return
            progress, cache = _advance(graphdef, params, cache, progress, rules)

    return steps(cache)


def _start(decoder: Decoder, prompts: Prompts, options: _Options):
    """Checks everything, fills the cache, and returns what the loop needs."""
    if not isinstance(decoder, Decoder):
        raise TypeError(f"`decoder` must be a Decoder, got {type(decoder).__name__}")
    rules = _rules(decoder, options)
    tokens, lengths = pad_prompts(prompts, options.prompt_lengths, decoder.config.vocab_size)
    if decoder.axes is not None:
        check_rows(tokens, decoder.axes.without_seq, None, name="prompts")
    longest = tokens.shape[1]
    needed = longest + options.max_new_tokens
    if options.max_length is not None and options.max_length < needed:
        raise ValueError(
            f"`max_length` must hold the longest prompt and `max_new_tokens`, {longest} + {options.max_new_tokens}, "
            f"got {options.max_length}"
        )
    chunk = options.prefill_chunk or longest
    # A chunk must fit, even where it is mostly padding.
    capacity = max(options.max_length or needed, chunk)
    graphdef, params = nnx.split(decoder)
    cache = _empty_cache(
        graphdef,
        params,
        batch=len(lengths),
        capacity=caches.divisible_capacity(capacity, decoder.axes),
        dtype=options.cache_dtype,
        policy=options.cache_policy,
    )
    logits = jnp.zeros((), jnp.float32)
    for start in range(0, longest, chunk):
        piece = tokens[:, start : start + chunk]
        piece = np.pad(piece, ((0, 0), (0, chunk - piece.shape[1])))
        real = np.clip(lengths - start, 0, chunk).astype(np.int32)
        newest, cache = _prefill(graphdef, params, cache, jnp.asarray(piece), jnp.asarray(real))
        logits = newest if start == 0 else jnp.where((real > 0)[:, None], newest, logits)
    return graphdef, params, cache, logits, rules


def _rules(decoder: Decoder, options: _Options) -> _Rules:
    config = decoder.config
    sampling = make_sampling(options.temperature, top_k=options.top_k, top_p=options.top_p)
    key = None if sampling.temperature is None else options.key
    if sampling.temperature is not None and key is None:
        raise ValueError(f"`key` must be given when `temperature={options.temperature}`, got None")
    if sampling.top_k is not None and sampling.top_k > config.vocab_size:
        raise ValueError(
            f"`top_k` must be at most vocab_size={config.vocab_size}, got {sampling.top_k}"
        )
    stop_tokens, pad_token = _stop_tokens(options.stop_tokens, decoder), options.pad_token
    if pad_token is None:
        pad_token = (*stop_tokens, 0)[0] if config.pad_token is None else config.pad_token
    return _Rules(
        sampling=sampling,
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        pad_token=jnp.asarray(as_int("pad_token", pad_token, "a token id"), jnp.int32),
        key=None if key is None else _checked_key(key),
        axes=decoder.axes,
    )


def _stop_tokens(stop_tokens: Any, decoder: Decoder) -> tuple[int, ...]:
    if stop_tokens is None:
        return decoder.config.stop_tokens
    vocab_size = decoder.config.vocab_size
    alone = np.ndim(stop_tokens) == 0 and not isinstance(stop_tokens, Collection)
    rule = "a token id or a collection of them"
    ids = tuple(as_int("stop_tokens", i, rule) for i in ([stop_tokens] if alone else stop_tokens))
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"`stop_tokens` must lie in [0, vocab_size={vocab_size}), got {outside[0]}"
        )
    return ids


def _checked_key(key: Any) -> Array:
    """A typed key, or raw bits of one as `jax.random.PRNGKey` makes them."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and len(shape or ()) == 1):
        raise TypeError(
            f"`key` must be one key, as `jax.random.key(seed)` makes it, got {dtype or type(key).__name__} of shape "
            f"{shape}"
        )
    return key


@functools.partial(jax.jit, static_argnames=("graphdef", "batch", "capacity", "dtype", "policy"))
def _empty_cache(graphdef, params, *, batch, capacity, dtype, policy) -> DecoderCache:
    """Allocated where it belongs: on a mesh no device ever holds it whole."""
    decoder = nnx.merge(graphdef, params)
    cache = decoder.init_cache(batch, capacity, dtype=dtype, policy=policy)
    return cache if decoder.axes is None else caches.shard_cache(cache, decoder)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def _prefill(graphdef, params, cache, tokens, lengths) -> tuple[Array, DecoderCache]:
    """Logits `[B, V]` of each row's last token, and the cache."""
    decoder = nnx.merge(graphdef, params)
    logits, cache = decoder.step(tokens, cache, lengths=lengths, last_only=True)
    return logits[:, 0], cache


def _record(progress: _Progress, logits: Float[Array, "B V"], rules: _Rules) -> _Progress:
    """Draws the next token of every row that still generates; on a mesh every device knows them all."""
    return caches.on_every_device(_draw, progress, logits, rules, axes=rules.axes)


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
    # The compiler chooses the layout of a loop's carry by itself; every device must hold all tokens.
    return caches.on_every_device(lambda x: x, progress, axes=rules.axes), cache
