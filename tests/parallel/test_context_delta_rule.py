"""The gated delta rule and its convolution over spread rows equal one device: outputs, states and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gqa_jax.parallel.context import (
    ContextParallel,
    check_permutation,
    context_causal_conv1d,
    context_gated_delta_rule,
    from_layout,
    redo_order,
    to_layout,
    undo_order,
)
from pallas_kernels import GatedDeltaRuleOutput, causal_conv1d, gated_delta_rule
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh, mostly_slow, pairwise

CASES = pairwise(
    11,
    layout=["contiguous", "zigzag"],
    exchange=["all_gather", "prefix_scan", "all_to_all", None],
    packed=[False, True, "padded"],
    initial=[False, True],
    kind=["auto", "explicit"],
    devices=[2, 4],
)

CASES.append(CASES[0] | dict(layout="zigzag", exchange="prefix_scan", packed=True, devices=6))


def _name(case):
    return "-".join(map(str, case.values()))


@pytest.mark.parametrize("case", mostly_slow(CASES, _name))
def test_equals_one_device(case):
    rng = np.random.default_rng(CASES.index(case))
    devices, layout = case["devices"], case["layout"]
    batch, length, key_heads, per_key, key_dim, value_dim = 2, 24, 2, 2, 4, 3
    heads = key_heads * per_key
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    inputs = dict(
        query=normal(batch, length, key_heads, key_dim),
        key=normal(batch, length, key_heads, key_dim),
        value=normal(batch, length, heads, value_dim),
        g=-jnp.abs(normal(batch, length, heads)) * 0.3,
        beta=jax.nn.sigmoid(normal(batch, length, heads)),
        initial_state=normal(batch, heads, key_dim, value_dim) if case["initial"] else None,
    )
    ids = None
    if case["packed"]:
        cuts = np.sort(rng.integers(0, length, (batch, 4)), axis=1)
        ids = (np.arange(length)[None, None] >= cuts[:, :, None]).sum(1).astype(np.int32)
    if (
        case["packed"] == "padded"
    ):  # whole chunks on both sides of one row, single tokens of the other
        ids[0, :7], ids[0, -8:] = -1, -2
        ids[1, rng.random(length) < 0.3] = -1
    weights, state_weights = (
        normal(batch, length, heads, value_dim),
        normal(batch, heads, key_dim, value_dim),
    )

    def loss(result, weights):
        return jnp.sum(jnp.sin(result.out) * weights) + jnp.sum(
            jnp.sin(result.final_state) * state_weights
        )

    def alone(inputs):
        result = gated_delta_rule(**inputs, segment_ids=ids, use_qk_l2norm=True)
        return loss(result, weights), result

    expected_grads, expected = jax.jit(jax.grad(alone, has_aux=True))(inputs)

    the_mesh = mesh(case["kind"], cp=devices)
    context = ContextParallel(layout=layout, state_exchange=case["exchange"], axis_name="cp")
    put = functools.partial(to_layout, axis_size=devices, layout=layout)
    back = lambda x: np.asarray(from_layout(np.asarray(x), axis_size=devices, layout=layout))
    spec = {name: P(None, "cp") for name in inputs} | {"initial_state": P()}
    local = lambda inputs, ids: context_gated_delta_rule(
        **inputs, segment_ids=ids, context_parallel=context, use_qk_l2norm=True
    )
    with jax.set_mesh(the_mesh):
        place = lambda x, s: None if x is None else jax.device_put(x, NamedSharding(the_mesh, s))
        spread = {
            name: place(x if name == "initial_state" else put(x), spec[name])
            for name, x in inputs.items()
        }
        ids_spread = None if ids is None else place(put(ids), P(None, "cp"))
        sharded = jax.shard_map(
            local,
            in_specs=(spec, P(None, "cp")),
            out_specs=GatedDeltaRuleOutput(P(None, "cp"), P()),
        )

        @jax.jit
        def run(inputs, ids, weights):
            def total(inputs):
                result = sharded(inputs, ids)
                return loss(result, weights), result

            return jax.grad(total, has_aux=True)(inputs)

        grads, result = run(spread, ids_spread, place(put(weights), P(None, "cp")))
    assert_close(back(result.out), expected.out, atol=1e-5, rtol=1e-5, what="out")
    assert_close(result.final_state, expected.final_state, atol=1e-5, rtol=1e-5, what="final state")
    for name, want in expected_grads.items():
        if want is not None:
            got = grads[name] if name == "initial_state" else back(grads[name])
            top = max(1.0, float(jnp.abs(want).max()))
            assert_close(got, want, atol=1e-5 * top, what=f"gradient of {name}")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True, "padded"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_reads_across_the_boundary(layout, packed, width):
    rng = np.random.default_rng(width)
    batch, length, features, devices = 2, 32, 3, 4
    x = rng.normal(size=(batch, length, features)).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(width, features)), jnp.float32)
    ids = np.sort(rng.integers(0, 5, (batch, length)), axis=1).astype(np.int32) if packed else None
    if packed == "padded":
        ids[0, :9], ids[0, -6:], ids[1, 13:15] = -1, -1, -2

    def alone(x, weight):
        out = causal_conv1d(x, weight, activation="silu", segment_ids=ids).out
        return jnp.sum(jnp.sin(out)), out

    (expected_dx, expected_dw), expected = jax.grad(alone, argnums=(0, 1), has_aux=True)(
        jnp.asarray(x), weight
    )
    context = ContextParallel(layout=layout, axis_name="cp")
    put = functools.partial(to_layout, axis_size=devices, layout=layout)
    back = lambda x: from_layout(np.asarray(x), axis_size=devices, layout=layout)
    with jax.set_mesh(mesh("auto", cp=devices)):
        spec = P(None, "cp")
        sharded = jax.shard_map(
            lambda x, w, ids: context_causal_conv1d(
                x,
                w,
                context_parallel=context,
                activation="silu",
                segment_ids=ids,
            ),
            in_specs=(spec, P(), spec),
            out_specs=spec,
        )

        @jax.jit
        def run(x, weight, ids):
            def total(x, weight):
                out = sharded(x, weight, ids)
                return jnp.sum(jnp.sin(out)), out

            return jax.grad(total, argnums=(0, 1), has_aux=True)(x, weight)

        (dx, dw), out = run(put(x), weight, None if ids is None else put(ids))
    assert_close(back(out), expected, atol=1e-6, what="out")
    assert_close(back(dx), expected_dx, atol=1e-5, what="gradient of x")
    assert_close(dw, expected_dw, atol=1e-5, rtol=1e-5, what="gradient of weight")


def test_any_order_is_undone_and_redone():
    rng = np.random.default_rng(3)
    order = np.stack([rng.permutation(16) for _ in range(2)])
    x = rng.normal(size=(2, 16, 3)).astype(np.float32)
    shuffled = np.take_along_axis(x, order[..., None], axis=1)
    with jax.set_mesh(mesh("auto", cp=4)):
        spec = P(None, "cp")

        def local(x, positions):
            sorted_x, positions = undo_order(x, positions, axis_name="cp")
            return sorted_x, redo_order(sorted_x, positions, axis_name="cp")

        run = jax.jit(jax.shard_map(local, in_specs=(spec, spec), out_specs=(spec, spec)))
        in_order, again = run(shuffled, order.astype(np.int32))
        twice = order.copy()
        twice[1, 0] = twice[1, 1]
        broken, _ = run(shuffled, twice.astype(np.int32))
    assert_bitwise_equal(in_order, x)
    assert_bitwise_equal(again, shuffled)
    assert np.isfinite(broken[0]).all()
    assert np.isnan(broken[1]).all()
    check_permutation(jnp.asarray(order))
    with pytest.raises(
        ValueError, match="`positions` must hold each of 0 .. 15 once per row .* in row 1"
    ):
        check_permutation(jnp.asarray(twice))
