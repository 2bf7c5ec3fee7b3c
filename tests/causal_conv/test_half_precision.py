"""Convolutions in 16 bits, jitted: outputs, final states and gradients are read and held against float32."""

import pytest

from pallas_kernels import causal_conv1d, causal_conv1d_qkv
from tests.support import conv_cases
from tests.support.half_precision import check, over_rows, sweep

SHAPES = [(3, 1), (1, 2), (3, 17), (1, 130), (3, 300), (8, 17)]  # batch 8: on eight devices


def plain(batch, length):
    def call(x, weight, bias, state):
        return causal_conv1d(x, weight, bias=bias, initial_state=state, activation="silu")

    return call, conv_cases.arrays(length, length, 4, batch=batch)


def fused(batch, length):
    sizes = dict(key_dim=4, value_dim=6)

    def call(mixed, weight, bias, state):
        options = dict(bias=bias + 1, initial_state=state, use_qk_l2norm=True)  # away from 0 / 0
        return causal_conv1d_qkv(mixed, weight, **options, **sizes)

    return call, conv_cases.random_qkv(length, length, 4, batch=batch, **sizes)


@pytest.mark.parametrize("case", sweep(make=[plain, fused], shape=SHAPES))
def test_convolution(case):
    batch, length = case["shape"]
    call, operands = case["make"](batch, length)
    call = over_rows(call, shared=(1, 2)) if batch == 8 else call
    check(call, operands, case["dtype"])
