"""What crosses devices, counted and weighed in the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gqa_jax.layers.mlp import MLP
from gqa_jax.parallel.context import ContextParallel, context_attention, context_gated_delta_rule
from gqa_jax.parallel.layers import spread
from gqa_jax.parallel.sharding import MeshAxes, shard_parameters
from tests.support.hlo import collectives, count
from tests.support.meshes import mesh


def _compiled(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize(
    "residual, want",
    [(None, {"all-reduce": 2}), ("tp", {"all-gather": 2, "reduce-scatter": 2})],
)
def test_a_tensor_parallel_block_makes_the_reductions_that_megatron_needs(residual, want):
    """One forward and one backward; with a split residual stream, gathers and reduce-scatters in their place."""
    axes = MeshAxes(heads="tp", seq_residual=residual)
    the_mesh = mesh("auto", tp=4)
    block = spread(MLP(8, 16, rngs=nnx.Rngs(0)), axes=axes)
    with jax.set_mesh(the_mesh):
        block = shard_parameters(block, the_mesh, axes)
        x = jax.device_put(jnp.ones((2, 8, 8)), jax.NamedSharding(the_mesh, axes.residual))
        gradient = jax.grad(
            lambda block, x: jnp.sum(jnp.sin(block(x)), dtype=jnp.float32), argnums=(0, 1)
        )
        found = collectives(_compiled(gradient, block, x))
    large = [kind for kind, size in found if size >= 2 * 2 * 8 * 4]
    assert {kind: large.count(kind) for kind in set(large)} == want


def _attention_program(mode, devices, differentiate):
    shape, groups = (1, 64, 4, 8), 2
    plan = ContextParallel(mode=mode, axis_name="cp")
    with jax.set_mesh(mesh("auto", cp=devices)):
        spec = P(None, "cp")
        run = jax.shard_map(
            functools.partial(context_attention, context_parallel=plan),
            in_specs=(spec, spec, spec),
            out_specs=spec,
        )
        query, key = jnp.ones(shape), jnp.ones((*shape[:2], groups, 8))
        if differentiate:
            run = jax.grad(
                lambda q, k, v, run=run: jnp.sum(jnp.sin(run(q, k, v))), argnums=(0, 1, 2)
            )
        text = _compiled(run, query, key, key)
    local = 64 // devices * groups * 8 * 4  # bytes of this device's keys, or values
    return text, local


def test_a_ring_makes_one_hop_less_than_devices():
    text, local = _attention_program("ring", 4, False)
    hops = [size for kind, size in collectives(text) if kind == "collective-permute"]
    assert hops == [2 * local] * 3
    text, local = _attention_program("ring", 4, True)
    hops = [size for kind, size in collectives(text) if kind == "collective-permute"]
    # Forward 3, keys again 3, their gradients 4 to come home.
    assert sum(hops) == 10 * 2 * local


def test_all_gather_gathers_again_in_the_backward_and_the_compiler_keeps_it_so():
    text, local = _attention_program("all_gather", 4, True)
    found = collectives(text)
    gathered = sum(size for kind, size in found if kind == "all-gather" and size >= local)
    assert gathered == 2 * 2 * 4 * local
    assert count(text).get("reduce-scatter", 0) >= 1


@pytest.mark.parametrize(
    "exchange, kinds", [("prefix_scan", {"collective-permute"}), ("all_gather", {"all-gather"})]
)
def test_the_delta_rule_exchanges_states_not_activations(exchange, kinds):
    batch, length, heads, dim, devices = 1, 256, 2, 4, 4
    plan = ContextParallel(layout="contiguous", state_exchange=exchange, axis_name="cp")
    with jax.set_mesh(mesh("auto", cp=devices)):
        spec = P(None, "cp")
        run = jax.shard_map(
            lambda *inputs: context_gated_delta_rule(*inputs, context_parallel=plan).out,
            in_specs=(spec,) * 5,
            out_specs=spec,
        )
        x, gate = jnp.ones((batch, length, heads, dim)), -jnp.ones((batch, length, heads))
        found = collectives(_compiled(run, x, x, x, gate, -gate))
    pair = batch * heads * dim * 2 * dim * 4  # M and E
    assert {kind for kind, _ in found} == kinds
    limit = 3 * pair if exchange == "prefix_scan" else devices * pair
    assert sum(size for _, size in found) <= limit, found
