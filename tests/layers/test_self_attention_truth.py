"""SelfAttention against its definition, written out head by head and query by query in float64 numpy: every field of
the config and every argument of the call is right, not merely heard."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, LinearScaling, RopeConfig, SelfAttention
from tests.support.compare import assert_close
from tests.support.random_layers import draw, random_layer

CALL = nnx.jit(SelfAttention.__call__, graph=False, graph_updates=False)
STEP = nnx.jit(SelfAttention.step, graph=False, graph_updates=False)
BASE = AttentionConfig(
    model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(theta=50.0)
)
NORMED = dataclasses.replace(BASE, qk_norm="rms")
FIELDS = {
    "model_dim": (BASE, {"model_dim": 20}),
    "num_heads": (BASE, {"num_heads": 6}),
    "num_kv_heads": (BASE, {"num_kv_heads": 1}),
    "head_dim": (BASE, {"head_dim": 6}),
    "qkv_bias": (BASE, {"qkv_bias": True}),
    "out_bias": (BASE, {"out_bias": True}),
    "output_gate": (BASE, {"output_gate": True}),
    "output_gate_dtype": (BASE, {"output_gate": True, "output_gate_dtype": "float32"}),
    "qk_norm": (BASE, {"qk_norm": "rms"}),
    "qk_norm, 1 + w": (BASE, {"qk_norm": "rms_zero_centred"}),
    "qk_norm, without weights": (BASE, {"qk_norm": "l2"}),
    "qk_norm_position": (NORMED, {"qk_norm_position": "after_rope"}),
    "norm_eps": (NORMED, {"norm_eps": 0.5}),
    "rope": (BASE, {"rope": None}),
    "rope, adjacent and partial": (BASE, {"rope": RopeConfig(theta=9.0, rotary_dim=4, pairing="adjacent")}),
    "rope, scaled": (BASE, {"rope": RopeConfig(theta=50.0, scaling=LinearScaling(factor=4.0))}),
    "sliding_window": (BASE, {"sliding_window": 3}),
    "scale": (BASE, {"scale": 1.7}),
    "logits_soft_cap": (BASE, {"logits_soft_cap": 0.5}),
    "sinks": (BASE, {"sinks": "learnable"}),
    "sinks, off by one": (BASE, {"sinks": "zero"}),
    "is_causal": (BASE, {"is_causal": False}),
}  # fmt: skip


def rotated(x: np.ndarray, rope: RopeConfig, positions: np.ndarray) -> np.ndarray:
    """`[T, D]` as complex numbers, each turned by its angle."""
    dim = rope.rotary_dim or x.shape[-1]
    stretch = rope.scaling.factor if isinstance(rope.scaling, LinearScaling) else 1.0
    frequency = rope.theta ** (-np.arange(dim // 2) * 2.0 / dim) / stretch
    turn = np.exp(1j * positions[:, None] * frequency)
    pairs = np.stack([x[:, : dim // 2], x[:, dim // 2 : dim]], -1)
    if rope.pairing == "adjacent":
        pairs = x[:, :dim].reshape(len(x), dim // 2, 2)
    pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    pairs = np.stack([pairs.real, pairs.imag], -1)
    if rope.pairing == "half":
        pairs = np.swapaxes(pairs, 1, 2)
    return np.concatenate([pairs.reshape(len(x), dim), x[:, dim:]], axis=1)


def definition(layer, x, *, positions=None, segments=None, mask=None) -> np.ndarray:
    """The layer on one row `[T, M]`; `mask` is `[N, T, T]`."""
    config, length = layer.config, len(x)
    p = {
        "/".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    positions = np.arange(length) if positions is None else positions
    segments = np.zeros(length, int) if segments is None else segments
    fused = np.einsum("tm,mkwd->tkwd", x, p["qkv/kernel"]) + p.get("qkv/bias", 0.0)
    scale = config.head_dim**-0.5 if config.scale is None else config.scale

    def embedded(vector, name):
        def normed(v):
            if config.qk_norm == "none":
                return v
            v = v / np.sqrt((v**2).mean(-1, keepdims=True) + config.norm_eps)
            if config.qk_norm == "l2":
                return v
            return v * (p[f"{name}/scale"] + (config.qk_norm == "rms_zero_centred"))

        turned = lambda v: v if config.rope is None else rotated(v, config.rope, positions)
        if config.qk_norm_position == "after_rope":
            return normed(turned(vector))
        return turned(normed(vector))

    out = np.zeros((length, config.model_dim))
    per_group = config.num_heads // config.num_kv_heads
    for head in range(config.num_heads):
        group, place = divmod(head, per_group)
        query = embedded(fused[:, group, place], "q_norm")
        key, value = embedded(fused[:, group, -2], "k_norm"), fused[:, group, -1]
        for t in range(length):
            seen = [
                s
                for s in range(length)
                if segments[s] == segments[t] >= 0
                and (not config.is_causal or s <= t)
                and (config.sliding_window is None or t - s < config.sliding_window)
                and (mask is None or mask[head, t, s])
            ]
            logits = scale * key[seen] @ query[t]
            if config.logits_soft_cap is not None:
                logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
            total = np.exp(logits).sum()
            if config.sinks != "none":
                sink = p["sinks"][group, place] if config.sinks == "learnable" else 0.0
                total = total + np.exp(sink)
            mixed = np.exp(logits) @ value[seen] / (total or 1.0)
            if config.output_gate:
                mixed = mixed / (1.0 + np.exp(-fused[t, group, per_group + place]))
            out[t] += mixed @ p["out/kernel"][group, place]
    return np.where(segments[:, None] >= 0, out + p.get("out/bias", 0.0), 0.0)


def test_every_field_is_covered():
    fields = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert fields - {"dropout_rate"} == {name.split(",")[0] for name in FIELDS}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_the_layer_to_its_definition(field):
    config, change = FIELDS[field]
    layer = random_layer(SelfAttention, dataclasses.replace(config, **change), 3)
    x = draw(5, 2, 9, layer.config.model_dim)
    expected = np.stack([definition(layer, row) for row in np.asarray(x, np.float64)])
    assert_close(CALL(layer, x), expected, atol=2e-5)
    if layer.config.is_causal:
        stepped, _ = STEP(layer, x, layer.init_cache(2, 12))
        assert_close(stepped, expected, atol=2e-5, what="step")


@pytest.mark.parametrize("seed", range(3))
def test_all_fields_at_once_with_positions_segments_and_mask(seed):
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(
        BASE, num_heads=[4, 3, 6][seed], num_kv_heads=[4, 1, 2][seed], qkv_bias=True, out_bias=True, output_gate=True,
        qk_norm=["rms", "l2", "rms_zero_centred"][seed], qk_norm_position=["after_rope", "before_rope"][seed % 2],
        norm_eps=0.1, sliding_window=6, scale=0.9, logits_soft_cap=1.5, sinks=["zero", "learnable"][seed % 2],
        rope=RopeConfig(theta=20.0, rotary_dim=6, pairing=["adjacent", "half"][seed % 2]),
    )  # fmt: skip
    layer = random_layer(SelfAttention, config, seed)
    x, length = draw(seed, 3, 14, 24), 14
    segments = np.sort(rng.integers(-1, 3, (3, length)), axis=1)
    positions = rng.integers(0, 40, (3, length))
    mask = rng.random((3, config.num_heads, length, length)) < 0.7
    got = CALL(
        layer,
        x,
        positions=jnp.asarray(positions, jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        mask=jnp.asarray(mask),
    )
    for row in range(3):
        options = dict(positions=positions[row], segments=segments[row], mask=mask[row])
        expected = definition(layer, np.asarray(x[row], np.float64), **options)
        assert_close(got[row], expected, atol=2e-5, what=f"row {row}")
