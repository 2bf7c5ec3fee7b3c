"""A hybrid decoder trains and decodes on a mesh as on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gqa_jax import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNetConfig,
    MoEConfig,
    SelfAttention,
    generate,
    stream,
)
from gqa_jax.models.decoder_layer import Embedding
from gqa_jax.parallel import caches, vocabulary
from gqa_jax.parallel.context import ContextParallel, from_layout, to_layout
from gqa_jax.parallel.layers import spread
from gqa_jax.parallel.sharding import (
    MeshAxes,
    parameter_shardings,
    parameter_specs,
    shard_parameters,
)
from tests.support.compare import assert_close, relative_error
from tests.support.hlo import collectives
from tests.support.meshes import mesh

CONFIG = DecoderConfig(
    vocab_size=24, model_dim=16, layers=("linear_attention", "full_attention") * 2,
    attention=AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, dropout_rate=0.2),
    gated_deltanet=GatedDeltaNetConfig(
        model_dim=16, num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=4
    ),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=8), moe_layers=(False, True) * 2,
    intermediate_size=16, scan_layers=True, remat=True,
)  # fmt: skip
AXES = MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp", seq_residual="tp")


def _like(decoder, other):
    """`decoder` with the parameters of `other`."""
    return jax.tree.unflatten(jax.tree.structure(decoder), jax.tree.leaves(other))


def _randomised(decoder, rng):
    """Wide parameters, so that no two tokens are about equally likely."""
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), decoder)


def _largest(x) -> float:
    return max(1e-2, float(np.abs(x).max()))


def _tolerance(name: str) -> float:
    """Of the largest element. In Gated DeltaNet, where a key of four numbers is nearly zero or the terms of the decay's
    gradient nearly cancel, one device in float32 misses its own float64 result by 1e-4."""
    return 1e-4 if ".layers[0].mixer." in name else 1e-5


@pytest.mark.parametrize("kind, tied", [("auto", False), ("explicit", True)])
def test_training_loss_and_gradients(kind, tied):
    rng = np.random.default_rng(7)
    batch, length = 2, 16
    tokens = rng.integers(0, 24, (batch, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)
    labels = tokens[:, 1:].copy()
    labels[0, :3] = -1
    start = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(length)[None], 0), axis=1
    )
    data = dict(
        tokens=tokens[:, :-1],
        segments=segments,
        labels=labels,
        positions=(np.arange(length)[None] - start).astype(np.int32),
    )
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    alone = Decoder(config, rngs=nnx.Rngs(0), keep_rngs=False)

    drop = dict(deterministic=False, dropout_key=jax.random.key(3))

    def logits_of(decoder, data):
        marks = dict(positions=data["positions"], segment_ids=data["segments"])
        return decoder(data["tokens"], **marks, **drop)

    def loss_alone(decoder, data):
        logits = logits_of(decoder, data)
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(data["labels"], 0)[..., None], axis=-1
        )
        return -jnp.sum(jnp.where(data["labels"] >= 0, chosen[..., 0], 0.0)), logits

    want, want_gradient = jax.jit(jax.value_and_grad(loss_alone, has_aux=True))(
        alone, jax.tree.map(jnp.asarray, data)
    )

    the_mesh = mesh(kind, fsdp=2, cp=2, tp=2)
    spread = Decoder(
        config,
        rngs=nnx.Rngs(0),
        keep_rngs=False,
        axes=AXES,
        context_parallel=ContextParallel(mode="ring"),
    )

    def loss_spread(decoder, data):
        logits = logits_of(decoder, data)
        return jnp.sum(vocabulary.cross_entropy(logits, data["labels"], AXES)), logits

    with jax.set_mesh(the_mesh):
        spread = shard_parameters(_like(spread, alone), the_mesh, AXES)
        place = lambda x: jax.device_put(x, NamedSharding(the_mesh, AXES.tokens))
        placed = jax.tree.map(place, to_layout(data, axis_size=2))
        got, gradient = jax.jit(jax.value_and_grad(loss_spread, has_aux=True))(spread, placed)
    assert_close(got[0], want[0], atol=1e-5, rtol=1e-5, what="loss")
    assert_close(
        from_layout(np.asarray(got[1]), axis_size=2), want[1], atol=1e-5, rtol=1e-5, what="logits"
    )
    shardings = jax.tree.leaves(parameter_shardings(spread, the_mesh, AXES))
    for (path, b), a, sharding in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient),
        jax.tree.leaves(gradient),
        shardings,
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        # Four layers, a mixture among them, pass that noise on to each other.
        assert_close(a, b, atol=max(5e-5, _tolerance(name)) * _largest(b), what=name)
        assert a.sharding.is_equivalent_to(sharding, a.ndim), name


def test_ids_outside_the_vocabulary_are_nan():
    axes = MeshAxes(heads="tp")
    table = spread(Embedding(24, 16, rngs=nnx.Rngs(0)), axes=axes)
    with jax.set_mesh(mesh("auto", tp=2)):
        x = jax.jit(lambda table, tokens: table(tokens))(
            table, jnp.asarray([[0, 23, 24, -1]], jnp.int32)
        )
    assert np.isfinite(np.asarray(x)[0, :2]).all()
    assert np.isnan(np.asarray(x)[0, 2:]).all()


@pytest.mark.parametrize("kind, scan", [("auto", False), ("explicit", True)])
def test_decoding_with_ragged_rows(kind, scan):
    """Heads and slots of the cache are split; prompt in two pieces, then token by token."""
    rng = np.random.default_rng(9)
    config = dataclasses.replace(
        CONFIG,
        scan_layers=scan,
        remat=False,
        layers=CONFIG.layers[: 4 if scan else 2],
        moe_layers=CONFIG.moe_layers[: 4 if scan else 2],
    )
    alone = Decoder(config, rngs=nnx.Rngs(0), keep_rngs=False)
    spread = Decoder(
        config, rngs=nnx.Rngs(0), keep_rngs=False, axes=AXES, context_parallel=ContextParallel()
    )
    the_mesh = mesh(kind, fsdp=2, cp=2, tp=2)
    cache, step = alone.init_cache(2, 32), jax.jit(lambda d, t, c, n: d.step(t, c, lengths=n))
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(_like(spread, alone), the_mesh, AXES)
        cache_spread = caches.shard_cache(spread.init_cache(2, 32), spread)
    for num_new, lengths in ((12, [12, 7]), (1, [1, 1]), (1, [0, 1])):
        tokens = jnp.asarray(rng.integers(0, 24, (2, num_new)), jnp.int32)
        real = np.arange(num_new)[None] < np.asarray(lengths)[:, None]
        want, cache = step(alone, tokens, cache, jnp.asarray(lengths, jnp.int32))
        with jax.set_mesh(the_mesh):
            rows = NamedSharding(the_mesh, jax.P("fsdp"))
            got, cache_spread = step(
                spread,
                jax.device_put(tokens, rows),
                cache_spread,
                jax.device_put(jnp.asarray(lengths, jnp.int32), rows),
            )
        assert_close(
            np.asarray(got)[real],
            np.asarray(want)[real],
            atol=1e-5,
            rtol=1e-5,
            what=f"{num_new} tokens",
        )
    slots = cache_spread[1].key
    assert slots.sharding.shard_shape(slots.shape) == (2,) * scan + (1, 1, 16, 8)


SMALL = dataclasses.replace(
    CONFIG, layers=CONFIG.layers[:2], moe=None, moe_layers=None, scan_layers=False, remat=False
)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_inside_a_shard_map_of_the_user(kind):
    """A whole decoder, and a layer that knows no mesh, are the part of one device in a caller's `shard_map`."""
    rng = np.random.default_rng(13)
    tokens = rng.integers(0, 24, (2, 16)).astype(np.int32)
    alone = Decoder(SMALL, rngs=nnx.Rngs(0), keep_rngs=False)
    plan = ContextParallel()
    spread = _like(
        Decoder(SMALL, rngs=nnx.Rngs(0), keep_rngs=False, axes=AXES, context_parallel=plan), alone
    )
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    labels = rng.integers(0, 24, (2, 16)).astype(np.int32)

    def alone_loss(decoder):
        chosen = jax.nn.log_softmax(decoder(jnp.asarray(tokens)))
        return -jnp.take_along_axis(chosen, jnp.asarray(labels)[..., None], axis=-1).sum()

    want, want_gradient = jax.jit(jax.value_and_grad(alone_loss))(alone)
    the_mesh = mesh(kind, fsdp=2, cp=2, tp=2)
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(spread, the_mesh, AXES)
        specs = parameter_specs(spread, AXES, the_mesh)
        treedef = jax.tree.structure(spread)

        def local(leaves, tokens, labels, places):
            decoder = jax.tree.unflatten(treedef, leaves)
            logits = decoder(tokens, positions=places)
            return jax.lax.psum(
                vocabulary.cross_entropy(logits, labels, AXES).sum(), ("fsdp", "cp")
            )

        run = jax.shard_map(local, in_specs=(specs, *(AXES.tokens,) * 3), out_specs=jax.P())
        place = lambda x: jax.device_put(
            to_layout(x, axis_size=2), NamedSharding(the_mesh, AXES.tokens)
        )
        data = [place(x) for x in (tokens, labels, places)]
        got, gradient = jax.jit(jax.value_and_grad(run))(jax.tree.leaves(spread), *data)
    assert_close(got, want, atol=1e-5, rtol=1e-5, what="loss")
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), gradient, strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert_close(a, b, atol=_tolerance(name) * _largest(b), what=name)

    layer = SelfAttention(dataclasses.replace(CONFIG.attention, dropout_rate=0.4), rngs=nnx.Rngs(1))
    x = rng.normal(size=(8, 6, 16)).astype(np.float32)
    drop = dict(deterministic=False, dropout_key=jax.random.key(3))
    the_mesh = mesh(kind, dp=4)
    with jax.set_mesh(the_mesh):

        def rows(layer, x):
            first = jax.lax.axis_index("dp") * x.shape[0]
            return layer(x, dropout_offset=jnp.stack([first, jnp.zeros_like(first)]), **drop)

        out = jax.jit(jax.shard_map(rows, in_specs=(jax.P(), jax.P("dp")), out_specs=jax.P("dp")))
        got = out(layer, jax.device_put(x, NamedSharding(the_mesh, jax.P("dp"))))
    assert_close(got, layer(jnp.asarray(x), **drop), atol=1e-5, what="a layer without axes")


def test_bfloat16_is_no_worse_than_on_one_device():
    """Errors against float32 of the same parameters; partial sums of bfloat16 are what a mesh adds."""
    rng = np.random.default_rng(17)
    tokens = rng.integers(0, 24, (2, 32)).astype(np.int32)
    narrow = _randomised(
        Decoder(SMALL, rngs=nnx.Rngs(0), keep_rngs=False, param_dtype=jnp.bfloat16), rng
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    spread = Decoder(
        SMALL,
        rngs=nnx.Rngs(0),
        keep_rngs=False,
        param_dtype=jnp.bfloat16,
        axes=AXES,
        context_parallel=ContextParallel(mode="ring"),
    )
    the_mesh = mesh("auto", fsdp=2, cp=2, tp=2)
    run = jax.jit(lambda decoder, tokens: decoder(tokens))
    truth, alone = run(wide, jnp.asarray(tokens)), run(narrow, jnp.asarray(tokens))
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(_like(spread, narrow), the_mesh, AXES)
        rows = NamedSharding(the_mesh, AXES.tokens)
        got = run(spread, jax.device_put(to_layout(tokens, axis_size=2), rows))
    got = from_layout(np.asarray(got), axis_size=2)
    assert relative_error(got, truth) <= 1.1 * relative_error(alone, truth)


def test_a_step_moves_little_and_writes_in_place():
    """From the compiled program: the cache aliases its input and only queries' worth of bytes cross devices."""
    config = AttentionConfig(
        model_dim=64, num_heads=8, num_kv_heads=2, head_dim=16, sinks="learnable", sliding_window=64
    )
    axes = MeshAxes(seq="cp", heads="tp")
    layer = SelfAttention(config, rngs=nnx.Rngs(0))
    layer = spread(layer, axes=axes, context_parallel=ContextParallel())
    the_mesh = mesh("auto", cp=4, tp=2)
    with jax.set_mesh(the_mesh):
        layer = shard_parameters(layer, the_mesh, axes)
        cache = caches.shard_cache(layer.init_cache(2, 512), layer)
        x = jnp.zeros((2, 1, 64))
        step = jax.jit(lambda layer, x, cache: layer.step(x, cache), donate_argnames=("cache",))
        text = step.lower(layer, x, cache).compile().as_text()
        pointers = [s.data.unsafe_buffer_pointer() for s in cache.key.addressable_shards]
        _, new = step(layer, x, cache)
    assert [s.data.unsafe_buffer_pointer() for s in new.key.addressable_shards] == pointers
    assert re.search(r"input_output_alias=\{.*may-alias.*may-alias.*may-alias", text)
    found = collectives(text)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(size for _, size in found) <= 8 * 1024, found


PROMPTS = [[9, 3, 22, 1, 0, 7, 15], [4, 4], [18, 2, 23, 5, 11], [6]]
GREEDY = dict(max_new_tokens=8, prefill_chunk=4, stop_tokens=(3, 11))
DRAWN = dict(temperature=2.0, top_k=9, top_p=0.9, key=jax.random.key(5), **GREEDY)


@functools.cache
def _generated_by_one_device():
    """The decoder, and what it continues `PROMPTS` with."""
    alone = _randomised(
        Decoder(SMALL, rngs=nnx.Rngs(0), keep_rngs=False), np.random.default_rng(21)
    )
    return alone, generate(alone, PROMPTS, **GREEDY), generate(alone, PROMPTS, **DRAWN)


@pytest.mark.parametrize(
    "kind, cp",
    [("explicit", 1), ("auto", 2), pytest.param("auto", 1, marks=pytest.mark.slow)],
)
def test_generates_the_tokens_of_one_device(kind, cp):
    """Prompts of four lengths in pieces, rows that stop early, a capacity that cp does not divide."""
    alone, want, want_drawn = _generated_by_one_device()
    assert min(want.lengths.tolist()) < max(want.lengths.tolist()) == GREEDY["max_new_tokens"]
    axes = MeshAxes(batch="dp", heads="tp", seq="cp" if cp > 1 else None)
    plan = ContextParallel() if cp > 1 else None
    the_mesh = mesh(kind, dp=2, cp=cp, tp=2)
    spread = _like(
        Decoder(SMALL, rngs=nnx.Rngs(0), keep_rngs=False, axes=axes, context_parallel=plan), alone
    )
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(spread, the_mesh, axes)
        got = generate(spread, PROMPTS, **GREEDY)
        got_drawn = generate(spread, PROMPTS, **DRAWN)
        steps = list(stream(spread, PROMPTS, **GREEDY))
        with pytest.raises(
            ValueError, match="`prompts` must have a batch that is a multiple of 2 .*got B=3"
        ):
            generate(spread, PROMPTS[:3], **GREEDY)
    assert got.tokens.sharding.is_fully_replicated
    assert got.to_lists() == want.to_lists()
    assert got_drawn.to_lists() == want_drawn.to_lists()
    streamed = np.stack([step.tokens for step in steps], axis=1)
    assert np.array_equal(streamed, want.tokens)
