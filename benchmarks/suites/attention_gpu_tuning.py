"""Which tiles the Hopper forward kernel should use: every candidate of `hopper.tuning`, timed on the GPU at hand.

    python -m benchmarks.run attention_gpu_tuning            # on an H100 or H200
    python -m benchmarks.run attention_gpu_tuning --quick    # anywhere: two candidates of a toy shape, interpreted

The rows go to `benchmarks/results/<device>/`, fastest first per shape; defaults in `hopper.tuning` are changed by
hand, each with its reason, so that no length is tuned apart from its neighbours.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.suites.attention_gpu import TOY, Shape, inputs
from benchmarks.timing import paired
from pallas_kernels.attention.hopper import fwd, tuning

TESTS = ["tests/attention/test_mosaic_gpu_fwd.py"]
SHAPES = (
    Shape(1024),
    Shape(4096),
    Shape(16384),
    Shape(4096, causal=False),
    Shape(4096, kv_heads=32, dim=64),
    Shape(4096, heads=16, kv_heads=2, dim=256),
    Shape(8192, documents=8),
)


def measure_shape(shape: Shape, batch: int, limit: int | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape, fastest first."""
    (query, key, value, _), ids = inputs(shape, batch)
    candidates = tuning.forward_candidates(head_dim=shape.dim)[:limit]

    def call(config):
        run = jax.jit(
            lambda query, key, value: fwd.forward(
                query,
                key,
                value,
                config=config,
                scale=shape.dim**-0.5,
                is_causal=shape.causal,
                sliding_window=shape.window,
                query_segment_ids=ids,
                kv_segment_ids=ids,
            )
        )
        return lambda: run(query, key, value)

    seconds = paired({str(c): call(c) for c in candidates}, rounds=rounds, warmup=1)
    rows = [
        {
            "shape": shape.label,
            "config": dataclasses.asdict(config),
            "seconds": seconds[str(config)]["median"],
            "tflops": shape.flops(2) / seconds[str(config)]["median"] / 1e12,
        }
        for config in candidates
    ]
    return sorted(rows, key=lambda row: row["seconds"])


def measure(quick: bool) -> list[dict[str, Any]]:
    """All shapes on a GPU; with `quick` on a machine without one, two candidates, interpreted."""
    if jax.default_backend() == "gpu":
        shapes = SHAPES[:1] if quick else SHAPES
        return [row for s in shapes for row in measure_shape(s, s.batch, None, rounds=10)]
    if not quick:
        raise SystemExit("attention_gpu_tuning needs an NVIDIA GPU; --quick interprets a toy shape")
    from tests.support.mosaic_gpu_interpreter import interpreted

    with interpreted():
        rows = measure_shape(TOY, 1, 2, rounds=1)
    for row in rows:
        del row["tflops"]  # an interpreter's
    return rows
