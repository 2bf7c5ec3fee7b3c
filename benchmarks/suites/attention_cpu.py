"""Attention on a CPU: ours, `jax.nn.dot_product_attention` and torch, in turn, forward, with gradients, and decoding.

`ATTENTION_CPU_SECONDS` bounds the whole: cells that would start later are left out and named.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from benchmarks.timing import paired

TESTS = ["tests/attention/test_properties.py", "tests/decode"]
LENGTHS = (2048, 512, 4096, 1024, 8192)  # in order of interest, for a bounded run
GROUPS = (4, 1, 8)
NUM_HEADS, HEAD_DIM = 8, 64
DECODE = {"batch": 8, "capacity": 8192}


def measure(quick: bool) -> list[dict]:
    """One row per cell: seconds of each variant, median, least and most."""
    lengths = (64,) if quick else LENGTHS
    budget = float(os.environ.get("ATTENTION_CPU_SECONDS", "inf"))
    started = time.perf_counter()
    cells = [
        (task, length, group, dtype)
        for length in lengths
        for group in GROUPS
        for dtype in DTYPES
        for task in ("forward", "forward+backward")
    ]
    decode = [
        ("decode", 256 if quick else DECODE["capacity"], g, d) for g in GROUPS for d in DTYPES
    ]
    cells = cells[:4] + decode + cells[4:]
    rows = []
    for task, length, group, dtype in cells:
        row = {
            "task": task,
            "length": length,
            "group": group,
            "dtype": dtype,
            "num_heads": NUM_HEADS,
            "head_dim": HEAD_DIM,
        }
        if time.perf_counter() - started > budget:
            rows.append(row | {"left_out": f"over {budget:.0f} s"})
            continue
        build = _decode if task == "decode" else _attention
        variants = build(length, group, dtype, backward=task == "forward+backward")
        rounds = 1 if quick else (7 if length <= 1024 or task == "decode" else 3)
        rows.append(row | {"seconds": paired(variants, rounds=rounds, warmup=1)})
        print(row | {n: f"{s['median'] * 1e3:.1f} ms" for n, s in rows[-1]["seconds"].items()})
    return rows


DTYPES = ("float32", "bfloat16")


def _attention(length, group, dtype, *, backward):
    """Causal self-attention of one sequence."""
    arrays = _normal(
        [(1, length, heads, HEAD_DIM) for heads in (NUM_HEADS, *[NUM_HEADS // group] * 2)], dtype
    )

    def ours(query, key, value):
        return pk.gqa_attention(query, key, value, is_causal=True)

    def peer(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def task(function):
        if not backward:
            return jax.jit(function)
        loss = lambda *arrays: function(*arrays).astype(jnp.float32).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    _must_agree(ours(*arrays), peer(*arrays))
    run_ours, run_peer = task(ours), task(peer)
    variants = {"ours": lambda: run_ours(*arrays), "jax.nn": lambda: run_peer(*arrays)}
    torch_arrays = [_to_torch(jnp.swapaxes(a, 1, 2)) for a in arrays]
    if torch_arrays[0] is not None:
        import torch

        sdpa = torch.nn.functional.scaled_dot_product_attention
        for array in torch_arrays:
            array.requires_grad_(backward)

        def run_torch():
            with torch.set_grad_enabled(backward):
                out = sdpa(*torch_arrays, is_causal=True, enable_gqa=True)
                if backward:
                    torch.autograd.grad(out.float().sum(), torch_arrays)

        variants["torch"] = run_torch
    return variants


def _decode(capacity, group, dtype, *, backward):
    """One new token per row over a full cache, in the layout that each peer wants."""
    del backward
    batch, groups = DECODE["batch"], NUM_HEADS // group
    query, key, value = _normal(
        [(batch, 1, NUM_HEADS, HEAD_DIM), *[(batch, groups, capacity, HEAD_DIM)] * 2], dtype
    )
    lengths = jnp.full((batch,), capacity, jnp.int32)
    token_major = [jnp.swapaxes(a, 1, 2).copy() for a in (key, value)]
    ours = jax.jit(pk.decode_attention)
    peer = jax.jit(jax.nn.dot_product_attention)
    _must_agree(ours(query, key, value, lengths), peer(query, *token_major))
    variants = {
        "ours": lambda: ours(query, key, value, lengths),
        "jax.nn": lambda: peer(query, *token_major),
    }
    torch_arrays = [_to_torch(a) for a in (jnp.swapaxes(query, 1, 2), key, value)]
    if torch_arrays[0] is not None:
        import torch

        def run_torch():
            with torch.no_grad():
                torch.nn.functional.scaled_dot_product_attention(*torch_arrays, enable_gqa=True)

        variants["torch"] = run_torch
    return variants


def _normal(shapes, dtype):
    draw = np.random.default_rng(0)
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def _to_torch(array):
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch.from_numpy(np.asarray(array.astype(jnp.float32)).copy()).to(
        getattr(torch, str(array.dtype))
    )


def _must_agree(one, other) -> None:
    error = float(jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)).max())
    if error > (1e-4 if one.dtype == jnp.float32 else 5e-2):
        raise SystemExit(f"not timed: the results differ by {error}")
