"""The parts around the delta rule in a Gated DeltaNet layer, on an NVIDIA GPU: the convolution, and a decode step.

    python -m benchmarks.run deltanet_gpu            # on an H100 or H200
    python -m benchmarks.run deltanet_gpu --quick    # anywhere: toy shapes, the kernels interpreted

`causal_conv1d_qkv` (forward, and with the gradients of projection and filter) and `gated_deltanet_step`, each by every
implementation, held to float64 on a short piece before it is timed. Calls are chained in a `lax.scan`. Both are bound
by memory: `of_copy` is the least that a call must read and write, over its time, over the rate of a large copy in the
same run. FLA's and Mamba's convolutions are no peers here: neither normalises nor splits in the same pass.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from benchmarks.suites.delta_rule_gpu import CHAINED, check, copy_rate, where_it_runs
from benchmarks.timing import paired
from pallas_kernels import _dispatch
from tests.support import conv_cases, deltanet_cases
from tests.support.compare import DELTA_RULE_TOLERANCES

TESTS = [
    "tests/causal_conv",
    "tests/deltanet",
    "tests/causal_conv/test_kernels.py",
    "tests/deltanet/test_step_kernels.py",
]
CHECKED_TOKENS, CHECKED_ROWS = 130, 2
WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution over `length` tokens, or with `step` a decode step of `rows` rows."""

    rows: int
    length: int
    key_heads: int = 16
    group: int = 2
    dim: int = 128
    step: bool = False

    @property
    def label(self) -> str:
        heads = f"{self.key_heads}/{self.key_heads * self.group} D{self.dim}"
        return f"{self.rows}x{self.length} {heads}{' step' if self.step else ' convolution'}"

    @property
    def channels(self) -> int:
        """Of a key head: query, key and its values."""
        return (2 + self.group) * self.dim

    def least_bytes(self, backward: bool) -> float:
        """Inputs read once, outputs written once, in bfloat16; a step's state is float32."""
        heads = self.rows * self.key_heads
        tokens = 2.0 * heads * self.channels * self.length
        if not self.step:  # in, out; then in and the outputs' gradients, and the input's
            return (5 if backward else 2) * tokens
        out = 2.0 * heads * self.group * self.dim * self.length
        state, windows = heads * self.group * self.dim**2, heads * self.channels * WIDTH
        return 2 * (4.0 * state + 2.0 * windows) + tokens + out


SHAPES = (
    Shape(1, 8192),
    Shape(1, 32768),
    *(Shape(rows, 1, step=True) for rows in (1, 64, 256)),
    Shape(64, 4, step=True),
)
TOY = (Shape(1, 70, 1, 2, 64), Shape(2, 1, 1, 2, 64, step=True))


def short(shape: Shape) -> Shape:
    """The piece on which results are checked."""
    rows, length = min(shape.rows, CHECKED_ROWS), min(shape.length, CHECKED_TOKENS)
    return dataclasses.replace(shape, rows=rows, length=length, key_heads=1)


def narrow(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.bfloat16)


def convolution(shape: Shape) -> tuple[tuple[jax.Array, ...], dict[str, Any], dict[str, Any]]:
    """Operands, options, and the exact results of a case that bfloat16 holds."""
    dims = {"key_dim": shape.dim, "value_dim": shape.dim}
    sizes = {"batch": shape.rows, "heads": shape.key_heads, "group": shape.group}
    arrays = conv_cases.random_qkv(0, shape.length, WIDTH, dtype=jnp.bfloat16, **dims, **sizes)
    exact: dict[str, Any] = {}
    if shape == short(shape):
        ids = np.zeros((shape.rows, shape.length), int)
        found = conv_cases.oracle_qkv(*arrays, ids, normalise=True, **dims)
        exact = dict(zip(("query", "key", "value"), found[:3], strict=True))
    mixed, weight, bias, state = map(narrow, arrays)
    options = {**dims, "bias": bias, "initial_state": state, "use_qk_l2norm": True}
    return (mixed, weight), options, exact


def step(shape: Shape) -> tuple[tuple[jax.Array, ...], dict[str, Any], dict[str, Any]]:
    """As `convolution`, of a decode step."""
    case = deltanet_cases.random_case(
        0,
        rows=shape.rows,
        length=shape.length,
        key_heads=shape.key_heads,
        group=shape.group,
        key_dim=shape.dim,
        value_dim=shape.dim,
        width=WIDTH,
    )
    wide = ("state", "A_log", "dt_bias")
    given = {
        name: jnp.asarray(x, jnp.float32) if name in wide else narrow(x) for name, x in case.items()
    }
    exact: dict[str, Any] = {}
    if shape == short(shape):
        numbers = {name: np.asarray(x).astype(np.float64) for name, x in given.items()}
        out, state, _, _ = deltanet_cases.truth(numbers)
        exact = {"out": out, "final_state": state}
    operands = tuple(given.pop(name) for name in ("mixed", "logits", "state", "conv_state"))
    return operands, given, exact


def checked(shape: Shape, name: str) -> dict[str, float]:
    """Relative errors on the short piece; raises where one is too large."""
    piece = short(shape)
    operands, options, exact = (step if shape.step else convolution)(piece)
    operator = pk.gated_deltanet_step if shape.step else pk.causal_conv1d_qkv
    run = jax.jit(lambda *x: operator(*x, **options, implementation=name))
    found = jax.block_until_ready(run(*operands))
    limits = {what: 2.0 * limit for what, limit in DELTA_RULE_TOLERANCES["bfloat16"].items()}
    return check(name, {what: getattr(found, what) for what in exact}, exact, limits)


def chains(shape: Shape, name: str, chained: int) -> dict[str, Callable[[], Any]]:
    """Chains of calls by direction, none of which can start before the last."""
    operands, options, _ = (step if shape.step else convolution)(shape)
    if shape.step:
        mixed, logits, *states = operands

        def advance(states, _):
            made = pk.gated_deltanet_step(mixed, logits, *states, **options, implementation=name)
            made = lax.optimization_barrier(made)
            return [made.final_state, made.final_conv_state], made.out.ravel()[0]

        run = jax.jit(lambda states: lax.scan(advance, states, length=chained))
        return {"step": lambda: run(states)}

    def forward(mixed, weight):
        return pk.causal_conv1d_qkv(mixed, weight, **options, implementation=name)[:3]

    def both(mixed, weight):
        made, pull = jax.vjp(forward, mixed, weight)
        return pull(made)

    def chain(function):
        def body(last, _):
            given = lax.optimization_barrier((*operands, last))
            made = lax.optimization_barrier(function(*given[:2]))  # all of it, whoever uses it
            return made[0].ravel()[0], None

        run = jax.jit(lambda last: lax.scan(body, last, length=chained))
        return lambda: run(jnp.zeros((), jnp.bfloat16))

    return {"forward": chain(forward), "both": chain(both)}


def reasons(shape: Shape) -> dict[str, str | None]:
    """Our implementations, and why each cannot run the shape, if so."""
    operands, options, _ = (step if shape.step else convolution)(short(shape))
    operator = "gated_deltanet_step" if shape.step else "causal_conv1d_qkv"
    on_gpu = jax.default_backend() == "gpu"
    with (
        contextlib.nullcontext() if on_gpu else _dispatch.targeting(_dispatch.Target("gpu", "9.0"))
    ):
        found = pk.explain(operator, *operands, **options).reasons
    return {n: None if not r or r.endswith("preferred here") else r for n, r in found.items()}


def measure_shape(
    shape: Shape, *, rounds: int, chained: int, copied: float
) -> list[dict[str, Any]]:
    """Rows of one shape; `copied`: the copy's bytes per second, 0 for an interpreted toy whose seconds mean nothing."""
    rows, calls, about = [], {}, {}
    for name, reason in reasons(shape).items():
        base = {"shape": shape.label, "implementation": name}
        if reason:
            rows.append(base | {"left_out": reason})
            continue
        with where_it_runs(name):
            about[name] = base | {"relative_error": checked(shape, name), "launched": "lax.scan"}
            calls[name] = chains(shape, name, chained)
            jax.block_until_ready([call() for call in calls[name].values()])
    if not copied:
        return rows + [row | {"checked": True} for row in about.values()]
    for direction in ("forward", "both", "step"):
        chosen = {name: pair[direction] for name, pair in calls.items() if direction in pair}
        for name, seconds in (paired(chosen, rounds=rounds) if chosen else {}).items():
            once = seconds["median"] / chained
            rate = shape.least_bytes(direction == "both") / once
            row = {"direction": direction, "seconds": once, "of_copy": rate / copied}
            rows.append(about[name] | row)
    return rows


def measure(quick: bool) -> list[dict[str, Any]]:
    """All shapes on a GPU; toy shapes, interpreted, with `quick` on a machine without one."""
    if jax.default_backend() != "gpu":
        if not quick:
            raise SystemExit("deltanet_gpu needs an NVIDIA GPU; --quick interprets toy shapes")
        return [row for s in TOY for row in measure_shape(s, rounds=1, chained=2, copied=0.0)]
    copied = copy_rate(quick)
    rows: list[dict[str, Any]] = [{"copy_bytes_per_second": copied}]
    for shape in (SHAPES[0], SHAPES[2]) if quick else SHAPES:
        rows += measure_shape(
            shape, rounds=3 if quick else 10, chained=2 if quick else CHAINED, copied=copied
        )
    return rows
