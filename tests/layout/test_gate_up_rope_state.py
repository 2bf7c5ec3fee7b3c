"""Gate and up, rotary pairings, layout metadata, and whole state dicts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_jax import layout
from tests.support.compare import assert_bitwise_equal, assert_close


@settings(max_examples=30, deadline=None)
@given(features=st.integers(1, 9), width=st.integers(1, 3))
def test_gate_up_rows(features, width):
    gate = np.arange(features * width).reshape(features, width)
    up = gate + 1000
    fused = layout.fuse_gate_up(gate, up, axis=0)
    for f in range(features):
        assert_bitwise_equal(fused[2 * f], gate[f])
        assert_bitwise_equal(fused[2 * f + 1], up[f])
    assert_bitwise_equal(
        layout.fuse_gate_up(gate.T, up.T).reshape(width, features, 2), np.stack([gate.T, up.T], -1)
    )
    concat = layout.fuse_gate_up(gate, up, layout="concat", axis=0)
    assert_bitwise_equal(concat, np.concatenate([gate, up]))
    for name, array in (("interleaved", fused), ("concat", concat)):
        back = layout.split_gate_up(array, layout=name, axis=0)
        assert_bitwise_equal(back.gate, gate)
        assert_bitwise_equal(back.up, up)


def test_gate_up_errors():
    with pytest.raises(ValueError, match="whole groups of gate and up = 2 features"):
        layout.split_gate_up(np.zeros(5))
    with pytest.raises(ValueError, match=r"`up` must have the shape of `gate` \(4,\), got \(6,\)"):
        layout.fuse_gate_up(np.zeros(4), np.zeros(6))
    with pytest.raises(ValueError, match=r"`layout` must be one of .*, got 'rows'"):
        layout.split_gate_up(np.zeros(4), layout="rows")
    with pytest.raises(TypeError, match="`up` must have the dtype of `gate`"):
        layout.fuse_gate_up(np.zeros(4), np.zeros(4, np.float32))


def rotate(x, pairing, rotary_dim, theta=10.0):
    """Turns heads `x` [T, H, D] by their position, pair by pair."""
    out = x.copy()
    half = rotary_dim // 2
    for i in range(half):
        first, second = (i, i + half) if pairing == "half" else (2 * i, 2 * i + 1)
        angle = np.arange(len(x))[:, None] * theta ** (-2 * i / rotary_dim)
        out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
        out[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return out


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 4),
    rest=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_rope_pairing_keeps_the_logits(heads, half, rest, seed):
    rng = np.random.default_rng(seed)
    head_dim, rotary_dim = 2 * half + rest, 2 * half
    x = rng.standard_normal((3, 5))
    query, key = rng.standard_normal((2, 5, heads * head_dim))
    spec = {"head_dim": head_dim, "rotary_dim": rotary_dim}

    def logits(query, key, pairing):
        q, k = (
            rotate((x @ w).reshape(3, heads, head_dim), pairing, rotary_dim) for w in (query, key)
        )
        return np.einsum("thd,shd->hts", q, k)

    converted = [
        layout.convert_rope_pairing(w, source="half", target="adjacent", **spec)
        for w in (query, key)
    ]
    assert_close(logits(*converted, "adjacent"), logits(query, key, "half"), atol=1e-12, rtol=1e-12)
    back = layout.convert_rope_pairing(converted[0], source="adjacent", target="half", **spec)
    assert_bitwise_equal(back, query)
    rows = layout.convert_rope_pairing(query.T, source="half", target="adjacent", axis=0, **spec)
    assert_bitwise_equal(rows, converted[0].T)


def test_rope_pairing_of_a_norm_scale_and_errors():
    scale = jnp.arange(6)
    for pairing in ("half", "adjacent"):
        same = layout.convert_rope_pairing(scale, source=pairing, target=pairing, head_dim=6)
        assert_bitwise_equal(same, scale)
    turned = layout.convert_rope_pairing(scale, source="half", target="adjacent", head_dim=6)
    assert_bitwise_equal(turned, np.array([0, 3, 1, 4, 2, 5], np.int32))
    spec = {"source": "half", "target": "adjacent"}
    with pytest.raises(
        ValueError, match="`rotary_dim` must be even and at most `head_dim=6`, got 3"
    ):
        layout.convert_rope_pairing(scale, head_dim=6, rotary_dim=3, **spec)
    with pytest.raises(
        ValueError, match="`weight` must hold whole groups of head_dim = 4 features"
    ):
        layout.convert_rope_pairing(scale, head_dim=4, **spec)
    with pytest.raises(ValueError, match=r"`target` must be one of .*, got 'gptj'"):
        layout.convert_rope_pairing(scale, head_dim=6, source="half", target="gptj")


def test_metadata_names_the_layout(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    numpy_io = pytest.importorskip("safetensors.numpy")
    spec = layout.FusedLayout("concat", q_per_kv=2, head_dim=3)
    weight = np.arange(24.0).reshape(12, 2)
    numpy_io.save_file(
        {"a.qkv_proj.weight": weight},
        tmp_path / "f.safetensors",
        metadata={"format": "pt"} | layout.layout_metadata({"a.qkv_proj.weight": spec}),
    )
    with safetensors.safe_open(tmp_path / "f.safetensors", "np") as file:
        found = layout.read_layout_metadata(file.metadata())
        assert found == {"a.qkv_proj.weight": spec}
        loaded = file.get_tensor("a.qkv_proj.weight")
    parts = layout.split_qkv(loaded, axis=0, **found["a.qkv_proj.weight"]._asdict())
    assert_bitwise_equal(parts.key, weight[6:9])
    assert layout.read_layout_metadata(None) == {}
    with pytest.raises(ValueError, match=r"the layout of 'w' must be one of .*, got 'rows'"):
        layout.layout_metadata({"w": ("rows", 1, 1)})
    with pytest.raises(
        ValueError, match="must hold layout, q_per_kv and head_dim as JSON, got 'grouped'"
    ):
        layout.read_layout_metadata({"gqa_jax.qkv_layout.w": "grouped"})


def adapter_state(rng, fused, prefix):
    h, g, d, hidden, rank = 4, 2, 8, 16, 3
    width = (h + 2 * g) * d if fused == "qkv_proj" else 2 * 20
    return {
        f"{prefix}{fused}.weight": rng.standard_normal((width, hidden)),
        f"{prefix}{fused}.bias": rng.standard_normal(width),
        f"{prefix}{fused}.lora_A.weight": rng.standard_normal((rank, hidden)),
        f"{prefix}{fused}.lora_B.default.weight": rng.standard_normal((width, rank)),
        f"{prefix}{fused}.lora_magnitude_vector": rng.standard_normal(width),
    }


def test_state_dicts_stream_both_ways():
    rng = np.random.default_rng(3)
    state = {"model.embed_tokens.weight": rng.standard_normal((4, 16))}
    state |= adapter_state(rng, "qkv_proj", "base_model.model.layers.0.self_attn.")
    state |= adapter_state(rng, "gate_up_proj", "base_model.model.layers.0.mlp.")
    spec = {"q_per_kv": 2, "head_dim": 8}
    split = dict(layout.split_state(state.items(), **spec))
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in split)
    attention = "base_model.model.layers.0.self_attn."
    shapes = {
        n.removeprefix(attention): a.shape for n, a in split.items() if n.startswith(attention)
    }
    assert shapes["q_proj.lora_B.default.weight"] == (32, 3)
    assert (
        shapes["k_proj.lora_B.default.weight"] == shapes["v_proj.lora_B.default.weight"] == (16, 3)
    )
    assert shapes["v_proj.lora_magnitude_vector"] == (16,)
    for part in "qkv":
        assert_bitwise_equal(
            split[f"{attention}{part}_proj.lora_A.weight"],
            state[f"{attention}qkv_proj.lora_A.weight"],
        )
    fused = dict(layout.fuse_state(split.items(), **spec))
    assert fused.keys() == state.keys()
    for name, tensor in state.items():
        assert_bitwise_equal(fused[name], tensor, what=name)


def test_gated_state_dicts_use_the_hugging_face_q_proj():
    weight = np.arange(2 * 6 * 3.0).reshape(36, 1)
    spec = {"q_per_kv": 2, "head_dim": 3, "layout": "grouped_gated"}
    split = dict(layout.split_state([("a.qkv_proj.weight", weight)], **spec))
    assert split["a.q_proj.weight"].shape == (24, 1)
    fused = dict(layout.fuse_state(split.items(), **spec))
    assert_bitwise_equal(fused["a.qkv_proj.weight"], weight)


def test_fusing_a_state_dict_refuses_what_it_would_lose():
    spec = {"q_per_kv": 1, "head_dim": 2}
    a = {f"x.{p}_proj.lora_A.weight": np.full((1, 4), i) for i, p in enumerate("qkv")}
    with pytest.raises(
        ValueError, match=r"x.qkv_proj.lora_A.weight: the LoRA A's .* must be equal"
    ):
        dict(layout.fuse_state(a.items(), **spec))
    with pytest.raises(ValueError, match=r"missing \['x.k_proj.bias', 'x.v_proj.bias'\]"):
        dict(layout.fuse_state([("x.q_proj.bias", np.zeros(2))], **spec))
    with pytest.raises(ValueError, match=r"x.qkv_proj.bias: `fused` must hold whole groups"):
        dict(layout.split_state([("x.qkv_proj.bias", np.zeros(7))], **spec))
