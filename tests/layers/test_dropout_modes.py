"""Dropout as Flax has it: `train()`, `eval()` and views set a mode, `rngs` are kept or given, a key goes first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, CrossAttention, Decoder, SelfAttention
from gqa_jax.parallel.context import ContextParallel, to_layout
from gqa_jax.parallel.sharding import MeshAxes, shard_parameters
from gqa_jax.train.step import TrainState, train_step
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
    keep = dict(keep_rngs=way.pop("keep_rngs", True))
    if kind == "self":
        return SelfAttention(CONFIG, rngs=rngs, **keep)
    if kind == "cross":
        return CrossAttention(dataclasses.replace(CONFIG, is_causal=False), rngs=rngs, **keep)
    return Decoder(dataclasses.replace(DECODER, **way), rngs=rngs, **keep)


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
@pytest.mark.parametrize("way", [dict(keep_rngs=False), "params"])
def test_a_module_without_a_stream_says_where_one_comes_from(kind, way):
    module = build(kind, nnx.Rngs(params=0)) if way == "params" else build(kind, nnx.Rngs(0), **way)
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
    loss = lambda module: (call(module, dropout_key=jax.random.key(0)) ** 2).sum()
    assert nnx.state(jax.grad(loss)(module), nnx.Param)  # no leaf that `jax.grad` refuses
    module.rngs = nnx.Rngs(0).default  # as the message says
    assert (call(module) != call(module)).any()


@pytest.mark.parametrize("kind", ["self", "cross", "decoder"])
def test_the_default_stream_stands_in_as_in_flax(kind):
    module = build(kind, nnx.Rngs(0))
    module.train()
    assert (call(module) != call(module)).any()
    named = build(kind, nnx.Rngs(0, dropout=1))
    states = [jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (module, named)]
    for a, b in zip(*states, strict=True):
        assert_bitwise_equal(a, b)
    loss = lambda module: (call(module) ** 2).sum()
    first, second = (nnx.value_and_grad(loss)(module) for _ in range(2))
    assert first[0] != second[0]
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    gradient = jax.grad(lambda params: loss(nnx.merge(graph, params, rest, copy=True)))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert not jax.tree.leaves(nnx.state(build_without_dropout(kind), nnx.RngState))


def build_without_dropout(kind):
    if kind == "decoder":
        quiet = dataclasses.replace(CONFIG, dropout_rate=0.0)
        return Decoder(dataclasses.replace(DECODER, attention=quiet), rngs=nnx.Rngs(0))
    causal = kind == "self"
    config = dataclasses.replace(CONFIG, dropout_rate=0.0, is_causal=causal)
    return (SelfAttention if causal else CrossAttention)(config, rngs=nnx.Rngs(0))


def test_a_training_step_follows_the_decoders_mode():
    optimizer, losses = optax.sgd(0.0), {}
    for mode in ("eval", "train", "train again", "by key"):
        decoder = build("decoder", nnx.Rngs(0))
        decoder.train() if mode.startswith("train") else decoder.eval()
        options = dict(dropout_key=jax.random.key(0)) if mode == "by key" else {}
        state = TrainState.create(decoder, optimizer)
        for _ in range(2):
            state, loss, _ = train_step(state, IDS, optimizer=optimizer, **options)
            losses.setdefault(mode, []).append(float(loss))
    assert losses["eval"][0] == losses["eval"][1]
    assert (
        len({losses["eval"][0], *losses["train"], *losses["by key"]}) == 5
    )  # every step drops anew
    assert losses["train"] == losses["train again"]


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
