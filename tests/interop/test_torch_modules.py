"""The torch layers against transformers' layers, torchtune's definition, and themselves step by step."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402

import gqa_jax  # noqa: E402
import interop  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch

ATTENTION = dict(model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
DELTA = dict(model_dim=32, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4)
_SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, num_hidden_layers=2,
)  # fmt: skip
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=4, linear_conv_kernel_dim=4,
)  # fmt: skip


def hidden(length=7, batch=2, width=32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator).requires_grad_(grad)


def compare_layers(ours, theirs, call_theirs, *, atol=1e-5):
    """Values, gradients of the input and of every parameter."""
    results = []
    for layer, call in ((ours, ours), (theirs, call_theirs)):
        x = hidden(grad=True)
        layer.zero_grad()
        out = call(x)
        out.sin().sum().backward()
        results.append((out, x.grad, {n: p.grad for n, p in layer.named_parameters()}))
    (out, x_grad, grads), (out2, x_grad2, grads2) = results
    assert_close(out, out2, atol=atol)
    assert_close(x_grad, x_grad2, atol=atol)
    assert grads.keys() == grads2.keys()
    for name in grads:
        assert_close(grads[name], grads2[name], atol=atol, what=name)


def rotary(model, x):
    positions = torch.arange(x.shape[1])[None]
    if (
        "mrope_section" in (model.config.rope_parameters or {})
        or "qwen3_5" in model.config.model_type
    ):
        positions = positions.expand(3, 1, -1)
    return model.model.rotary_emb(x, positions)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5"])
def test_self_attention_is_hugging_faces(family):
    torch.manual_seed(0)
    rope = gqa_jax.RopeConfig()
    match family:
        case "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))
            config = gqa_jax.AttentionConfig(**ATTENTION, rope=rope)
        case "qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES))
            config = gqa_jax.AttentionConfig(**ATTENTION, rope=rope, qk_norm="rms")
        case _:
            hf = transformers.Qwen3_5TextConfig(**_SIZES, **_LINEAR)
            model = transformers.Qwen3_5ForCausalLM(hf)
            theta = hf.rope_parameters["rope_theta"]
            config = gqa_jax.AttentionConfig(
                **ATTENTION, qk_norm="rms_zero_centred", output_gate=True,
                rope=gqa_jax.RopeConfig(theta=theta, rotary_dim=2),
            )  # fmt: skip
    model.set_attn_implementation("eager")
    theirs = model.model.layers[1].self_attn
    ours = interop.SelfAttention(config)
    ours.load_state_dict(theirs.state_dict())
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    call = lambda x: theirs(
        hidden_states=x, position_embeddings=rotary(model, x), attention_mask=mask
    )[0]
    compare_layers(ours, theirs, call)


@pytest.mark.parametrize("layout", ["qwen3_5", "qwen3_next"])
def test_gated_deltanet_is_hugging_faces(layout):
    torch.manual_seed(0)
    if layout == "qwen3_5":
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_SIZES, **_LINEAR))
    else:
        hf = transformers.Qwen3NextConfig(
            **_SIZES, **_LINEAR, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )  # fmt: skip
        model = transformers.Qwen3NextForCausalLM(hf)
    theirs = model.model.layers[0].linear_attn
    ours = interop.GatedDeltaNet(gqa_jax.GatedDeltaNetConfig(**DELTA), layout=layout)
    ours.load_state_dict(theirs.state_dict())
    compare_layers(ours, theirs, lambda x: theirs(hidden_states=x))


def layers():
    torch.manual_seed(0)
    return {
        "attention": interop.SelfAttention(
            gqa_jax.AttentionConfig(**ATTENTION, qk_norm="rms", sinks="learnable")
        ),
        "delta": interop.GatedDeltaNet(gqa_jax.GatedDeltaNetConfig(**DELTA, conv_bias=True)),
    }


@pytest.mark.parametrize("name", ["attention", "delta"])
@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_steps_of_any_size_equal_one_call(name, owner):
    layer = layers()[name]
    x = hidden(9)
    with torch.no_grad():
        whole = layer(x)
        cache = layer.init_cache(2, 16, owner=owner)
        outs = []
        for part in (x[:, :5], x[:, 5:6], x[:, 6:]):
            out, cache = layer.step(part, cache)
            outs.append(out)
    assert_close(torch.cat(outs, 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "delta"])
@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_ragged_rows_continue_as_if_alone(name, owner):
    layer = layers()[name]
    x = hidden(4)
    lengths = torch.tensor([4, 2])
    with torch.no_grad():
        cache = layer.init_cache(2, 8, owner=owner)
        first, cache = layer.step(x, cache, lengths=lengths)
        second, cache = layer.step(x, cache, lengths=torch.tensor([0, 3]))
        third, cache = layer.step(x[:, :1], cache)
        for row, parts in (
            (0, (x[:1], x[:1, :0], x[:1, :1])),
            (1, (x[1:, :2], x[1:, :3], x[1:, :1])),
        ):
            alone = layer(torch.cat(parts, 1))
            ours = [
                out[row : row + 1, : p.shape[1]]
                for out, p in zip((first, second, third), parts, strict=True)
            ]
            assert_close(torch.cat(ours, 1), alone, atol=1e-5, what=f"row {row}")
        held = cache if owner == "torch" else cache.to_torch()
        assert held.length.tolist() == [5, 6]
        if name == "delta":
            single = layer.init_cache(1, 8)
            _, single = layer.step(torch.cat((x[1:, :2], x[1:, :3], x[1:, :1]), 1), single)
            assert_close(held.state[1:], single.state, atol=1e-5)
            assert_close(held.conv[1:], single.conv, atol=1e-5)


@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_a_full_cache_is_said(owner):
    layer = layers()["attention"]
    x = hidden(4)
    with torch.no_grad():
        _, cache = layer.step(x, layer.init_cache(2, 5, owner=owner), lengths=torch.tensor([4, 2]))
        message = "`cache` must hold 6 tokens after this step, got capacity 5"
        with pytest.raises(ValueError, match=message):
            layer.step(x[:, :2], cache)


@pytest.mark.parametrize("name", ["attention", "ring", "delta"])
def test_steps_compile_whole(name):
    torch._dynamo.reset()
    window = gqa_jax.AttentionConfig(**ATTENTION, sliding_window=4)
    layer = interop.SelfAttention(window) if name == "ring" else layers()[name]
    options = {"policy": "ring"} if name == "ring" else {}
    x = hidden(7)
    compiled = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        cache, outs = layer.init_cache(2, 16, **options), []
        kind = type(cache)
        for part in (x[:, :5], x[:, 5:6], x[:, 6:]):
            out, cache = compiled(part, cache)
            assert type(cache) is kind
            outs.append(out)
        assert_close(torch.cat(outs, 1), layer(x), atol=1e-5)
        assert cache.length.tolist() == [7, 7]
    empty = layer.init_cache(2, 16, **options)
    gradients = []
    for step in (compiled, layer.step):
        out, _ = step(x[:, :3], empty, lengths=torch.tensor([3, 2]))
        loss = (out[0].sin().sum() + out[1, :2].sin().sum()).sum()
        gradients.append(
            torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad])
        )
    for mine, its in zip(*gradients, strict=True):
        assert_close(mine, its, atol=1e-5)


def test_a_compiled_step_cannot_take_a_jax_cache_whole():
    torch._dynamo.reset()
    layer = layers()["attention"]
    x = hidden(3)
    with torch.no_grad():
        expected = layer(x)
        whole = torch.compile(layer.step, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"init_cache\(owner='torch'\)"):
            whole(x, layer.init_cache(2, 8, owner="jax"))
        broken = torch.compile(layer.step, backend="eager")
        out, cache = broken(x, layer.init_cache(2, 8, owner="jax"))
        assert isinstance(cache, interop.JaxCache)
    assert_close(out, expected, atol=1e-5)


def test_a_jax_cache_is_changed_in_place_and_has_no_gradients():
    layer = layers()["attention"]
    x = hidden(3)
    cache = layer.init_cache(2, 16, owner="jax")
    with pytest.raises(RuntimeError, match="has no gradients"):
        layer.step(x, cache)
    with torch.no_grad():
        _, cache = layer.step(x, cache)
        before = cache.arrays.key.unsafe_buffer_pointer()
        _, cache = layer.step(x[:, :1], cache)
        assert cache.arrays.key.unsafe_buffer_pointer() == before
        tensors = cache.to_torch()
        again = interop.JaxCache.from_torch(tensors)
        one, _ = layer.step(x[:, :1], tensors)
        two, _ = layer.step(x[:, :1], again)
        assert_close(one, two, atol=1e-6)
    with pytest.raises(ValueError, match="`owner` must be 'torch' or 'jax', got 'me'"):
        layer.init_cache(2, 16, owner="me")


def test_other_cache_policies():
    config = gqa_jax.AttentionConfig(**ATTENTION, sliding_window=4)
    layer = interop.SelfAttention(config)
    x = hidden(9)
    with torch.no_grad():
        cache, outs = layer.init_cache(2, 16, policy="ring"), []
        for t in range(9):
            out, cache = layer.step(x[:, t : t + 1], cache)
            outs.append(out)
        assert_close(torch.cat(outs, 1), layer(x), atol=1e-5)
        quantised = layer.init_cache(2, 16, policy="int8", owner="jax")
        out, _ = layer.step(x, quantised)
        assert_close(out, layer(x), atol=0.05)


def test_segments_padding_positions_and_masks_reach_the_layer():
    layer = layers()["attention"]
    x = hidden(6)
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    out = layer(x, segment_ids=ids)
    assert_close(out[0, 2:], layer(x[:1, 2:])[0], atol=1e-5)
    mask = torch.ones(6, 6, dtype=torch.bool).tril(0)[None, None]
    mask[..., 0] = False
    assert not torch.equal(layer(x, mask=mask), layer(x))
    positions = torch.arange(6).expand(2, -1) * 3
    assert not torch.equal(layer(x, positions=positions), layer(x))
    delta = layers()["delta"]
    assert_close(delta(x, segment_ids=ids)[0, 2:], delta(x[:1, 2:])[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, M=32\], got \(2, 6, 31\)"):
        layer(x[..., :31])
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, M=32\]"):
        delta(x[0])


def test_dropout_only_in_training():
    layer = interop.SelfAttention(gqa_jax.AttentionConfig(**ATTENTION, dropout_rate=0.5))
    x = hidden()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", ["attention", "delta"])
def test_layers_are_ordinary_modules(name, tmp_path):
    layer = layers()[name]
    x = hidden()
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected, atol=1e-6)
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        loss = ((layer(x) - x) ** 2).mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first


def test_a_replaced_projection_takes_part():
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer = layers()["attention"]
    x = hidden()
    before = layer(x)
    layer.v_proj = Doubled(layer.v_proj)
    assert_close(layer(x), 2 * before, atol=1e-5)


def test_cross_attention_is_torchs():
    config = gqa_jax.AttentionConfig(**ATTENTION, rope=None, is_causal=False, qkv_bias=True)
    layer = interop.CrossAttention(config, memory_dim=24)
    x, memory = hidden(5, grad=True), hidden(7, width=24)
    heads = lambda y, n: y.view(2, -1, n, 8).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads(layer.q_proj(x), 4),
        heads(layer.k_proj(memory), 2),
        heads(layer.v_proj(memory), 2),
        enable_gqa=True,
    )
    expected = layer.o_proj(expected.transpose(1, 2).flatten(2))
    out = layer(x, memory)
    assert_close(out, expected, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.sin().sum(), list(layer.parameters())) for y in (out, expected)
    ]
    for mine, its in zip(*gradients, strict=True):
        assert_close(mine, its, atol=1e-5)
    ids, memory_ids = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[0] * 4 + [-1] * 3] * 2)
    padded = layer(x, memory, segment_ids=ids, memory_segment_ids=memory_ids)
    assert_close(padded, layer(x, memory[:, :4]), atol=1e-5)
    with pytest.raises(ValueError, match="`memory` must have width 24"):
        layer(x, x)
    with pytest.raises(ValueError, match="`config.is_causal` must be False for cross-attention"):
        interop.CrossAttention(gqa_jax.AttentionConfig(**ATTENTION))


@pytest.mark.parametrize(
    "kind, gate", [("rms", False), ("rms_zero_centred", True), ("l2", False), ("none", True)]
)
def test_cross_attention_norms_sinks_and_gates(kind, gate):
    config = gqa_jax.AttentionConfig(
        **ATTENTION,
        rope=None,
        is_causal=False,
        qk_norm=kind,
        sinks="zero",
        dropout_rate=0.1,
        output_gate=gate,
    )
    layer = interop.CrossAttention(config).eval()
    x = hidden(3)
    norm = lambda y: y if kind == "none" else torch.nn.functional.rms_norm(y, (8,), eps=1e-6)
    q, k, v = (
        p(x).view(2, 3, n, -1).transpose(1, 2)
        for p, n in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
    )
    scores = norm(q[..., :8]) @ norm(k).repeat_interleave(2, 1).mT * 8**-0.5
    scores = torch.cat((scores, torch.zeros(2, 4, 3, 1)), -1).softmax(-1)[..., :3]
    heads = scores @ v.repeat_interleave(2, 1)
    if gate:
        heads = heads * q[..., 8:].sigmoid()
    expected = heads.transpose(1, 2).flatten(2)
    assert_close(layer(x, x), layer.o_proj(expected), atol=1e-5)
    layer.train()
    assert not torch.equal(layer(x, x), layer(x, x))


class Tower(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.dropout(self.norm(x)) * scale


def test_nnx_modules_with_state():
    module = interop.NNXModule(Tower, static_argnames=("scale",))
    names = {name for name, _ in module.named_parameters()}
    assert names == {
        "layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias", "norm.scale", "norm.bias"
    }  # fmt: skip
    x = hidden(4, width=8)
    mean = module.norm.mean.clone()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)  # dropout advanced its counter
    assert not torch.equal(module.norm.mean, mean)
    module.eval()
    assert torch.equal(module(x), module(x))
    assert_close(module(x, scale=2.0), 2 * module(x), atol=1e-6)

    original = Tower(nnx.Rngs(0))
    original.eval()
    fresh = interop.NNXModule(Tower).eval()
    assert_close(fresh(x), original(interop.to_jax(x)), atol=1e-6)
    fresh(x).sum().backward()
    assert all(p.grad is not None for p in fresh.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(x), fresh(x))
    torch._dynamo.reset()
    assert_close(torch.compile(fresh, backend="aot_eager", fullgraph=True)(x), fresh(x), atol=1e-6)
    twin = interop.NNXModule(Tower, rngs=1).eval()
    twin.load_state_dict(fresh.state_dict())
    assert torch.equal(twin(x), fresh(x))
    with pytest.raises(TypeError, match=r"`factory` must return an nnx\.Module, got int"):
        interop.NNXModule(lambda rngs: 3)


def test_nnx_module_of_ours_trains_like_jax():
    config = gqa_jax.AttentionConfig(**ATTENTION)
    build = lambda rngs: gqa_jax.SelfAttention(config, rngs=rngs)
    module, original = interop.NNXModule(build), build(nnx.Rngs(0))
    x = hidden()
    module(x).sum().backward()
    expected = nnx.grad(lambda m: m(interop.to_jax(x)).sum())(original)
    assert_close(module.qkv.kernel.grad, expected.qkv.kernel[...], atol=1e-4)
    assert not jax.config.jax_enable_x64
