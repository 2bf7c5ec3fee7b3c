"""Gated DeltaNet input layouts against explicit loops over heads."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_jax import layout
from tests.support.compare import assert_bitwise_equal

NAMES = ("key_heads", "qwen3_next", "qwen3_5", "megatron")
sizes = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 5),
        "v_per_key": st.integers(1, 4),
        "key_head_dim": st.integers(1, 4),
        "value_head_dim": st.integers(1, 4),
    }
)


def separate(heads, v_per_key, key_head_dim, value_head_dim):
    counts = [
        heads * key_head_dim,
        heads * key_head_dim,
        *[heads * v_per_key * value_head_dim] * 2,
        *[heads * v_per_key] * 2,
    ]
    cuts = np.cumsum(counts)
    return layout.GDNInputs(*np.split(np.arange(cuts[-1]), cuts[:-1]))


def expected(name, parts, tp, *, heads, v_per_key, key_head_dim, value_head_dim):
    dk, dv, n = key_head_dim, value_head_dim, v_per_key
    q, k, v, z, b, a = parts
    if name == "qwen3_5":
        return layout.Qwen3_5Inputs(np.concatenate([q, k, v]), z, b, a)
    if name == "megatron":
        rows, local = [], heads // tp
        for rank in range(tp):
            for part, width in zip(parts, (dk, dk, n * dv, n * dv, n, n), strict=True):
                rows.extend(part[rank * local * width : (rank + 1) * local * width])
        return np.array(rows)
    qkvz, ba = [], []
    for head in range(heads):
        for part, width in ((q, dk), (k, dk), (v, n * dv), (z, n * dv)):
            qkvz.extend(part[head * width : (head + 1) * width])
        for part in (b, a):
            ba.extend(part[head * n : (head + 1) * n])
    qkvz, ba = np.array(qkvz), np.array(ba)
    if name == "key_heads":
        return layout.KeyHeadInputs(qkvz.reshape(heads, -1), ba.reshape(heads, -1))
    return layout.Qwen3NextInputs(qkvz, ba)


def assert_same(actual, wanted):
    if isinstance(wanted, tuple):
        assert type(actual) is type(wanted)
        for left, right in zip(actual, wanted, strict=True):
            assert_bitwise_equal(left, right)
    else:
        assert_bitwise_equal(actual, wanted)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
@settings(max_examples=15, deadline=None)
@given(size=sizes, tps=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_every_pair_equals_the_loops(source, target, size, tps):
    source_tp, target_tp = (
        tp if n == "megatron" else 1 for tp, n in zip(tps, (source, target), strict=True)
    )
    size["heads"] *= np.lcm(source_tp, target_tp).item()
    parts = separate(**size)
    spec = {k: v for k, v in size.items() if k != "heads"}
    fused = expected(source, parts, source_tp, **size)
    assert_same(layout.split_gdn(fused, layout=source, tp=source_tp, axis=0, **spec), parts)
    converted = layout.convert_gdn(
        fused,
        source=source,
        target=target,
        source_tp=source_tp,
        target_tp=target_tp,
        axis=0,
        **spec,
    )
    assert_same(converted, expected(target, parts, target_tp, **size))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
def test_orientation(name, size, seed):
    rng = np.random.default_rng(seed)
    order = separate(**size)
    total = sum(len(part) for part in order)
    weight = rng.integers(0, 2**16, (total, 3), dtype=np.uint16).view(jnp.bfloat16)
    torch_form = layout.GDNInputs(*(weight[part] for part in order))
    jax_form = layout.GDNInputs(*(part.T for part in torch_form))
    spec = {k: v for k, v in size.items() if k != "heads"} | {"layout": name}
    by_row = layout.fuse_gdn(torch_form, axis=0, **spec)
    by_column = layout.fuse_gdn(jax_form, **spec)
    rows, columns = (x if isinstance(x, tuple) else (x,) for x in (by_row, by_column))
    for row, column in zip(rows, columns, strict=True):
        assert_bitwise_equal(np.moveaxis(np.asarray(row), -1, 0), column)
    assert_same(layout.split_gdn(by_row, axis=0, **spec), torch_form)
    assert_same(layout.split_gdn(by_column, **spec), jax_form)


@settings(max_examples=30, deadline=None)
@given(size=sizes, width=st.integers(1, 4), tp=st.integers(1, 3))
def test_convolution(size, width, tp):
    size["heads"] *= tp
    heads = size["heads"]
    spec = {k: v for k, v in size.items() if k != "heads"}
    dk, dv, n = spec["key_head_dim"], spec["value_head_dim"], spec["v_per_key"]
    channels = heads * (2 * dk + n * dv)
    weight = np.arange(channels * width).reshape(channels, 1, width)
    kernel = layout.conv_to_key_heads(weight, tp=tp, **spec)
    assert kernel.shape == (width, heads, 2 * dk + n * dv)
    local = heads // tp
    for head in range(heads):
        rank, at = divmod(head, local)
        start = rank * local * (2 * dk + n * dv)
        rows = [start + at * dk + c for c in range(dk)]
        rows += [start + (local + at) * dk + c for c in range(dk)]
        rows += [start + 2 * local * dk + at * n * dv + c for c in range(n * dv)]
        assert_bitwise_equal(kernel[:, head], weight[rows, 0].T)
    assert_bitwise_equal(layout.conv_from_key_heads(kernel, tp=tp, **spec), weight)
    bias = layout.conv_to_key_heads(weight[:, 0, 0], tp=tp, **spec)
    assert_bitwise_equal(bias, kernel[0])
    assert_bitwise_equal(layout.conv_from_key_heads(bias, tp=tp, **spec), weight[:, 0, 0])


SPEC = {"v_per_key": 2, "key_head_dim": 2, "value_head_dim": 3}
BAD = [
    (
        lambda: layout.split_gdn(
            layout.Qwen3NextInputs(np.zeros(30), np.zeros(4)), layout="qwen3_next", **SPEC
        ),
        r"`fused.in_proj_qkvz` must hold whole groups of 2 Dk \+ 2 n Dv = 16 features along axis 0, got 30",
    ),
    (
        lambda: layout.split_gdn(
            layout.Qwen3NextInputs(np.zeros(32), np.zeros(4)), layout="qwen3_next", **SPEC
        ),
        "`fused.in_proj_ba` must have 8 features along axis 0, got 4",
    ),
    (
        lambda: layout.split_gdn(np.zeros(40), layout="megatron", tp=3, **SPEC),
        r"whole groups of tp \* \(2 Dk \+ 2 n Dv \+ 2 n\) = 60",
    ),
    (
        lambda: layout.split_gdn(
            layout.Qwen3NextInputs(np.zeros(32), np.zeros(8)), layout="qwen3_next", tp=2, **SPEC
        ),
        "`tp` must be 1 for layout 'qwen3_next'",
    ),
    (
        lambda: layout.fuse_gdn(separate(3, 2, 2, 3), layout="megatron", tp=2, **SPEC),
        "`tp` must divide the 3 key heads of `inputs`, got 2",
    ),
    (
        lambda: layout.split_gdn(
            layout.KeyHeadInputs(np.zeros((2, 15)), np.zeros((2, 4))), layout="key_heads", **SPEC
        ),
        "`fused.in_proj` must have 16 features along axis 1, got 15",
    ),
    (
        lambda: layout.conv_to_key_heads(np.zeros((10, 2, 4)), **SPEC),
        r"`weight` must have shape \[conv_dim, 1, W\] or \[conv_dim\], got \(10, 2, 4\)",
    ),
    (
        lambda: layout.conv_from_key_heads(np.zeros((4, 2, 11)), **SPEC),
        r"`kernel` must have shape \[W, Hk, 10\]",
    ),
    (
        lambda: layout.split_gdn(np.zeros(4), layout="fla", **SPEC),
        "`layout` must be one of .*'megatron'.*, got 'fla'",
    ),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
