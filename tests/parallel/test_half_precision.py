"""Rows spread over eight devices in 16 bits, jitted: outputs and gradients are those of one device in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gqa_jax.parallel.context import (
    ContextParallel,
    context_attention_with_lse,
    context_causal_conv1d,
    context_gated_delta_rule,
    from_layout,
    to_layout,
)
from pallas_kernels import causal_conv1d, gated_delta_rule, gqa_attention_with_lse
from tests.support import conv_cases
from tests.support.delta_cases import random_case
from tests.support.half_precision import check, sweep
from tests.support.meshes import mesh

SHAPES = [(3, 16), (1, 48), (3, 304)]


def spread(function, plan, *, shared=()):
    """`function(*operands, context_parallel=plan)` of the tokens of eight devices; what is `shared` has none."""
    names = plan.axis if isinstance(plan.axis, tuple) else (plan.axis,)
    the_mesh = mesh("auto", **dict(zip(names, [8] if len(names) == 1 else [2, 4], strict=True)))
    order = dict(axis_size=8, layout=plan.layout)

    def call(*operands):
        tokens = [place not in shared for place in range(len(operands))]
        laid = [to_layout(x, **order) if t else x for x, t in zip(operands, tokens, strict=True)]
        out = jax.shard_map(
            lambda *operands: function(*operands, context_parallel=plan), mesh=the_mesh,
            in_specs=tuple(P(None, plan.axis) if t else P() for t in tokens),
            out_specs=P(None, plan.axis),
        )(*laid)  # fmt: skip
        return jax.tree.map(lambda x: from_layout(x, **order), out)

    return call


@pytest.mark.parametrize(
    "case",
    sweep(
        mode=["all_gather", "ring", "a2a", "a2a+ring", "halo"],
        layout=["contiguous", "zigzag"],
        shape=SHAPES,
    ),
)
def test_attention(case):
    batch, length = case["shape"]
    rng = np.random.default_rng(length)
    operands = tuple(rng.normal(size=(batch, length, n, 4)) for n in (16, 8, 8))
    mode, axis, window = case["mode"], "cp", None
    if mode == "a2a+ring":
        axis = ("outer", "inner")
    if mode == "halo":
        mode, window = "ring", 1 + length // 16
    plan = ContextParallel(mode=mode, layout=case["layout"], axis_name=axis)
    cuts = jnp.asarray([length // 3, 2 * length // 3])
    ids = jnp.searchsorted(cuts, jnp.arange(length), side="right").astype(jnp.int32)

    def local(query, key, value, ids, *, context_parallel):
        options = dict(segment_ids=ids, sliding_window=window, context_parallel=context_parallel)
        return context_attention_with_lse(query, key, value, **options)

    def alone(query, key, value):
        ids_of_rows = jnp.broadcast_to(ids, query.shape[:2])
        options = dict(query_segment_ids=ids_of_rows, kv_segment_ids=ids_of_rows)
        return gqa_attention_with_lse(
            query, key, value, is_causal=True, sliding_window=window, **options
        )

    def call(*operands):
        return spread(local, plan)(*operands, jnp.broadcast_to(ids, operands[0].shape[:2]))

    check(call, operands, case["dtype"], truth=alone)


@pytest.mark.parametrize(
    "case",
    sweep(
        exchange=["all_gather", "prefix_scan", "all_to_all"],
        layout=["contiguous", "zigzag"],
        shape=SHAPES,
    ),
)
def test_delta_rule(case):
    """Gates are float32, as in a model of 16 bits."""
    *operands, _ = random_case(1, *case["shape"], 4, 8, 8, 6).operands
    operands[3] = jnp.asarray(operands[3], jnp.float32)
    plan = ContextParallel(layout=case["layout"], state_exchange=case["exchange"], axis_name="cp")

    def local(*operands, context_parallel):
        options = dict(use_qk_l2norm=True, context_parallel=context_parallel)
        return context_gated_delta_rule(*operands, **options).out

    def alone(*operands):
        return gated_delta_rule(*operands, use_qk_l2norm=True).out

    check(spread(local, plan), tuple(operands), case["dtype"], truth=alone)


@pytest.mark.parametrize("case", sweep(layout=["contiguous", "zigzag"], shape=[(3, 48), (1, 304)]))
def test_convolution(case):
    x, weight, bias, _ = conv_cases.arrays(1, case["shape"][1], 4, batch=case["shape"][0])
    plan = ContextParallel(layout=case["layout"], axis_name="cp")

    def local(x, weight, bias, *, context_parallel):
        options = dict(bias=bias, activation="silu", context_parallel=context_parallel)
        return context_causal_conv1d(x, weight, **options)

    def alone(x, weight, bias):
        return causal_conv1d(x, weight, bias=bias, activation="silu").out

    call = spread(local, plan, shared=(1, 2))
    check(call, (x, weight, bias), case["dtype"], truth=alone)
