"""GatedDeltaNet against Hugging Face and a float64 recurrence, and its step against its call."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import GatedDeltaNet, GatedDeltaNetConfig
from gqa_jax.layers.masks import padding_segment_ids
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, random_layer

BASE = GatedDeltaNetConfig(
    model_dim=24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6
)
VARIANTS = {
    "qwen": BASE,
    "one value head per key head": dataclasses.replace(BASE, num_value_heads=2, conv_width=1),
    "negative eigenvalues": dataclasses.replace(
        BASE, allow_negative_eigenvalues=True, conv_bias=True, conv_width=3
    ),
    "megatron": dataclasses.replace(BASE, norm_zero_centred=True, num_value_heads=6, norm_eps=1e-3),
    "mamba": dataclasses.replace(BASE, decay_init="mamba", num_key_heads=4, chunk_size=16),
}
CALL = nnx.jit(GatedDeltaNet.__call__, graph=False, graph_updates=False)
STEP = nnx.jit(GatedDeltaNet.step, graph=False, graph_updates=False)
build = functools.partial(random_layer, GatedDeltaNet)


def recurrence(layer: GatedDeltaNet, x: np.ndarray) -> np.ndarray:
    """The layer's definition, token by token and head by head, in float64 numpy. `x` is `[T, M]`."""
    config = layer.config
    p = {
        "/".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    n, dk, dv = config.v_per_key, config.key_head_dim, config.value_head_dim
    width = config.conv_width
    projected = np.einsum("tm,mhf->thf", x, p["in_proj/kernel"])
    mixed, z = projected[..., : 2 * dk + n * dv], projected[..., 2 * dk + n * dv :]
    past = np.concatenate([np.zeros((width - 1, *mixed.shape[1:])), mixed])
    conv = sum(past[w : w + len(x)] * p["conv/kernel"][w] for w in range(width))
    conv = conv + p.get("conv/bias", 0.0)
    conv = conv * sigmoid(conv)
    logits = np.einsum("tm,mhf->thf", x, p["ba/kernel"])
    beta = sigmoid(logits[..., :n]) * (2 if config.allow_negative_eigenvalues else 1)
    g = -np.exp(p["A_log"]) * np.log1p(np.exp(logits[..., n:] + p["dt_bias"]))
    weight = p["norm/scale"] + config.norm_zero_centred
    out = np.zeros((len(x), config.model_dim))
    for h in range(config.num_key_heads):
        for j in range(n):
            state = np.zeros((dk, dv))
            for t in range(len(x)):
                q, k = conv[t, h, :dk], conv[t, h, dk : 2 * dk]
                q, k = (v / np.sqrt((v**2).sum() + 1e-6) for v in (q, k))
                v = conv[t, h, 2 * dk + j * dv :][:dv]
                state = state * np.exp(g[t, h, j])
                state = state + np.outer(k, beta[t, h, j] * (v - state.T @ k))
                o = state.T @ q * dk**-0.5
                o = o / np.sqrt((o**2).mean() + config.norm_eps) * weight
                gate = z[t, h, j * dv : (j + 1) * dv]
                out[t] += (o * gate * sigmoid(gate)) @ p["out/kernel"][h, j]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_float64_recurrence(name):
    layer = build(VARIANTS[name], seed=1)
    x = draw(1, 2, 21, 24)
    expected = np.stack([recurrence(layer, row) for row in np.asarray(x, np.float64)])
    scale = np.abs(
        expected
    ).max()  # the gated norm divides by small numbers: errors follow the largest output
    assert_close(CALL(layer, x), expected, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "name, seed", [*((name, 0) for name in VARIANTS), ("qwen", 1), ("megatron", 2)]
)
def test_any_split_of_the_steps_equals_one_call(name, seed):
    layer, rng = build(VARIANTS[name], seed), np.random.default_rng(seed)
    total = 83
    x = draw(seed, 2, total, 24)
    cuts = np.sort(rng.choice(np.arange(1, total), size=3, replace=False))
    sizes = [66] + [1] * 17 if seed == 0 else np.diff([0, *cuts, total]).tolist()
    cache, outs, start = layer.init_cache(2), [], 0
    for size in sizes:
        out, cache = STEP(layer, x[:, start : start + size], cache)
        outs.append(out)
        start += size
    assert_close(jnp.concatenate(outs, axis=1), CALL(layer, x), atol=1e-5, rtol=1e-5)
    assert cache.length.tolist() == [total, total]


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_different_lengths_in_one_batch(name):
    layer, rng = build(VARIANTS[name]), np.random.default_rng(3)
    rows = [draw(i, 1, n, 24) for i, n in enumerate((3, 29, 17))]
    whole = [CALL(layer, row) for row in rows]
    cache, done, got = layer.init_cache(3), [0, 0, 0], [[], [], []]
    while any(d < row.shape[1] for d, row in zip(done, rows, strict=True)):
        lengths = [
            int(rng.integers(0, min(21, row.shape[1] - d) + 1))
            for d, row in zip(done, rows, strict=True)
        ]
        width = 5 if max(lengths) <= 5 else 21  # two shapes to compile: decoding and prefill
        x = np.full((3, width, 24), 7.0, np.float32)  # what stands in the padding must not matter
        for b, n in enumerate(lengths):
            x[b, :n] = rows[b][0, done[b] : done[b] + n]
        before = cache
        out, cache = STEP(layer, jnp.asarray(x), cache, lengths=jnp.asarray(lengths, jnp.int32))
        for b, n in enumerate(lengths):
            got[b].append(out[b, :n])
            done[b] += n
            if n == 0:
                assert_bitwise_equal(cache.state[b], before.state[b], what="state of an idle row")
                assert_bitwise_equal(cache.conv[b], before.conv[b], what="conv of an idle row")
    for b in range(3):
        assert_close(jnp.concatenate(got[b]), whole[b][0], atol=1e-5, what=f"row {b}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["qwen", "negative eigenvalues"])
def test_padding_on_either_side_equals_the_unpadded_row(name, side):
    layer, lengths, width = build(VARIANTS[name]), (5, 11, 1), 13
    real = np.zeros((3, width), bool)
    x = np.full((3, width, 24), 5.0, np.float32)
    for b, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        real[b, at] = True
        x[b, at] = draw(b, n, 24)
    ids = padding_segment_ids(jnp.asarray(real))
    out = CALL(layer, jnp.asarray(x), segment_ids=ids)
    assert np.isfinite(np.asarray(out)).all()
    for b, n in enumerate(lengths):
        expected = CALL(layer, draw(b, 1, n, 24))[0]
        assert_close(out[b][real[b]], expected, atol=1e-5, what=f"row {b}")

    def loss(x):
        return jnp.where(real[..., None], layer(x, segment_ids=ids) ** 2, 0.0).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x)))
    assert np.isfinite(gradient).all()
    assert (gradient[~real] == 0).all(), "padding has a gradient"


def test_zero_inputs_have_finite_gradients():
    layer = build(BASE)
    gradient = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum()))(jnp.zeros((1, 9, 24)))
    assert np.isfinite(np.asarray(gradient)).all()


def test_packed_documents_equal_documents_alone():
    layer = build(VARIANTS["megatron"])
    documents = [draw(i, 1, n, 24) for i, n in enumerate((4, 1, 9, 2))]
    ids = jnp.asarray([[0] * 4 + [1] + [2] * 9 + [3] * 2])
    expected = jnp.concatenate([CALL(layer, d) for d in documents], axis=1)
    actual = CALL(layer, jnp.concatenate(documents, axis=1), segment_ids=ids)
    assert_close(actual, expected, atol=1e-5)


def test_gates_are_float32_in_a_bfloat16_model():
    layer = build(BASE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert layer.A_log.dtype == layer.dt_bias.dtype == jnp.float32
    cache = layer.init_cache(2)
    assert cache.state.dtype == jnp.float32
    assert cache.conv.dtype == jnp.bfloat16
    x = draw(0, 2, 20, 24).astype(jnp.bfloat16)
    out, cache = STEP(layer, x, cache)
    assert out.dtype == jnp.bfloat16
    assert cache.state.dtype == jnp.float32
    g, beta = layer._gates(x)
    assert g.dtype == beta.dtype == jnp.float32
    assert_close(out, CALL(build(BASE), x.astype(jnp.float32)), atol=0.15, rtol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_initial_decay_is_finite_and_in_range(seed):
    config = dataclasses.replace(BASE, A_init_range=(1e-8, 16.0), num_value_heads=64)
    layer = GatedDeltaNet(config, rngs=nnx.Rngs(seed))
    assert np.isfinite(np.asarray(layer.A_log)).all()
    assert (np.asarray(layer.dt_bias) == 1).all()
    mamba = GatedDeltaNet(dataclasses.replace(config, decay_init="mamba"), rngs=nnx.Rngs(seed))
    step = np.log1p(np.exp(np.asarray(mamba.dt_bias, np.float64)))
    assert (step >= 0.99e-3).all()
    assert (step <= 1.01e-1).all()


def test_step_updates_a_donated_state_in_place():
    layer = build(BASE)
    graph, params = nnx.split(layer)

    def step(params, x, cache):
        return nnx.merge(graph, params).step(x, cache)

    text = (
        jax.jit(step, donate_argnums=2)
        .lower(params, draw(0, 2, 1, 24), layer.init_cache(2))
        .compile()
        .as_text()
    )
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    assert aliased.count("may-alias") + aliased.count("must-alias") == 3  # conv, state, length


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_value_heads": 3}, "`num_value_heads=3` must be a multiple of `num_key_heads=2`"),
        ({"conv_width": 0}, "`conv_width` must be positive, got 0"),
        ({"A_init_range": (0.0, 16.0)}, "`A_init_range` must satisfy 0 < low <= high"),
        ({"decay_init": "zeros"}, "`decay_init` must be one of"),
        ({"norm_eps": -1.0}, "`norm_eps` must be positive, got -1.0"),
        ({"chunk_size": 0}, "`chunk_size` must be positive, got 0"),
    ],
)
def test_a_config_that_exists_is_valid(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_bad_calls():
    layer, x = build(BASE), draw(0, 2, 4, 24)
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, M=24\]"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        layer.init_cache(0)
    with pytest.raises(ValueError, match="the cache's batch size 3, got 2 rows"):
        layer.step(x, layer.init_cache(3))
    with pytest.raises(ValueError, match=r"`lengths` must lie in \[0, T=4\]"):
        layer.step(x, layer.init_cache(2), lengths=jnp.asarray([5, 1]))


@pytest.mark.torch
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_equals_hugging_face_with_gradients_of_every_parameter(family):
    torch = pytest.importorskip("torch")
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    prefix = {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5"}[family]
    configuration = getattr(module, f"{prefix}{'Text' if family == 'qwen3_5' else ''}Config")(
        hidden_size=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=6,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = getattr(module, f"{prefix}GatedDeltaNet")(configuration, 0)
    ours = GatedDeltaNet(BASE, rngs=nnx.Rngs(0))
    heads, n, dk, dv = 2, 2, 8, 6

    def by_key_head(rows: np.ndarray, *widths: int) -> np.ndarray:
        """`[..., sum(Hk * widths)]`, sections over all heads, to `[..., Hk, sum(widths)]`."""
        sections = np.split(rows, np.cumsum([heads * w for w in widths])[:-1], axis=-1)
        return np.concatenate([s.reshape(*rows.shape[:-1], heads, -1) for s in sections], axis=-1)

    def expected_tree(tensors: dict[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
        if family == "qwen3_next":
            in_proj = tensors["in_proj_qkvz.weight"].T.reshape(24, heads, -1)
            ba = tensors["in_proj_ba.weight"].T.reshape(24, heads, -1)
        else:
            names = ("in_proj_qkv.weight", "in_proj_z.weight")
            flat = np.concatenate([tensors[name].T for name in names], axis=-1)
            in_proj = by_key_head(flat, dk, dk, n * dv, n * dv)
            names = ("in_proj_b.weight", "in_proj_a.weight")
            ba = by_key_head(np.concatenate([tensors[name].T for name in names], axis=-1), n, n)
        return {
            ("in_proj", "kernel"): in_proj,
            ("ba", "kernel"): ba,
            ("conv", "kernel"): by_key_head(tensors["conv1d.weight"][:, 0].T, dk, dk, n * dv),
            ("A_log",): tensors["A_log"].reshape(heads, n),
            ("dt_bias",): tensors["dt_bias"].reshape(heads, n),
            ("norm", "scale"): tensors["norm.weight"],
            ("out", "kernel"): tensors["out_proj.weight"].T.reshape(heads, n, dv, 24),
        }

    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    state = {path: jnp.asarray(value) for path, value in expected_tree(weights).items()}
    nnx.update(ours, nnx.from_flat_state({path: nnx.Param(v) for path, v in state.items()}))

    rng = np.random.default_rng(6)
    x, cotangent = rng.normal(size=(2, 2, 71, 24)).astype(np.float32)
    out = theirs(torch.tensor(x))
    (out * torch.tensor(cotangent)).sum().backward()
    assert_close(CALL(ours, jnp.asarray(x)), out, atol=1e-5)
    gradients = nnx.jit(nnx.grad(lambda m: (m(jnp.asarray(x)) * cotangent).sum()))(ours)
    actual = dict(nnx.to_flat_state(gradients))
    theirs_flat = expected_tree({name: p.grad.numpy() for name, p in theirs.named_parameters()})
    assert set(actual) == set(theirs_flat)
    for path, expected in theirs_flat.items():
        # Theirs sums the decay's gradient in float32 with cancellation; ours is held to float64 elsewhere.
        tolerance = 1e-3 if path in (("A_log",), ("dt_bias",)) else 2e-5
        scale = np.abs(expected).max()
        assert_close(actual[path][...], expected, atol=tolerance * scale, what="/".join(path))
