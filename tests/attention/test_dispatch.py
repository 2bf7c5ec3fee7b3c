"""The public operators through the Hopper kernels (interpreted), and who is chosen where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import _dispatch
from tests.attention import kernel_cases as cases
from tests.support import compare
from tests.support.mosaic_gpu_interpreter import interpreted

KERNEL = {"implementation": "mosaic_gpu"}


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_gpu_atomic"])
def test_value_and_gradient_of_the_public_operator(name):
    query, key, value, d_out = cases.inputs(0, q_len=90, kv_len=130, heads=2)
    sinks = jnp.asarray([0.3, -1.0], jnp.float32)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "logits_soft_cap": 4.0}

    def run(implementation, d_lse):
        def call(*arrays):
            *arrays, sinks = arrays
            return tuple(
                pk.gqa_attention_with_lse(
                    *arrays, sinks=sinks, implementation=implementation, **options
                )
            )

        saved, pull = jax.vjp(call, query, key, value, sinks)
        return saved, pull((d_out, d_lse))

    d_lse = jnp.asarray(np.random.default_rng(1).normal(size=(1, 90, 2)), jnp.float32)
    with interpreted():
        found = jax.block_until_ready(jax.jit(lambda d: run(name, d))(d_lse))
    expected = run("blockwise", d_lse)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for actual, truth in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == truth.dtype
        largest = float(np.abs(np.asarray(truth, np.float32)).max())
        compare.assert_close(actual, truth, atol=2 * eps * (1 + largest), rtol=2 * eps)


@pytest.mark.parametrize(
    "packed, name", [(False, "mosaic_gpu"), (True, "mosaic_gpu"), (True, "mosaic_gpu_atomic")]
)
def test_fused_buffer_with_gradient(packed, name):
    qkv = random((1, 100, 1, 4, 64), 2)
    d_out = random((1, 100, 2, 64), 3)
    options = {"is_causal": True}
    if packed:
        options["cu_seqlens"] = jnp.asarray([0, 33, 33, 90], jnp.int32)

    def run(implementation):
        call = lambda qkv: pk.gqa_attention_qkv(qkv, implementation=implementation, **options)
        out, pull = jax.vjp(call, qkv)
        return out, pull(d_out)[0]

    with interpreted():
        found = jax.block_until_ready(jax.jit(lambda: run(name))())
    expected = run("blockwise")
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for actual, truth in zip(found, expected, strict=True):
        largest = float(np.abs(np.asarray(truth, np.float32)).max())
        compare.assert_close(actual, truth, atol=2 * eps * (1 + largest), rtol=2 * eps)


def test_offsets_of_rows_reach_the_kernel():
    query, key, value, _ = cases.inputs(4, q_len=20, kv_len=100, batch=2)
    options = {"is_causal": True, "q_offset": jnp.asarray([80, 3]), "sliding_window": 30}
    with interpreted():
        call = lambda q, k, v: pk.gqa_attention(q, k, v, **options, **KERNEL)
        out = jax.block_until_ready(jax.jit(call)(query, key, value))
    expected = pk.gqa_attention(query, key, value, **options, implementation="reference")
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    compare.assert_close(out, expected, atol=2 * eps, rtol=2 * eps)


def test_vmap():
    qkv = random((2, 1, 64, 1, 3, 64), 6)
    call = jax.vmap(lambda x: pk.gqa_attention_qkv(x, is_causal=True, **KERNEL))
    with interpreted():
        out = jax.block_until_ready(jax.jit(call)(qkv))
    expected = pk.gqa_attention_qkv(qkv[:, 0], is_causal=True, implementation="reference")
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    compare.assert_close(out[:, 0], expected, atol=2 * eps, rtol=2 * eps)


SHAPE = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"scale": -1.0}, "it needs a positive `scale`, got -1.0"),
        ({"bias": jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32)}, "it has no `bias`"),
        ({"mask": jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.bool_)}, "it has no `mask`"),
    ],
)
def test_reasons(change, reason):
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        found = pk.explain("gqa_attention", SHAPE, SHAPE, SHAPE, **change)
    assert found.reasons["mosaic_gpu"] == reason


def test_reasons_of_shapes_and_machines():
    explain = lambda x: pk.explain("gqa_attention", x, x, x).reasons["mosaic_gpu"]
    assert explain(SHAPE) == "it needs an NVIDIA GPU of compute capability 9.0 (H100, H200)"
    with _dispatch.targeting(_dispatch.Target("gpu", "10.0")):
        assert "this is 10.0" in explain(SHAPE)
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        assert explain(SHAPE) == "cudnn is preferred here"
        assert "got float32" in explain(SHAPE.update(dtype=jnp.float32))
        wide = SHAPE.update(shape=(1, 8, 2, 256))
        reasons = pk.explain("gqa_attention", wide, wide, wide).reasons
        assert reasons["mosaic_gpu"] == "cudnn is preferred here"
        assert "dk and dv of D = 256 leave no registers" in reasons["mosaic_gpu_atomic"]
        assert "D must be one of 64, 96, 128, 256, got 80" in explain(
            SHAPE.update(shape=(1, 8, 2, 80))
        )
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*cannot run this call.*9\.0"):
        pk.gqa_attention(x, x, x, **KERNEL)


def test_second_derivative_goes_through_the_reference():
    query, key, value, _ = cases.inputs(5, q_len=9)

    def loss(implementation, query):
        out = pk.gqa_attention(query, key, value, implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    def curvature(implementation):
        first = jax.grad(lambda q: loss(implementation, q).astype(jnp.float32))
        return jax.vjp(first, query)[1](query)[0]

    with interpreted():
        found = jax.block_until_ready(jax.jit(lambda: curvature("mosaic_gpu"))())
    expected = curvature("blockwise")
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    largest = float(np.abs(np.asarray(expected, np.float32)).max())
    compare.assert_close(found, expected, atol=4 * eps * (1 + largest), rtol=4 * eps)
