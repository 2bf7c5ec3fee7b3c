"""A decode step of Gated DeltaNet in 16 bits, jitted: outputs, states and gradients are held against float32."""

import jax.numpy as jnp
import pytest

from pallas_kernels import gated_deltanet_step
from tests.support.deltanet_cases import random_case
from tests.support.half_precision import check, over_rows, sweep

ROWS = ("mixed", "logits", "state", "conv_state")
WIDE = ("state", "A_log", "dt_bias")


@pytest.mark.parametrize("case", sweep(shape=[(3, 1), (1, 8), (3, 3), (8, 2)]))
def test_gated_deltanet_step(case):
    rows, length = case["shape"]
    operands = random_case(length, rows=rows, length=length, key_dim=8, value_dim=6)
    operands["conv_bias"] = operands["conv_bias"] + 1  # keys and queries away from zero
    operands |= {name: jnp.asarray(operands[name], jnp.float32) for name in WIDE}

    def call(*values):
        return gated_deltanet_step(**dict(zip(operands, values, strict=True)))

    shared = tuple(place for place, name in enumerate(operands) if name not in ROWS)
    call = over_rows(call, shared=shared) if rows == 8 else call  # on eight devices
    check(call, tuple(operands.values()), case["dtype"])
