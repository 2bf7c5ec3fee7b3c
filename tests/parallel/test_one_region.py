"""A decoder on a mesh is one `shard_map`, in which a scan gathers the parameters of one layer at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, Decoder, DecoderConfig, MeshAxes, SelfAttention, spread
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import shard_parameters
from tests.support.meshes import mesh

ATTENTION = AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)
AXES = MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp", seq_residual="tp")


def _config(num_layers: int, **options) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=24,
        model_dim=16,
        layers=("full_attention",) * num_layers,
        attention=ATTENTION,
        intermediate_size=16,
        **options,
    )


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_one_region_for_all_layers(kind):
    plan = ContextParallel(mode="ring")
    decoder = Decoder(_config(3), rngs=nnx.Rngs(0), axes=AXES, context_parallel=plan)
    with jax.set_mesh(mesh(kind, fsdp=2, cp=2, tp=2)):
        traced = jax.make_jaxpr(lambda decoder, tokens: decoder(tokens))
        program = str(traced(decoder, jnp.zeros((2, 16), jnp.int32)))
        step = jax.make_jaxpr(lambda decoder, tokens, cache: decoder.step(tokens, cache))
        one_token = str(step(decoder, jnp.zeros((2, 1), jnp.int32), decoder.init_cache(2, 16)))
    assert program.count("shard_map[") == one_token.count("shard_map[") == 1


def test_padding_where_the_residual_stream_is_split():
    """Inside the region a device holds a part of the residual stream, and the segment ids of all its tokens."""
    rng = np.random.default_rng(3)
    alone = Decoder(_config(1), rngs=nnx.Rngs(0))
    axes = MeshAxes(heads="tp", seq_residual="tp")
    spread = Decoder(_config(1), rngs=nnx.Rngs(0), axes=axes)
    spread = jax.tree.unflatten(jax.tree.structure(spread), jax.tree.leaves(alone))
    tokens = jnp.asarray(rng.integers(0, 24, (2, 8)), jnp.int32)
    ids = jnp.asarray([[0, 0, -1, 0, 1, 1, -1, -1], [-1, 2, 2, 2, 2, -1, 3, 3]], jnp.int32)
    run = jax.jit(lambda decoder: decoder(tokens, segment_ids=ids))
    want = run(alone)
    the_mesh = mesh("auto", tp=2)
    with jax.set_mesh(the_mesh):
        got = run(shard_parameters(spread, the_mesh, axes))
    real = np.asarray(ids) >= 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5, rtol=1e-5)


def _gathers(text: str) -> dict[bool, int]:
    """Bytes of the results of float32 all-gathers outside (False) and inside (True) the bodies of loops."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, inside = {False: 0, True: 0}, False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            inside = re.split(r"[ (]", line.removeprefix("ENTRY ").removeprefix("%"))[0] in bodies
        if match := re.search(r"= f32\[([\d,]+)\]\S* all-gather\(", line):
            found[inside] += 4 * int(np.prod([int(n) for n in match[1].split(",")]))
    return found


def test_fsdp_gathers_one_layer_at_a_time():
    """Forward and backward: four times as many layers gather no more outside of loops, nor more in one pass of them."""
    axes = MeshAxes(batch="fsdp", embed="fsdp")
    the_mesh = mesh("auto", fsdp=2)

    def compiled(num_layers: int):
        config = _config(num_layers, scan_layers=True, remat=True)
        decoder = Decoder(config, rngs=nnx.Rngs(0), axes=axes)
        tokens = jnp.zeros((2, 8), jnp.int32)
        with jax.set_mesh(the_mesh):
            decoder = shard_parameters(decoder, the_mesh, axes)
            gradient = jax.jit(jax.grad(lambda decoder: decoder(tokens).sum()))
            return gradient.lower(decoder).compile(), decoder

    (few, _), (many, decoder) = compiled(2), compiled(8)
    layer = sum(x.nbytes for x in jax.tree.leaves(decoder.layer(0)) if x.ndim > 1)
    assert _gathers(few.as_text()) == _gathers(many.as_text())
    assert _gathers(many.as_text())[True] >= 2 * layer  # forward, and again backward
    more = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    # What grows: each layer's input, which the backward reads, and its share of the gradient; not gathered weights.
    assert more < 6 * layer


def test_a_subclass_whose_work_might_cross_devices_is_refused():
    class Own(SelfAttention):
        pass

    plan = ContextParallel()
    decoder = Decoder(_config(1), rngs=nnx.Rngs(0), axes=AXES, context_parallel=plan)
    decoder.layers[0].mixer = Own(ATTENTION, rngs=nnx.Rngs(0))
    refused = pytest.raises(TypeError, match="must be SelfAttention itself, got its subclass Own")
    with jax.set_mesh(mesh("auto", fsdp=2, cp=2, tp=2)), refused:
        jax.eval_shape(decoder, jnp.zeros((2, 16), jnp.int32))
    with pytest.raises(TypeError, match="`layer` must be one of SelfAttention, .* got Own"):
        spread(Own(ATTENTION, rngs=nnx.Rngs(0)), axes=MeshAxes(heads="tp"))


def test_axes_that_name_nothing_change_nothing():
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    alone = Decoder(_config(1), rngs=nnx.Rngs(0))
    nowhere = Decoder(_config(1), rngs=nnx.Rngs(0), axes=MeshAxes())
    run = jax.jit(lambda decoder, tokens: decoder(tokens))
    with jax.set_mesh(mesh("auto", tp=2)):
        got = run(nowhere, tokens)
    np.testing.assert_allclose(got, run(alone, tokens), atol=1e-6)
