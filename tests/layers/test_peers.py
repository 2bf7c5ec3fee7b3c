"""SelfAttention against Hugging Face modules with sinks (gpt-oss) and soft cap (gemma2), multi-axis rotary embedding
against Qwen2-VL, packing and ring cache against torch's scaled dot product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, RopeConfig, SelfAttention, masks
from gqa_jax.layers.rotary import apply_rotary, rotary_tables
from tests.support.compare import assert_close

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def adopt(config, theirs):
    """Our layer with the weights of theirs: q/k/v/o_proj, biases, sinks."""
    ours = SelfAttention(config, rngs=nnx.Rngs(0))
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    groups, per_group, dim = config.num_kv_heads, config.q_per_kv, config.head_dim

    def fused(kind):
        parts = [np.atleast_2d(weights[f"{n}_proj.{kind}"].T) for n in "qkv"]
        shapes = [(groups, per_group, dim), (groups, 1, dim), (groups, 1, dim)]
        return np.concatenate([p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True)], 2)

    ours.qkv.kernel[...] = jnp.asarray(fused("weight"))
    kernel = weights["o_proj.weight"].T.reshape(groups, per_group, dim, -1)
    ours.out.kernel[...] = jnp.asarray(kernel)
    if config.qkv_bias:
        ours.qkv.bias[...] = jnp.asarray(fused("bias")[0])
        ours.out.bias[...] = jnp.asarray(weights["o_proj.bias"])
    if "sinks" in weights:
        ours.sinks[...] = jnp.asarray(weights["sinks"].reshape(groups, per_group))
    return ours


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_sinks_and_soft_cap_equal_hugging_face(family, kind):
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    prefix = {"gpt_oss": "GptOss", "gemma2": "Gemma2"}[family]
    settings = dict(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        num_hidden_layers=1, layer_types=[kind], rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )  # fmt: skip
    if family == "gemma2":
        settings |= dict(query_pre_attn_scalar=3, attn_logit_softcapping=0.8)
    configuration = getattr(module, f"{prefix}Config")(**settings)
    configuration._attn_implementation = "eager"
    torch.manual_seed(3)
    theirs = getattr(module, f"{prefix}Attention")(configuration, 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    window = 5 if kind == "sliding_attention" else None
    special = (
        dict(sinks="learnable", qkv_bias=True, out_bias=True)
        if family == "gpt_oss"
        else dict(scale=3.0**-0.5, logits_soft_cap=0.8)
    )
    config = AttentionConfig(
        model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=window,
        rope=RopeConfig(theta=77.0), **special,
    )  # fmt: skip
    ours = adopt(config, theirs)
    x = np.random.default_rng(6).normal(size=(2, 13, 24)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(configuration)
    embeddings = rotary(tensor, torch.arange(13)[None].expand(2, -1))
    visible = masks.attention_mask(13, is_causal=True, sliding_window=window)
    mask = torch.where(torch.tensor(np.array(visible)), 0.0, float("-inf"))
    out, _ = theirs(tensor, position_embeddings=embeddings, attention_mask=mask)
    assert_close(ours(jnp.asarray(x)), out, atol=2e-5)
    stepped, _ = ours.step(jnp.asarray(x), ours.init_cache(2, 13))
    assert_close(stepped, out, atol=2e-5)
    (out**2).sum().backward()
    gradient = jax.grad(lambda x: (ours(x) ** 2).sum())(jnp.asarray(x))
    assert_close(gradient, tensor.grad, atol=2e-4, rtol=2e-4)
    if family == "gpt_oss":
        grads = nnx.grad(lambda m: (m(jnp.asarray(x)) ** 2).sum())(ours)
        expected = theirs.sinks.grad.numpy().reshape(2, 2)
        assert_close(grads["sinks"][...], expected, atol=2e-4, rtol=2e-4)


def test_blocked_sections_equal_qwen2_vl():
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    configuration = modeling_qwen2_vl.Qwen2VLTextConfig(
        hidden_size=48, num_attention_heads=3, num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    positions = np.random.default_rng(0).integers(0, 50, (3, 2, 9))
    query, key = (np.random.default_rng(i).normal(size=(2, 9, 3, 16)).astype("f4") for i in (1, 2))
    swap = lambda a: torch.tensor(a).transpose(1, 2)
    tables = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(configuration)(
        torch.zeros(1), torch.tensor(positions)
    )
    expected = modeling_qwen2_vl.apply_rotary_pos_emb(swap(query), swap(key), *tables)
    config = RopeConfig(theta=100.0, mrope_sections=(2, 3, 3))
    cos, sin = rotary_tables(config, 16, jnp.asarray(positions))
    for ours, theirs in zip((query, key), expected, strict=True):
        assert_close(apply_rotary(jnp.asarray(ours), cos, sin), theirs.transpose(1, 2), atol=2e-5)


@pytest.mark.parametrize("policy", ["full", "ring"])
def test_windowed_decoding_equals_torch_scaled_dot_product(policy):
    """The weights go through torch alone: projections, mask and `scaled_dot_product_attention(enable_gqa=True)`."""
    config = AttentionConfig(
        model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=6, rope=None
    )
    layer = SelfAttention(config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 21, 24)).astype(np.float32)
    kernel = torch.tensor(np.array(layer.qkv.kernel[...]))
    fused = torch.einsum("btm,mkwd->btkwd", torch.tensor(x), kernel)
    query = fused[:, :, :, :2].reshape(2, 21, 4, 8).transpose(1, 2)
    key, value = (fused[:, :, :, i].transpose(1, 2) for i in (2, 3))
    at = torch.arange(21)
    distance = at[:, None] - at[None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=(distance >= 0) & (distance < 6), enable_gqa=True
    )
    out = torch.einsum(
        "btkrd,krdm->btm",
        out.transpose(1, 2).reshape(2, 21, 2, 2, 8),
        torch.tensor(np.array(layer.out.kernel[...])),
    )
    cache, outs = layer.init_cache(2, 32, policy=policy), []
    step = jax.jit(layer.step)
    for chunk in np.split(x, [17, 18, 19, 20], axis=1):
        y, cache = step(jnp.asarray(chunk), cache)
        outs.append(np.asarray(y))
    assert_close(np.concatenate(outs, 1), out, atol=2e-5)
