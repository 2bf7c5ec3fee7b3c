"""The programs of decode attention that `pallas_kernels.aot` knows by name."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels.aot.case import Case, Program


def _decode(batch: int = 32, slots: int = 8192, heads: int = 32, kv_heads: int = 8) -> Case:
    """One token per row against a head-major cache."""
    dim, struct = 128, jax.ShapeDtypeStruct

    def build() -> Program:
        cache = struct((batch, kv_heads, slots, dim), jnp.bfloat16)
        query, lengths = struct((batch, 1, heads, dim), jnp.bfloat16), struct((batch,), jnp.int32)
        return pk.decode_attention, (query, cache, cache, lengths)

    rows = 2.0 * batch * dim
    moved = rows * (2 * kv_heads * slots + 2 * heads) + 4 * batch
    flops = 4.0 * batch * heads * slots * dim
    return Case(f"decode_attention/step/b{batch}-s{slots}", build, flops, moved)


def cases() -> list[Case]:
    """Every registered case."""
    return [_decode()]
