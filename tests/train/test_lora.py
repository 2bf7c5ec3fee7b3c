"""LoRA and DoRA on fused projections; PEFT's files, applied by hand to a Hugging Face model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gqa_jax import (
    MLP,
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNetConfig,
    SelfAttention,
    lora,
    qk_clip,
)
from gqa_jax.train import lora_peft
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, randomise

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True)
PLAIN, DORA = lora.LoRAConfig(rank=3, alpha=6.0), lora.LoRAConfig(rank=3, alpha=6.0, use_dora=True)

# Every adapter trained for a while: nothing at its initial value.
trained = functools.partial(randomise, kind=nnx.LoRAParam, scale=0.2)


def adapted(config=PLAIN, attention=BASE, seed=0):
    layer = SelfAttention(attention, rngs=nnx.Rngs(seed))
    lora.apply(layer, config, rngs=nnx.Rngs(seed + 1))
    return layer


def explicit_kernel(projection):
    """float64, output by output: s * A @ B added, with DoRA rescaled to the magnitude."""
    get = lambda p: np.asarray(p[...], np.float64)
    kernel, num_in = get(projection.kernel), projection.base.num_in
    a, b = get(projection.lora_a), get(projection.lora_b)
    flat = kernel.reshape(np.prod(kernel.shape[:num_in]), -1)
    flat = flat + projection.scaling * a.reshape(flat.shape[0], -1) @ b.reshape(b.shape[0], -1)
    if projection.magnitude is not None:
        flat = flat / np.linalg.norm(flat, axis=0) * get(projection.magnitude).reshape(-1)
    return flat.reshape(kernel.shape)


@pytest.mark.parametrize("config", [PLAIN, DORA])
def test_a_new_adapter_changes_nothing(config):
    layer, x = adapted(config), draw(0, 2, 5, 24)
    plain = SelfAttention(BASE, rngs=nnx.Rngs(0))
    assert_close(layer(x), plain(x), atol=1e-5)
    assert layer.qkv.lora_a.shape == (24, 3)
    assert layer.qkv.lora_b.shape == (3, 2, 4, 8)
    assert layer.out.lora_a.shape == (2, 2, 8, 3)
    assert layer.out.lora_b.shape == (3, 24)
    if config.use_dora:
        norms = np.linalg.norm(np.asarray(plain.qkv.kernel[...]), axis=0)
        assert_close(layer.qkv.magnitude[...], norms, atol=1e-6)


@pytest.mark.parametrize("config", [PLAIN, DORA])
@pytest.mark.parametrize("gate", [False, True])
def test_forward_merge_and_unmerge(config, gate):
    attention = BASE if not gate else AttentionConfig(
        model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, output_gate=True
    )  # fmt: skip
    layer, x = trained(adapted(config, attention)), draw(0, 2, 5, 24)
    kernels = {name: explicit_kernel(getattr(layer, name)) for name in ("qkv", "out")}
    plain = SelfAttention(attention, rngs=nnx.Rngs(0))
    before = plain.qkv.kernel[...]
    for name, kernel in kernels.items():
        getattr(plain, name).kernel[...] = jnp.asarray(kernel, jnp.float32)
    assert_close(layer(x), plain(x), atol=5e-5)
    out = layer(x)
    stepped, _ = layer.step(x, layer.init_cache(2, 5))
    assert_close(stepped, out, atol=2e-5)
    adapters = lora.merge(layer)
    assert set(adapters) == {("qkv",), ("out",)}
    assert type(layer.qkv) is type(plain.qkv)
    assert_close(layer.qkv.kernel[...], kernels["qkv"], atol=1e-5)
    assert_close(layer(x), out, atol=5e-5)
    lora.unmerge(layer, adapters)
    assert_close(layer.qkv.kernel[...], before, atol=2e-6)
    assert_close(layer(x), out, atol=5e-5)
    with pytest.raises(ValueError, match="`adapters` must belong to plain projections"):
        lora.unmerge(layer, adapters)


@pytest.mark.parametrize("config", [PLAIN, DORA])
def test_only_adapters_train_and_dora_holds_its_norm_fixed(config):
    layer, x = trained(adapted(config)), draw(0, 2, 5, 24)
    loss = lambda m: (m.qkv(x) ** 2).sum()
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    leaves = {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(grads)}
    assert all("lora" in name or "magnitude" in name for name in leaves)
    get = lambda p: np.asarray(p[...], np.float64)
    kernel, a, b = get(layer.qkv.kernel), get(layer.qkv.lora_a), get(layer.qkv.lora_b)
    flat, b = kernel.reshape(24, -1), b.reshape(3, -1)
    change = layer.qkv.scaling * a @ b
    ratio = 1.0
    if config.use_dora:
        magnitude = np.asarray(layer.qkv.magnitude[...], np.float64).reshape(-1)
        ratio = magnitude / np.linalg.norm(flat + change, axis=0)  # a constant for the gradient
    rows = np.asarray(x, np.float64).reshape(-1, 24)
    bias = np.asarray(layer.qkv.bias[...], np.float64).reshape(-1)
    d_out = 2 * (ratio * (rows @ (flat + change)) + bias)
    d_b = layer.qkv.scaling * (rows @ a).T @ (d_out * ratio)
    assert_close(leaves["qkv.lora_b"].reshape(3, -1), d_b, atol=2e-3, rtol=1e-4)
    d_a = layer.qkv.scaling * rows.T @ ((d_out * ratio) @ b.T)
    assert_close(leaves["qkv.lora_a"], d_a, atol=2e-3, rtol=1e-4)


def test_rank_stabilised_scaling_and_low_precision():
    assert lora.LoRAConfig(rank=16, alpha=8.0).scaling == 0.5
    assert lora.LoRAConfig(rank=16, alpha=8.0, use_rslora=True).scaling == 2.0
    layer = SelfAttention(BASE, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    lora.apply(layer, DORA, rngs=nnx.Rngs(1))
    assert layer.qkv.lora_a[...].dtype == jnp.float32
    assert layer.qkv(draw(0, 2, 5, 24).astype(jnp.bfloat16)).dtype == jnp.bfloat16
    lora.merge(layer)
    assert layer.qkv.kernel[...].dtype == jnp.bfloat16


def with_zeros():
    """A layer with outputs whose weights are all 0 (one is so small that its square is 0 in float32)."""
    layer = SelfAttention(BASE, rngs=nnx.Rngs(0))
    layer.out.kernel[...] = layer.out.kernel[...].at[..., 3].set(0).at[..., 5].set(1e-30)
    layer.qkv.kernel[...] = layer.qkv.kernel[...].at[:, 1, 2].set(0)
    return layer


def test_dora_on_weights_of_zero_changes_nothing_and_then_learns():
    layer, x = with_zeros(), draw(0, 2, 5, 24)
    plain = layer(x)
    lora.apply(layer, DORA, rngs=nnx.Rngs(1))
    loss = jax.jit(lambda m: (m(x) ** 2).sum() + m(x).sum())
    assert_close(jax.jit(lambda m: m(x))(layer), plain, atol=1e-5)
    for _ in range(3):  # fresh; then B is not 0 and the magnitude is; then neither is
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        for path, value in nnx.to_flat_state(grads):
            assert np.isfinite(np.asarray(value[...])).all(), path
        state = nnx.state(layer, nnx.LoRAParam)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 1e-3 * g, state, grads))
    assert np.abs(layer.out.magnitude[...][3]) > 0
    learnt = layer(x)
    lora.merge(layer)
    assert_close(layer(x), learnt, atol=5e-5)
    fresh = with_zeros()
    kernels = {name: np.asarray(getattr(fresh, name).kernel[...]) for name in ("qkv", "out")}
    lora.apply(fresh, DORA, rngs=nnx.Rngs(1))
    adapters = lora.merge(fresh)
    for _ in range(2):  # merged, then taken out again
        for name, kernel in kernels.items():
            assert_close(getattr(fresh, name).kernel[...], kernel, atol=1e-6)
        if adapters:
            lora.unmerge(fresh, adapters)
            adapters = None


def test_a_magnitude_of_zero_merges_and_is_not_taken_out():
    layer, x = trained(adapted(DORA)), draw(0, 2, 5, 24)
    layer.out.magnitude[...] = layer.out.magnitude[...].at[4].set(0)
    expected, kernel = layer(x), explicit_kernel(layer.out)
    adapters = lora.merge(layer)
    assert_close(layer.out.kernel[...], kernel, atol=1e-5)
    assert_close(layer(x), expected, atol=5e-5)
    with pytest.raises(ValueError, match="`adapters` must have magnitudes other than 0"):
        lora.unmerge(layer, adapters)


@pytest.mark.parametrize(
    "config", [PLAIN, DORA, lora.LoRAConfig(rank=3, alpha=2.0, use_rslora=True)]
)
def test_merging_into_bfloat16_rounds_once(config):
    layer = SelfAttention(BASE, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    lora.apply(layer, config, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
    if config.use_dora:
        base = np.asarray(layer.qkv.kernel[...], np.float64)
        assert_close(layer.qkv.magnitude[...], np.linalg.norm(base, axis=0), atol=1e-6)
    trained(layer)
    kernels = {name: explicit_kernel(getattr(layer, name)) for name in ("qkv", "out")}
    lora.merge(layer)
    for name, kernel in kernels.items():
        merged = getattr(layer, name).kernel[...]
        assert merged.dtype == jnp.bfloat16
        # Half a unit in the last of 8 bits, and float32's error before it.
        assert_close(merged, kernel, atol=1e-5, rtol=2**-8)


# Splitting and fusing: the reference system's shapes ------------------------------------------------------------


def wide_layer(config):
    attention = AttentionConfig(model_dim=256, num_heads=4, num_kv_heads=2, head_dim=64)
    layer = SelfAttention(attention, rngs=nnx.Rngs(0))
    lora.apply(layer, config, rngs=nnx.Rngs(1))
    return trained(layer)


def test_split_shapes_of_a_fused_adapter():
    layer = wide_layer(lora.LoRAConfig(rank=8, alpha=32.0, use_dora=True))
    adapter = layer.qkv.adapter()
    assert adapter.scaling == 4.0
    parts = lora_peft.split(adapter, name="qkv", layer=layer)
    assert {n: p.lora_B.shape for n, p in parts.items()} == {
        "q_proj": (256, 8), "k_proj": (128, 8), "v_proj": (128, 8)
    }  # fmt: skip
    assert {n: p.magnitude.shape for n, p in parts.items()} == {
        "q_proj": (256,), "k_proj": (128,), "v_proj": (128,)
    }  # fmt: skip
    for part in parts.values():
        assert part.lora_A.shape == (8, 256)
        assert_bitwise_equal(part.lora_A, parts["q_proj"].lora_A)
    b = np.asarray(
        adapter.b
    )  # query head 3 is the second of group 1; keys are third, values fourth
    assert_bitwise_equal(parts["q_proj"].lora_B[192:256], np.ascontiguousarray(b[:, 1, 1].T))
    assert_bitwise_equal(parts["k_proj"].lora_B[64:], np.ascontiguousarray(b[:, 1, 2].T))
    assert_bitwise_equal(parts["v_proj"].lora_B[:64], np.ascontiguousarray(b[:, 0, 3].T))
    mlp = MLP(256, 512, rngs=nnx.Rngs(0))
    lora.apply(mlp, lora.LoRAConfig(rank=8, alpha=8.0, targets=("gate_up",)), rngs=nnx.Rngs(1))
    parts = lora_peft.split(trained(mlp).gate_up.adapter(), name="gate_up", layer=mlp)
    assert {n: p.lora_B.shape for n, p in parts.items()} == {
        "gate_proj": (512, 8), "up_proj": (512, 8)
    }  # fmt: skip


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("config", [PLAIN, DORA])
@pytest.mark.parametrize("name", ["qkv", "out"])
def test_fuse_is_the_inverse_of_split(name, config, gate):
    attention = AttentionConfig(
        model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, output_gate=gate
    )
    layer = trained(adapted(config, attention))
    adapter = getattr(layer, name).adapter()
    parts = lora_peft.split(adapter, name=name, layer=layer)
    back = lora_peft.fuse(parts, name=name, layer=layer, scaling=adapter.scaling)
    jax.tree.map(assert_bitwise_equal, back, adapter)
    if gate and name == "qkv":  # Hugging Face's q_proj: [q | gate] per head
        assert parts["q_proj"].lora_B.shape == (2 * 4 * 8, 3)
        b = np.asarray(adapter.b)
        assert_bitwise_equal(parts["q_proj"].lora_B[8:16], np.ascontiguousarray(b[:, 0, 2].T))


def test_parts_with_different_a_are_stacked_exactly():
    layer = SelfAttention(BASE, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)
    parts = {
        "q_proj": lora_peft.Part(array(3, 24), array(32, 3)),
        "v_proj": lora_peft.Part(array(2, 24), array(16, 2)),
    }
    factors = {"q_proj": 0.7, "v_proj": 5.0}
    for scaling in (2.0, factors):
        adapter = lora_peft.fuse(parts, name="qkv", layer=layer, scaling=scaling)
        assert adapter.rank == 5
        change = adapter.scaling * np.asarray(lora.delta_kernel(adapter.a, adapter.b))
        of = dict.fromkeys(parts, scaling) if scaling == 2.0 else scaling
        product = {n: of[n] * (p.lora_B @ p.lora_A).T for n, p in parts.items()}
        assert_close(change[:, :, :2].reshape(24, 32), product["q_proj"], atol=2e-5)
        assert_close(change[:, :, 3].reshape(24, 16), product["v_proj"], atol=2e-5)
        assert not change[:, :, 2].any()  # k_proj has no adapter


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parts={}), "`parts` must hold some of"),
        (dict(parts={"o_proj": None}), r"`parts` must hold some of .*, got \['o_proj'\]"),
        (
            dict(parts={"q_proj": lora_peft.Part(np.ones((3, 24)), np.ones((32, 3)), np.ones(16))}),
            r"`q_proj` must have a magnitude of 32 numbers, got shape \(16,\)",
        ),
        (
            dict(parts={"q_proj": lora_peft.Part(np.ones(()), np.ones((32, 3)))}),
            r"`q_proj` must have lora_A \[r, 24\] and lora_B \[32, r\], got \(\)",
        ),
        (dict(name="down"), "`name` must be a projection with a counterpart in PEFT"),
        (
            dict(parts={"q_proj": lora_peft.Part(np.ones((3, 24)), np.ones((16, 3)))}),
            r"`q_proj` must have lora_A \[r, 24\] and lora_B \[32, r\], got",
        ),
        (
            dict(parts={
                "q_proj": lora_peft.Part(np.ones((3, 24)), np.ones((32, 3)), np.ones(32)),
                "k_proj": lora_peft.Part(np.ones((3, 24)), np.ones((16, 3))),
            }),
            "`magnitude` must be given for all parts or for none",
        ),
    ],
)  # fmt: skip
def test_bad_parts(change, message):
    layer = SelfAttention(BASE, rngs=nnx.Rngs(0))
    options = dict(name="qkv", layer=layer, scaling=1.0)
    options["parts"] = {"q_proj": lora_peft.Part(np.ones((3, 24)), np.ones((32, 3)))}
    options |= change
    with pytest.raises(ValueError, match=message):
        lora_peft.fuse(options.pop("parts"), **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lora.LoRAConfig(rank=0, alpha=1.0), "`rank` must be a positive int, got 0"),
        (lambda: lora.LoRAConfig(rank=1, alpha=0.0), "`alpha` must be positive, got 0.0"),
        (lambda: lora.LoRAConfig(rank=1, alpha=float("inf")), "`alpha` must be finite, got inf"),
        (lambda: lora.LoRAConfig(rank=1, alpha=1.0, targets=("q_proj",)), "`targets` must be names out of"),
        (lambda: lora.apply(adapted(), PLAIN, rngs=nnx.Rngs(0)), "`model` must carry no adapters on its targets"),
        (lambda: lora.apply(MLP(4, 4, rngs=nnx.Rngs(0)), PLAIN, rngs=nnx.Rngs(0)), "`targets` must name projections"),
        (lambda: lora.merge(SelfAttention(BASE, rngs=nnx.Rngs(0))), "`model` must carry adapters, got none"),
        (lambda: qk_clip.clip_layer(adapted(), jnp.ones((2, 2))), "`layer.qkv` must not carry a LoRA adapter"),
    ],
)  # fmt: skip
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Files ------------------------------------------------------------------------------------------------------------

DECODER = DecoderConfig(
    vocab_size=32, model_dim=24, layers=("full_attention", "linear_attention"), intermediate_size=16,
    attention=AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8),
    gated_deltanet=GatedDeltaNetConfig(
        model_dim=24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4
    ),
)  # fmt: skip
EVERYTHING = ("qkv", "out", "gate_up", "down")


@pytest.mark.parametrize("use_dora", [False, True])
def test_files_hold_exactly_what_peft_writes_and_come_back(use_dora, tmp_path):
    model = Decoder(DECODER, rngs=nnx.Rngs(0))
    config = lora.LoRAConfig(rank=3, alpha=6.0, targets=EVERYTHING, use_dora=use_dora)
    paths = lora.apply(model, config, rngs=nnx.Rngs(1))
    trained(model)
    lora_peft.save(model, tmp_path, base_model="tiny")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    out_of = {
        "layers.0.self_attn.q_proj": (24, 32), "layers.0.self_attn.k_proj": (24, 16),
        "layers.0.self_attn.v_proj": (24, 16), "layers.0.self_attn.o_proj": (32, 24),
        "layers.1.linear_attn.out_proj": (16, 24),
    }  # fmt: skip
    for i in range(2):
        sizes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
        out_of |= {f"layers.{i}.mlp.{name}": size for name, size in sizes.items()}
    expected = {}
    for module, (size_in, size_out) in out_of.items():
        expected[f"base_model.model.model.{module}.lora_A.weight"] = (3, size_in)
        expected[f"base_model.model.model.{module}.lora_B.weight"] = (size_out, 3)
        if use_dora:
            expected[f"base_model.model.model.{module}.lora_magnitude_vector"] = (size_out,)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"], written["use_dora"]) == (3, 6, use_dora)
    assert written["base_model_name_or_path"] == "tiny"
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["target_modules"] == sorted({name.rsplit(".", 1)[1] for name in out_of})

    fresh, tokens = Decoder(DECODER, rngs=nnx.Rngs(0)), jnp.arange(7)[None]
    assert set(lora_peft.load(fresh, tmp_path)) == set(paths)
    assert_bitwise_equal(fresh(tokens), model(tokens))


@pytest.mark.torch
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_applied_by_hand_to_a_hugging_face_llama(use_dora, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from gqa_jax import checkpoint

    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=32, tie_word_embeddings=False,
    )).eval()  # fmt: skip
    peer.save_pretrained(tmp_path / "base")
    model = checkpoint.load_hf(tmp_path / "base", dtype=jnp.float32)
    config = lora.LoRAConfig(rank=3, alpha=6.0, targets=EVERYTHING, use_dora=use_dora)
    lora.apply(model, config, rngs=nnx.Rngs(1))
    trained(model)
    lora_peft.save(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    modules = dict(peer.named_modules())
    with torch.no_grad():
        base = peer(torch.tensor(tokens)).logits.numpy()
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            stem = key.removesuffix(".lora_A.weight")
            linear = modules[stem.removeprefix("base_model.model.")]
            change = 2.0 * torch.tensor(tensors[f"{stem}.lora_B.weight"] @ tensors[key])
            linear.weight += change
            if use_dora:
                magnitude = torch.tensor(tensors[f"{stem}.lora_magnitude_vector"])
                linear.weight *= (magnitude / linear.weight.norm(dim=1))[:, None]
        expected = peer(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - base).max() > 0.05
    assert_close(model(jnp.asarray(tokens)), expected, atol=2e-4)
    lora.merge(model)
    assert_close(model(jnp.asarray(tokens)), expected, atol=2e-4)


def write_peft(path, tensors, **config):
    named = {f"base_model.model.model.layers.0.{name}": v for name, v in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(base | config))


def q_and_v(seed=0):
    """What PEFT trains by default: q_proj and v_proj, each with its own A."""
    rng = np.random.default_rng(seed)
    shapes = {"q_proj": (24, 32), "v_proj": (24, 16)}
    tensors = {}
    for name, (size_in, size_out) in shapes.items():
        tensors[f"self_attn.{name}.lora_A.weight"] = rng.normal(size=(2, size_in)).astype("float32")
        tensors[f"self_attn.{name}.lora_B.weight"] = rng.normal(size=(size_out, 2)).astype("float32")  # fmt: skip
    return tensors


def test_an_adapter_trained_on_separate_projections_loads_by_stacking(tmp_path):
    tensors = q_and_v()
    write_peft(tmp_path, tensors)
    model = Decoder(DECODER, rngs=nnx.Rngs(0))
    before = np.asarray(model.layers[0].mixer.qkv.kernel[...])
    assert lora_peft.load(model, tmp_path) == (("layers", 0, "mixer", "qkv"),)
    lora_peft.save(model, tmp_path / "again")
    lora.merge(model)
    change = np.asarray(model.layers[0].mixer.qkv.kernel[...]) - before
    product = lambda n: (
        2.0 * (tensors[f"self_attn.{n}.lora_B.weight"] @ tensors[f"self_attn.{n}.lora_A.weight"])
    )
    assert_close(change[:, :, :2].reshape(24, 32).T, product("q_proj"), atol=1e-5)
    assert_close(change[:, :, 3].reshape(24, 16).T, product("v_proj"), atol=1e-5)
    assert not change[:, :, 2].any()
    fresh = Decoder(DECODER, rngs=nnx.Rngs(0))
    lora_peft.load(fresh, tmp_path / "again")
    lora.merge(fresh)
    assert_close(fresh.layers[0].mixer.qkv.kernel[...] - before, change, atol=1e-6)


def test_patterns_and_rank_stabilised_scaling_are_heard(tmp_path):
    tensors = {k: v for k, v in q_and_v().items() if "q_proj" in k}
    for config, scaling in [
        (dict(use_rslora=True), 4 / 2**0.5),
        (dict(alpha_pattern={"self_attn.q_proj": 10}), 5.0),
        (dict(alpha_pattern={"v_proj": 10}), 2.0),
        (dict(r=9, rank_pattern={"q_proj": 2}), 2.0),
    ]:
        write_peft(tmp_path, tensors, **config)
        model = Decoder(DECODER, rngs=nnx.Rngs(0))
        lora_peft.load(model, tmp_path)
        assert model.layers[0].mixer.qkv.scaling == pytest.approx(scaling)
    write_peft(tmp_path, tensors, lora_dropout=0.1)
    with pytest.warns(
        UserWarning, match=r"`lora_dropout=0.1` of adapter_config.json has no counterpart"
    ):
        lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)


@pytest.mark.parametrize(
    "tensors, config, message",
    [
        ({}, dict(peft_type="IA3"), "`peft_type` of adapter_config.json must be 'LORA', got 'IA3'"),
        ({}, dict(bias="all"), "`bias` of adapter_config.json must be 'none', got 'all'"),
        ({}, dict(modules_to_save=["lm_head"]), "`modules_to_save` of adapter_config.json must be empty"),
        ({"mlp.gate_proj.weight": np.ones(2, "f4")}, {}, "must hold LoRA tensors of linear layers, got"),
        ({"mlp.gate_proj.lora_A.weight": np.ones((2, 24), "f4")}, {}, "must have lora_A and lora_B"),
        (
            {"mlp.w1.lora_A.weight": np.ones((2, 24), "f4"), "mlp.w1.lora_B.weight": np.ones((2, 2), "f4")},
            {}, r"`model` must have a projection for each adapter, got \['model.layers.0.mlp.w1'\]",
        ),
    ],
)  # fmt: skip
def test_files_that_fit_nothing_are_refused(tensors, config, message, tmp_path):
    write_peft(tmp_path, tensors or q_and_v(), **config)
    with pytest.raises(ValueError, match=message):
        lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)


# Every setting of PEFT 0.21.2, with values other than its defaults.
CHANGES_NOTHING = dict(
    auto_mapping={"base_model_class": "X"}, base_model_name_or_path="a/b", ensure_weight_tying=True,
    eva_config={"rho": 2.0}, exclude_modules=["lm_head"], inference_mode=True, init_lora_weights="gaussian",
    layers_pattern="layers", layers_to_transform=[0], lora_ga_config={"scale": "stable"}, loftq_config={},
    megatron_config={"a": 1}, megatron_core="other", peft_version="0.21.2", qalora_group_size=32, revision="main",
    target_modules="all-linear", task_type="CAUSAL_LM", corda_config={"verbose": True},
    runtime_config={"ephemeral_gpu_offload": True}, modules_to_save=[], layer_replication=None,
)  # fmt: skip
IS_REFUSED = dict(
    alora_invocation_tokens=[1, 2], arrow_config={"top_k": 2}, bias="lora_only", fan_in_fan_out=True,
    init_lora_weights="pissa", kasa_config={"beta": 0.1}, layer_replication=[[0, 2], [1, 2]], lora_bias=True,
    modules_to_save=["lm_head"], monteclora_config={"num_samples": 2}, peft_type="ADALORA", target_parameters=["w"],
    trainable_token_indices=[3], use_bdlora={"nblocks": 2}, use_qalora=True, velora_config={"scale": 1.0}, r=0,
    lora_alpha="16", rank_pattern={"q": 0}, alpha_pattern={"(": 1.0}, use_dora=True, use_rslora=1,
    some_setting_of_tomorrow=0.5,
)  # fmt: skip
IS_READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
}  # tests above
WARNS = {"lora_dropout"}


def test_settings_that_change_nothing_are_accepted(tmp_path):
    loaded = []
    for settings in (
        {},
        CHANGES_NOTHING,
        *({"init_lora_weights": x} for x in ("eva", False, "MiCA")),
    ):
        write_peft(tmp_path, q_and_v(), **settings)
        model = Decoder(DECODER, rngs=nnx.Rngs(0))
        lora_peft.load(model, tmp_path)
        loaded.append(model.layers[0].mixer.qkv.adapter())
    for adapter in loaded[1:]:
        jax.tree.map(assert_bitwise_equal, adapter, loaded[0])


@pytest.mark.parametrize("name", IS_REFUSED)
def test_settings_that_change_the_function_are_refused_by_name(name, tmp_path):
    write_peft(tmp_path, q_and_v(), **{name: IS_REFUSED[name]})
    with pytest.raises(ValueError, match=name) as error:
        lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)
    assert "adapter_" in str(error.value)


def test_initialisations_that_change_the_base_are_refused_with_the_way_out(tmp_path):
    for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", "new"):
        write_peft(tmp_path, q_and_v(), init_lora_weights=value)
        with pytest.raises(ValueError, match=f"got '{value}': .*path_initial_model_for_weight_con"):
            lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)
        lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path, ignore=["init_lora_weights"])


def test_the_settings_are_all_those_of_peft():
    peft = pytest.importorskip("peft")
    known = IS_READ | WARNS | CHANGES_NOTHING.keys() | IS_REFUSED.keys()
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_their_own_for_every_projection(use_dora, use_rslora, tmp_path):
    """Ranks and alphas by pattern, one projection without an adapter, against float64 by hand."""
    rng = np.random.default_rng(3)
    model = Decoder(DECODER, rngs=nnx.Rngs(0))
    mixer, mlp = model.layers[0].mixer, model.layers[0].mlp
    ours = {
        "q_proj": mixer.qkv.kernel[:, :, :2], "k_proj": mixer.qkv.kernel[:, :, 2], "v_proj": mixer.qkv.kernel[:, :, 3],
        "o_proj": jnp.moveaxis(mixer.out.kernel[...], -1, 0), "gate_proj": mlp.gate_up.kernel[..., 0],
        "up_proj": mlp.gate_up.kernel[..., 1],
    }  # fmt: skip
    weights = {n: np.asarray(w, np.float64).reshape(24, -1) for n, w in ours.items()}  # [in, out]
    weights["o_proj"] = weights["o_proj"].T
    rank = {"q_proj": 2, "k_proj": 3, "v_proj": 2, "o_proj": 2, "gate_proj": 4}
    alpha = {"q_proj": 4.0, "k_proj": 1.5, "v_proj": -7.0, "o_proj": 4.0, "gate_proj": 4.0}
    tensors, expected = {}, dict(weights)
    for name, r in rank.items():
        size_in, size_out = weights[name].shape
        room = "mlp" if name == "gate_proj" else "self_attn"
        a, b = (rng.normal(size=shape).astype("f4") for shape in ((r, size_in), (size_out, r)))
        tensors |= {f"{room}.{name}.lora_A.weight": a, f"{room}.{name}.lora_B.weight": b}
        factor = alpha[name] / (np.sqrt(r) if use_rslora else r)
        wide = weights[name] + factor * (b.astype(np.float64) @ a.astype(np.float64)).T
        if use_dora:
            magnitude = rng.uniform(0.5, 2.0, size_out).astype("f4")
            tensors[f"{room}.{name}.lora_magnitude_vector"] = magnitude
            wide = wide / np.linalg.norm(wide, axis=0) * magnitude
        expected[name] = wide
    write_peft(
        tmp_path, tensors, use_dora=use_dora, use_rslora=use_rslora,
        rank_pattern={"k_proj": 3, "layers.0.mlp.gate_proj": 4},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 1.5, ".*v_proj": -7, "proj": 99},
    )  # fmt: skip
    lora_peft.load(model, tmp_path)
    mixer, mlp = model.layers[0].mixer, model.layers[0].mlp
    x = draw(1, 2, 24)
    y = jax.jit(lambda m: m(x))(mixer.qkv)
    for _ in range(2):
        for name, at in (("q_proj", y[:, :, :2]), ("k_proj", y[:, :, 2]), ("v_proj", y[:, :, 3])):
            assert_close(at.reshape(2, -1), np.asarray(x, np.float64) @ expected[name], atol=2e-4)
        both = mlp.gate_up(x)
        assert_close(both[..., 0], np.asarray(x, np.float64) @ expected["gate_proj"], atol=2e-4)
        assert_close(both[..., 1], np.asarray(x, np.float64) @ expected["up_proj"], atol=2e-4)
        heads = draw(2, 1, 2, 2, 8)
        assert_close(
            mixer.out(heads),
            np.asarray(heads, np.float64).reshape(1, 32) @ expected["o_proj"],
            atol=2e-4,
        )
        if type(mixer.qkv) is lora.LoRAProjection:
            lora.merge(model)
            y = mixer.qkv(x)


def change_files(path, **change):
    """A valid adapter with one change."""
    tensors = {k: v for k, v in q_and_v().items() if v is not None}
    for name, value in change.pop("tensors", {}).items():
        tensors[name] = value
    write_peft(path, {k: v for k, v in tensors.items() if v is not None}, **change)


Q = "self_attn.q_proj."
ADAPTERS_FROM_STRANGERS = [
    (dict(r=3), r"`r` of adapter_config.json must be that of `model.layers.0.self_attn.q_proj.lora_A`"),
    (dict(rank_pattern={"v_proj": 5}), r"`r` of .* `model.layers.0.self_attn.v_proj.lora_A` .* got 5"),
    (dict(r=True), "`r` of adapter_config.json must be a positive integer, got True"),
    (dict(r="2"), "`r` of adapter_config.json must be a positive integer, got '2'"),
    (dict(lora_alpha=float("nan")), "`lora_alpha` of adapter_config.json must be a finite number"),
    (dict(rank_pattern=[1]), "`rank_pattern` of adapter_config.json must be positive integers by"),
    (dict(tensors={Q + "lora_B.weight": np.ones((31, 2), "f4")}), r"at .*q_proj.*: `q_proj` must have .* \(31, 2\)"),
    (dict(tensors={Q + "lora_A.weight": np.ones((2, 23), "f4")}), r"at .*q_proj.*: `q_proj` must have .* \(2, 23\)"),
    (dict(tensors={Q + "lora_A.weight": np.ones((2, 24, 1), "f4")}), r"`q_proj` must have .* \(2, 24, 1\)"),
    (dict(tensors={Q + "lora_A.weight": np.ones((), "f4")}), r"`r` of .* of shape \(\)"),
    (dict(tensors={Q + "lora_A.weight": np.ones((2, 24), "i4")}), r"got '.*q_proj.lora_A.weight' \(int32\)"),
    (dict(tensors={Q + "lora_magnitude_vector": np.ones(32, "f4")}), "q_proj` must have lora_A and lora_B in"),
    (dict(tensors={Q + "lora_embedding_A": np.ones((2, 3), "f4")}), "must hold LoRA tensors of linear layers"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", ADAPTERS_FROM_STRANGERS)
def test_an_adapter_that_contradicts_itself_is_refused(change, message, tmp_path):
    change_files(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            lora_peft.load(Decoder(DECODER, rngs=nnx.Rngs(0)), tmp_path)

    refused(r"`path` must hold adapter_config.json, got")
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    change_files(tmp_path)
    whole = weights.read_bytes()
    weights.rename(tmp_path / "adapter_model.bin")
    refused(r"`path` must hold adapter_model.safetensors, got .*adapter_model.bin.*save_pretrained")
    for broken in (whole[:-1], whole[:100], b"", b"\xff" * 8 + whole[8:]):
        weights.write_bytes(broken)
        refused(r"adapter_model.safetensors` must be a safetensors file")
    weights.write_bytes(whole)
    for text, message in (
        (b"[1]", "must hold a JSON object, got list"),
        (b'{"r": 2', "adapter_config.json` must be JSON, got"),
        (b"\xff\xfe\xff", "adapter_config.json` must be JSON, got"),
    ):
        config.write_bytes(text)
        refused(message)


def test_a_scanned_decoder_is_refused():
    config = dataclasses.replace(DECODER, layers=("full_attention",) * 2, scan_layers=True)
    with pytest.raises(ValueError, match="`model` must not stack its layers for a scan"):
        lora.apply(Decoder(config, rngs=nnx.Rngs(0)), PLAIN, rngs=nnx.Rngs(0))
