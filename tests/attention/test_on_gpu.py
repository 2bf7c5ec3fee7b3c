"""The Hopper attention kernels on the hardware that they are for: numbers, edges, repetition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.attention.hopper.tuning import ATOMIC_HEAD_DIMS, HEAD_DIMS
from tests.attention import kernel_cases as cases
from tests.support import compare

pytestmark = pytest.mark.gpu
KERNELS = ("mosaic_gpu", "mosaic_gpu_atomic")


def value_and_gradients(implementation, arrays, **options):
    """Output, lse and gradients of query, key, value, compiled as one program."""

    def run(query, key, value, d_out):
        def call(*arrays):
            return tuple(
                pk.gqa_attention_with_lse(*arrays, implementation=implementation, **options)
            )

        saved, pull = jax.vjp(call, query, key, value)
        d_lse = jnp.ones_like(saved[1])
        return *saved, *pull((d_out.astype(saved[0].dtype), d_lse))

    return jax.block_until_ready(jax.jit(run)(*arrays))


def check(implementation, arrays, **options):
    found = value_and_gradients(implementation, arrays, **options)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = value_and_gradients("reference", wide, **options)
    eps = float(jnp.finfo(arrays[0].dtype).eps)
    for name, actual, truth in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        largest = float(np.abs(np.nan_to_num(np.asarray(truth), neginf=0.0)).max())
        compare.assert_close(actual, truth, atol=eps * (1 + largest), rtol=2 * eps, what=name)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (64, 65), (513, 700), (2048, 2048)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(implementation, dim, q_len, kv_len, is_causal):
    if implementation == "mosaic_gpu_atomic" and dim not in ATOMIC_HEAD_DIMS:
        pytest.skip("refused, with the reason, by `explain`")
    arrays = cases.inputs(q_len, q_len=q_len, kv_len=kv_len, batch=2, heads=4, kv_heads=2, dim=dim)
    check(implementation, arrays, is_causal=is_causal)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_feature(implementation, dtype):
    arrays = cases.inputs(1, q_len=900, batch=2, heads=4, kv_heads=2, dim=128, dtype=dtype)
    ids = cases.packed_ids(1, 2, 900)
    check(
        implementation,
        arrays,
        is_causal=True,
        sliding_window=300,
        query_segment_ids=ids,
        kv_segment_ids=ids,
        sinks=jnp.asarray([0.5, -3.0, 4.0, 1.0], jnp.float32),
        logits_soft_cap=3.0,
    )


def test_many_times_is_bitwise_the_same():
    arrays = cases.inputs(2, q_len=4096, heads=8, kv_heads=2, dim=128)
    first = value_and_gradients("mosaic_gpu", arrays, is_causal=True)
    for _ in range(10):
        again = value_and_gradients("mosaic_gpu", arrays, is_causal=True)
        for a, b in zip(first, again, strict=True):
            compare.assert_bitwise_equal(a, b)
