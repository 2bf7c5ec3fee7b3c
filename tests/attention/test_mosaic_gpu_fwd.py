"""The Hopper forward kernel on the CPU, by the interpreter with race detection, against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.hopper import fwd
from pallas_kernels.attention.hopper.tuning import ForwardConfig
from tests.attention import kernel_cases as cases
from tests.support import compare
from tests.support.mosaic_gpu_interpreter import interpreted

SMALL = ForwardConfig(block_kv=64)


def run(arrays, *, config=SMALL, **options):
    """The kernel, jitted over its arrays."""
    traced = {n: options.pop(n) for n in list(options) if isinstance(options[n], jax.Array)}

    def call(arrays, traced):
        return fwd.forward(*arrays, config=config, **options, **traced)

    with interpreted():
        return jax.block_until_ready(jax.jit(call)(arrays, traced))


def check(arrays, *, config=SMALL, **options):
    options.setdefault("scale", arrays[0].shape[-1] ** -0.5)
    out, lse = run(arrays, config=config, **options)
    expected, expected_lse = cases.truth(*arrays, **options)
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == jnp.float32
    # Weights and output are rounded to the input dtype once each.
    compare.assert_close(
        out, expected, atol=2.0 * rounding(out.dtype), rtol=2.0 * rounding(out.dtype)
    )
    empty = np.isneginf(np.asarray(expected_lse))
    np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), empty)
    compare.assert_close(
        np.where(empty, 0.0, lse), np.where(empty, 0.0, expected_lse), atol=1e-5, rtol=1e-6
    )
    assert not np.any(np.asarray(out, np.float32)[empty])


def rounding(dtype):
    return float(jnp.finfo(dtype).eps)


# Lengths from one tile to three and one row more, none of them special.
@pytest.mark.parametrize(
    "q_len, kv_len", [(1, 1), (64, 65), (129, 128), (128, 193), (257, 64), (200, 140)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(q_len, kv_len, is_causal):
    arrays = cases.inputs(q_len, q_len=q_len, kv_len=kv_len)[:3]
    check(arrays, is_causal=is_causal)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_head_dims_and_dtypes(dim, dtype):
    arrays = cases.inputs(dim, q_len=136, heads=2, kv_heads=1, dim=dim, dtype=dtype)[:3]
    check(arrays, is_causal=True)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stages, block_kv", [(2, 128), (3, 64), (4, 64)])
def test_configurations(overlap, stages, block_kv):
    arrays = cases.inputs(stages, q_len=260, batch=2)[:3]
    config = ForwardConfig(block_kv, stages, overlap=overlap, heads_then_batch=overlap)
    check(arrays, config=config, is_causal=True)


@pytest.mark.parametrize("window", [1, 63, 64, 100, 1000])
def test_sliding_window(window):
    arrays = cases.inputs(window, q_len=200, kv_len=330)[:3]
    check(arrays, is_causal=True, sliding_window=window, offset=130)


@pytest.mark.parametrize("offset", [-70, 5, 300])
def test_static_offset(offset):
    check(cases.inputs(1, q_len=130, kv_len=190)[:3], is_causal=True, offset=offset)


@pytest.mark.parametrize("window", [None, 40])
def test_offset_of_every_batch_row(window):
    arrays = cases.inputs(2, q_len=70, kv_len=200, batch=3)[:3]
    offsets = jnp.asarray([130, -40, 500], jnp.int32)
    check(arrays, is_causal=True, sliding_window=window, offset=offsets)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
def test_packed_documents(is_causal, stages):
    arrays = cases.inputs(3, q_len=300, batch=2)[:3]
    ids = cases.packed_ids(stages, 2, 300)
    check(
        arrays,
        config=ForwardConfig(64, stages),
        is_causal=is_causal,
        query_segment_ids=ids,
        kv_segment_ids=ids,
    )


def test_segments_in_no_order_and_of_other_lengths():
    random = np.random.default_rng(4)
    arrays = cases.inputs(4, q_len=90, kv_len=150)[:3]
    ids = [jnp.asarray(random.integers(-2, 4, (1, n)), jnp.int32) for n in (90, 150)]
    check(arrays, query_segment_ids=ids[0], kv_segment_ids=ids[1])


def test_soft_cap_and_sinks_together_with_window_and_segments():
    arrays = cases.inputs(5, q_len=140, heads=4, kv_heads=2)[:3]
    ids = cases.packed_ids(5, 1, 140)
    sinks = jnp.asarray([0.5, -3.0, 8.0, 60.0], jnp.float32)
    check(
        arrays,
        is_causal=True,
        sliding_window=50,
        query_segment_ids=ids,
        kv_segment_ids=ids,
        sinks=sinks,
        logits_soft_cap=3.0,
        scale=0.7,
    )


@pytest.mark.parametrize("pack, q_len", [(2, 20), (4, 16), (8, 9), (8, 40)])
def test_heads_packed_into_a_tile(pack, q_len):
    arrays = cases.inputs(pack, q_len=q_len, kv_len=150, heads=16, kv_heads=2)[:3]
    sinks = jnp.asarray(np.random.default_rng(pack).normal(size=16), jnp.float32)
    config = ForwardConfig(64, pack=pack)
    check(arrays, config=config, is_causal=True, offset=150 - q_len, sinks=sinks)


def test_packed_heads_with_segments_and_window():
    arrays = cases.inputs(6, q_len=37, heads=4, kv_heads=1, batch=2)[:3]
    ids = cases.packed_ids(6, 2, 37)
    config = ForwardConfig(64, pack=4)
    check(
        arrays,
        config=config,
        is_causal=True,
        sliding_window=9,
        query_segment_ids=ids,
        kv_segment_ids=ids,
    )


def test_large_scores_do_not_overflow():
    query, key, value, _ = cases.inputs(7, q_len=70)
    check((query * 50, key * 50, value), is_causal=True)


def test_twice_is_bitwise_the_same():
    arrays = cases.inputs(8, q_len=200, heads=2)[:3]
    first, second = (run(arrays, scale=0.1, is_causal=True) for _ in range(2))
    compare.assert_bitwise_equal(first[0], second[0])
    compare.assert_bitwise_equal(first[1], second[1])


def test_later_keys_change_nothing():
    query, key, value, _ = cases.inputs(9, q_len=200)
    poisoned = [x.at[:, 128:].set(jnp.nan) for x in (key, value)]
    out, _ = run((query, key, value), scale=0.1, is_causal=True)
    poisoned_out, _ = run((query, *poisoned), scale=0.1, is_causal=True)
    compare.assert_bitwise_equal(out[:, :128], poisoned_out[:, :128])


@pytest.mark.parametrize(
    "group, length, is_causal", [(1, 130, True), (2, 200, False), (4, 72, True)]
)
def test_from_the_fused_buffer(group, length, is_causal):
    query, key, value, _ = cases.inputs(10, q_len=length, heads=2 * group, kv_heads=2)
    shape = (*key.shape[:3], group, key.shape[3])
    fused = jnp.concatenate([query.reshape(shape), key[..., None, :], value[..., None, :]], axis=3)
    options = {"config": SMALL, "scale": 0.2, "is_causal": is_causal}
    with interpreted():
        out, lse = fwd.forward_qkv(fused, **options)
        expected, expected_lse = fwd.forward(query, key, value, **options)
    compare.assert_bitwise_equal(out, expected)
    compare.assert_bitwise_equal(lse, expected_lse)
