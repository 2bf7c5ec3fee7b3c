"""Scratch memory of attention's forward and backward, as compiled: nothing is executed."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk

TESTS = ["tests/attention/test_memory.py"]
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def temp_bytes(implementation: str, length: int, *, dtype=jnp.bfloat16, **options) -> int:
    """Temporary bytes of the compiled gradient of causal self-attention over `length` tokens."""
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), dtype)

    def loss(query, key, value):
        out = pk.gqa_attention(
            query, key, value, is_causal=True, implementation=implementation, **options
        )
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(shape(NUM_HEADS), shape(NUM_KV_HEADS), shape(NUM_KV_HEADS)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(quick: bool) -> list[dict]:
    """One row per length: bytes of each implementation."""
    return [
        {
            "length": length,
            "num_heads": NUM_HEADS,
            "num_kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "bfloat16",
            "bytes": {name: temp_bytes(name, length) for name in ("blockwise", "reference")},
        }
        for length in (LENGTHS[:2] if quick else LENGTHS)
    ]
