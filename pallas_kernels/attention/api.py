"""Public attention operators: contract, validation, choice of implementation."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _checks, _dispatch, _sharding
from pallas_kernels.attention import algebra, cudnn, reference, tuning, vjp
from pallas_kernels.attention.hopper import tuning as hopper_tuning

CausalAlignment = Literal["upper_left", "bottom_right"]
Implementation = Literal["blockwise", "cudnn", "mosaic_gpu", "mosaic_gpu_atomic", "reference"]


class AttentionOutput(NamedTuple):
    """Attention output and its softmax statistic.

    Attributes:
      out: `[B, T, N, Dv]`, the query's dtype. A query that may attend to nothing gives zeros.
      lse: `[B, T, N]` float32 (float64 for float64 inputs), natural logarithm of the softmax denominator, sinks
        counted; -inf where nothing is visible and there is no sink.
    """

    out: jax.Array
    lse: jax.Array


class SharedOptions(TypedDict, total=False):
    """Options of every attention operator; `gqa_attention` says what they mean."""

    scale: float | None
    is_causal: bool
    causal_alignment: CausalAlignment
    q_offset: int | Int[Array, "B"] | None
    sliding_window: int | None
    mask: Bool[Array, "#B #N #T #S"] | None
    bias: Float[Array, "#B #N #T #S"] | None
    sinks: Float[Array, "N"] | None
    logits_soft_cap: float | None
    dropout_rate: float
    dropout_key: Array | None
    dropout_offset: tuple[int, int] | Int[Array, "2"] | None
    implementation: Implementation | None


class AttentionOptions(SharedOptions, total=False):
    """Options of `gqa_attention` and `gqa_attention_with_lse`."""

    query_segment_ids: Int[Array, "B T"] | None
    kv_segment_ids: Int[Array, "B S"] | None
    query_positions: Int[Array, "B T"] | None
    kv_positions: Int[Array, "B S"] | None
    query_cu_seqlens: Int[Array, "num_sequences+1"] | None
    kv_cu_seqlens: Int[Array, "num_sequences+1"] | None


class SelfAttentionOptions(SharedOptions, total=False):
    """Options of `gqa_attention_qkv`."""

    segment_ids: Int[Array, "B T"] | None
    positions: Int[Array, "B T"] | None
    cu_seqlens: Int[Array, "num_sequences+1"] | None


# What is not None by default.
_DEFAULTS = {"is_causal": False, "causal_alignment": "upper_left", "dropout_rate": 0.0}


def _spelled_out[F: Callable[..., Any]](function: F) -> F:
    """Gives `help` and `inspect.signature` each option of `**options: Unpack[...]` by name, with its default."""
    signature = inspect.signature(function)
    *arrays, options = signature.parameters.values()
    (declared,) = get_args(options.annotation)
    named = [
        options.replace(
            name=name, annotation=kind, default=_DEFAULTS.get(name), kind=options.KEYWORD_ONLY
        )
        for name, kind in declared.__annotations__.items()
    ]
    setattr(function, "__signature__", signature.replace(parameters=[*arrays, *named]))  # noqa: B010
    return _dispatch.operator(function)


@_spelled_out
def gqa_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    **options: Unpack[AttentionOptions],
) -> Float[Array, "B T N Dv"]:
    """Grouped-query attention; query head `h` reads key/value head `h // R`, which is never repeated in memory.

    `softmax(soft_cap(scale * q k^T) + bias) v` over the keys that a query sees: those that every given rule
    (causal, window, mask, segments) lets it see.

    Args:
      query: `[B, T, N, D]`; float16, bfloat16, float32 or float64.
      key: `[B, S, K, D]`; N is a multiple of K.
      value: `[B, S, K, Dv]`; Dv may differ from D.
      scale: multiplies the logits; `D ** -0.5` by default.
      is_causal: a query sees keys at its own and earlier positions.
      causal_alignment: where positions come from when none are given: "upper_left" puts query 0 at key 0,
        "bottom_right" the last query at the last key (`q_offset = S - T`; for packed sequences, each its own).
      q_offset: position of the first query, keys counting from 0: an integer, or `[B]` integers.
      sliding_window: exactly this many keys are visible, self included; needs `is_causal`.
      mask: `[B or 1, N or 1, T or 1, S or 1]` boolean, True where the query sees the key.
      bias: of the same shape, any float dtype, added to the (soft-capped) logits; differentiable. -inf hides.
      query_segment_ids, kv_segment_ids: `[B, T]`, `[B, S]`; equal ids see each other; a negative id is padding,
        which sees nothing and is seen by nothing.
      query_positions, kv_positions: `[B, T]`, `[B, S]`; what `is_causal` and `sliding_window` compare, in any order.
      query_cu_seqlens, kv_cu_seqlens: `[num_sequences + 1]`, starts of sequences packed along T and S, then the end of
        the last; B must be 1. Sequence i of the queries sees sequence i of the keys, positions counting from 0
        in each; tokens behind the last end are padding.
      sinks: `[N]` float: one more logit per head, which takes softmax mass and gives nothing; differentiable.
        Zeros are "softmax off by one".
      logits_soft_cap: `cap * tanh(logits / cap)`.
      dropout_rate: share of the softmax weights dropped, the others scaled by `1 / (1 - rate)`; lse is unaffected.
      dropout_key: a JAX random key. What is dropped is a function of this key and of batch row, query head, segment
        and positions only: equal in forward and backward, in every implementation, blocking and token order.
      dropout_offset: (first batch row, first query head) of these arrays in the whole, for a call on a shard.
      implementation: None takes the first that can run the call, in the order of this table.

    Returns:
      `[B, T, N, Dv]` in the query's dtype. Softmax and accumulators are float32 (float64 for float64 inputs).
      A query that sees no key gives zeros and passes no gradient.

    Raises:
      TypeError, ValueError: naming the argument, before anything is computed.
      NotImplementedError: the requested implementation cannot run this call, with the reason.

    | implementation | runs on | dtypes | memory | gradients | vmap, shard_map | deterministic |
    |---|---|---|---|---|---|---|
    | "cudnn" | NVIDIA GPU, compute capability >= 8.0 | float16, bfloat16 | O(T) | q k v | yes | no (backward) |
    | "mosaic_gpu" | H100, H200 | float16, bfloat16 | O(T) | q k v sinks, lse | yes (1) | yes |
    | "mosaic_gpu_atomic" | H100, H200 | float16, bfloat16 | O(T) | q k v sinks, lse | yes (1) | no (gradient of q) |
    | "blockwise" | any (XLA) | all | O(T) forward and backward | all inputs, lse | yes | yes |
    | "reference" | any (XLA) | all | O(T S) | all inputs, lse, forward mode | yes | yes |

    (1) `jax.shard_map` with `check_vma=False` only: the kernels' results have no type over mesh axes.

    "cudnn" has only `scale`, upper-left `is_causal` and `sliding_window`. "mosaic_gpu" takes D = Dv of 64, 96, 128 or
    256 and everything but `mask`, `bias`, positions and dropout; it was proven by interpretation and compilation, not
    yet on a GPU, so it runs only by name. "mosaic_gpu_atomic" is the same forward with a backward of 5 matrix products
    instead of 7, whose blocks add up the gradient of q in whatever order they end: its last bits differ between runs
    (D of 64, 96 or 128). The gradients of all but "cudnn" can be differentiated again in reverse mode (through the
    reference, at its memory); forward mode (`jax.jvp`, `jax.hessian`) needs "reference".
    `pallas_kernels.explain` tells the choice and the reasons.

    Source: grouped queries, arXiv 2305.13245 section 2; tiles and their backward, arXiv 2307.08691 section 3.1; sinks,
    arXiv 2508.10925 section 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> query = jax.random.normal(jax.random.key(0), (1, 8, 4, 16))
      >>> key = value = jax.random.normal(jax.random.key(1), (1, 8, 2, 16))
      >>> gqa_attention(query, key, value, is_causal=True, sliding_window=4).shape
      (1, 8, 4, 16)
    """
    return _attend("gqa_attention", query, key, value, options).out


@_spelled_out
def gqa_attention_with_lse(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    **options: Unpack[AttentionOptions],
) -> AttentionOutput:
    """`gqa_attention` and the logarithm of its softmax denominator, by which partial results can be merged.

    Arguments, errors and implementations are those of `gqa_attention`; both results are differentiable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> query = jax.random.normal(jax.random.key(0), (1, 8, 4, 16))
      >>> key = value = jax.random.normal(jax.random.key(1), (1, 8, 2, 16))
      >>> gqa_attention_with_lse(query, key, value).lse.shape
      (1, 8, 4)
    """
    return _attend("gqa_attention_with_lse", query, key, value, options)


@_spelled_out
def gqa_attention_qkv(
    qkv: Float[Array, "B T K R+2 D"],
    **options: Unpack[SelfAttentionOptions],
) -> Float[Array, "B T N D"]:
    """Self-attention straight from the fused, group-interleaved projection `[Q_g | K_g | V_g]`.

    Args:
      qkv: `[B, T, K, R + 2, D]`: per key/value head its R query heads, then its key, then its value.
      segment_ids, positions, cu_seqlens: as for `gqa_attention`, of queries and keys alike.
      scale, is_causal, causal_alignment, q_offset, sliding_window, mask, bias, sinks, logits_soft_cap, dropout_rate,
        dropout_key, dropout_offset, implementation: as for `gqa_attention`.

    Returns:
      `[B, T, K * R, D]`. Both "mosaic_gpu" read the buffer in place, and write one gradient of the same layout.

    Raises:
      TypeError, ValueError, NotImplementedError: as `gqa_attention`.

    Example:
      >>> import jax
      >>> qkv = jax.random.normal(jax.random.key(0), (1, 8, 2, 2 + 2, 16))
      >>> gqa_attention_qkv(qkv, is_causal=True).shape
      (1, 8, 4, 16)
    """
    named, sizes = _options("gqa_attention_qkv", options, SelfAttentionOptions), {}
    _checks.check_array("qkv", qkv, "B T K R+2 D", sizes)
    _checks.check_float("qkv", qkv)
    if sizes["R+2"] < 3:
        raise ValueError(f"`qkv` must have shape [B, T, K, R + 2, D] with R >= 1, got {qkv.shape}")
    for name, letters in _SELF_PLACES.items():
        named[f"query_{name}"] = named[f"kv_{name}"] = named[name]
        if named[name] is not None:
            _checks.check_array(name, named[name], letters, sizes)
            _checks.check_integer(name, named[name])
    fused = vjp.Fused(qkv, named["sinks"])
    split = jax.eval_shape(lambda qkv: vjp.Fused(qkv).split(), qkv)
    _check(split.query, split.key, split.value, named)
    call = _call(split.query, split.key, split.value, named, arrays=qkv)
    run = _dispatch.choose("gqa_attention_qkv", named["implementation"], _OF_FUSED, call=call)
    static, context = _normal_form(split.query, split.key, named)
    return run(*_sharding.vary_alike((fused, context)), static)[0]


_SELF_PLACES = {"segment_ids": "B T", "positions": "B T", "cu_seqlens": "num_sequences+1"}
_PLACES = [
    f"{of}_{n}" for n in ("positions", "segment_ids", "cu_seqlens") for of in ("query", "kv")
]
# The kernels come after XLA until the harness (`python -m benchmarks.run attention_gpu`) has run them on a GPU: nobody
# is given kernels that only an interpreter and a compiler have seen. They are there by name.
_IMPLEMENTATIONS = {
    "cudnn": _dispatch.Implementation(cudnn.attention, tuning.cudnn_reason),
    "blockwise": _dispatch.Implementation(vjp.attention, tuning.blockwise_reason),
    "mosaic_gpu": _dispatch.Implementation(vjp.mosaic_gpu, hopper_tuning.unsupported_reason),
    "mosaic_gpu_atomic": _dispatch.Implementation(
        vjp.mosaic_gpu_atomic, functools.partial(hopper_tuning.unsupported_reason, atomic=True)
    ),
    "reference": _dispatch.Implementation(reference.attention),
}
_OF_FUSED = {
    name: each._replace(run=vjp.FUSED.get(name, vjp.splitting(each.run)))
    for name, each in _IMPLEMENTATIONS.items()
}


def _options(operator: str, given: Mapping[str, Any], declared: type) -> dict[str, Any]:
    """Every option of a call; those that are no arrays checked, as Python numbers."""
    names = declared.__annotations__
    for name in given:
        if name not in names:
            raise TypeError(f"{operator}() got an unexpected keyword argument {name!r}")
    options = {**dict.fromkeys(names), **_DEFAULTS, **given}
    options["is_causal"] = _checks.check_flag("is_causal", options["is_causal"])
    options["sliding_window"] = _checks.check_window(options["sliding_window"])
    options["dropout_rate"] = _checks.check_number("dropout_rate", options["dropout_rate"])
    if options["scale"] is not None:
        options["scale"] = _checks.check_number("scale", options["scale"])
    if options["logits_soft_cap"] is not None:
        cap = _checks.check_number("logits_soft_cap", options["logits_soft_cap"], is_positive=True)
        options["logits_soft_cap"] = cap
    return options


def _call(
    query,
    key: jax.Array,
    value: jax.Array,
    options: dict,
    *,
    arrays: Any,
    with_lse: bool = False,
) -> tuning.Call:
    return tuning.Call(
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        lengths=(query.shape[1], key.shape[1]),
        options=options,
        with_lse=with_lse,
        is_symbolic=_dispatch.is_symbolic(query, key, value),
        is_varying=_sharding.is_varying((arrays, options)),
    )


def _attend(
    operator: str, query: jax.Array, key: jax.Array, value: jax.Array, given: AttentionOptions
) -> AttentionOutput:
    options = _options(operator, given, AttentionOptions)
    _check(query, key, value, options)
    with_lse = operator == "gqa_attention_with_lse"
    call = _call(query, key, value, options, arrays=(query, key, value), with_lse=with_lse)
    run = _dispatch.choose(operator, options["implementation"], _IMPLEMENTATIONS, call=call)
    static, context = _normal_form(query, key, options)
    inputs = algebra.Inputs(query, key, value, options["bias"], options["sinks"])
    return AttentionOutput(*run(*_sharding.vary_alike((inputs, context)), static))


def _normal_form(
    query: jax.Array, key: jax.Array, options: dict
) -> tuple[algebra.Options, algebra.Context]:
    """The same request with every way to place tokens reduced to positions and segments."""
    q_len, kv_len = query.shape[1], key.shape[1]
    places = {
        name: None if options[name] is None else jnp.asarray(_checks.as_int32(name, options[name]))
        for name in _PLACES
    }
    q_position, kv_position, q_segment, kv_segment, q_starts, kv_starts = places.values()
    bottom_right = options["causal_alignment"] == "bottom_right"
    offset = options["q_offset"]
    if offset is None:
        offset = kv_len - q_len if bottom_right else 0
        if not isinstance(offset, int):  # a symbol of jax.export
            offset = jnp.broadcast_to(jnp.asarray(offset), query.shape[:1])
    q_offsets = None
    if q_starts is not None and kv_starts is not None:
        offset = 0  # positions count inside each sequence
        q_position, q_segment = algebra.packed_tokens(q_starts, q_len)
        kv_position, kv_segment = algebra.packed_tokens(kv_starts, kv_len)
        if bottom_right:
            shift = jnp.diff(kv_starts) - jnp.diff(q_starts)
            q_position = q_position + shift[q_segment]
    elif not _is_int(offset):
        q_offsets = jnp.asarray(_checks.as_int32("q_offset", offset))
        q_position = q_offsets[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None]
        kv_position = jnp.arange(kv_len, dtype=jnp.int32)[None]
    seeds = None
    if options["dropout_rate"] > 0.0:
        seeds = algebra.dropout_seeds(options["dropout_key"], options["dropout_offset"])
    scale = options["scale"]
    static = algebra.Options(
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        is_causal=options["is_causal"],
        sliding_window=options["sliding_window"],
        logits_soft_cap=options["logits_soft_cap"],
        dropout_rate=float(options["dropout_rate"]),
        q_offset=int(offset) if _is_int(offset) else 0,
    )
    mask = None if options["mask"] is None else jnp.asarray(options["mask"])
    context = algebra.Context(
        mask, q_segment, kv_segment, q_position, kv_position, seeds, q_offsets
    )
    return static, context


def _check(query: jax.Array, key: jax.Array, value: jax.Array, options: dict) -> None:
    """Raises for every call that no implementation may accept."""
    sizes: dict[str, int] = {}
    arrays = {"query": query, "key": key, "value": value}
    for (name, array), letters in zip(
        arrays.items(), ("B T N D", "B S K D", "B S K Dv"), strict=True
    ):
        _checks.check_array(name, array, letters, sizes)
        _checks.check_float(name, array)
    _checks.check_same_dtype(tuple(arrays), tuple(arrays.values()))
    if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(f"`query` must be float16, bfloat16, float32 or float64, got {query.dtype}")
    _checks.check_multiple("N", sizes["N"], "K", sizes["K"])
    for letter in ("B", "T", "S", "D", "Dv"):
        if sizes[letter] < 1:
            raise ValueError(f"`{letter}` must be positive, got {sizes[letter]}")
    _check_logits(options, sizes)
    _check_places(options, sizes)
    _check_dropout(options)


def _check_logits(options: dict, sizes: dict[str, int]) -> None:
    for name in ("mask", "bias"):
        array = options[name]
        if array is None:
            continue
        _checks.check_array(name, array, "B N T S", {})
        full = tuple(sizes[letter] for letter in "BNTS")
        if any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
            listed = ", ".join(f"{n} or 1" if n != 1 else "1" for n in full)
            raise ValueError(f"`{name}` must have shape [{listed}], got {tuple(array.shape)}")
    if options["mask"] is not None and options["mask"].dtype != jnp.bool_:
        raise TypeError(f"`mask` must be boolean, got {options['mask'].dtype}")
    if options["bias"] is not None:
        _checks.check_float("bias", options["bias"])
    if options["sinks"] is not None:
        _checks.check_array("sinks", options["sinks"], "N", sizes)
        _checks.check_float("sinks", options["sinks"])


def _check_places(options: dict, sizes: dict[str, int]) -> None:
    """Positions, segments, offsets, packing, window: each alone, then which exclude each other."""
    _checks.check_one_of(
        "causal_alignment", options["causal_alignment"], ("upper_left", "bottom_right")
    )
    window = options["sliding_window"]
    if window is not None and not options["is_causal"]:
        raise ValueError(f"`is_causal` must be True with `sliding_window={window}`, got False")
    for query_name, kv_name, letters in (
        ("query_segment_ids", "kv_segment_ids", ("B T", "B S")),
        ("query_positions", "kv_positions", ("B T", "B S")),
        ("query_cu_seqlens", "kv_cu_seqlens", ("num_sequences+1", "num_sequences+1")),
    ):
        given = [name for name in (query_name, kv_name) if options[name] is not None]
        if len(given) == 1:
            raise ValueError(
                f"`{query_name}` and `{kv_name}` must be given together, got only `{given[0]}`"
            )
        shape = dict(sizes)
        for name, letter in zip(given, letters, strict=False):
            _checks.check_array(name, options[name], letter, shape)
            _checks.check_integer(name, options[name])
    packed = options["query_cu_seqlens"] is not None
    if packed and sizes["B"] != 1:
        raise ValueError(f"`query_cu_seqlens` must come with B=1, got B={sizes['B']}")
    if packed and options["query_cu_seqlens"].shape[0] < 2:
        raise ValueError("`query_cu_seqlens` must hold at least two entries, got 1")
    for name, letter in (("query_cu_seqlens", "T"), ("kv_cu_seqlens", "S")) if packed else ():
        _checks.check_offsets(name, options[name], letter, sizes)
    offset = options["q_offset"]
    if _is_int(offset):
        _checks.as_int32("q_offset", np.asarray(offset))
    elif offset is not None:
        _checks.check_array("q_offset", offset, "B", sizes)
        _checks.check_integer("q_offset", offset)
    ways = {
        "q_offset": offset is not None,
        "causal_alignment='bottom_right'": options["causal_alignment"] == "bottom_right",
        "query_positions": options["query_positions"] is not None,
        "query_segment_ids": options["query_segment_ids"] is not None,
        "query_cu_seqlens": packed,
    }
    for one, other in (
        ("q_offset", "causal_alignment='bottom_right'"),
        ("q_offset", "query_positions"),
        ("q_offset", "query_cu_seqlens"),
        ("causal_alignment='bottom_right'", "query_positions"),
        ("query_positions", "query_cu_seqlens"),
        ("query_segment_ids", "query_cu_seqlens"),
    ):
        if ways[one] and ways[other]:
            raise ValueError(f"`{one}` must not be given together with `{other}`, got both")


def _check_dropout(options: dict) -> None:
    rate, key = options["dropout_rate"], options["dropout_key"]
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"`dropout_rate` must be in [0, 1), got {rate}")
    if rate > 0.0 and key is None:
        raise ValueError(f"`dropout_key` must be given with `dropout_rate={rate}`, got None")
    if key is not None:
        dtype, shape = getattr(key, "dtype", np.dtype(bool)), np.shape(key)
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
        if not is_key and not (dtype == jnp.uint32 and shape == (2,)):
            raise TypeError(
                f"`dropout_key` must be one JAX random key, got {type(key).__name__} of shape {shape}"
            )
    offset = options["dropout_offset"]
    if offset is not None:
        if np.shape(offset) != (2,):
            raise ValueError(f"`dropout_offset` must be (batch row, query head), got {offset!r}")
        for first in (offset,) if hasattr(offset, "dtype") else map(np.asarray, offset):
            _checks.as_int32("dropout_offset", first)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
