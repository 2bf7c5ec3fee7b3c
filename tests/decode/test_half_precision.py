"""Decoding in 16 bits, jitted: outputs and gradients are read and held against float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from tests.support.half_precision import check, over_rows, sweep


@pytest.mark.parametrize(
    "case",
    sweep(
        sizes=[(1, 1, 1), (3, 1, 130), (3, 16, 300), (1, 2, 17), (8, 1, 33)],  # (B, T, S)
        sliding_window=[None, 6],
        logits_soft_cap=[None, 3.0],
    ),
)
def test_decode_attention(case):
    batch, new, capacity = case["sizes"]
    options = {name: case[name] for name in ("sliding_window", "logits_soft_cap")}
    rng = np.random.default_rng(capacity)
    lengths = jnp.asarray(rng.integers(new, capacity + 1, batch), jnp.int32)
    shapes = (batch, new, 6, 8), (batch, 2, capacity, 8), (batch, 2, capacity, 12)
    operands = tuple(rng.normal(size=shape) for shape in shapes)

    def call(query, key, value):
        return decode_attention(query, key, value, lengths[: len(query)], **options)

    if batch == 8:  # on eight devices
        lengths = jnp.full((batch,), capacity - 1)
        call = over_rows(call)
    check(call, operands, case["dtype"])
