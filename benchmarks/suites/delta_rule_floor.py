"""What the gated delta rule costs at least on an H200, per shape: operations, bytes, chain; and what others published.

    python -m benchmarks.run delta_rule_floor && python -m benchmarks.report

Nothing is measured: every number follows from the constants of this file. Symbols as in docs/gated_delta_rule.md,
C = 64, D = Dk = Dv = 128, 16-bit operands, per token and value head unless said otherwise.

Operations. Forward, folded form (section 3 there): `K S`, `Q S`, `X^T R` are 6 D^2; `K K^T`, `Q K^T`, `X`, `Ph R` are
8 C D; `Ph = P T` 2 C^2. Backward (section 4): 14 D^2 + 20 C D + 2 C^2 and the replay of chunk-start states,
4 D^2 + 2 C D. The products `K K^T` and `Q K^T` belong to a key head, and are counted per value head.

Bytes, per token. `minimum`: inputs read once, outputs written once. `design`: what our plan of kernels moves: a
prologue reads keys and writes T; the chain reads query, key, value, T and the float32 tables of gates; in the backward
a replay writes the state of every chunk (16 bit), a reverse chain writes its gradient, and a third kernel reads both.

Time. A block runs the chunks of one value head of one sequence, or of one of P segments of it, in order. A chunk takes
the longer of its products on one multiprocessor and of the latency of the dependent ones; segments add a pass that
finds what state each starts from (8 D^2 C per chunk). The prediction takes the best P. It is a floor for this plan of
work at full tensor-core rate, not a forecast.
"""

import dataclasses
import math
from typing import Any

TESTS = ["tests/delta_rule/test_step_kernels.py"]
CHUNK, DIM, KEY_HEADS = 64, 128, 16
# H200: copy bandwidth and dense bfloat16 products as commonly reached, not the data sheet's 4.8 and 989.
BYTES_PER_SECOND, FLOPS_PER_SECOND, MULTIPROCESSORS = 4.3e12, 790e12, 132
# Two dependent wgmma of 64 x 128 x 128 and the work between them, 0.95k cycles at 1.75 GHz (an estimate, not measured).
CHAIN_SECONDS = 0.55e-6
SEGMENTS = (1, 2, 4, 8, 16, 32)
TOKENS = tuple(2**n for n in range(11, 20))
VALUE_HEADS = (32, 64)
SOURCE = (
    "FlashQLA repository (c18a486): H200, torch 2.9.1, fla 0.5.1, flashinfer 0.6.13 without its SM90 context "
    "parallelism, CUDA graphs, initial and final state on; its FlashInfer column was given log gates where that "
    "library takes decays"
)
# (direction, sequences, tokens of each, value heads of 16 key heads) -> milliseconds by library. Left out:
# backward runs of several sequences, whose ragged lengths were not stated.
PUBLISHED: dict[tuple[str, int, int, int], dict[str, float]] = {
    ("forward", 1, 2048, 32): {"FlashQLA": 0.109, "FlashInfer": 0.106, "FLA": 0.132},
    ("forward", 1, 8192, 32): {"FlashQLA": 0.280, "FlashInfer": 0.394, "FLA": 0.472},
    ("forward", 1, 32768, 32): {"FlashQLA": 0.877, "FlashInfer": 1.550, "FLA": 1.890},
    ("forward", 4, 8192, 32): {"FlashQLA": 0.611, "FlashInfer": 0.425, "FLA": 1.898},
    ("forward", 8, 1024, 32): {"FlashQLA": 0.178, "FlashInfer": 0.119, "FLA": 0.501},
    ("forward", 1, 2048, 64): {"FlashQLA": 0.113, "FlashInfer": 0.105, "FLA": 0.220},
    ("forward", 1, 8192, 64): {"FlashQLA": 0.397, "FlashInfer": 0.392, "FLA": 0.814},
    ("forward", 1, 32768, 64): {"FlashQLA": 1.521, "FlashInfer": 1.552, "FLA": 3.331},
    ("forward", 4, 8192, 64): {"FlashQLA": 1.214, "FlashInfer": 0.827, "FLA": 3.362},
    ("forward", 8, 1024, 64): {"FlashQLA": 0.341, "FlashInfer": 0.232, "FLA": 0.854},
    ("backward", 1, 8192, 32): {"FlashQLA": 0.789, "FLA": 1.444},
    ("backward", 1, 32768, 32): {"FlashQLA": 2.515, "FLA": 5.697},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """`sequences` of `length` tokens each, 16 key heads."""

    direction: str
    sequences: int
    length: int
    value_heads: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def chain(self) -> int:
        """Chunks that depend on each other."""
        return math.ceil(self.length / CHUNK)


def flops_per_token_head(direction: str) -> int:
    """Operations of the matrix products per token and value head."""
    c, d = CHUNK, DIM
    if direction == "forward":
        return 6 * d * d + 8 * c * d + 2 * c * c
    return (14 * d * d + 20 * c * d + 2 * c * c) + (4 * d * d + 2 * c * d)


def bytes_per_token(direction: str, value_heads: int, *, design: bool) -> float:
    """Bytes between memory and chip per token, without states at the ends of sequences."""
    keys, values = 2 * KEY_HEADS * DIM, 2 * value_heads * DIM
    gates, inverse, state = (
        8 * value_heads,
        2 * value_heads * CHUNK,
        2 * value_heads * DIM**2 / CHUNK,
    )
    tables = 5 * 4 * value_heads
    forward = 2 * keys + 2 * values + gates
    if direction == "forward":
        prologue = keys + gates + inverse + tables
        return prologue + 2 * keys + 2 * values + inverse + tables if design else forward
    # query, key, value, d_out in; the gradients of the first three out; gates and their gradients
    backward = 2 * keys + 2 * values + 2 * keys + values + 2 * gates
    if not design:
        return backward + inverse
    replay = keys + values + inverse + tables + state
    reverse = 2 * keys + values + inverse + tables + state  # chain over d_state, which it writes
    gradients = backward + inverse + tables + 2 * state
    return replay + reverse + gradients


def predicted_seconds(shape: Shape) -> tuple[float, int]:
    """Time of the plan of work above and its P."""
    return min((_seconds(shape, p), p) for p in SEGMENTS if p <= shape.chain)


def _seconds(shape: Shape, segments: int) -> float:
    blocks = shape.sequences * shape.value_heads * segments
    waves = math.ceil(blocks / MULTIPROCESSORS)
    rate = FLOPS_PER_SECOND / MULTIPROCESSORS
    chunks = math.ceil(shape.chain / segments)
    chunk_seconds = max(flops_per_token_head(shape.direction) * CHUNK / rate, CHAIN_SECONDS)
    steps = waves * chunks * chunk_seconds
    if segments > 1:
        steps += waves * chunks * max(8 * DIM**2 * CHUNK / rate, CHAIN_SECONDS)
    moved = shape.tokens * bytes_per_token(shape.direction, shape.value_heads, design=True)
    return max(steps, moved / BYTES_PER_SECOND)


def row(shape: Shape) -> dict[str, Any]:
    """One line of the table."""
    flops = flops_per_token_head(shape.direction) * shape.tokens * shape.value_heads
    moved = shape.tokens * bytes_per_token(shape.direction, shape.value_heads, design=False)
    designed = shape.tokens * bytes_per_token(shape.direction, shape.value_heads, design=True)
    seconds, segments = predicted_seconds(shape)
    key = (shape.direction, shape.sequences, shape.length, shape.value_heads)
    times = PUBLISHED.get(key, {})
    return {
        **dataclasses.asdict(shape),
        "tokens": shape.tokens,
        "gflop": flops / 1e9,
        "minimum_mb": moved / 1e6,
        "design_mb": designed / 1e6,
        "chain": shape.chain,
        "products_ms": flops / FLOPS_PER_SECOND * 1e3,
        "memory_ms": moved / BYTES_PER_SECOND * 1e3,
        "predicted_ms": seconds * 1e3,
        "segments": segments,
        "published_ms": times,
        "source": SOURCE if times else "",
    }


def shapes() -> list[Shape]:
    """One sequence of every length, and the published shapes of several sequences."""
    found = [
        Shape(direction, 1, tokens, heads)
        for direction in ("forward", "backward")
        for heads in VALUE_HEADS
        for tokens in TOKENS
    ]
    return found + [Shape(*key) for key in PUBLISHED if Shape(*key) not in found]


def measure(quick: bool) -> list[dict[str, Any]]:
    """One row per shape; nothing depends on the machine."""
    return [row(shape) for shape in (shapes()[:2] if quick else shapes())]
