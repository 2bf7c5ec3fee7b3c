"""Where kernels of the gated delta rule round, and what it costs: ours beside FLA's and FlashQLA's choices, emulated.

    python -m benchmarks.run delta_rule_rounding && python -m benchmarks.report

NumPy, forward, D = 128, C = 64, on the inputs of `tests/support/delta_cases.nasty_cases`. Only the roundings are
modelled: operands of matrix products are rounded to 16 bits where a library stores or feeds them so, sums are exact,
the state is float32 between chunks, the inverse is exact before it is rounded (its own method matters little then).
Errors are relative to the float64 token recurrence on the same rounded inputs, before the output's own rounding. The
three plans, in the symbols of docs/gated_delta_rule.md:

- FLA: `u = T (beta V)` and `w = T (beta since K)` stored, the state rounded for every product, updates rounded twice.
- FlashQLA: beta and Gamma folded into a rounded, gate-free T; residual and update rounded.
- ours: T keeps its unit diagonal, beta multiplies residuals in float32, T moves to the other operands (the folded
  form) and is rounded with care, to `T (I - E)`; with bfloat16 and with float16 operands.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import delta_cases
from tests.support.compare import relative_error

TESTS = ["tests/delta_rule/test_truth.py"]
CHUNK, DIM = 64, 128


def rounder(dtype):
    """Rounds float64 numbers to a 16-bit type and back."""
    return lambda x: np.asarray(x, np.float32).astype(dtype).astype(np.float64)


single = rounder(np.float32)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What every plan starts from, for one chunk of one head, in float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    between: np.ndarray
    since: np.ndarray
    until: np.ndarray
    scores: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        return np.tril(self.beta * (self.k @ self.k.T), -1)


def make_chunk(q, k, v, g, beta, scale) -> Chunk:
    total = np.cumsum(g)
    exponent = np.minimum(total[:, None] - total[None, :], 0.0)
    between = np.tril(np.exp(exponent))
    since, until = np.exp(total)[:, None], np.exp(total[-1] - total)[:, None]
    return Chunk(q, k, v, beta[:, None], between, since, until, scale * between * (q @ k.T))


def inverse(lower: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.eye(len(lower)) + lower)


def fla(c: Chunk, state, scale, r):
    t = r(inverse(c.between * c.overlap))
    u, w = r(t @ r(c.beta * c.v)), r(t @ r(c.beta * c.since * c.k))
    held = r(state)
    update = single(u - w @ held)
    out = scale * c.since * (c.q @ held) + r(c.scores) @ r(update)
    return out, c.k.T @ r(c.until * update)


def flash_qla(c: Chunk, state, scale, r):
    t = r(c.between * r(inverse(c.overlap)) * c.beta.T)
    held = r(state)
    update = single(t @ r(c.v - c.since * (c.k @ held)))
    out = scale * c.since * (c.q @ held) + r(c.scores) @ r(update)
    return out, c.k.T @ r(c.until * update)


def ours(c: Chunk, state, scale, r):
    t = inverse(c.between * c.overlap)
    t = r(t - t @ (t - r(t)))
    held = r(state)
    landing, scores = r(t.T @ r(c.until * c.k)), r(r(c.scores) @ t)
    write = r(c.beta * (c.v - c.since * (c.k @ held)))
    return scale * c.since * (c.q @ held) + scores @ write, landing.T @ write


BFLOAT16 = rounder(ml_dtypes.bfloat16)
PLANS: dict[str, tuple[Any, Any]] = {
    "ours": (ours, BFLOAT16),
    "ours, float16": (ours, rounder(np.float16)),
    "FLA": (fla, BFLOAT16),
    "FlashQLA": (flash_qla, BFLOAT16),
}


def emulate(case: delta_cases.Case, plan, r) -> dict[str, np.ndarray]:
    """`out` and `final_state` of a case of one row."""
    scale = case.query.shape[-1] ** -0.5
    group = case.value.shape[2] // case.key.shape[2]
    out, final = np.zeros_like(case.value), np.zeros_like(case.initial_state)
    for head in range(case.value.shape[2]):
        state = case.initial_state[0, head]
        for begin in range(0, case.value.shape[1], CHUNK):
            here = (0, slice(begin, begin + CHUNK), head)
            shared = (*here[:2], head // group)
            chunk = make_chunk(
                case.query[shared],
                case.key[shared],
                case.value[here],
                case.g[here],
                case.beta[here],
                scale,
            )
            out[here], written = plan(chunk, state, scale, r)
            state = single(chunk.since[-1] * state + written)
        final[0, head] = state
    return {"out": out, "final_state": final}


def row(name: str, case: delta_cases.Case) -> dict[str, Any]:
    """Errors of every plan on one input, whose query, key and value are rounded first."""
    narrow = {n: BFLOAT16(getattr(case, n)) for n in ("query", "key", "value")}
    case = dataclasses.replace(case, **narrow)
    out, final, _ = delta_cases.recurrence(case)
    exact = {"out": out, "final_state": final}
    found = {plan: emulate(case, *choices) for plan, choices in PLANS.items()}
    errors = {
        what: {plan: relative_error(found[plan][what], exact[what]) for plan in PLANS}
        for what in exact
    }
    return {"inputs": name, "length": case.value.shape[1], "relative_error": errors}


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row per input."""
    cases = delta_cases.nasty_cases(0, 64 if quick else 512, DIM)
    return [row(name, case) for name, case in cases.items()]
