"""The gated delta rule on an NVIDIA GPU: ours, FLA, FlashQLA and FlashInfer; forward, backward and decode.

    python -m benchmarks.run delta_rule_gpu            # on an H100 or H200
    python -m benchmarks.run delta_rule_gpu --quick    # anywhere: toy shapes, the kernels interpreted

Correctness first: every implementation is held to a float64 token recurrence on a short piece before it is timed: ours
to the tolerances of FLA's tests, a peer to 2e-2. An implementation of ours that fails, or is wrong, stops the run; one
that its own `unsupported_reason` refuses, and a peer that is not installed, fails or is wrong, is left out with the
reason in its row.

A call lasts 0.05 to 3 ms, so calls are chained on the device and their launches amortised: ours in a `lax.scan` whose
carry is the state (and, in the backward, the gradient), a peer's replayed from a CUDA graph, or where that cannot be
captured enqueued one after another (`launched` in the row). Bandwidth counts the state read once and written once.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from benchmarks.suites.delta_rule_floor import PUBLISHED
from benchmarks.timing import paired
from pallas_kernels import _dispatch
from pallas_kernels.delta_rule.step import triton
from tests.support import delta_cases
from tests.support.compare import DELTA_RULE_TOLERANCES, relative_error
from tests.support.mosaic_gpu_interpreter import interpreted

TESTS = ["tests/delta_rule"]
RULES, STEPS = ("mosaic_gpu", "chunked"), ("mosaic_gpu", "triton", "reference")
CHECKED_TOKENS, CHECKED_ROWS = 192, 4
PEER_TOLERANCE = 2e-2
CHAINED = 20  # calls per measurement


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` sequences of `length` tokens; with `state_dtype` a decode step."""

    rows: int
    length: int
    heads: int = 32
    key_heads: int = 16
    dim: int = 128
    state_dtype: str | None = None

    @property
    def label(self) -> str:
        heads = f"{self.key_heads}/{self.heads} D{self.dim}"
        kind = f" decode, {self.state_dtype} state" if self.state_dtype else ""
        return f"{self.rows}x{self.length} {heads}{kind}"

    @property
    def state_bytes(self) -> float:
        """State in and out."""
        size = jnp.dtype(self.state_dtype or "float32").itemsize
        return 2.0 * self.rows * self.heads * self.dim**2 * size


SHAPES = (
    Shape(1, 2048),
    Shape(1, 8192),
    Shape(1, 32768),
    Shape(4, 8192),
    Shape(8, 1024),
    Shape(1, 8192, heads=64),
    Shape(1, 32768, heads=64),
)
DECODE = (
    *(Shape(rows, 1, state_dtype="float32") for rows in (1, 64, 256)),
    *(Shape(rows, 1, state_dtype="bfloat16") for rows in (64, 256)),
    Shape(64, 4, state_dtype="float32"),
)
TOY = (Shape(1, 128, 2, 1, 64), Shape(2, 1, 2, 1, 64, "float32"))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One set of inputs, as float64 arrays of numbers that the narrow types hold exactly.

    `a` and `b` are what a layer computes the gates from, with `A_log` and `dt_bias` zero: FlashInfer's decode takes
    them.
    """

    case: delta_cases.Case
    a: np.ndarray
    b: np.ndarray
    shape: Shape


def rounded(x: np.ndarray, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return np.asarray(jnp.asarray(x, dtype)).astype(np.float64)


def problem(shape: Shape) -> Problem:
    """Unit keys and queries, gates as a freshly initialised layer makes them."""
    random = np.random.default_rng(0)
    rows, length, heads, dim = shape.rows, shape.length, shape.heads, shape.dim
    normal = lambda *sizes: random.standard_normal(sizes, dtype=np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    a, b = rounded(normal(rows, length, heads) - 3.0), rounded(normal(rows, length, heads))
    case = delta_cases.Case(
        query=rounded(unit(normal(rows, length, shape.key_heads, dim))),
        key=rounded(unit(normal(rows, length, shape.key_heads, dim))),
        value=rounded(normal(rows, length, heads, dim)),
        g=rounded(-np.log1p(np.exp(a)), jnp.float32),
        beta=rounded(1.0 / (1.0 + np.exp(-b)), jnp.float32),
        initial_state=rounded(
            0.1 * normal(rows, heads, dim, dim), shape.state_dtype or jnp.float32
        ),
        d_out=rounded(normal(rows, length, heads, dim)),
        d_final=rounded(0.1 * normal(rows, heads, dim, dim), jnp.float32),
    )
    return Problem(case, a, b, shape)


def short(shape: Shape) -> Shape:
    """The piece on which results are checked."""
    rows, length = min(shape.rows, CHECKED_ROWS), min(shape.length, CHECKED_TOKENS)
    if shape.state_dtype is None:
        rows = 1
    return dataclasses.replace(shape, rows=rows, length=length)


class Left(Exception):
    """Why an implementation is left out."""


def check(
    name: str, found: dict[str, Any], exact: dict[str, Any], limits: dict[str, float]
) -> dict[str, float]:
    """Relative errors of what an implementation found; raises when one is over its limit."""
    errors = {what: relative_error(found[what], exact[what]) for what in found}
    over = {w: f"{e:.1e}" for w, e in errors.items() if not e <= limits.get(w, limits["gradient"])}
    if over:
        raise Left(f"{name} is wrong: relative errors {over}")
    return errors


def exact_results(given: Problem) -> dict[str, Any]:
    out, final, gradients = delta_cases.recurrence(given.case)
    return {"out": out, "final_state": final, **gradients}


# --- ours ------------------------------------------------------------------------------------------------------------


def jax_operands(given: Problem) -> tuple[jax.Array, ...]:
    case, narrow = given.case, jnp.bfloat16
    state = jnp.asarray(case.initial_state, given.shape.state_dtype or jnp.float32)
    arrays = (jnp.asarray(x, narrow) for x in (case.query, case.key, case.value))
    return *arrays, *(jnp.asarray(x, jnp.float32) for x in (case.g, case.beta)), state


def rule(implementation: str) -> Callable[..., Any]:
    return lambda *x: tuple(
        pk.gated_delta_rule(*x[:5], initial_state=x[5], implementation=implementation)
    )


def step(implementation: str) -> Callable[..., Any]:
    return lambda *x: tuple(pk.gated_delta_rule_step(*x, implementation=implementation)[:2])


def with_gradients(call):
    """`(out, final_state, gradients)`, all of them computed whoever uses them."""

    def both(operands, d_out, d_final):
        (out, final), pull = jax.vjp(call, *operands)
        return lax.optimization_barrier((out, final, pull((d_out, d_final))))

    return both


def ours(implementation: str, given: Problem, backward: bool) -> dict[str, Any]:
    """Results of one of our implementations."""
    operands = jax_operands(given)
    call = (step if given.shape.state_dtype else rule)(implementation)
    if not backward:
        return dict(zip(("out", "final_state"), jax.jit(call)(*operands), strict=True))
    d_out = jnp.asarray(given.case.d_out, jnp.bfloat16)
    d_final = jnp.asarray(given.case.d_final, jnp.float32)
    out, final, gradients = jax.jit(with_gradients(call))(operands, d_out, d_final)
    found = dict(zip(delta_cases.NAMES, gradients, strict=True))
    return {"out": out, "final_state": final, **found}


def our_calls(implementation: str, given: Problem, backward: bool, chained: int):
    """Chains of `chained` calls, by direction."""
    *tokens, state = jax_operands(given)
    call = (step if given.shape.state_dtype else rule)(implementation)
    d_out = jnp.asarray(given.case.d_out, jnp.bfloat16)

    @jax.jit
    def forward(tokens, state):
        def body(state, _):
            out, final = lax.optimization_barrier(call(*tokens, state))
            return final, out.ravel()[0]

        return lax.scan(body, state, length=chained)

    @jax.jit
    def both(tokens, state, d_out):
        def body(carry, _):
            state, d_out = carry
            out, final, gradients = with_gradients(call)((*tokens, state), d_out, state)
            return (final, gradients[2]), out.ravel()[0]

        return lax.scan(body, (state, d_out), length=chained)

    calls = {"forward": lambda: forward(tokens, state)}
    return calls | ({"both": lambda: both(tokens, state, d_out)} if backward else {})


def our_names(given: Problem) -> dict[str, str | None]:
    """Our implementations and why each cannot run these inputs, if so."""
    operands = jax_operands(given)
    decode = given.shape.state_dtype is not None
    on_gpu = jax.default_backend() == "gpu"
    operator = "gated_delta_rule_step" if decode else "gated_delta_rule"
    options = {} if decode else {"initial_state": operands[5]}
    with (
        contextlib.nullcontext() if on_gpu else _dispatch.targeting(_dispatch.Target("gpu", "9.0"))
    ):
        reasons = pk.explain(operator, *operands[: 6 if decode else 5], **options).reasons
    names = [name for name in (STEPS if decode else RULES) if name in reasons]
    return {
        name: None
        if not reasons[name] or reasons[name].endswith("preferred here")
        else reasons[name]
        for name in names
    }


# --- peers -----------------------------------------------------------------------------------------------------------


def torch_inputs(given: Problem) -> dict[str, Any]:
    """Tensors on the GPU. Raises `Left` without one."""
    if importlib.util.find_spec("torch") is None:
        raise Left("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Left("torch sees no GPU")
    case = given.case
    make = lambda x, dtype: torch.from_numpy(np.ascontiguousarray(x)).to("cuda", dtype)
    narrow, wide = torch.bfloat16, torch.float32
    of_state = getattr(torch, given.shape.state_dtype or "float32")
    return {
        **{name: make(getattr(case, name), narrow) for name in ("query", "key", "value", "d_out")},
        **{name: make(getattr(case, name), wide) for name in ("g", "beta", "d_final")},
        "initial_state": make(case.initial_state, of_state),
        "a": make(given.a, narrow),
        "b": make(given.b, narrow),
    }


def installed(module: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise Left(f"{module} is not installed")
    return importlib.import_module(module)


def fla(decode: bool) -> Callable[..., Any]:
    installed("fla")
    rules = importlib.import_module("fla.ops.gated_delta_rule")
    call = rules.fused_recurrent_gated_delta_rule if decode else rules.chunk_gated_delta_rule
    return lambda t: call(
        t["query"],
        t["key"],
        t["value"],
        t["g"],
        t["beta"],
        initial_state=t["initial_state"],
        output_final_state=True,
    )


def flash_qla(decode: bool) -> Callable[..., Any]:
    if decode:
        raise Left("compared on whole sequences only")
    call = installed("flash_qla").chunk_gated_delta_rule
    return lambda t: call(
        t["query"],
        t["key"],
        t["value"],
        t["g"],
        t["beta"],
        initial_state=t["initial_state"],
        output_final_state=True,
    )


def flashinfer(decode: bool) -> Callable[..., Any]:
    """Takes decays, not their logarithms, and holds states as `[N, H, Dv, Dk]`."""
    installed("flashinfer")
    import torch

    if decode:
        from flashinfer.gdn_decode import gated_delta_rule_decode

        def one(t):
            if t["query"].shape[1] != 1 or t["initial_state"].dtype != torch.float32:
                raise Left("compared on one token and a float32 state")
            zero = torch.zeros(t["a"].shape[-1], device="cuda")
            # In place: each call continues from the state of the last, but the check wants the given one untouched.
            return gated_delta_rule_decode(
                t["query"],
                t["key"],
                t["value"],
                t["initial_state"],
                zero,
                t["a"],
                zero,
                t["b"],
                use_qk_l2norm=False,
            )

        return one
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    def whole(t):
        rows, length = t["query"].shape[:2]
        flat = lambda x: x.reshape(rows * length, *x.shape[2:])
        bounds = torch.arange(rows + 1, device="cuda", dtype=torch.int64) * length
        out, final = chunk_gated_delta_rule(
            *(flat(t[name]) for name in ("query", "key", "value")),
            flat(t["g"].exp()),
            flat(t["beta"]),
            initial_state=t["initial_state"].transpose(-1, -2).contiguous(),
            output_final_state=True,
            cu_seqlens=bounds,
        )
        return out.reshape(rows, length, *out.shape[1:]), final.transpose(-1, -2)

    return whole


PEERS: dict[str, Callable[[bool], Callable[..., Any]]] = {
    "FLA": fla,
    "FlashQLA": flash_qla,
    "FlashInfer": flashinfer,
}
NO_BACKWARD = ("FlashInfer",)


def peer_results(call, given: Problem, backward: bool) -> dict[str, Any]:
    import torch

    tensors = torch_inputs(given)
    if backward:
        for name in delta_cases.NAMES:
            tensors[name].requires_grad_()
    out, final = call(tensors)
    found = {"out": out, "final_state": final}
    if backward:
        leaves = [tensors[name] for name in delta_cases.NAMES]
        gradients = torch.autograd.grad(
            [out, final], leaves, [tensors["d_out"], tensors["d_final"]]
        )
        found |= dict(zip(delta_cases.NAMES, gradients, strict=True))
    return {name: x.detach().float().cpu() for name, x in found.items()}


def peer_calls(call, given: Problem, backward: bool, chained: int):
    """Chains of calls by direction, and how they are launched."""
    import torch

    tensors = torch_inputs(given)
    leaves = [tensors[name].requires_grad_(backward) for name in delta_cases.NAMES]

    def forward():
        with torch.no_grad():
            call(tensors)

    def both():
        results = list(call(tensors))
        torch.autograd.grad(results, leaves, [tensors["d_out"], tensors["d_final"]])

    calls, launched = {}, "CUDA graph"
    for name, one in {"forward": forward, **({"both": both} if backward else {})}.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                one()
        torch.cuda.synchronize()
        replay = one
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                one()
            replay = graph.replay
        except RuntimeError:
            launched = "one by one"
        torch.cuda.synchronize()
        calls[name] = _waited(replay, chained)
    return calls, launched


def _waited(call, chained: int) -> Callable[[], None]:
    import torch

    def run():
        for _ in range(chained):
            call()
        torch.cuda.synchronize()

    return run


# --- measuring -------------------------------------------------------------------------------------------------------


def copy_rate(quick: bool) -> float:
    """Bytes per second of a large copy in the same run, read and written."""
    x = jnp.zeros((2**10 if quick else 2**28,), jnp.float32)
    add = jax.jit(lambda x: lax.fori_loop(0, CHAINED, lambda _, x: x + 1.0, x))
    seconds = paired({"copy": lambda: add(x)}, rounds=3)["copy"]["median"]
    return 2.0 * x.nbytes * CHAINED / seconds


@contextlib.contextmanager
def where_it_runs(name: str) -> Iterator[None]:
    """Without a GPU the kernels are interpreted."""
    contexts = {"mosaic_gpu": interpreted, "triton": triton.interpreted}
    if jax.default_backend() == "gpu" or name not in contexts:
        yield
        return
    with contexts[name]():
        yield


def measure_shape(
    shape: Shape, *, rounds: int, chained: int, copied: float
) -> list[dict[str, Any]]:
    """Rows of one shape; `copied`: the copy's bytes per second, 0 for an interpreted toy whose seconds mean nothing."""
    decode, backward = shape.state_dtype is not None, shape.state_dtype is None
    piece, full = problem(short(shape)), problem(shape)
    exact = exact_results(piece)
    # Twice what our tests allow is what FLA's allow: beyond that a result is wrong, not rounded.
    limits = {what: 2.0 * limit for what, limit in DELTA_RULE_TOLERANCES["bfloat16"].items()}
    rows, calls, about = [], {}, {}

    def left_out(name, reason):
        first = (str(reason) or type(reason).__name__).splitlines()[0]
        rows.append({"shape": shape.label, "implementation": name, "left_out": first})

    reasons = our_names(full)
    for name in STEPS if decode else RULES:
        if name not in reasons or reasons[name]:
            left_out(name, reasons.get(name, "not built"))
            continue
        with where_it_runs(name):
            found = jax.block_until_ready(ours(name, piece, backward))
            errors = check(name, found, exact, limits)
            calls[name] = our_calls(name, full, backward, chained)
            jax.block_until_ready([call() for call in calls[name].values()])
            about[name] = {"relative_error": errors, "launched": "lax.scan"}
    for name, make in PEERS.items():
        try:
            call, with_backward = make(decode), backward and name not in NO_BACKWARD
            errors = check(
                name,
                peer_results(call, piece, with_backward),
                exact,
                dict.fromkeys(("out", "final_state", "gradient"), PEER_TOLERANCE),
            )
            calls[name], launched = peer_calls(call, full, with_backward, chained)
            about[name] = {"relative_error": errors, "launched": launched}
        except Exception as reason:
            calls.pop(name, None)
            left_out(name, reason)
    times: dict[str, dict[str, float]] = {}
    for direction in ("forward", "both"):
        chosen = {name: pair[direction] for name, pair in calls.items() if direction in pair}
        measured = paired(chosen, rounds=rounds) if copied and chosen else {}
        times[direction] = {name: seconds["median"] / chained for name, seconds in measured.items()}
    for name in calls:
        rows += _rows(shape, name, about[name], times, copied)
    return rows


def _rows(shape: Shape, name: str, about, times, copied: float) -> list[dict[str, Any]]:
    base = {"shape": shape.label, "implementation": name, **about}
    if not copied:
        return [base | {"checked": True}]
    forward = times["forward"][name]
    row = base | {"direction": "decode" if shape.state_dtype else "forward", "seconds": forward}
    if shape.state_dtype:
        row |= {"of_copy": shape.state_bytes / forward / copied}
    found = [row]
    if name in times["both"]:
        found.append(base | {"direction": "backward", "seconds": times["both"][name] - forward})
    for row in found:
        key = (row["direction"], shape.rows, shape.length, shape.heads)
        if name in PUBLISHED.get(key, {}):
            row["published_seconds"] = PUBLISHED[key][name] / 1e3
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    """All shapes on a GPU; toy shapes, interpreted, with `quick` on a machine without one."""
    if jax.default_backend() != "gpu":
        if not quick:
            raise SystemExit("delta_rule_gpu needs an NVIDIA GPU; --quick interprets toy shapes")
        return [row for s in TOY for row in measure_shape(s, rounds=1, chained=2, copied=0.0)]
    copied = copy_rate(quick)
    rows: list[dict[str, Any]] = [{"copy_bytes_per_second": copied}]
    shapes = (SHAPES[0], DECODE[0]) if quick else SHAPES + DECODE
    for shape in shapes:
        rows += measure_shape(
            shape, rounds=3 if quick else 10, chained=2 if quick else CHAINED, copied=copied
        )
    return rows
