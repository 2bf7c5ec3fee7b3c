"""Dropout as Flax has it: `train()`, `eval()` and views set a mode, `rngs` are kept or given, a key goes first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, CrossAttention, Decoder, SelfAttention
from gqa_jax.parallel.context import ContextParallel, to_layout
from gqa_jax.parallel.sharding import MeshAxes, shard_parameters
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh
from tests.support.random_layers import draw
from tests.support.tiny_decoders import HYBRID

CONFIG = AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, dropout_rate=0.5)
DECODER = dataclasses.replace(
    HYBRID, layers=("full_attention", "sliding_attention") * 2, attention=CONFIG
)
IDS = jnp.arange(7, dtype=jnp.int32)[None]
X = draw(0, 1, 7, 16)


def build(kind, rngs, **way):
    if kind == "self":
        return SelfAttention(CONFIG, rngs=rngs)
    if kind == "cross":
        return CrossAttention(dataclasses.replace(CONFIG, is_causal=False), rngs=rngs)
    return Decoder(dataclasses.replace(DECODER, **way), rngs=rngs)


def call(module, **options):
    if isinstance(module, Decoder):
        return module(IDS, **options)
    return module(X, X, **options) if isinstance(module, CrossAttention) else module(X, **options)


@pytest.mark.parametrize("kind", ["self", "cross", "decoder"])
def test_modes_are_heard_and_calls_go_before_them(kind):
    module, twin = (build(kind, nnx.Rngs(0, dropout=1)) for _ in range(2))
    quiet = call(module)
    assert_bitwise_equal(call(module), quiet)  # a new module drops nothing
    module.train()
    first, second = call(module), call(module)
    assert (first != second).any()
    assert (first != quiet).any()
    assert_bitwise_equal(call(module, deterministic=True), quiet)
    twin.train()  # the same seed, the same masks
    assert_bitwise_equal(call(twin), first)
    assert_bitwise_equal(call(twin), second)
    key = jax.random.key(5)
    by_key = call(module, dropout_key=key)
    assert_bitwise_equal(call(twin, dropout_key=key), by_key)
    assert_bitwise_equal(call(module, rngs=key), by_key)
    given = [call(module, rngs=rngs) for rngs in (nnx.Rngs(7), nnx.Rngs(7).dropout)]
    assert_bitwise_equal(*given)
    rngs = nnx.Rngs(dropout=7)
    assert (call(module, rngs=rngs) != call(module, rngs=rngs)).any()
    viewed = nnx.view(module, deterministic=True)
    assert_bitwise_equal(call(viewed), quiet)
    assert (call(module) != quiet).any()
    module.eval()
    assert_bitwise_equal(call(module), quiet)
    assert (call(module, deterministic=False) != quiet).any()


@pytest.mark.parametrize("kind", ["self", "cross", "decoder"])
def test_a_module_without_a_stream_says_where_one_comes_from(kind):
    module = build(kind, nnx.Rngs(0))
    module.train()
    with pytest.raises(ValueError, match="`dropout_key` must be given when deterministic=False .*"):
        call(module)
    assert (call(module, rngs=nnx.Rngs(0)) != call(module, deterministic=True)).any()
    with pytest.raises(ValueError, match="`rngs` must be None when `dropout_key` is given"):
        call(module, rngs=nnx.Rngs(0), dropout_key=jax.random.key(0))
    with pytest.raises(
        TypeError, match=r"`rngs` must be nnx.Rngs, nnx.RngStream or a key, got int"
    ):
        call(module, rngs=3)
    assert not jax.tree.leaves(nnx.state(module, nnx.RngState))


def test_parameters_do_not_depend_on_the_stream():
    with_stream, without = build("decoder", nnx.Rngs(0, dropout=1)), build("decoder", nnx.Rngs(0))
    states = [nnx.state(module, nnx.Param) for module in (with_stream, without)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert_bitwise_equal(a, b)
    assert len(jax.tree.leaves(nnx.state(with_stream, nnx.RngState))) == 2  # one key and its count


@pytest.mark.parametrize("way", [dict(remat=True), dict(scan_layers=True, remat=True)])
def test_recomputation_drops_what_the_forward_dropped(way):
    plain = build("decoder", nnx.Rngs(0, dropout=1), scan_layers=way.get("scan_layers", False))
    other = build("decoder", nnx.Rngs(0, dropout=1), **way)
    graphs, results = [], []
    for module in (plain, other):
        module.train()
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        @jax.jit
        def step(params, rest, graph=graph):
            def loss(params):
                module = nnx.merge(graph, params, jax.tree.map(jnp.copy, rest))
                value = (call(module) ** 2).sum()
                return value, nnx.state(module, nnx.RngState)

            return jax.value_and_grad(loss, has_aux=True)(params)

        results.append(step(params, rest))
        graphs.append((step, params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            assert_close(a, b, atol=1e-5, rtol=1e-4)
    step, params = graphs[1]
    (value, rest), _ = results[1]  # the count came back, so the next call drops anew
    assert abs(float(step(params, rest)[0][0] - value)) > 1e-4


def test_nnx_jit_brings_the_count_back():
    module = build("decoder", nnx.Rngs(0, dropout=1), scan_layers=True)
    module.train()
    run = nnx.jit(call)
    assert (run(module) != run(module)).any()


def test_modes_on_a_mesh_drop_what_one_device_drops():
    axes = MeshAxes(batch="dp", seq="cp", heads="tp")
    alone = build("decoder", nnx.Rngs(0, dropout=1))
    spread = Decoder(
        DECODER, rngs=nnx.Rngs(0, dropout=1), axes=axes, context_parallel=ContextParallel()
    )
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 8)), jnp.int32)
    run = jax.jit(lambda d, ids: d(ids))
    alone.train()
    expected = run(alone, ids)
    the_mesh = mesh("explicit", dp=2, cp=2, tp=2)
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(spread, the_mesh, axes)
        spread.train()
        placed = jax.device_put(
            to_layout(ids, axis_size=2), jax.NamedSharding(the_mesh, axes.tokens)
        )
        got = run(spread, placed)
        quiet = run(nnx.view(spread, deterministic=True), placed)
    back = lambda x: np.asarray(x)[:, [0, 1, 4, 5, 6, 7, 2, 3]]
    assert_close(back(got), expected, atol=2e-5, rtol=1e-4)
    assert (np.asarray(quiet) != np.asarray(got)).any()
