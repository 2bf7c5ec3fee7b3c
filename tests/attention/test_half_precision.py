"""16-bit inputs under `jit`, forward and gradient, read and held against the same numbers in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from tests.support import meshes
from tests.support.half_precision import check

attend = functools.partial(pk.gqa_attention_with_lse, is_causal=True)


def qkv(batch, length, *, seed=0):
    draw = np.random.default_rng(seed)
    return tuple(draw.normal(size=(batch, length, heads, 8)) for heads in (4, 2, 2))


# The lengths that make loops of one step and of many, with and without padded blocks.
@pytest.mark.parametrize("batch, length", [(3, 1), (1, 2), (3, 17), (3, 128), (1, 129), (3, 300)])
def test_bfloat16(batch, length):
    check(attend, qkv(batch, length), jnp.bfloat16)


@pytest.mark.parametrize("batch, length", [(3, 17), (1, 129)])
def test_float16(batch, length):
    check(attend, qkv(batch, length), jnp.float16)


@pytest.mark.parametrize("options", [{"logits_soft_cap": 3.0, "sliding_window": 5}, {}])
def test_operands_that_the_caller_transposed(options):
    def call(*heads_first):
        return attend(*(jnp.swapaxes(array, 1, 2) for array in heads_first), **options)

    check(call, tuple(np.swapaxes(array, 1, 2) for array in qkv(3, 17)), jnp.bfloat16)


@pytest.mark.parametrize("check_vma", [False, True])
def test_on_eight_devices(check_vma):
    mesh = meshes.mesh(batch=4, heads=2)
    spec = P("batch", None, "heads")
    sharded = jax.shard_map(
        lambda *arrays: attend(*arrays).out,
        mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma,
    )  # fmt: skip
    check(sharded, qkv(8, 17), jnp.bfloat16)
