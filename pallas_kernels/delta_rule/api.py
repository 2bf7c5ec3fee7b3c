"""Public gated delta rule: contract, validation, choice of implementation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch, _sharding
from pallas_kernels._precision import compute_dtype
from pallas_kernels.delta_rule import order, reference, step, tuning, vjp
from pallas_kernels.delta_rule.hopper import tuning as hopper_tuning
from pallas_kernels.delta_rule.step import tuning as step_tuning


class GatedDeltaRuleOutput(NamedTuple):
    """Output and final state.

    Attributes:
      out: `[B, T, Hv, Dv]`, the value's dtype.
      final_state: `[B, Hv, Dk, Dv]` (`[num_sequences, Hv, Dk, Dv]` with `cu_seqlens`), float32 (float64 for float64
        inputs).
    """

    out: jax.Array
    final_state: jax.Array


class GatedDeltaRuleStepOutput(NamedTuple):
    """Output and state after a decode step.

    Attributes:
      out: `[B, T, Hv, Dv]`, the value's dtype.
      final_state: the state argument's shape: the new states, in their slots. A bfloat16 or float16 state keeps its
        dtype (it is rounded once per call), any other becomes float32 (float64 beside float64 values).
      states: `[B, T, Hv, Dk, Dv]` in the same dtype, the state after each token, or None unless `return_states`.
    """

    out: jax.Array
    final_state: jax.Array
    states: jax.Array | None


@_dispatch.operator
def gated_delta_rule(
    query: Float[Array, "B T Hk Dk"],
    key: Float[Array, "B T Hk Dk"],
    value: Float[Array, "B T Hv Dv"],
    g: Float[Array, "B T Hv"] | Float[Array, "B T Hk Dk"],
    beta: Float[Array, "B T Hv"],
    *,
    initial_state: Float[Array, "B Hv Dk Dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cu_seqlens: Int[Array, "num_sequences+1"] | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Gated delta rule: `S_t = e^g_t S_{t-1} + k_t beta_t (v_t - e^g_t S_{t-1}^T k_t)^T`, `out_t = scale S_t^T q_t`.

    Args:
      query, key: `[B, T, Hk, Dk]`, T >= 0. Keys should have length at most 1 (`use_qk_l2norm`): with longer ones the
        rule itself is unstable.
      value: `[B, T, Hv, Dv]`, Hv a multiple of Hk; value head h reads key head `h // (Hv // Hk)`.
      g: `[B, T, Hv]`, natural-log decay, <= 0 (-inf forgets everything); or `[B, T, Hk, Dk]`, one decay per key
        channel (Kimi delta attention).
      beta: `[B, T, Hv]`, writing strength, in [0, 1], or up to 2 for negative eigenvalues.
      initial_state: `[B, Hv, Dk, Dv]`, or `[num_sequences, Hv, Dk, Dv]` with `cu_seqlens`; zeros if None. With
        `segment_ids` it belongs to the segment of each row's first real token.
      segment_ids: `[B, T]`. The state restarts from zero where the id changes. Negative ids are padding: never read,
        output 0, transparent to the state. The final state is that of the row's last segment.
      cu_seqlens: `[num_sequences + 1]` integer, `[0, ..., T]` not decreasing, only with B = 1: sequence i holds tokens
        `cu_seqlens[i] : cu_seqlens[i + 1]` (possibly none), with its own initial and final state. Tokens past the last
        boundary are padding.
      scale: multiplies the output; None means `Dk ** -0.5`.
      use_qk_l2norm: `x * rsqrt(sum x^2 + 1e-6)` on query and key, in float32.
      chunk_size: tokens of a chunk, 16, 32, 64 or 128; None lets measurement choose.
      implementation: None or a name below.

    | name | runs on | dtypes | backward | vmap | bitwise repeatable |
    |---|---|---|---|---|---|
    | "chunked" | XLA, any device | bf16, fp16, fp32, fp64 | by hand, reverse mode, any order | yes | yes |
    | "mosaic_gpu" | H100, H200; Dk, Dv <= 128 | bf16, fp16 | by kernels; further orders in XLA | yes | yes |
    | "reference" | XLA, any device | bf16, fp16, fp32, fp64 | automatic, forward and reverse | yes | yes |

    With a decay per key channel the backward of one chunk is automatic, the scan over chunks still by hand.
    Sums, gates and states are float32 (float64 for float64 values). None takes "chunked", and the token recurrence
    for a handful of tokens; "mosaic_gpu" has not been timed on a GPU yet and runs by name only (under `jax.shard_map`
    with `check_vma=False`). `jax.jvp`, `jax.jacfwd` and `jax.hessian` need `implementation="reference"`.

    Raises:
      TypeError, ValueError: naming the argument.
      NotImplementedError: the requested implementation cannot run the call.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.3; derivation in docs/gated_delta_rule.md.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.ones((1, 3, 1, 4)) / 2
      >>> g = jnp.zeros((1, 3, 1))
      >>> gated_delta_rule(q, q, jnp.ones((1, 3, 1, 2)), g, g + 1, scale=1.0).out[0, :, 0, 0].tolist()
      [1.0, 1.0, 1.0]
    """
    segment_ids = _checks.as_int32("segment_ids", segment_ids)
    cu_seqlens = _checks.as_int32("cu_seqlens", cu_seqlens)
    sizes = _check(query, key, value, g, beta, initial_state, segment_ids, cu_seqlens, chunk_size)
    tokens = order.Tokens(query, key, value, g, beta)
    call = tuning.Call(
        sizes=sizes,
        dtypes=tuple(x.dtype for x in tokens[:3]),
        per_channel=len(g.shape) == 4,
        scale=sizes["Dk"] ** -0.5 if scale is None else _checks.check_number("scale", scale),
        use_qk_l2norm=_checks.check_flag("use_qk_l2norm", use_qk_l2norm),
        chunk_size=None if chunk_size is None else int(chunk_size),
        is_symbolic=_dispatch.is_symbolic(*tokens),
        is_varying=_sharding.is_varying((tokens, initial_state, segment_ids, cu_seqlens)),
    )
    is_short = isinstance(sizes["T"], int) and sizes["T"] <= tuning.RECURRENT_TOKENS
    implementations = _OF_FEW_TOKENS if is_short else _IMPLEMENTATIONS
    run = _dispatch.choose("gated_delta_rule", implementation, implementations, call=call)
    compute = compute_dtype(value.dtype)
    if initial_state is None:
        shape = (sizes["sequences"], sizes["Hv"], sizes["Dk"], sizes["Dv"])
        initial_state = jnp.zeros_like(value, compute, shape)
    initial_state = initial_state.astype(compute)
    if 0 in (sizes["B"], sizes["T"]):
        return GatedDeltaRuleOutput(jnp.zeros_like(value), initial_state)
    if cu_seqlens is not None:
        cu_seqlens = jnp.asarray(cu_seqlens)
    varied: Any = _sharding.vary_alike((tokens, initial_state, segment_ids, cu_seqlens))
    tokens, state, segment_ids, cu_seqlens = varied
    return run(call, tokens, state, segment_ids=segment_ids, cu_seqlens=cu_seqlens)


@_dispatch.operator
def gated_delta_rule_step(
    query: Float[Array, "B T Hk Dk"],
    key: Float[Array, "B T Hk Dk"],
    value: Float[Array, "B T Hv Dv"],
    g: Float[Array, "B T Hv"] | Float[Array, "B T Hk Dk"],
    beta: Float[Array, "B T Hv"],
    state: Float[Array, "B Hv Dk Dv"] | Float[Array, "num_slots Hv Dk Dv"],
    *,
    slots: Int[Array, "B"] | None = None,
    return_states: bool = False,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    implementation: str | None = None,
) -> GatedDeltaRuleStepOutput:
    """Advances decode states by T <= 8 tokens.

    Args:
      query, key, value, g, beta: as for `gated_delta_rule`, 1 <= T <= 8.
      state: `[B, Hv, Dk, Dv]`, or a pool `[num_slots, Hv, Dk, Dv]` with `slots`; float32, or bfloat16 or float16 to
        halve the bytes of a step. Donate it: the update is then in place.
      slots: `[B]`, each row's place in the pool, all different; -1 (or any number outside the pool) is a padding
        row, which changes no state and yields 0.
      return_states: also return the state after every token, so that speculative decoding can roll back to any.
      scale, use_qk_l2norm: as for `gated_delta_rule`.
      implementation: None or a name below.

    | name | runs on | dtypes | backward | vmap | bitwise repeatable |
    |---|---|---|---|---|---|
    | "reference" | XLA, any device | bf16, fp16, fp32, fp64 | automatic, any order | yes | yes |
    | "mosaic_gpu" | H100, H200 | bf16, fp16, fp32 | by recomputation, reverse mode, any order | yes | yes |
    | "triton" | NVIDIA from A100 on | bf16, fp16, fp32 | by recomputation, reverse mode, any order | yes | yes |

    The kernels read the state once and write it once; `jax.shard_map` takes them with `check_vma=False`. None takes
    "reference" until they have been measured.

    Raises:
      TypeError, ValueError: naming the argument.
      NotImplementedError: the requested implementation cannot run the call.

    Example:
      >>> import jax.numpy as jnp
      >>> x, g, pool = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1)), jnp.zeros((5, 1, 2, 2))
      >>> step = gated_delta_rule_step(x, x, x, g, g + 1, pool, slots=jnp.array([3]))
      >>> step.final_state.sum((1, 2, 3)).tolist()
      [0.0, 0.0, 0.0, 4.0, 0.0]
    """
    slots = _checks.as_int32("slots", slots)
    sizes = _check_step(query, key, value, g, beta, state, slots)
    options = step.Options(
        sizes["Dk"] ** -0.5 if scale is None else _checks.check_number("scale", scale),
        _checks.check_flag("use_qk_l2norm", use_qk_l2norm),
        _checks.check_flag("return_states", return_states),
    )
    tokens = step.Tokens(query, key, value, g, beta)
    call = step_tuning.Call(
        dtypes=[x.dtype for x in tokens[:3]],
        state_dtype=step.state_dtype(state, value),
        key_dim=sizes["Dk"],
        value_dim=sizes["Dv"],
        is_varying=_sharding.is_varying((tokens, state, slots)),
    )
    run = _dispatch.choose("gated_delta_rule_step", implementation, _STEPS, call=call)
    state = jnp.asarray(state).astype(step.state_dtype(state, value))
    tokens, state, slots = _sharding.vary_alike((tokens, state, slots))
    return GatedDeltaRuleStepOutput(*run(options, tokens, state, slots))


# The kernels come last until they have been measured on a GPU: nobody is given what only an interpreter and a compiler
# have seen.
_STEPS = {
    "reference": _dispatch.Implementation(step.recurrence),
    "mosaic_gpu": _dispatch.Implementation(
        functools.partial(step.run, "mosaic_gpu"), step_tuning.mosaic_gpu_reason
    ),
    "triton": _dispatch.Implementation(
        functools.partial(step.run, "triton"), step_tuning.triton_reason
    ),
}


def _by_reference(
    call: tuning.Call, tokens: order.Tokens, state: jax.Array, **places
) -> GatedDeltaRuleOutput:
    out, final, _ = reference.recurrent(
        *tokens, initial_state=state, scale=call.scale, use_qk_l2norm=call.use_qk_l2norm, **places
    )
    return GatedDeltaRuleOutput(out, final)


def _by_chunks(
    call: tuning.Call, tokens: order.Tokens, state: jax.Array, **places
) -> GatedDeltaRuleOutput:
    outputs = vjp.gated_delta_rule(_plan(call, places["cu_seqlens"]), tokens, state, **places)
    boundaries = reference.boundaries(tokens.value.shape[:2], **places)
    bounded = tokens._replace(g=order.bounded(tokens.g))
    return GatedDeltaRuleOutput(
        *order.spoiled_outputs(outputs, bounded, state, boundaries, places["cu_seqlens"])
    )


def _by_kernels(
    call: tuning.Call, tokens: order.Tokens, state: jax.Array, **places
) -> GatedDeltaRuleOutput:
    plan = _plan(call, places["cu_seqlens"], kernels=True)
    bounded = tokens._replace(g=order.bounded(tokens.g))
    return GatedDeltaRuleOutput(*vjp.mosaic_gpu(plan, bounded, state, **places))


_REFERENCE = {"reference": _dispatch.Implementation(_by_reference, tuning.reference_reason)}
# The kernels come last, as those of the step do.
_IMPLEMENTATIONS = {
    "chunked": _dispatch.Implementation(_by_chunks, tuning.chunked_reason),
    **_REFERENCE,
    "mosaic_gpu": _dispatch.Implementation(_by_kernels, hopper_tuning.unsupported_reason),
}
_OF_FEW_TOKENS = {**_REFERENCE, **_IMPLEMENTATIONS}


def _plan(call: tuning.Call, cu_seqlens: jax.Array | None, *, kernels: bool = False) -> order.Plan:
    sizes, platform = call.sizes, _dispatch.target().platform
    sequences = None if cu_seqlens is None else sizes["sequences"]
    chunk = call.chunk_size or tuning.chunk_size(sizes["T"], sequences)
    if kernels:
        chunk = hopper_tuning.CHUNK
    count = order.chunk_count(sizes["T"], sequences, chunk)
    lanes = 1 if call.per_channel else tuning.segments(count, platform)
    if kernels:
        lanes = 1  # packed sequences run side by side already
        if sequences is None:
            heads = sizes["B"] * sizes["Hv"]
            lanes = hopper_tuning.lanes(heads=heads, value_dim=sizes["Dv"], chunks=count)
    steps = -(-count // lanes)
    block = tuning.block(steps, sizes["B"] * lanes * sizes["Hv"], platform)
    return order.Plan(
        batch=sizes["B"],
        length=sizes["T"],
        chunk=chunk,
        lanes=lanes,
        steps=-(-steps // block) * block,
        scale=call.scale,
        use_qk_l2norm=call.use_qk_l2norm,
        block=block,
        per_channel=call.per_channel,
    )


def _check_operands(
    query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    _checks.check_array("query", query, "B T Hk Dk", sizes)
    _checks.check_array("key", key, "B T Hk Dk", sizes)
    _checks.check_array("value", value, "B T Hv Dv", sizes)
    per_channel = len(getattr(g, "shape", ())) == 4
    _checks.check_array("g", g, "B T Hk Dk" if per_channel else "B T Hv", sizes)
    _checks.check_array("beta", beta, "B T Hv", sizes)
    for name, array in (("query", query), ("key", key), ("value", value), ("g", g), ("beta", beta)):
        _checks.check_float(name, array)
    _checks.check_multiple("Hv", sizes["Hv"], "Hk", sizes["Hk"])
    return sizes


def _check(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    cu_seqlens: jax.Array | None,
    chunk_size,
) -> dict[str, int]:
    """Sizes by letter, and `sequences`: how many states there are."""
    sizes = _check_operands(query, key, value, g, beta)
    letter = "B"
    if chunk_size is not None:
        _checks.check_one_of(
            "chunk_size", _checks.check_int("chunk_size", chunk_size), tuning.CHUNK_SIZES
        )
    if segment_ids is not None:
        _checks.check_array("segment_ids", segment_ids, "B T", sizes)
        _checks.check_integer("segment_ids", segment_ids)
    if cu_seqlens is not None:
        letter = "num_sequences"
        _check_cu_seqlens(cu_seqlens, segment_ids, sizes)
    if initial_state is not None:
        _checks.check_array("initial_state", initial_state, f"{letter} Hv Dk Dv", sizes)
        _checks.check_float("initial_state", initial_state)
    return {**sizes, "sequences": sizes[letter]}


def _check_cu_seqlens(
    cu_seqlens: jax.Array | None, segment_ids: jax.Array | None, sizes: dict[str, int]
) -> None:
    bounds: dict[str, int] = {}
    _checks.check_array("cu_seqlens", cu_seqlens, "num_sequences+1", bounds)
    _checks.check_integer("cu_seqlens", cu_seqlens)
    sizes["num_sequences"] = bounds["num_sequences+1"] - 1
    if sizes["num_sequences"] < 1:
        raise ValueError("`cu_seqlens` must hold at least two boundaries, got 1")
    if segment_ids is not None:
        raise ValueError("`cu_seqlens` must be None when `segment_ids` is given, got both")
    if sizes["B"] != 1:
        raise ValueError(f"`cu_seqlens` must come with B=1, got B={sizes['B']}")
    _checks.check_offsets("cu_seqlens", cu_seqlens, "T", sizes)


def _check_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    slots: jax.Array | None,
) -> dict[str, int]:
    sizes = _check_operands(query, key, value, g, beta)
    if not 1 <= sizes["T"] <= step_tuning.MAX_STEP_TOKENS:
        raise ValueError(
            f"`query` must hold 1 to {step_tuning.MAX_STEP_TOKENS} tokens, got T={sizes['T']}; use gated_delta_rule"
        )
    _checks.check_array(
        "state", state, "B Hv Dk Dv" if slots is None else "num_slots Hv Dk Dv", sizes
    )
    _checks.check_float("state", state)
    if slots is not None:
        _checks.check_array("slots", slots, "B", sizes)
        _checks.check_integer("slots", slots)
    return sizes
