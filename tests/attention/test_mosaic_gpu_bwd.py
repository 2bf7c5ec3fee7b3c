"""The Hopper backward kernels on the CPU, by the interpreter with race detection, against float32 autodiff of the
reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.hopper import bwd
from pallas_kernels.attention.hopper.tuning import HEAD_DIMS, BackwardConfig, backward_config
from tests.attention import kernel_cases as cases
from tests.support import compare
from tests.support.mosaic_gpu_interpreter import interpreted


def run(arrays, *, config=None, **options):
    """The kernels, jitted over their arrays, on the reference's output and lse."""
    query, key, value, _ = arrays
    config = config or backward_config(head_dim=query.shape[-1])
    forward_options = {n: x for n, x in options.items() if n != "d_lse"}
    out, lse = cases.truth(query, key, value, **forward_options)
    traced = {n: options.pop(n) for n in list(options) if isinstance(options[n], jax.Array)}

    def call(arrays, out, lse, traced):
        query, key, value, d_out = arrays
        return bwd.backward(query, key, value, out, lse, d_out, config=config, **options, **traced)

    with interpreted():
        return jax.block_until_ready(jax.jit(call)(arrays, out.astype(query.dtype), lse, traced))


def check(arrays, *, config=None, **options):
    options.setdefault("scale", arrays[0].shape[-1] ** -0.5)
    found = run(arrays, config=config, **options)
    options["lse_cotangent"] = options.pop("d_lse", None)
    expected = cases.gradients(*arrays, **options)
    eps = float(jnp.finfo(arrays[0].dtype).eps)
    for name, actual, truth in zip(bwd.Gradients._fields, found, expected, strict=False):
        assert actual.dtype == (truth.dtype if name == "sinks" else arrays[0].dtype)
        # Weights, ds and the result are rounded to the input dtype, terms of both signs are summed.
        largest = float(np.abs(np.asarray(truth)).max())
        compare.assert_close(actual, truth, atol=eps * (1.0 + largest), rtol=2.0 * eps, what=name)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (64, 65), (129, 200), (257, 64)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(q_len, kv_len, is_causal):
    check(cases.inputs(q_len, q_len=q_len, kv_len=kv_len), is_causal=is_causal)


@pytest.mark.parametrize(
    "dim, dtype", [(96, jnp.bfloat16), (128, jnp.float16), (256, jnp.bfloat16), (256, jnp.float16)]
)
def test_head_dims_and_dtypes_with_a_group(dim, dtype):
    arrays = cases.inputs(dim, q_len=136, heads=2, kv_heads=1, dim=dim, dtype=dtype)
    check(arrays, is_causal=True)


@pytest.mark.parametrize("window, dim", [(1, 64), (64, 64), (100, 256)])
def test_sliding_window_with_offset(window, dim):
    arrays = cases.inputs(window, q_len=140, kv_len=260, dim=dim)
    check(arrays, is_causal=True, sliding_window=window, offset=110)


@pytest.mark.parametrize("window", [None, 40])
def test_offset_of_every_batch_row(window):
    arrays = cases.inputs(2, q_len=70, kv_len=140, batch=3)
    offsets = jnp.asarray([70, -40, 500], jnp.int32)
    check(arrays, is_causal=True, sliding_window=window, offset=offsets)


@pytest.mark.parametrize("is_causal, dim", [(True, 64), (False, 64), (True, 256)])
def test_packed_documents(is_causal, dim):
    arrays = cases.inputs(3, q_len=300, dim=dim)
    ids = cases.packed_ids(3, 1, 300)
    check(arrays, is_causal=is_causal, query_segment_ids=ids, kv_segment_ids=ids)


@pytest.mark.parametrize("dim", [64, 256])
def test_soft_cap_sinks_and_the_gradient_of_lse(dim):
    arrays = cases.inputs(5, q_len=100, heads=4, kv_heads=2, dim=dim)
    random = np.random.default_rng(5)
    d_lse = jnp.asarray(random.normal(size=(1, 100, 4)), jnp.float32)
    sinks = jnp.asarray([0.5, -3.0, 4.0, 1.0], jnp.float32)
    check(
        arrays,
        is_causal=True,
        sliding_window=50,
        sinks=sinks,
        logits_soft_cap=3.0,
        scale=0.7,
        d_lse=d_lse,
    )


@pytest.mark.parametrize("stages, kv_stages", [(4, 4)])
def test_deeper_pipelines(stages, kv_stages):
    config = BackwardConfig(stages=stages, kv_stages=kv_stages, value_stages=kv_stages)
    check(cases.inputs(6, q_len=330, batch=2), config=config, is_causal=True)


ATOMIC = BackwardConfig(atomic=True)


@pytest.mark.parametrize(
    "q_len, kv_len, is_causal",
    [
        (1, 1, False),
        (129, 200, True),
        pytest.param(257, 64, False, marks=pytest.mark.slow),
        pytest.param(70, 330, True, marks=pytest.mark.slow),
    ],
)
def test_atomic_lengths(q_len, kv_len, is_causal):
    arrays = cases.inputs(q_len, q_len=q_len, kv_len=kv_len)
    check(arrays, config=ATOMIC, is_causal=is_causal)


@pytest.mark.parametrize(
    "dim, dtype",
    [pytest.param(96, jnp.float16, marks=pytest.mark.slow), (128, jnp.bfloat16)],
)
def test_atomic_with_every_feature(dim, dtype):
    arrays = cases.inputs(dim, q_len=200, heads=2, kv_heads=1, batch=2, dim=dim, dtype=dtype)
    ids = cases.packed_ids(dim, 2, 200)
    random = np.random.default_rng(dim)
    check(
        arrays,
        config=ATOMIC,
        is_causal=True,
        sliding_window=90,
        offset=jnp.asarray([3, 20], jnp.int32),
        query_segment_ids=ids,
        kv_segment_ids=ids,
        sinks=jnp.asarray([0.5, -3.0], jnp.float32),
        logits_soft_cap=3.0,
        scale=0.7,
        d_lse=jnp.asarray(random.normal(size=(2, 200, 2)), jnp.float32),
    )


@pytest.mark.slow
def test_atomic_with_a_deeper_pipeline():
    config = BackwardConfig(stages=3, atomic=True)
    check(cases.inputs(6, q_len=330), config=config, is_causal=True)


def test_atomic_key_and_value_gradients_are_those_of_two_kernels():
    arrays = cases.inputs(8, q_len=200, heads=2)
    two = run(arrays, scale=0.1, is_causal=True)
    one = run(arrays, config=ATOMIC, scale=0.1, is_causal=True)
    compare.assert_bitwise_equal(one.key, two.key)
    compare.assert_bitwise_equal(one.value, two.value)


def test_the_default_is_deterministic():
    assert not any(backward_config(head_dim=dim).atomic for dim in HEAD_DIMS)


def test_twice_is_bitwise_the_same():
    arrays = cases.inputs(7, q_len=200, heads=2)
    first, second = (run(arrays, scale=0.1, is_causal=True) for _ in range(2))
    for name, a, b in zip(first._fields[:3], first[:3], second[:3], strict=True):
        compare.assert_bitwise_equal(a, b, what=name)


@pytest.mark.parametrize(
    "group, length, dim, atomic", [(2, 200, 64, False), (1, 75, 256, False), (2, 200, 64, True)]
)
def test_into_the_fused_buffer(group, length, dim, atomic):
    query, key, value, d_out = cases.inputs(10, q_len=length, heads=group, dim=dim)
    shape = (*key.shape[:3], group, dim)
    fused = jnp.concatenate([query.reshape(shape), key[..., None, :], value[..., None, :]], axis=3)
    config = backward_config(head_dim=dim, atomic=atomic)
    options = {"config": config, "scale": 0.1, "is_causal": True}
    out, lse = cases.truth(query, key, value, scale=0.1, is_causal=True)
    out = out.astype(query.dtype)

    def both(query, key, value, fused, out, lse, d_out):
        apart = bwd.backward(query, key, value, out, lse, d_out, **options)
        return apart, bwd.backward_qkv(fused, out, lse, d_out, **options)

    with interpreted():
        apart, (together, _) = jax.block_until_ready(
            jax.jit(both)(query, key, value, fused, out, lse, d_out)
        )
    d_query = together[:, :, :, :group]
    if atomic:
        eps = float(jnp.finfo(query.dtype).eps)
        compare.assert_close(d_query, apart.query.reshape(shape), atol=1e-6, rtol=eps)
    else:
        compare.assert_bitwise_equal(d_query, apart.query.reshape(shape))
    compare.assert_bitwise_equal(together[:, :, :, group], apart.key)
    compare.assert_bitwise_equal(together[:, :, :, group + 1], apart.value)
