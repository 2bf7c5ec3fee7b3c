"""Public decode step of Gated DeltaNet: contract, validation, choice of implementation."""

import functools
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch, _sharding
from pallas_kernels.delta_rule.step.tuning import MAX_STEP_TOKENS
from pallas_kernels.deltanet import reference, step, tuning
from pallas_kernels.deltanet.algebra import Inputs, Options


class GatedDeltaNetStepOutput(NamedTuple):
    """Output and both states after a decode step.

    Attributes:
      out: `[B, T, Hv, Dv]`, the dtype of `mixed`.
      final_state: the shape of `state`: the new states, in their slots. A bfloat16 or float16 state keeps its dtype (it
        is rounded once per call), any other becomes float32 (float64 beside float64 inputs).
      final_conv_state: the shape and dtype of `conv_state`: the last W inputs of each row, oldest first.
      states: `[B, T, Hv, Dk, Dv]` in the dtype of `final_state`, the state after each token, or None unless
        `return_states`.
    """

    out: jax.Array
    final_state: jax.Array
    final_conv_state: jax.Array
    states: jax.Array | None


@_dispatch.operator
def gated_deltanet_step(
    mixed: Float[Array, "B T Hk F"],
    logits: Float[Array, "B T Hk 2*n"],
    state: Float[Array, "B Hv Dk Dv"] | Float[Array, "num_slots Hv Dk Dv"],
    conv_state: Float[Array, "B W Hk C"] | Float[Array, "num_slots W Hk C"],
    *,
    conv_kernel: Float[Array, "W Hk C"],
    conv_bias: Float[Array, "Hk C"] | None = None,
    A_log: Float[Array, "Hk n"],
    dt_bias: Float[Array, "Hk n"],
    lengths: Int[Array, "B"] | None = None,
    slots: Int[Array, "B"] | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    allow_negative_eigenvalues: bool = False,
    return_states: bool = False,
    implementation: str | None = None,
) -> GatedDeltaNetStepOutput:
    """Advances the states of a Gated DeltaNet layer by T <= 8 tokens, from its input projections to its gated norm.

    That is `causal_conv1d` with SiLU, the gates `g = -exp(A_log) softplus(a + dt_bias)` and `beta = sigmoid(b)`, and
    `gated_delta_rule_step`; the kernels do all of it in one launch.

    Args:
      mixed: `[B, T, Hk, F]`, 1 <= T <= 8, F >= C = 2 Dk + n Dv: per key head query, key and the values of its
        n = Hv // Hk value heads, before the convolution; channels beyond C (a layer's output gates) are not read.
      logits: `[B, T, Hk, 2 n]`, per key head b of its n value heads, then a.
      state: `[B, Hv, Dk, Dv]`, or a pool `[num_slots, Hv, Dk, Dv]` with `slots`; float32, or bfloat16 or float16 to
        halve the bytes of a step. Donate it: the update is then in place.
      conv_state: `[B, W, Hk, C]`, or a pool of them, in the dtype of `mixed`: the W inputs before `mixed`, oldest
        first. Without slots the new windows are an array of their own (a donated one is copied into); a donated pool is
        updated in place.
      conv_kernel: `[W, Hk, C]`; the last tap multiplies the current token.
      conv_bias: `[Hk, C]`.
      A_log, dt_bias: `[Hk, n]`.
      lengths: `[B]` in [0, T], how many tokens of each row are real; None means all. The others may hold anything,
        leave both states untouched and have output 0. A number outside [0, T] is refused; inside `jit` its row
        has output NaN and both states stay.
      slots: `[B]`, each row's place in both pools, all different; -1 (or any number outside the pools) is a padding
        row, which changes no state and yields 0.
      scale: multiplies the output; None means `Dk ** -0.5`.
      use_qk_l2norm: `x * rsqrt(sum x^2 + 1e-6)` on query and key, in float32.
      allow_negative_eigenvalues: `beta = 2 sigmoid(b)`.
      return_states: also return the state after every token, so that speculative decoding can roll back to any.
      implementation: None or a name below.

    | name | runs on | dtypes | backward | vmap | bitwise repeatable |
    |---|---|---|---|---|---|
    | "reference" | XLA, any device | bf16, fp16, fp32, fp64 | automatic, any order | yes | yes |
    | "mosaic_gpu" | H100, H200 | bf16, fp16, fp32 | by recomputation, reverse mode, any order | yes | yes |
    | "triton" | NVIDIA from A100 on | bf16, fp16, fp32 | by recomputation, reverse mode, any order | yes | yes |

    "reference" rounds convolved queries, keys and values to the dtype of `mixed`, as `causal_conv1d` does; the kernels
    keep them in float32, and work under `jax.shard_map` with `check_vma=False`. None takes "reference" until the
    kernels have been measured.

    Raises:
      TypeError, ValueError: naming the argument.
      NotImplementedError: the requested implementation cannot run the call.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.4, with the layout of Qwen3-Next.

    Example:
      >>> import jax.numpy as jnp
      >>> mixed, logits = jnp.ones((1, 1, 1, 6)), jnp.zeros((1, 1, 1, 2))
      >>> state, conv_state = jnp.zeros((1, 1, 2, 2)), jnp.zeros((1, 4, 1, 6))
      >>> step = gated_deltanet_step(mixed, logits, state, conv_state, conv_kernel=jnp.ones((4, 1, 6)),
      ...                            A_log=jnp.zeros((1, 1)), dt_bias=jnp.zeros((1, 1)))
      >>> step.out.shape, step.final_conv_state[0, :, 0, 0].tolist()
      ((1, 1, 1, 2), [0.0, 0.0, 0.0, 1.0])
    """
    lengths, slots = _checks.as_int32("lengths", lengths), _checks.as_int32("slots", slots)
    inputs = Inputs(mixed, logits, conv_state, conv_kernel, conv_bias, A_log, dt_bias, lengths)
    sizes = _check(inputs, state, slots)
    scale = float(sizes["Dk"] ** -0.5) if scale is None else _checks.check_number("scale", scale)
    flags = {
        "use_qk_l2norm": use_qk_l2norm,
        "allow_negative_eigenvalues": allow_negative_eigenvalues,
        "return_states": return_states,
    }
    options = Options(scale, *(_checks.check_flag(*flag) for flag in flags.items()))
    call = _call(inputs, state, slots)
    run = _dispatch.choose("gated_deltanet_step", implementation, _IMPLEMENTATIONS, call=call)
    state = jnp.asarray(state).astype(step.state_dtype(state, mixed))
    inputs, slots = jax.tree.map(jnp.asarray, (inputs, slots))
    inputs, state, slots = _sharding.vary_alike((inputs, state, slots))
    bad = None
    if isinstance(inputs.lengths, jax.core.Tracer):
        bad = (inputs.lengths < 0) | (inputs.lengths > inputs.mixed.shape[1])
        inputs = inputs._replace(lengths=jnp.where(bad, 0, inputs.lengths))
    out, after, states, windows = run(options, inputs, state, slots)
    if bad is not None:
        out = jnp.where(bad[:, None, None, None], jnp.asarray(jnp.nan, out.dtype), out)
    return GatedDeltaNetStepOutput(out, after, windows, states)


# The kernels come last until they have been measured on a GPU.
_IMPLEMENTATIONS = {
    "reference": _dispatch.Implementation(reference.step),
    "mosaic_gpu": _dispatch.Implementation(
        functools.partial(step.run, "mosaic_gpu"), tuning.mosaic_gpu_reason
    ),
    "triton": _dispatch.Implementation(functools.partial(step.run, "triton"), tuning.triton_reason),
}


def _call(inputs: Inputs, state: jax.Array, slots: jax.Array | None) -> tuning.Call:
    floats = inputs._replace(lengths=None)
    return tuning.Call(
        dtypes=[x.dtype for x in jax.tree.leaves(floats)],
        state_dtype=step.state_dtype(state, inputs.mixed),
        key_dim=state.shape[2],
        value_dim=state.shape[3],
        is_varying=_sharding.is_varying((inputs, state, slots)),
        width=inputs.conv_kernel.shape[0],
        channels=inputs.mixed.shape[3],
    )


def _check(inputs: Inputs, state: jax.Array, slots: jax.Array | None) -> dict[str, int]:
    pool = "B" if slots is None else "num_slots"
    sizes: dict[str, int] = {}
    _checks.check_array("A_log", inputs.A_log, "Hk n", sizes)
    sizes["Hv"] = sizes["Hk"] * sizes["n"]
    sizes["2*n"] = 2 * sizes["n"]
    _checks.check_array("state", state, f"{pool} Hv Dk Dv", sizes)
    sizes["C"] = 2 * sizes["Dk"] + sizes["n"] * sizes["Dv"]
    _checks.check_array("mixed", inputs.mixed, "B T Hk F", sizes)
    if sizes["F"] < sizes["C"]:
        raise ValueError(
            f"`mixed` must have at least C = 2 Dk + n Dv = {sizes['C']} channels, got F={sizes['F']}"
        )
    _checks.check_float("mixed", inputs.mixed)
    if not 1 <= sizes["T"] <= MAX_STEP_TOKENS:
        raise ValueError(
            f"`mixed` must hold 1 to {MAX_STEP_TOKENS} tokens, got T={sizes['T']}; "
            "use causal_conv1d and gated_delta_rule"
        )
    letters = {
        "logits": "B T Hk 2*n",
        "conv_kernel": "W Hk C",
        "conv_state": f"{pool} W Hk C",
        "conv_bias": "Hk C",
        "dt_bias": "Hk n",
    }
    for name, shape in letters.items():
        if getattr(inputs, name) is not None:
            _checks.check_array(name, getattr(inputs, name), shape, sizes)
            _checks.check_float(name, getattr(inputs, name))
    _checks.check_float("A_log", inputs.A_log)
    _checks.check_float("state", state)
    _checks.check_same_dtype(("mixed", "conv_state"), (inputs.mixed, inputs.conv_state))
    if sizes["W"] < 1:
        raise ValueError("`conv_kernel` must have at least one tap, got W=0")
    for name, array in (("lengths", inputs.lengths), ("slots", slots)):
        if array is not None:
            _checks.check_array(name, array, "B", sizes)
            _checks.check_integer(name, array)
    lengths = inputs.lengths
    if lengths is not None and not isinstance(lengths, jax.core.Tracer | jax.ShapeDtypeStruct):
        lengths = np.asarray(lengths)
        if ((lengths < 0) | (lengths > sizes["T"])).any():
            raise ValueError(f"`lengths` must lie in [0, T={sizes['T']}], got {lengths.tolist()}")
    return sizes
