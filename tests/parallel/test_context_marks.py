"""Marks that context parallelism cannot work with: an error where they can be read, NaN in their rows inside `jit`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import AttentionConfig, Decoder, GatedDeltaNet, SelfAttention, masks
from gqa_jax.parallel import layers
from gqa_jax.parallel.context import ContextParallel, from_layout, to_layout
from gqa_jax.parallel.sharding import MeshAxes
from tests.support.compare import assert_close
from tests.support.meshes import mesh
from tests.support.random_layers import draw, random_layer
from tests.support.tiny_decoders import DELTA, HYBRID, build, tokens

AXES = MeshAxes(seq="cp")
ATTENTION = AttentionConfig(
    model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="rms", qk_norm_position="after_rope"
)  # fmt: skip
CONFIGS = {
    "attention": (SelfAttention, ATTENTION),
    "window": (SelfAttention, dataclasses.replace(ATTENTION, sliding_window=3)),
    "delta": (GatedDeltaNet, dataclasses.replace(DELTA, conv_width=3)),
}
PLACES = np.asarray([[3, 0, 1, 2, 7, 6, 5, 4]] * 2, np.int32)
WRONG = {
    "twice": np.asarray([[3, 0, 1, 2, 7, 6, 5, 5]], np.int32),
    "packed": np.asarray([[0, 1, 2, 3, 0, 1, 2, 3]], np.int32),
    "beyond": np.asarray([[3, 0, 1, 2, 8, 6, 5, 4]], np.int32),
}


def spread(name, layout, mode="all_gather"):
    plan = ContextParallel(layout=layout, mode=mode)
    return layers.spread(random_layer(*CONFIGS[name]), axes=AXES, context_parallel=plan)


@pytest.mark.parametrize(
    "name, wrong, mode",
    [
        ("attention", "twice", "ring"),
        ("window", "packed", "all_gather"),
        ("delta", "beyond", "ring"),
    ],
)
def test_positions_that_are_no_permutation(name, wrong, mode):
    layer, x = spread(name, "positions", mode), draw(0, 2, 8, 16)
    places = np.concatenate([PLACES[:1], WRONG[wrong]])
    run = jax.jit(lambda layer, x, places: layer(x, positions=places))
    with jax.set_mesh(mesh("auto", cp=2)):
        with pytest.raises(ValueError, match=r"`positions` must hold each of 0 .. 7 once .* row 1"):
            layer(x, positions=jnp.asarray(places))
        out, right = run(layer, x, places), run(layer, x, PLACES)
        by_x = jax.jit(jax.grad(lambda x: run(layer, x, places)[1:].sum()))(x)
    assert jnp.isnan(out[1]).all()
    assert_close(out[0], right[0], atol=1e-6)
    assert not jnp.isnan(right).any()
    assert not by_x[0].any()


def test_a_decoder_says_so_too():
    config = dataclasses.replace(HYBRID, layers=("full_attention", "linear_attention"))
    plan = ContextParallel(layout="positions")
    decoder = build(config, 1, axes=AXES, context_parallel=plan)
    ids = tokens(np.random.default_rng(1), 1, 8)
    with jax.set_mesh(mesh("auto", cp=2)):
        with pytest.raises(ValueError, match="`positions` must hold each of 0 .. 7 once per row"):
            decoder(ids, positions=jnp.asarray(WRONG["packed"]))
        run = jax.jit(lambda d, ids, places: Decoder.__call__(d, ids, positions=places))
        assert jnp.isnan(run(decoder, ids, WRONG["packed"])).all()
        assert jnp.isfinite(run(decoder, ids, PLACES[:1])).all()
        with pytest.raises(ValueError, match=r"must have shape \[B, T\] with layout 'positions'"):
            decoder(ids, positions=jnp.asarray(np.stack([PLACES[:1]] * 3)))


# Row 1 has padding, or another segment, between tokens of one segment.
SPLIT = {
    "padding": np.asarray([[-1, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, -1, 0, 1, 1, 1]], np.int32),
    "segment": np.asarray([[-1, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 0, 0, 2, 2]], np.int32),
}


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "positions"])
@pytest.mark.parametrize("name", CONFIGS)
def test_segments_that_are_split(name, layout):
    layer, x = spread(name, layout), draw(1, 2, 8, 16)
    alone = random_layer(*CONFIGS[name])
    put = lambda x: np.asarray(to_layout(x, axis_size=2, layout=layout))
    back = lambda x: np.asarray(from_layout(np.asarray(x), axis_size=2, layout=layout))
    order = None
    if layout == "positions":
        order = PLACES
        put = lambda x: np.stack([row[at] for row, at in zip(np.asarray(x), PLACES, strict=True)])
        back = lambda x: np.stack(
            [row[np.argsort(at)] for row, at in zip(np.asarray(x), PLACES, strict=True)]
        )
    run = jax.jit(lambda layer, x, ids: layer(x, positions=order, segment_ids=ids))
    for split, ids in SPLIT.items():
        refused = name == "window" or (name == "delta" and split == "padding")
        rope = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
        places = dict(positions=rope) if order is not None and name != "delta" else {}
        expected = np.asarray(alone(x, segment_ids=jnp.asarray(ids), **places))
        with jax.set_mesh(mesh("auto", cp=2)):
            out = run(layer, put(x), put(ids))
            if refused:
                by = f"order_{'by_segment' if name == 'window' else 'without_gaps'}"
                rule = rf"`segment_ids` must not split a segment .* in row 1; .* `masks\.{by}"
                with pytest.raises(ValueError, match=rule):
                    layer(jnp.asarray(put(x)), positions=order, segment_ids=jnp.asarray(put(ids)))
                if not places:  # else the rotary embedding goes by places, gaps among them
                    whole = getattr(masks, by)(jnp.asarray(ids))
                    again = run(layer, put(masks.take(x, whole)), put(masks.take(ids, whole)))
                    wanted = masks.take(expected, whole)
                    assert_close(back(again), wanted, atol=2e-6, rtol=1e-5, what=by)
        out = back(out)
        assert_close(out[:1], expected[:1], atol=2e-6, rtol=1e-5)
        if refused:
            assert np.isnan(out[1][ids[1] >= 0]).all()
        else:
            assert_close(out[1], expected[1], atol=2e-6, rtol=1e-5)
