"""The programs of attention that `pallas_kernels.aot` knows by name: directions and shapes."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.aot.case import Case, Program
from pallas_kernels.attention.hopper import bwd, fwd, tuning


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """A shape and mask of attention, with everything that changes the machine code."""

    label: str
    batch: int = 1
    length: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    is_causal: bool = True
    sliding_window: int | None = None
    segments: bool = False
    soft_cap: float | None = None
    sinks: bool = False
    fused: bool = False
    dtype: DTypeLike = jnp.bfloat16

    @property
    def visible_pairs(self) -> float:
        """(query, key) pairs that the mask lets through, documents taken as one."""
        if not self.is_causal:
            return self.length**2
        window = min(self.sliding_window or self.length, self.length)
        return window * (window + 1) / 2 + (self.length - window) * window

    def flops(self, products: int) -> float:
        """Operations of `products` matrix products over the visible pairs."""
        return products * 2.0 * self.batch * self.heads * self.head_dim * self.visible_pairs

    def options(self) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "is_causal": self.is_causal,
            "sliding_window": self.sliding_window,
            "logits_soft_cap": self.soft_cap,
        }

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, struct = (self.batch, self.length), jax.ShapeDtypeStruct
        group = self.heads // self.kv_heads
        if self.fused:
            arrays = {"qkv": struct((*rows, self.kv_heads, group + 2, self.head_dim), self.dtype)}
        else:
            key = struct((*rows, self.kv_heads, self.head_dim), self.dtype)
            query = struct((*rows, self.heads, self.head_dim), self.dtype)
            arrays = {"query": query, "key": key, "value": key}
        if self.segments:
            arrays["segment_ids"] = struct(rows, jnp.int32)
        return arrays

    @property
    def row_bytes(self) -> float:
        """One 16-bit value per query head, token and channel."""
        return 2.0 * self.batch * self.length * self.head_dim * self.heads

    def forward_bytes(self) -> float:
        """Query, key, value in; output and lse out."""
        both_keys = 2 * self.row_bytes * self.kv_heads / self.heads
        return 2 * self.row_bytes + both_keys + 4.0 * self.batch * self.length * self.heads

    def backward_bytes(self) -> float:
        """Query, key, value, output, its gradient and lse in; three gradients out."""
        both_keys = 2 * self.row_bytes * self.kv_heads / self.heads
        return 4 * self.row_bytes + 2 * both_keys + 4.0 * self.batch * self.length * self.heads

    def loops(self, block_kv: int) -> int:
        """Copies of a loop body: one with the mask where it may be needed, one without (which the compiler drops where
        there is one tile)."""
        if self.length <= block_kv:
            return 1
        return 2 if self.is_causal or self.segments or self.length % block_kv else 1

    def forward_config(self) -> tuning.ForwardConfig:
        return tuning.forward_config(
            q_len=self.length,
            kv_len=self.length,
            head_dim=self.head_dim,
            group=self.heads // self.kv_heads,
            batch=self.batch,
            kv_heads=self.kv_heads,
            segments=self.segments,
            is_causal=self.is_causal,
        )


ATTENTION = (
    AttentionShape("causal"),
    AttentionShape("full", is_causal=False),
    AttentionShape("window1024", sliding_window=1024),
    AttentionShape("packed", segments=True),
    AttentionShape("softcap-sinks", soft_cap=30.0, sinks=True),
    AttentionShape("fused", fused=True),
    AttentionShape("fp16", dtype=jnp.float16),
    AttentionShape("d64", kv_heads=32, head_dim=64),
    AttentionShape("d96", head_dim=96),
    AttentionShape("d256", heads=16, kv_heads=2, head_dim=256),
    AttentionShape("short16", length=16, batch=8),
    AttentionShape("long32k", length=32768),
)


def _forward(shape: AttentionShape, config: tuning.ForwardConfig | None = None) -> Case:
    config = config or shape.forward_config()

    def build() -> Program:
        arrays = shape.arrays()

        def attention_forward(*values):
            given = dict(zip(arrays, values, strict=True))
            ids = given.pop("segment_ids", None)
            options = shape.options() | {"config": config}
            if shape.sinks:
                options["sinks"] = jnp.zeros((shape.heads,), jnp.float32)
            if shape.fused:
                return fwd.forward_qkv(*given.values(), segment_ids=ids, **options)
            return fwd.forward(
                *given.values(), query_segment_ids=ids, kv_segment_ids=ids, **options
            )

        return attention_forward, tuple(arrays.values())

    # A wgmma covers 64 rows, all columns and 16 of the contracted dimension: scores contract head_dim, the weighted sum
    # contracts the keys. The prologue has one of the former, the epilogue one of the latter.
    bodies = 1 + (shape.loops(config.block_kv) if shape.length > config.block_kv else 0)
    count = bodies * (shape.head_dim + config.block_kv) // 16
    name = f"gqa_attention/forward/{shape.label}"
    return Case(name, build, shape.flops(2), shape.forward_bytes(), (count,))


def _backward(shape: AttentionShape, config: tuning.BackwardConfig | None = None) -> Case:
    config = config or tuning.backward_config(head_dim=shape.head_dim)

    def build() -> Program:
        arrays = shape.arrays()
        struct, rows = jax.ShapeDtypeStruct, (shape.batch, shape.length, shape.heads)
        out = struct((*rows, shape.head_dim), shape.dtype)
        arrays |= {"out": out, "lse": struct(rows, jnp.float32), "d_out": out}

        def attention_backward(*values):
            given = dict(zip(arrays, values, strict=True))
            ids = given.pop("segment_ids", None)
            options = shape.options() | {"config": config}
            if shape.sinks:
                options["sinks"] = jnp.zeros((shape.heads,), jnp.float32)
            if shape.fused:
                return bwd.backward_qkv(*given.values(), segment_ids=ids, **options)
            return bwd.backward(
                *given.values(), query_segment_ids=ids, kv_segment_ids=ids, **options
            )

        return attention_backward, tuple(arrays.values())

    dim, loops = shape.head_dim, shape.loops(config.block_kv)
    masked = 2 if (shape.is_causal or shape.segments) and shape.length > config.block_q else 1
    # dk_dv: two products that contract head_dim, two that contract queries; split, the half that makes dk has one loop.
    one = (dim + config.block_q) // 16
    dk_dv = (masked + 1) * one if config.split else 2 * masked * one
    dq = loops * (2 * dim + config.block_kv) // 16
    # atomic: dq contracts the 128 keys of the block.
    counts = (masked * (2 * one + 128 // 16),) if config.atomic else (dk_dv, dq)
    name = f"gqa_attention/{'backward_atomic' if config.atomic else 'backward'}/{shape.label}"
    return Case(name, build, shape.flops(5), shape.backward_bytes(), counts)


def _backward_atomic(shape: AttentionShape, config: tuning.BackwardConfig | None = None) -> Case:
    return _backward(shape, config or tuning.backward_config(head_dim=shape.head_dim, atomic=True))


# By the names of `hopper.tuning.DIRECTIONS`.
DIRECTIONS = {"forward": _forward, "backward": _backward, "backward_atomic": _backward_atomic}


def cases() -> list[Case]:
    """The Mosaic GPU kernels of attention."""
    atomic = tuning.ATOMIC_HEAD_DIMS
    return [
        make(shape)
        for make in DIRECTIONS.values()
        for shape in ATTENTION
        if make is not _backward_atomic or shape.head_dim in atomic
    ]


OPERATORS = ("gqa_attention",)


def add_shape_arguments(parser: argparse._ArgumentGroup) -> None:
    """The command line's description of one shape."""
    parser.add_argument("--direction", choices=DIRECTIONS, action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--sliding-window", type=int)
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--soft-cap", type=float)
    parser.add_argument("--sinks", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--dtype", choices=tuning.DTYPES, default="bfloat16")


def from_arguments(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the command line describes: one per direction."""
    a = arguments
    shape = AttentionShape(
        f"b{a.batch}-t{a.length}-n{a.heads}-k{a.kv_heads}-d{a.head_dim}",
        a.batch,
        a.length,
        a.heads,
        a.kv_heads,
        a.head_dim,
        a.causal,
        a.sliding_window,
        a.segments,
        a.soft_cap,
        a.sinks,
        a.fused,
        jnp.dtype(a.dtype),
    )
    return [DIRECTIONS[name](shape) for name in a.direction or DIRECTIONS]
