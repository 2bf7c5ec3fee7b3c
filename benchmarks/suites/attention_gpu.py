"""Attention on an NVIDIA GPU: ours, cuDNN, tokamax, PyTorch's backends and FlashAttention, forward and backward.

    python -m benchmarks.run attention_gpu            # on an H100 or H200: tests, then every shape, under 8 minutes
    python -m benchmarks.run attention_gpu --quick    # anywhere: one toy shape, the kernels interpreted

Correctness first: errors (of the output, and the largest of the gradients) are relative to a float32 reference on 512
tokens of one batch row; `make test-gpu` runs the kernels' tests on the GPU itself. A peer that is not installed, or
refuses a shape, is left out with its reason in the row; a failure of ours stops the run, other than a refusal.
TFLOP/s counts the products of visible pairs, two forward and five backward, whatever an implementation computes.

How long it takes, estimated (it has not run on a GPU): about 150 programs of 2 seconds to compile (14 shapes, 5
implementations in JAX, 2 directions; 8 checks of each), and 12 calls each of 0.1 to 60 ms, 40 s in all: 6 minutes,
besides the tests, which are interpreted and take as long as on a CPU (`--no-tests` where they have just been run).
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from benchmarks.timing import paired

TESTS = ["tests/attention"]
# Queries of one call: enough blocks for every SM at any length, and 8 minutes for the whole suite.
TOKENS = 32768
CHECKED = 512


@dataclasses.dataclass(frozen=True)
class Shape:
    """One problem; `window` and `documents` need `causal`."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    causal: bool = True
    window: int | None = None
    documents: int = 1

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.length)

    @property
    def problem(self) -> str:
        """What shapes of different lengths have in common."""
        kind = "causal" if self.causal else "full"
        kind = f"window{self.window}" if self.window else kind
        kind = f"packed{self.documents}" if self.documents > 1 else kind
        return f"{self.heads}/{self.kv_heads} D{self.dim} {kind}"

    @property
    def label(self) -> str:
        return f"T{self.length} {self.problem}"

    def flops(self, products: int) -> float:
        """Operations of `products` matrix products over visible pairs."""
        length = self.length / self.documents
        pairs = length**2
        if self.causal:
            window = min(self.window or length, length)
            pairs = window * (window + 1) / 2 + (length - window) * window
        return products * 2.0 * self.batch * self.documents * self.heads * self.dim * pairs


LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHAPES = (
    *(Shape(length) for length in LENGTHS),
    *(Shape(length, causal=False) for length in (2048, 8192)),
    *(Shape(length, heads=16, kv_heads=2, dim=256) for length in (2048, 8192)),
    *(Shape(length, kv_heads=32, dim=64) for length in (2048, 8192)),
    Shape(8192, window=1024),
    Shape(8192, documents=8),
)
TOY = Shape(128, heads=2, kv_heads=1, dim=64)


def inputs(shape: Shape, batch: int) -> tuple[list[jax.Array], jax.Array | None]:
    """Query, key, value, gradient of the output; and segment ids of equal documents."""
    random = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    arrays = [
        jnp.asarray(random.normal(size=(batch, shape.length, n, shape.dim)), jnp.bfloat16)
        for n in heads
    ]
    if shape.documents == 1:
        return arrays, None
    ids = np.arange(shape.length) // (shape.length // shape.documents)
    return arrays, jnp.asarray(np.broadcast_to(ids, (batch, shape.length)), jnp.int32)


def ours(shape: Shape, ids, implementation: str) -> Callable[..., jax.Array]:
    return lambda query, key, value: pk.gqa_attention(
        query,
        key,
        value,
        is_causal=shape.causal,
        sliding_window=shape.window,
        query_segment_ids=ids,
        kv_segment_ids=ids,
        implementation=implementation,
    )


def cudnn(shape: Shape, ids) -> Callable[..., jax.Array]:
    if ids is not None:
        raise NotImplementedError("jax.nn.dot_product_attention has no segment ids")
    window = None if shape.window is None else (shape.window - 1, 0)
    return lambda query, key, value: jax.nn.dot_product_attention(
        query, key, value, is_causal=shape.causal, local_window_size=window, implementation="cudnn"
    )


def tokamax(shape: Shape, ids) -> Callable[..., jax.Array]:
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("tokamax is not installed")
    if ids is not None or shape.window is not None:
        raise NotImplementedError("compared on causal and full attention only")
    import tokamax

    return lambda query, key, value: tokamax.dot_product_attention(
        query, key, value, is_causal=shape.causal, implementation="mosaic"
    )


def blockwise(shape: Shape, ids) -> Callable[..., jax.Array]:
    if shape.length > 4096:
        raise NotImplementedError("a baseline, not a rival: compared up to T = 4096")
    return ours(shape, ids, "blockwise")


OURS = ("mosaic_gpu", "mosaic_gpu_atomic", "blockwise")
JAX_PEERS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": lambda shape, ids: ours(shape, ids, "mosaic_gpu"),
    "mosaic_gpu_atomic": lambda shape, ids: ours(shape, ids, "mosaic_gpu_atomic"),
    "blockwise": blockwise,
    "cudnn": cudnn,
    "tokamax": tokamax,
}


def jax_calls(attention, arrays) -> dict[str, Callable[[], Any]]:
    """Forward alone, and forward with backward."""
    *operands, d_out = arrays

    def both(query, key, value, d_out):
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(d_out)

    forward, backward = jax.jit(attention), jax.jit(both)
    return {"forward": lambda: forward(*operands), "both": lambda: backward(*operands, d_out)}


def torch_calls(shape: Shape, arrays) -> dict[str, dict[str, Callable[[], Any]]]:
    """PyTorch's backends, and FlashAttention where a wheel of it is installed, on the same numbers, each call waited
    for; empty without a GPU build of torch."""
    if importlib.util.find_spec("torch") is None or shape.documents > 1:
        return {}
    import torch
    from torch.nn import attention as backends

    if not torch.cuda.is_available():
        return {}
    *operands, d_out = (
        torch.from_numpy(np.array(x, np.float32)).to("cuda", torch.bfloat16) for x in arrays
    )
    operands = [x.requires_grad_() for x in operands]

    def waited(call):
        call()
        torch.cuda.synchronize()

    def calls(forward):
        both = lambda: torch.autograd.grad(forward(), operands, d_out)
        return {"forward": lambda: waited(forward), "both": lambda: waited(both)}

    def sdpa(backend):
        heads_first = [x.transpose(1, 2) for x in operands]
        with backends.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=shape.causal, enable_gqa=True
            )
        return out.transpose(1, 2)

    found = {}
    if shape.window is None:
        kinds = backends.SDPBackend
        found["torch cudnn"] = calls(lambda: sdpa(kinds.CUDNN_ATTENTION))
        found["torch flash"] = calls(lambda: sdpa(kinds.FLASH_ATTENTION))
    flash = flash_attention()
    if flash is not None:
        window = (-1, -1) if shape.window is None else (shape.window - 1, 0)
        options = {"causal": shape.causal, "window_size": window}
        found["FlashAttention"] = calls(lambda: flash(*operands, **options))
    return found


def flash_attention() -> Callable[..., Any] | None:
    """FlashAttention's function, of version 3 before version 2, where its wheel is installed."""
    for module in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(module) is not None:
            function = importlib.import_module(module).flash_attn_func
            # Version 3 gives the lse too in some releases.
            return lambda *arrays, **options: _first(function(*arrays, **options))
    return None


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def ceiling(quick: bool) -> float:
    """TFLOP/s of a large bfloat16 matrix product in the same run."""
    size = 256 if quick else 8192
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    seconds = paired({"matmul": lambda: product(x)}, rounds=3 if quick else 20)["matmul"]["median"]
    return 2.0 * size**3 / seconds / 1e12


def error(name: str, shape: Shape) -> dict[str, float]:
    """Relative error of the output, and the largest of the gradients, on a short piece, against float32."""
    short = dataclasses.replace(
        shape,
        length=min(shape.length, CHECKED),
        window=shape.window and min(shape.window, CHECKED // 4),
    )
    return _error(name, short)


@functools.cache
def _error(name: str, short: Shape) -> dict[str, float]:
    arrays, ids = inputs(short, 1)
    found = jax_calls(JAX_PEERS[name](short, ids), arrays)["both"]()
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = jax_calls(ours(short, ids, "reference"), wide)["both"]()

    def relative(ours, theirs) -> float:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    gaps = jax.tree.map(relative, found, expected)
    return {"forward": gaps[0], "backward": max(gaps[1])}


def measure_shape(shape: Shape, rounds: int, peak: float) -> list[dict[str, Any]]:
    """Rows of one shape: every implementation, forward and (forward + backward) - forward.

    `peak` is the matrix product's TFLOP/s, or 0 for an interpreted toy, whose seconds mean nothing.
    """
    arrays, ids = inputs(shape, shape.batch if peak else 1)
    rows: list[dict[str, Any]] = []
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, make in JAX_PEERS.items():
        try:
            errors[name] = error(name, shape)
            calls[name] = jax_calls(make(shape, ids), arrays)
            jax.block_until_ready(calls[name]["both"]())
        except Exception as reason:
            if name in OURS and not isinstance(reason, NotImplementedError):
                raise  # a refusal in words is no failure
            calls.pop(name, None)
            first = (str(reason) or type(reason).__name__).splitlines()[0]
            rows.append({"shape": shape.label, "implementation": name, "left_out": first})
    for name, pair in torch_calls(shape, arrays).items():
        try:
            pair["both"]()
            calls[name] = pair
        except RuntimeError as reason:
            first = str(reason).splitlines()[0]
            rows.append({"shape": shape.label, "implementation": name, "left_out": first})
    forward = paired({name: pair["forward"] for name, pair in calls.items()}, rounds=rounds)
    both = paired({name: pair["both"] for name, pair in calls.items()}, rounds=rounds)
    for name in calls:
        backward = both[name]["median"] - forward[name]["median"]
        times = {"forward": (forward[name]["median"], 2), "backward": (backward, 5)}
        for direction, (seconds, products) in times.items():
            row = {"shape": shape.label, "implementation": name, "direction": direction}
            row |= {"length": shape.length, "problem": shape.problem}
            row |= {"seconds": seconds, "relative_error": errors.get(name, {}).get(direction)}
            if peak and seconds > 0:
                rate = shape.flops(products) / seconds / 1e12
                row |= {"tflops": rate, "of_matmul": rate / peak}
            rows.append(row)
    return rows


def measure(quick: bool) -> list[dict[str, Any]]:
    """All shapes on a GPU; one toy shape, interpreted, with `quick` on a machine without one."""
    if jax.default_backend() != "gpu":
        if not quick:
            raise SystemExit("attention_gpu needs an NVIDIA GPU; --quick interprets a toy shape")
        from tests.support.mosaic_gpu_interpreter import interpreted

        with interpreted():
            return measure_shape(TOY, rounds=1, peak=0.0)
    peak = ceiling(quick)
    rows = [{"matmul_tflops": peak}]
    for shape in SHAPES[:1] if quick else SHAPES:
        rows += measure_shape(shape, rounds=3 if quick else 10, peak=peak)
    return rows
