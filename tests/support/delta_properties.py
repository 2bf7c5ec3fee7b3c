"""What every implementation of the gated delta rule must satisfy, as functions of a case and the operator's options."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gated_delta_rule
from pallas_kernels.delta_rule import tuning
from tests.support import delta_cases
from tests.support.compare import DELTA_RULE_TOLERANCES, relative_error


@functools.partial(jax.jit, static_argnames=("options",))
def _evaluate(operands, cotangents, segment_ids, cu_seqlens, options):
    *tokens, initial_state = operands

    def loss(tokens, initial_state):
        out, final = gated_delta_rule(
            *tokens, initial_state=initial_state, segment_ids=segment_ids, cu_seqlens=cu_seqlens,
            **dict(options),
        )  # fmt: skip
        wide = final.dtype
        total = jnp.sum(out.astype(wide) * cotangents[0]) + jnp.sum(final * cotangents[1])
        return total, (out, final)

    grads, (out, final) = jax.grad(loss, (0, 1), has_aux=True)(tuple(tokens), initial_state)
    return out, final, (*grads[0], grads[1])


def cast(case: delta_cases.Case, dtype) -> tuple[jax.Array, ...]:
    """Operands for the operator: gates and state stay float32 beside 16-bit queries, keys, values and beta."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    query, key, value, g, beta, state = case.operands
    narrow = tuple(jnp.asarray(x).astype(dtype) for x in (query, key, value))
    return (
        *narrow,
        jnp.asarray(g, wide),
        jnp.asarray(beta).astype(dtype),
        jnp.asarray(state, wide),
    )


def evaluate(case: delta_cases.Case, dtype=jnp.float32, *, lanes: int | None = None, **options):
    """`(out, final_state, gradients by name)` of the operator. `lanes` forces so many segments side by side."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    cotangents = tuple(jnp.asarray(x, wide) for x in (case.d_out, case.d_final))
    places = (
        None if x is None else jnp.asarray(x, jnp.int32)
        for x in (case.segment_ids, case.cu_seqlens)
    )  # fmt: skip
    run = _evaluate if lanes is None else jax.jit(_evaluate.__wrapped__, static_argnames="options")
    chosen = tuning.segments if lanes is None else (lambda chunks, platform: min(lanes, chunks))
    with mock.patch.object(tuning, "segments", chosen):
        out, final, grads = run(
            cast(case, dtype), cotangents, *places, options=tuple(sorted(options.items()))
        )
    return out, final, dict(zip(delta_cases.NAMES, grads, strict=True))


def check_truth(
    case: delta_cases.Case, dtype=jnp.float32, *, strong_decay=False, **options
) -> None:
    """Value, final state and every gradient against the float64 recurrence on the same (rounded) numbers.

    `strong_decay` takes the wider tolerance for the gradient of g.
    """
    rounded = [np.asarray(x).astype(np.float64) for x in cast(case, dtype)]
    exact = dataclasses.replace(case, **dict(zip(delta_cases.NAMES, rounded, strict=True)))
    scale = options.get("scale")
    out, final, grads = delta_cases.recurrence(exact, scale=scale)
    got_out, got_final, got = evaluate(case, dtype, **options)
    limits = DELTA_RULE_TOLERANCES[jnp.dtype(dtype).name]
    errors = {"out": relative_error(got_out, out), "final_state": relative_error(got_final, final)}
    errors |= {name: relative_error(got[name], grads[name]) for name in delta_cases.NAMES}
    allowed = {name: limits.get(name, limits["gradient"]) for name in errors}
    if strong_decay:
        allowed["g"] = limits["g, strong decay"]
    wrong = {n: f"{e:.1e} > {allowed[n]:.1e}" for n, e in errors.items() if not e <= allowed[n]}
    assert not wrong, f"relative errors against the float64 recurrence: {wrong}"
