"""The backward programs of the gated delta rule that `pallas_kernels.aot` knows by name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.aot.case import Case, Program
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper import bwd
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, BackwardConfig


@dataclasses.dataclass(frozen=True)
class DeltaBackwardShape:
    """A shape of the backward as its kernels see it: rows of whole chunks."""

    label: str
    rows: int = 1
    chunks: int = 128
    key_heads: int = 16
    value_heads: int = 32
    dim: int = 128
    segments: bool = False
    dtype: DTypeLike = jnp.bfloat16
    use_qk_l2norm: bool = True
    config: BackwardConfig = dataclasses.field(default_factory=BackwardConfig)

    def arrays(self) -> dict[str, Any]:
        """Operands of `bwd.backward`."""
        struct, tokens = jax.ShapeDtypeStruct, (self.rows, self.chunks * CHUNK)
        heads = (self.rows, self.value_heads)
        key = struct((*tokens, self.key_heads, self.dim), self.dtype)
        value = struct((*tokens, self.value_heads, self.dim), self.dtype)
        rows = order.table_rows(segments=self.segments)
        unit = struct(heads, jnp.float32)
        state = struct((*heads, self.dim, self.dim), jnp.float32)
        return {
            "query": key,
            "key": key,
            "value": value,
            "tables": struct((*heads, self.chunks, rows, CHUNK), jnp.float32),
            "inverse": struct((*heads, self.chunks, CHUNK, CHUNK), jnp.float16),
            "start_state": state,
            "d_out": value,
            "d_final": state,
            "held": unit,
            "pulled": unit,
            "asked": unit,
        }

    @property
    def chunk_heads(self) -> int:
        return self.rows * self.chunks * self.value_heads

    @property
    def chain_bytes(self) -> float:
        """What the three kernels hand to each other: two 16-bit states of every chunk."""
        return 2 * 2.0 * self.chunk_heads * self.dim**2

    @property
    def flops(self) -> float:
        """Of the products in the derivation; what is made twice counts once."""
        square, channels = CHUNK**2, CHUNK * self.dim
        chains = (
            2 * channels * self.dim
            + square * self.dim
            + 3 * channels * self.dim
            + 2 * square * self.dim
        )
        gradients = 2 * channels * self.dim + 2 * square * self.dim  # K S, K D; Q K^T, K K^T
        gradients += 5 * square * self.dim + 4 * square * self.dim + 3 * channels * self.dim
        return 2.0 * self.chunk_heads * (chains + gradients)


SHAPES = (
    DeltaBackwardShape("8k"),
    DeltaBackwardShape("4x8k", rows=4),
    DeltaBackwardShape("16x64", value_heads=64),
    DeltaBackwardShape("packed", segments=True),
    DeltaBackwardShape("d64", dim=64),
    DeltaBackwardShape("fp16", dtype=jnp.float16),
    DeltaBackwardShape("any-length", use_qk_l2norm=False),
    DeltaBackwardShape("spread", value_heads=16, config=BackwardConfig(chain_owners=1)),
)


def backward_case(shape: DeltaBackwardShape) -> Case:
    """The three kernels of the backward."""
    arrays = shape.arrays()

    def build() -> Program:
        def delta_rule_backward(*given):
            named = dict(zip(arrays, given, strict=True))
            operands = [named.pop(name) for name in ("query", "key", "value")]
            return bwd.backward(
                *operands,
                config=shape.config,
                scale=shape.dim**-0.5,
                segments=shape.segments,
                use_qk_l2norm=shape.use_qk_l2norm,
                **named,
            )

        return delta_rule_backward, tuple(arrays.values())

    # A wgmma contracts 16. Contracting the key channels: K S; Q K^T and K D; five in `gradients`. Contracting 64: two,
    # four, and in `gradients` five on the way to dR, dL and dP, seven into dq and dk, four into dg.
    deep, flat = shape.dim // 16, CHUNK // 16
    counts = (deep + 2 * flat, 2 * deep + 4 * flat, 5 * deep + 16 * flat)
    size = lambda names: sum(arrays[name].size * arrays[name].dtype.itemsize for name in names)
    read = size(arrays)
    # Three gradients like their operands, g and beta, the start state; the chains' states are written and read.
    written = size(("query", "key", "value", "start_state"))
    written += 2 * 4.0 * shape.chunk_heads * CHUNK
    moved = read + written + 2 * shape.chain_bytes
    name = f"gated_delta_rule/backward/{shape.label}"
    return Case(name, build, shape.flops, moved, counts)


def cases() -> list[Case]:
    """Every registered case."""
    return [backward_case(shape) for shape in SHAPES]
