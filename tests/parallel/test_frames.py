"""How far it is from a call to the operator: functions of this project on the stack where the operator is called."""

import dataclasses
import pathlib
import traceback

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, Decoder, DecoderConfig
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.context.layers import ContextSelfAttention
from gqa_jax.parallel.sharding import MeshAxes
from tests.support.meshes import mesh

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = DecoderConfig(
    vocab_size=16,
    model_dim=16,
    layers=("full_attention",) * 2,
    attention=AttentionConfig(model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8),
    intermediate_size=16,
)


@pytest.mark.parametrize(
    "axes, sizes, layer, most",
    [
        (None, {}, SelfAttention, 7),
        (MeshAxes(heads="tp"), dict(tp=2), SelfAttention, 11),
        (MeshAxes(seq="cp"), dict(cp=2), ContextSelfAttention, 11),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_frames_from_a_decoder_to_attention(monkeypatch, axes, sizes, layer, most, scan):
    plan = ContextParallel(mode="ring") if axes is not None and axes.seq else None
    attend, stacks = layer.attend, []

    def spy(*args, **kwargs):
        stack = [frame.filename for frame in traceback.extract_stack()[:-1]]
        ours = [name for name in stack if name.startswith((f"{ROOT}/gqa_jax", f"{ROOT}/pallas_"))]
        stacks.append(ours)
        return attend(*args, **kwargs)

    monkeypatch.setattr(layer, "attend", staticmethod(spy))
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    decoder = Decoder(config, rngs=nnx.Rngs(0), axes=axes, context_parallel=plan)
    tokens = jnp.zeros((2, 8), jnp.int32)
    if axes is None:
        jax.eval_shape(decoder, tokens)
    else:
        with jax.set_mesh(mesh("auto", **sizes)):
            jax.eval_shape(decoder, tokens)
    assert stacks
    assert max(map(len, stacks)) <= most, stacks[0]
