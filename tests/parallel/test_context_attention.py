"""Context-parallel attention equals attention on one device: outputs, lse and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gqa_jax.parallel.context import (
    ContextParallel,
    context_attention_with_lse,
    from_layout,
    to_layout,
)
from pallas_kernels import gqa_attention_with_lse
from tests.support.compare import assert_close
from tests.support.meshes import mesh, mostly_slow, pairwise

CASES = pairwise(
    5,
    mode=["all_gather", "ring", "a2a", "a2a+ring"],
    layout=["contiguous", "zigzag", "positions"],
    packed=[False, True, "padded"],
    window=[None, 1, 7, 19],
    extras=[(), ("sinks",), ("cap",), ("sinks", "cap")],
    kind=["auto", "explicit"],
    devices=[2, 4],
    dropout=[0.0, 0.4],
)


def _segments(rng, batch, length, packed):
    if not packed:
        return None
    cuts = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
    ids = (np.arange(length)[None, None] >= cuts[:, :, None]).sum(1)
    if packed == "padded":
        ids = np.where(np.arange(length)[None] < rng.integers(0, 5, (batch, 1)), -1, ids)
        ids = np.where(np.arange(length)[None] >= length - rng.integers(0, 9, (batch, 1)), -2, ids)
    return ids.astype(np.int32)


def _name(case):
    return "-".join(str(v) if not isinstance(v, tuple) else "+".join(v) for v in case.values())


@pytest.mark.parametrize("case", mostly_slow(CASES, _name, every=("mode", "kind")))
def test_equals_one_device(case):
    rng = np.random.default_rng(CASES.index(case))
    devices, window = case["devices"], case["window"]
    batch, length, groups, per_group, dim = 2, 32, 4, 2, 8
    query = rng.normal(size=(batch, length, groups * per_group, dim)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, length, groups, dim)).astype(np.float32)
    weights = rng.normal(size=query.shape).astype(np.float32)
    lse_weights = rng.normal(size=query.shape[:3]).astype(np.float32)
    sinks = rng.normal(size=groups * per_group).astype(np.float32)
    ids = _segments(rng, batch, length, case["packed"])
    options = dict(is_causal=True, sliding_window=window, scale=0.3)
    if "cap" in case["extras"]:
        options["logits_soft_cap"] = 3.0
    if case["dropout"]:
        options |= dict(dropout_rate=case["dropout"], dropout_key=jax.random.key(5))

    def loss(result, weights, lse_weights):
        seen = jnp.isfinite(result.lse)
        return jnp.sum(jnp.sin(result.out) * weights) + jnp.sum(
            jnp.where(seen, result.lse, 0.0) * lse_weights
        )

    def alone(query, key, value, sinks):
        result = gqa_attention_with_lse(
            query, key, value, sinks=sinks if "sinks" in case["extras"] else None,
            query_segment_ids=ids, kv_segment_ids=ids, **options,
        )  # fmt: skip
        return loss(result, weights, lse_weights), result

    expected_grads, expected = jax.grad(alone, argnums=(0, 1, 2, 3), has_aux=True)(
        jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), jnp.asarray(sinks)
    )

    layout, positions = case["layout"], None
    if layout == "positions":
        order = rng.permutation(length)
        put = lambda x: x[:, order]
        back = lambda x: np.asarray(x)[:, np.argsort(order)]
        positions = np.broadcast_to(order.astype(np.int32), (batch, length))
    else:
        put = functools.partial(to_layout, axis_size=devices, layout=layout)
        back = lambda x: np.asarray(from_layout(x, axis_size=devices, layout=layout))
    if case["mode"] == "a2a+ring":
        the_mesh, axis = mesh(case["kind"], outer=devices // 2, inner=2, tp=2), ("outer", "inner")
    else:
        the_mesh, axis = mesh(case["kind"], cp=devices, tp=2), "cp"
    if case["mode"].startswith("a2a") and devices == 4 and case["mode"] == "a2a":
        the_mesh = mesh(case["kind"], cp=devices, tp=1)  # four groups are all it has
    context = ContextParallel(mode=case["mode"], layout=layout, axis_name=axis)
    with jax.set_mesh(the_mesh):
        heads, marks = P(None, axis, "tp"), P(None, axis)
        place = lambda x, spec: jax.device_put(x, NamedSharding(the_mesh, spec))
        arrays = [place(put(x), heads) for x in (query, key, value)] + [place(sinks, P("tp"))]
        ints = [
            None if x is None else place(x, marks)
            for x in (positions, None if ids is None else put(ids))
        ]
        ws = [place(put(weights), heads), place(put(lse_weights), heads)]

        def local(query, key, value, sinks, positions, ids):
            first_head = jax.lax.axis_index("tp") * query.shape[2]
            return context_attention_with_lse(
                query, key, value, context_parallel=context, positions=positions, segment_ids=ids,
                sinks=sinks if "sinks" in case["extras"] else None,
                dropout_offset=jnp.stack([jnp.zeros_like(first_head), first_head]), **options,
            )  # fmt: skip

        sharded = jax.shard_map(
            local, in_specs=(heads, heads, heads, P("tp"), marks, marks), out_specs=heads
        )

        @jax.jit
        def run(query, key, value, sinks, ints, ws):
            def total(query, key, value, sinks):
                result = sharded(query, key, value, sinks, *ints)
                return loss(result, *ws), result

            return jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(query, key, value, sinks)

        grads, result = run(*arrays, ints, ws)
    seen = np.isfinite(np.asarray(expected.lse))
    np.testing.assert_array_equal(np.isfinite(back(result.lse)), seen)
    assert_close(back(result.out), expected.out, atol=2e-6, rtol=1e-5, what="out")
    assert_close(back(result.lse)[seen], np.asarray(expected.lse)[seen], atol=1e-5, what="lse")
    for name, got, want in zip(("query", "key", "value"), grads, expected_grads, strict=False):
        assert_close(back(got), want, atol=1e-5, rtol=1e-5, what=f"gradient of {name}")
    assert_close(grads[3], expected_grads[3], atol=1e-5, rtol=1e-5, what="gradient of sinks")
