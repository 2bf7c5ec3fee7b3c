"""What a decoder records and recomputes: largest logits through `remat` and `scan_layers`, policies that are heard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gqa_jax import AttentionConfig, CrossAttention, Decoder, qk_clip, recompute
from gqa_jax.layers.masks import positions_in_segments
from gqa_jax.parallel.context import ContextParallel, to_layout
from gqa_jax.parallel.sharding import MeshAxes, shard_parameters
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh
from tests.support.tiny_decoders import HYBRID, MIXTURE, build, tokens

ATTENTION = AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True)
CONFIG = dataclasses.replace(
    HYBRID,
    layers=("sliding_attention", "full_attention") * 2,
    attention=ATTENTION,
    moe=MIXTURE,
    moe_layers=(True, False) * 2,
)
WAYS = {
    "plain": {},
    "remat": dict(remat=True),
    "scan": dict(scan_layers=True),
    "both": dict(scan_layers=True, remat=True),
}


IDS = tokens(np.random.default_rng(1), 2, 7)
SEGMENT_IDS = jnp.asarray([[0] * 3 + [1] * 4, [0] * 5 + [-1] * 2])


def built(way, seed=1):
    """The decoder of `build(CONFIG, seed)`, its layers arranged as the way wants them."""
    config = dataclasses.replace(CONFIG, **WAYS[way])
    plain = build(CONFIG, seed)
    if not config.scan_layers:
        return jax.tree.unflatten(
            jax.tree.structure(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))),
            jax.tree.leaves(plain),
        )
    stacked = Decoder(config, rngs=nnx.Rngs(0))
    for name in ("embed", "norm", "lm_head"):
        setattr(stacked, name, getattr(plain, name))
    stack = lambda *leaves: jnp.stack(leaves)
    stacked.layers = nnx.List(
        [jax.tree.map(stack, plain.layers[i], plain.layers[i + 2]) for i in range(2)]
    )
    return stacked


def explicit_logits(decoder, ids, segment_ids):
    """The largest logits of every attention layer by NumPy, float64, one layer after the other."""
    x, positions = decoder.embed(ids), positions_in_segments(segment_ids)
    tops = {}
    for i, layer in enumerate(decoder.layers):
        if hasattr(layer.mixer, "qkv"):
            query, key, _, _ = layer.mixer.project(layer.mixer_norm(x), positions)
            query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
            query = query.reshape(*query.shape[:2], 2, 2, 8)
            logits = np.einsum("btkrd,bskd->bkrts", query, key) * 8**-0.5
            distance = np.subtract.outer(np.arange(ids.shape[1]), np.arange(ids.shape[1]))
            seen = (distance >= 0) & (distance < (layer.mixer.config.sliding_window or 99))
            same = np.asarray(segment_ids[:, :, None] == segment_ids[:, None])
            seen = seen & same & np.asarray(segment_ids >= 0)[:, :, None]
            tops[i] = np.where(seen[:, None, None], logits, -np.inf).max(axis=(0, 3, 4))
        x, _ = layer(x, positions=positions, segment_ids=segment_ids)
    return tops


@pytest.fixture(scope="module")
def truth():
    return explicit_logits(built("plain"), IDS, SEGMENT_IDS)


def loss(decoder):
    logits, router = decoder.with_router_statistics(IDS, segment_ids=SEGMENT_IDS)
    kept = jnp.where(SEGMENT_IDS[..., None] >= 0, logits, 0.0)
    return kept.sum() + router.probability[0]


@pytest.mark.parametrize("way", ["remat", "scan"])
def test_every_layer_records_its_largest_logits(way, truth):
    decoder = built(way)
    recorded = jax.jit(nnx.capture(loss, qk_clip.MaxLogits))(decoder)[1]
    tops = qk_clip.decoder_logits(decoder, recorded)
    assert list(tops) == [0, 1, 2, 3]
    for i, top in truth.items():
        assert_close(tops[i], top, atol=1e-5, rtol=1e-5, what=f"layer {i}")
    assert not hasattr(decoder, "__captures__")


def test_records_come_with_the_gradient_and_do_not_change_it(truth):
    decoder = built("both")
    captured = nnx.capture(loss, qk_clip.MaxLogits)
    (value, recorded), gradient = jax.jit(jax.value_and_grad(captured, has_aux=True))(decoder)
    expected, plain = jax.jit(jax.value_and_grad(loss))(decoder)
    assert_close(value, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)
    for i, top in qk_clip.decoder_logits(decoder, recorded).items():
        assert_close(top, truth[i], atol=1e-5, rtol=1e-5, what=f"layer {i}")


def test_a_decoder_is_clipped_layer_by_layer(truth):
    decoder, alone = built("both"), built("plain")
    other = jnp.flip(IDS, axis=1)  # two micro-batches
    twice = lambda d: (d(IDS, segment_ids=SEGMENT_IDS).sum(), d(other[:, :2]).sum())
    recorded = jax.jit(nnx.capture(twice, qk_clip.MaxLogits))(decoder)[1]
    tops = qk_clip.decoder_logits(decoder, recorded)
    assert all((np.asarray(tops[i]) >= truth[i] - 1e-5).all() for i in tops)
    threshold = float(np.median([top.max() for top in tops.values()]))
    qk_clip.clip_decoder(decoder, recorded, threshold=threshold, alpha=0.3)
    moved = 0
    for i, top in tops.items():
        layer = alone.layer(i).mixer
        before = layer.qkv.kernel[...]
        qk_clip.clip_layer(layer, top, threshold=threshold, alpha=0.3)
        moved += bool((before != layer.qkv.kernel[...]).any())
        mine = decoder.layer(i)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(alone.layer(i)), strict=True):
            assert_bitwise_equal(a, b)
    assert 0 < moved < len(tops)


def test_what_cannot_be_clipped_is_refused_before_anything_changes():
    cross = CrossAttention(dataclasses.replace(ATTENTION, is_causal=False), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`layer` must be a SelfAttention.*got CrossAttention"):
        qk_clip.clip_layer(cross, jnp.full((2, 2), 200.0))
    normed = dataclasses.replace(CONFIG, attention=dataclasses.replace(ATTENTION, qk_norm="rms"))
    decoder = build(normed, 3)
    top = (jnp.full((2, 2), 200.0),)
    recorded = {"layers": {i: {"mixer": {"max_logits": top}} for i in range(4)}}
    with pytest.raises(ValueError, match="`layer` must not normalise queries and keys"):
        qk_clip.clip_decoder(decoder, recorded)
    del recorded["layers"][2]
    with pytest.raises(ValueError, match=r"`recorded` must come from .* nothing for layers\[2\]"):
        qk_clip.clip_decoder(decoder, recorded)


def test_records_of_a_decoder_on_a_mesh():
    axes = MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp", seq_residual="tp")
    config = dataclasses.replace(CONFIG, **WAYS["both"])
    alone = built("both", 4)
    spread = Decoder(config, rngs=nnx.Rngs(0), axes=axes, context_parallel=ContextParallel())
    spread = jax.tree.unflatten(jax.tree.structure(spread), jax.tree.leaves(alone))
    ids = tokens(np.random.default_rng(4), 2, 16)
    record = jax.jit(nnx.capture(lambda d, ids: d(ids), qk_clip.MaxLogits))
    expected = qk_clip.decoder_logits(alone, record(alone, ids)[1])
    the_mesh = mesh("explicit", fsdp=2, cp=2, tp=2)
    with jax.set_mesh(the_mesh):
        spread = shard_parameters(spread, the_mesh, axes)
        placed = jax.device_put(to_layout(ids, axis_size=2), NamedSharding(the_mesh, axes.tokens))
        recorded = record(spread, placed)[1]
        tops = qk_clip.decoder_logits(spread, recorded)
        threshold = float(tops[1].max()) / 2
        qk_clip.clip_decoder(spread, recorded, threshold=threshold)
    for i, top in expected.items():
        assert_close(tops[i], top, atol=1e-5, rtol=1e-5, what=f"layer {i}")
    kernel = np.asarray(spread.layers[1].mixer.qkv.kernel[...])
    group = int(tops[1].max(axis=1).argmax())
    assert (kernel != np.asarray(alone.layers[1].mixer.qkv.kernel[...]))[0, :, group, :2].all()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_policy_decides_what_is_recomputed(scan_layers):
    ids = jnp.zeros((1, 5), jnp.int32)

    def products(remat):
        config = dataclasses.replace(CONFIG, scan_layers=scan_layers, remat=remat)
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        return str(jax.make_jaxpr(jax.grad(lambda d: d(ids).sum()))(state)).count("dot_general")

    policies = jax.checkpoint_policies
    everything, nothing = products(policies.everything_saveable), products(True)
    assert products(policies.nothing_saveable) == nothing
    assert products(recompute.policy()) == nothing
    assert everything < products(recompute.policy(save=("qkv",))) < nothing


@pytest.mark.parametrize("remat", ["no", "core_attention", 1, None, ("qkv",)])
def test_remat_is_a_switch_or_a_policy(remat):
    with pytest.raises(TypeError, match="`remat` must be True, False or a policy"):
        dataclasses.replace(CONFIG, remat=remat)


def test_equal_policies_make_equal_configs():
    make = lambda: dataclasses.replace(CONFIG, remat=recompute.policy(save=["qkv"]))
    assert make() == make()
    assert hash(make()) == hash(make())
