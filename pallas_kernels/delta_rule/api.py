"""Public gated delta rule: contract, validation, choice of implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _dispatch
from pallas_kernels.delta_rule import reference


class GatedDeltaRuleOutput(NamedTuple):
    """Output and final state.

    Attributes:
      out: `[B, T, Hv, Dv]`, the value's dtype.
      final_state: `[B, Hv, Dk, Dv]` float32 (float64 for float64 inputs).
    """

    out: jax.Array
    final_state: jax.Array


def gated_delta_rule(
    query: Float[Array, "B T Hk Dk"],
    key: Float[Array, "B T Hk Dk"],
    value: Float[Array, "B T Hv Dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    *,
    initial_state: Float[Array, "B Hv Dk Dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Gated delta rule over whole sequences; `g` is the natural-log decay (<= 0)."""
    _check(query, key, value, g, beta, initial_state, segment_ids)
    _dispatch.resolve("gated_delta_rule", implementation, _REASONS)
    batch, _, _, key_dim = query.shape
    heads, value_dim = value.shape[2:]
    compute = jnp.promote_types(value.dtype, jnp.float32)
    if use_qk_l2norm:
        query, key = reference.l2_normalize(query), reference.l2_normalize(key)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value_dim), compute)
    out, states = reference.recurrent(
        query, key, value, g, beta, initial_state=initial_state, segment_ids=segment_ids,
        scale=key_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    final = states[:, -1] if value.shape[1] else initial_state.astype(compute)
    return GatedDeltaRuleOutput(out, final)


def gated_delta_rule_step(
    query: Float[Array, "B T Hk Dk"],
    key: Float[Array, "B T Hk Dk"],
    value: Float[Array, "B T Hv Dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    state: Float[Array, "B Hv Dk Dv"],
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    implementation: str | None = None,
) -> GatedDeltaRuleOutput:
    """Advances `state` by T <= 8 tokens."""
    if not 1 <= query.shape[1] <= 8:
        raise ValueError(
            f"`query` must hold 1 to 8 tokens, got T={query.shape[1]}; use gated_delta_rule"
        )
    return gated_delta_rule(
        query, key, value, g, beta, initial_state=state, scale=scale, use_qk_l2norm=use_qk_l2norm,
        implementation=implementation,
    )  # fmt: skip


def explain_gated_delta_rule(
    query, key, value, g, beta, *, initial_state=None, segment_ids=None, **options
) -> _dispatch.Explanation:
    """Implementation choice for `gated_delta_rule`."""
    del options
    _check(query, key, value, g, beta, initial_state, segment_ids)
    return _dispatch.explain("gated_delta_rule", _REASONS)


def explain_gated_delta_rule_step(
    query, key, value, g, beta, state, **options
) -> _dispatch.Explanation:
    """Implementation choice for `gated_delta_rule_step`."""
    del options
    _check(query, key, value, g, beta, state, None)
    return _dispatch.explain("gated_delta_rule_step", _REASONS)


_REASONS: dict[str, str | None] = {"reference": None}


def _check(query, key, value, g, beta, initial_state, segment_ids) -> None:
    sizes: dict[str, int] = {}
    _checks.check_array("query", query, "B T Hk Dk", sizes)
    _checks.check_array("key", key, "B T Hk Dk", sizes)
    _checks.check_array("value", value, "B T Hv Dv", sizes)
    _checks.check_array("g", g, "B T Hv", sizes)
    _checks.check_array("beta", beta, "B T Hv", sizes)
    for name, array in (("query", query), ("key", key), ("value", value), ("g", g), ("beta", beta)):
        _checks.check_float(name, array)
    _checks.check_multiple("Hv", sizes["Hv"], "Hk", sizes["Hk"])
    if initial_state is not None:
        _checks.check_array("initial_state", initial_state, "B Hv Dk Dv", sizes)
    if segment_ids is not None:
        _checks.check_array("segment_ids", segment_ids, "B T", sizes)
        _checks.check_integer("segment_ids", segment_ids)
