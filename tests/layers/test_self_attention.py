"""SelfAttention against Hugging Face, and its step against its call."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, RopeConfig, SelfAttention
from gqa_jax.layers.masks import padding_segment_ids
from tests.support.compare import assert_close
from tests.support.random_layers import draw, random_layer

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
VARIANTS = {
    "plain": BASE,
    "everything": dataclasses.replace(
        BASE,
        qkv_bias=True, out_bias=True, output_gate=True, output_gate_dtype="float32",
        qk_norm="rms_zero_centred", sliding_window=5, scale=0.3, logits_soft_cap=4.0, sinks="learnable",
        rope=RopeConfig(theta=50.0, rotary_dim=4, pairing="adjacent"),
    ),
    "torchtune order": dataclasses.replace(
        BASE, num_kv_heads=1, qk_norm="rms", qk_norm_position="after_rope", sinks="zero", output_gate=True
    ),
    "no rope": dataclasses.replace(BASE, num_kv_heads=4, rope=None, qk_norm="l2", norm_eps=1e-5),
}  # fmt: skip

CALL = nnx.jit(SelfAttention.__call__, graph=False, graph_updates=False)
STEP = nnx.jit(SelfAttention.step, graph=False, graph_updates=False)
build = functools.partial(random_layer, SelfAttention)


def random_split(rng, total: int) -> list[int]:
    cuts = np.sort(rng.choice(np.arange(1, total), size=rng.integers(0, 5), replace=False))
    return np.diff([0, *cuts, total]).tolist()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_split_of_the_steps_equals_one_call(name, seed):
    layer, rng = build(VARIANTS[name], seed), np.random.default_rng(seed)
    x = draw(seed, 2, 37, 24)
    cache, outs = layer.init_cache(2, 40), []
    sizes = [1] * 37 if seed == 0 else random_split(rng, 37)
    start = 0
    for size in sizes:
        out, cache = STEP(layer, x[:, start : start + size], cache)
        outs.append(out)
        start += size
    assert_close(jnp.concatenate(outs, axis=1), layer(x), atol=1e-5)
    assert cache.length.tolist() == [37, 37]


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_different_lengths_in_one_batch(name):
    layer, rng = build(VARIANTS[name]), np.random.default_rng(3)
    rows = [draw(i, 1, n, 24) for i, n in enumerate((3, 29, 17))]
    whole = [CALL(layer, row) for row in rows]
    cache, done, got = layer.init_cache(3, 64), [0, 0, 0], [[], [], []]
    while any(d < row.shape[1] for d, row in zip(done, rows, strict=True)):
        lengths = [
            int(rng.integers(0, min(21, row.shape[1] - d) + 1))
            for d, row in zip(done, rows, strict=True)
        ]
        width = 5 if max(lengths) <= 5 else 21  # two shapes to compile: decoding and prefill
        x = np.full((3, width, 24), 7.0, np.float32)  # what stands in the padding must not matter
        for b, n in enumerate(lengths):
            x[b, :n] = rows[b][0, done[b] : done[b] + n]
        out, cache = STEP(layer, jnp.asarray(x), cache, lengths=jnp.asarray(lengths, jnp.int32))
        for b, n in enumerate(lengths):
            got[b].append(out[b, :n])
            done[b] += n
    for b in range(3):
        assert_close(jnp.concatenate(got[b]), whole[b][0], atol=1e-5, what=f"row {b}")
    assert cache.length.tolist() == [3, 29, 17]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_on_either_side_equals_the_unpadded_row(name, side):
    layer, lengths, width = build(VARIANTS[name]), (5, 11, 1), 13
    real = np.zeros((3, width), bool)
    x = np.full((3, width, 24), 5.0, np.float32)
    for b, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        real[b, at] = True
        x[b, at] = draw(b, n, 24)
    positions = jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0))
    out = CALL(
        layer,
        jnp.asarray(x),
        segment_ids=padding_segment_ids(jnp.asarray(real)),
        positions=positions,
    )
    assert np.isfinite(np.asarray(out)).all()
    for b, n in enumerate(lengths):
        assert_close(out[b][real[b]], CALL(layer, draw(b, 1, n, 24))[0], atol=1e-5, what=f"row {b}")


def test_packed_documents_equal_documents_alone():
    layer = build(VARIANTS["everything"])
    documents = [draw(i, 1, n, 24) for i, n in enumerate((4, 1, 9))]
    packed = jnp.concatenate(documents, axis=1)
    ids = jnp.asarray([[0] * 4 + [1] + [2] * 9])
    expected = jnp.concatenate([CALL(layer, d) for d in documents], axis=1)
    assert_close(CALL(layer, packed, segment_ids=ids), expected, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 6e-2), ("float16", 8e-3)])
def test_low_precision_follows_float32(dtype, tolerance):
    config = VARIANTS["everything"]
    wide, narrow = build(config), build(config, dtype=jnp.dtype(dtype))
    x = draw(4, 2, 33, 24)
    out = narrow(x.astype(dtype))
    assert out.dtype == jnp.dtype(dtype)
    assert_close(out, wide(x), atol=tolerance, rtol=tolerance)
    cache = narrow.init_cache(2, 33)
    assert cache.key.dtype == jnp.dtype(dtype)
    stepped, _ = narrow.step(x.astype(dtype), cache)
    assert_close(stepped, wide(x), atol=tolerance, rtol=tolerance)


def test_dropout_needs_a_key_and_reproduces_from_it():
    layer = build(dataclasses.replace(BASE, dropout_rate=0.5), keep_rngs=False)
    x = draw(0, 2, 9, 24)
    with pytest.raises(ValueError, match="`dropout_key` must be given when deterministic=False"):
        layer(x, deterministic=False)
    first = layer(x, deterministic=False, dropout_key=jax.random.key(1))
    again = layer(x, deterministic=False, dropout_key=jax.random.key(1))
    other = layer(x, deterministic=False, dropout_key=jax.random.key(2))
    assert (first == again).all()
    assert not (first == other).all()
    assert (layer(x) == layer(x, deterministic=True, dropout_key=jax.random.key(1))).all()


def test_step_updates_a_donated_cache_in_place():
    layer = build(VARIANTS["everything"])
    graph, state = nnx.split(layer)
    cache = layer.init_cache(2, 512)

    def step(state, x, cache):
        return nnx.merge(graph, state).step(x, cache)

    compiled = jax.jit(step, donate_argnums=2).lower(state, draw(0, 2, 1, 24), cache).compile()
    text = compiled.as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert aliased.count("may-alias") + aliased.count("must-alias") == 3  # key, value, length
    rewritten = re.findall(r"= f32\[2,2,512,8\]\S* copy\(", text)
    assert not rewritten, f"the cache is copied: {rewritten}"


def test_steps_compile_once():
    layer, traces = build(VARIANTS["everything"]), []

    @jax.jit
    def step(x, cache):
        traces.append(x.shape)
        return layer.step(x, cache)

    cache = layer.init_cache(2, 16)
    for t in range(5):
        _, cache = step(draw(t, 2, 1, 24), cache)
    assert traces == [(2, 1, 24)]


def test_a_full_cache_raises_outside_jit_and_gives_nan_inside():
    layer = build(BASE)
    _, cache = layer.step(draw(0, 2, 6, 24), layer.init_cache(2, 8))
    with pytest.raises(
        ValueError, match="`cache` must hold 9 tokens after this step, got capacity 8"
    ):
        layer.step(draw(1, 2, 3, 24), cache)
    lengths = jnp.asarray([3, 2], jnp.int32)
    out, cache = jax.jit(lambda x, c: layer.step(x, c, lengths=lengths))(draw(1, 2, 3, 24), cache)
    assert np.isnan(np.asarray(out[0])).all()
    assert np.isfinite(np.asarray(out[1])).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 3}, "`num_heads=3` must be a multiple of `num_kv_heads=2`"),
        ({"head_dim": 0}, "`head_dim` must be positive, got 0"),
        ({"rope": RopeConfig(rotary_dim=16)}, "`rope.rotary_dim=16` must be even and at most"),
        ({"qk_norm": "layer"}, "`qk_norm` must be one of"),
        ({"sliding_window": 0}, "`sliding_window` must be positive, got 0"),
        ({"sliding_window": 4, "is_causal": False}, "`sliding_window` needs `is_causal=True`"),
        ({"scale": -1.0}, "`scale` must be positive, got -1.0"),
        ({"logits_soft_cap": 0.0}, "`logits_soft_cap` must be positive, got 0.0"),
        ({"dropout_rate": 1.0}, r"`dropout_rate` must be in \[0, 1\), got 1.0"),
        ({"sinks": "two"}, "`sinks` must be one of"),
        ({"norm_eps": 0.0}, "`norm_eps` must be positive, got 0.0"),
    ],
)
def test_a_config_that_exists_is_valid(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)
    with pytest.raises(TypeError, match="`head_dim` must be an int, got 8.0"):
        dataclasses.replace(BASE, head_dim=8.0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: m(x[0]), ValueError, r"`x` must have shape \[B, T, M=24\]"),
        (lambda m, x: m(x[..., :5]), ValueError, r"`x` must have shape \[B, T, M=24\]"),
        (
            lambda m, x: m.init_cache(0, 4),
            ValueError,
            "`batch_size` and `max_length` must be positive",
        ),
        (
            lambda m, x: m.step(x, m.init_cache(1, 9)),
            ValueError,
            "`x` must have the cache's batch size 1, got 2 rows",
        ),
        (
            lambda m, x: m.step(x, m.init_cache(2, 3)),
            ValueError,
            "`cache` must hold at least T=4 tokens, got capacity 3",
        ),
        (
            lambda m, x: m.step(x, m.init_cache(2, 9), lengths=jnp.asarray([1.0, 2.0])),
            TypeError,
            "`lengths` must be an integer array, got float32",
        ),
        (
            lambda m, x: m.step(x, m.init_cache(2, 9), lengths=jnp.asarray([1, 5])),
            ValueError,
            r"`lengths` must lie in \[0, T=4\], got \[1, 5\]",
        ),
        (
            lambda m, x: m.step(x, m.init_cache(2, 9), lengths=jnp.asarray([1])),
            ValueError,
            r"`lengths` must have shape \[B=2\], got \(1,\)",
        ),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(build(BASE), draw(0, 2, 4, 24))


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_next", "qwen3_5"])
def test_equals_hugging_face_with_gradients_of_every_parameter(family):
    torch = pytest.importorskip("torch")
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_next": "Qwen3Next"}.get(
        family, "Qwen3_5"
    )
    configuration = getattr(module, f"{prefix}{'Text' if family == 'qwen3_5' else ''}Config")(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}
        if family in ("qwen3_next", "qwen3_5")
        else {"rope_type": "default", "rope_theta": 77.0},
    )  # fmt: skip
    configuration._attn_implementation = "eager"
    torch.manual_seed(5)
    theirs = getattr(module, f"{prefix}Attention")(configuration, 0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    gated = family in ("qwen3_next", "qwen3_5")
    config = AttentionConfig(
        model_dim=24, num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=family == "qwen2",
        output_gate=gated,
        qk_norm="rms_zero_centred" if gated else "rms" if family == "qwen3" else "none",
        rope=RopeConfig(theta=77.0, rotary_dim=8 if gated else None),
    )  # fmt: skip
    ours = SelfAttention(config, rngs=nnx.Rngs(0))
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}

    def grouped(kind):
        """`[M or 1, K, width, D]` of one torch projection."""
        names = (f"q_proj.{kind}", f"k_proj.{kind}", f"v_proj.{kind}")
        query, key, value = (np.atleast_2d(weights[n].T) for n in names)
        rows = query.shape[0]
        query = query.reshape(rows, 2, 2, -1, 16)  # [rows, K, R, 1 or 2 (query, gate), D]
        query = np.swapaxes(query, 2, 3).reshape(rows, 2, -1, 16)
        return np.concatenate(
            [query, key.reshape(rows, 2, 1, 16), value.reshape(rows, 2, 1, 16)], 2
        )

    ours.qkv.kernel[...] = jnp.asarray(grouped("weight"))
    if family == "qwen2":
        ours.qkv.bias[...] = jnp.asarray(grouped("bias")[0])
    ours.out.kernel[...] = jnp.asarray(weights["o_proj.weight"].T.reshape(2, 2, 16, 24))
    for name in ("q_norm", "k_norm"):
        if f"{name}.weight" in weights:
            getattr(ours, name).scale[...] = jnp.asarray(weights[f"{name}.weight"])

    x = np.random.default_rng(6).normal(size=(2, 19, 24)).astype(np.float32)
    cotangent = np.random.default_rng(7).normal(size=(2, 19, 24)).astype(np.float32)
    rotary = getattr(module, f"{prefix}{'Text' if family == 'qwen3_5' else ''}RotaryEmbedding")(
        configuration
    )
    tensor = torch.tensor(x)
    positions = torch.arange(19)[None].expand(2, -1)
    if family == "qwen3_5":  # three position axes, equal for text
        positions = positions[None].expand(3, -1, -1)
    upper = torch.full((19, 19), float("-inf")).triu(1)[None, None]
    out, _ = theirs(tensor, position_embeddings=rotary(tensor, positions), attention_mask=upper)
    (out * torch.tensor(cotangent)).sum().backward()
    assert_close(ours(jnp.asarray(x)), out, atol=1e-5)

    gradients = nnx.jit(nnx.grad(lambda m: (m(jnp.asarray(x)) * cotangent).sum()))(ours)
    weights = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert_close(
        gradients["qkv"]["kernel"][...], grouped("weight"), atol=1e-4, rtol=1e-5, what="qkv"
    )
    expected = weights["o_proj.weight"].T.reshape(2, 2, 16, 24)
    assert_close(gradients["out"]["kernel"][...], expected, atol=1e-4, rtol=1e-5, what="out")
    for name in ("q_norm", "k_norm"):
        if f"{name}.weight" in weights:
            actual = gradients[name]["scale"][...]
            assert_close(actual, weights[f"{name}.weight"], atol=1e-4, rtol=1e-5, what=name)
