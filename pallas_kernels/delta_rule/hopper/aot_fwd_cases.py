"""The programs of the gated delta rule that `pallas_kernels.aot` knows by name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.aot.case import Case, Program
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper import fwd, prologue, tuning
from pallas_kernels.delta_rule.hopper.tuning import CHUNK


@dataclasses.dataclass(frozen=True)
class DeltaShape:
    """A shape of the gated delta rule as its kernels see it: rows of whole chunks."""

    label: str
    rows: int = 1
    chunks: int = 128
    key_heads: int = 16
    value_heads: int = 32
    dim: int = 128
    segments: bool = False
    dtype: DTypeLike = jnp.bfloat16
    use_qk_l2norm: bool = True

    @property
    def length(self) -> int:
        return self.chunks * CHUNK

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def config(self) -> tuning.ForwardConfig:
        return tuning.forward_config(width=self.dim, heads=self.rows * self.value_heads)

    @property
    def table_rows(self) -> int:
        return order.table_rows(segments=self.segments)

    def gates(self) -> order.Gates:
        struct, chunks = jax.ShapeDtypeStruct, (self.chunks, CHUNK)
        gate: Any = struct((self.rows, self.value_heads, *chunks), jnp.float32)
        segment: Any = struct((self.rows, *chunks), jnp.float32) if self.segments else None
        return order.Gates(gate, gate, segment)

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Operands of `fwd.forward`."""
        struct, rows, half = jax.ShapeDtypeStruct, (self.rows, self.length), jnp.float16
        heads = (self.rows, self.value_heads)
        key = struct((*rows, self.key_heads, self.dim), self.dtype)
        return {
            "query": key,
            "key": key,
            "value": struct((*rows, self.value_heads, self.dim), self.dtype),
            "tables": struct((*heads, self.chunks, self.table_rows, CHUNK), jnp.float32),
            "inverse": struct((*heads, self.chunks, CHUNK, CHUNK), half),
            "start": struct((*heads, self.dim, self.dim), jnp.float32),
        }

    def bytes_of(self, *names: str) -> float:
        arrays = self.arrays()
        sizes = (arrays[name].size * arrays[name].dtype.itemsize for name in names)
        return float(sum(sizes))


SHAPES = (
    DeltaShape("8k"),
    DeltaShape("4x8k", rows=4),
    DeltaShape("packed", segments=True),
    DeltaShape("4x8k-packed", rows=4, segments=True),
    DeltaShape("d64", dim=64),
    DeltaShape("16x64", value_heads=64),
    DeltaShape("fp16", dtype=jnp.float16),
    DeltaShape("4x8k-any-length", rows=4, use_qk_l2norm=False),
)


def _prologue(shape: DeltaShape) -> Case:
    gates = shape.gates()

    def build() -> Program:
        run = lambda key, gates: prologue.prologue(key, gates, use_qk_l2norm=shape.use_qk_l2norm)
        return run, (shape.arrays()["key"], gates)

    # A wgmma contracts 16: K K^T once per key head; per value head five merges of two products, four products of
    # Newton's step and one of the rounding. The merges are a loop.
    square = CHUNK // 16
    count = shape.dim // 16 + 2 * square + 5 * square
    flops = 2.0 * shape.tokens * CHUNK
    flops *= shape.key_heads * shape.dim + shape.value_heads * 15 * CHUNK
    moved = shape.bytes_of("key", "inverse", "tables")
    moved += 4.0 * sum(array.size for array in gates if array is not None)
    return Case(f"gated_delta_rule/prologue/{shape.label}", build, flops, moved, (count,))


def forward_case(shape: DeltaShape, config: tuning.ForwardConfig | None = None) -> Case:
    """The chain with outputs."""
    config = config or shape.config()

    def build() -> Program:
        def delta_rule_forward(*arrays):
            return fwd.forward(
                *arrays,
                config=config,
                scale=shape.dim**-0.5,
                segments=shape.segments,
                use_qk_l2norm=shape.use_qk_l2norm,
            )

        return delta_rule_forward, tuple(shape.arrays().values())

    # S^T K^T, S^T Q^T and Q K^T contract the key channels; X, F and their two uses contract the chunk.
    # X is made 64 columns at a time.
    count = 3 * shape.dim // 16 + (3 + shape.dim // CHUNK) * (CHUNK // 16)
    per_token = 6 * shape.dim**2 + 2 * CHUNK * (3 * shape.dim + CHUNK)
    names = ("query", "key", "value", "tables", "inverse", "start")
    moved = shape.bytes_of(*names) + shape.bytes_of("value", "start")
    flops = float(shape.tokens * shape.value_heads * per_token)
    return Case(f"gated_delta_rule/forward/{shape.label}", build, flops, moved, (count,))


def _transition(shape: DeltaShape) -> Case:
    """The map of a segment: the chain without outputs, from the identity and without values."""

    def build() -> Program:
        arrays = shape.arrays()

        def delta_rule_transition(key, tables, inverse, start):
            return fwd.final_state(
                key,
                None,
                tables,
                inverse,
                start,
                config=shape.config(),
                use_qk_l2norm=shape.use_qk_l2norm,
            )

        names = ("key", "tables", "inverse", "start")
        return delta_rule_transition, tuple(arrays[name] for name in names)

    count = shape.dim // 16 + (1 + shape.dim // CHUNK) * (CHUNK // 16)
    per_token = 4 * shape.dim**2 + 2 * CHUNK * shape.dim
    moved = shape.bytes_of("key", "tables", "inverse", "start", "start")
    flops = float(shape.tokens * shape.value_heads * per_token)
    return Case(f"gated_delta_rule/transition/{shape.label}", build, flops, moved, (count,))


def cases() -> list[Case]:
    """Every registered case."""
    chain = [make(shape) for make in (_prologue, forward_case) for shape in SHAPES]
    return [*chain, _transition(DeltaShape("8x4k", rows=8, chunks=64, value_heads=16))]
