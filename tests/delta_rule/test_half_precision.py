"""The delta rule in 16 bits, jitted: outputs, states and gradients are read and held against float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule, gated_delta_rule_step
from tests.support.delta_cases import random_case
from tests.support.half_precision import check, over_rows, sweep

ROWS = [(3, 1), (1, 2), (3, 17), (1, 130), (3, 300), (8, 33)]  # batch 8: on eight devices
STEPS = [(3, 1), (1, 8), (8, 2)]


@pytest.mark.parametrize(
    "case",
    [
        *sweep(operator=[gated_delta_rule], shape=ROWS, per_channel=[False, True]),
        *sweep(operator=[gated_delta_rule_step], shape=STEPS, per_channel=[False, True]),
    ],
)
def test_gated_delta_rule(case):
    """Gates and states are float32, as in a model of 16 bits."""
    problem = random_case(1, *case["shape"], 2, 4, 8, 6)
    query, key, value, g, beta, state = problem.operands
    if case["per_channel"]:
        g = -0.3 * np.random.default_rng(2).exponential(size=key.shape)

    def call(query, key, value, g, beta, state):
        operands = query, key, value, g, beta
        if case["operator"] is gated_delta_rule:
            return gated_delta_rule(*operands, initial_state=state, use_qk_l2norm=True)
        return gated_delta_rule_step(*operands, state, use_qk_l2norm=True, return_states=True)

    g, state = jnp.asarray(g, jnp.float32), jnp.asarray(state, jnp.float32)
    call = over_rows(call) if case["shape"][0] == 8 else call
    check(call, (query, key, value, g, beta, state), case["dtype"])
