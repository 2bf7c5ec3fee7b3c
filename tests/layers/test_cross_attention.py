"""CrossAttention against torch and explicit sums; padding, packing, rows that see nothing, decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, CrossAttention, RopeConfig
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw, random_layer

BASE = AttentionConfig(
    model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=False, rope=None
)
VARIANTS = {
    "plain": BASE,
    "everything": dataclasses.replace(
        BASE, qkv_bias=True, out_bias=True, output_gate=True, output_gate_dtype="float32", qk_norm="rms",
        rope=RopeConfig(theta=50.0, rotary_dim=4, pairing="adjacent"), qk_norm_position="after_rope",
        scale=0.3, logits_soft_cap=4.0, sinks="learnable",
    ),
    "one group, zero sink": dataclasses.replace(BASE, num_kv_heads=1, sinks="zero", output_gate=True),
}  # fmt: skip
build = functools.partial(random_layer, CrossAttention)


def explicit(layer, x, memory, visible, positions=None, memory_positions=None):
    """Head by head in float64; `visible` [B, T, S]."""
    c = layer.config
    x, memory = np.asarray(x, np.float64), np.asarray(memory, np.float64)
    get = lambda p: np.asarray(p[...], np.float64)
    project = lambda m, a: (
        np.tensordot(a, get(m.kernel), 1) + (0 if m.bias is None else get(m.bias))
    )
    q, kv = project(layer.q, x), project(layer.kv, memory)

    def rotate(a, at):
        if c.rope is None:
            return a
        dim = c.rope.rotary_dim
        angle = at[..., None] * c.rope.theta ** -(np.arange(0, dim, 2) / dim)
        turned = (a[..., 0:dim:2] + 1j * a[..., 1:dim:2]) * np.exp(1j * angle)
        pair = np.stack([turned.real, turned.imag], -1).reshape(*a.shape[:-1], dim)
        return np.concatenate([pair, a[..., dim:]], -1)

    def norm(a, m):
        if m is None:
            return a
        return a / np.sqrt((a * a).mean(-1, keepdims=True) + c.norm_eps) * get(m.scale)

    def embed(a, m, at):
        order = (
            [lambda z: rotate(z, at), lambda z: norm(z, m)]
            if c.qk_norm_position == "after_rope"
            else [lambda z: norm(z, m), lambda z: rotate(z, at)]
        )
        return order[1](order[0](a))

    at = np.arange(x.shape[1]) if positions is None else np.asarray(positions)
    kat = np.arange(memory.shape[1]) if memory_positions is None else np.asarray(memory_positions)
    out = np.zeros((*x.shape[:2], c.num_kv_heads, c.q_per_kv, c.head_dim))
    for group in range(c.num_kv_heads):
        for r in range(c.q_per_kv):
            query = embed(q[:, :, group, r], layer.q_norm, at)
            key = embed(kv[:, :, group, 0], layer.k_norm, kat)
            logits = np.einsum("btd,bsd->bts", query, key) * (c.scale or c.head_dim**-0.5)
            if c.logits_soft_cap:
                logits = c.logits_soft_cap * np.tanh(logits / c.logits_soft_cap)
            weights = np.where(visible, np.exp(logits), 0.0)
            total = weights.sum(-1, keepdims=True)
            if c.sinks != "none":
                total += np.exp(0.0 if layer.sinks is None else get(layer.sinks)[group, r])
            seen = total > 0
            head = np.einsum("bts,bsd->btd", weights / np.where(seen, total, 1), kv[:, :, group, 1])
            if c.output_gate:
                head = head / (1 + np.exp(-q[:, :, group, c.q_per_kv + r]))
            out[:, :, group, r] = head
    y = np.tensordot(out, get(layer.out.kernel), 3)
    y = y + (0 if layer.out.bias is None else get(layer.out.bias))
    return np.where(visible.any(-1)[..., None], y, 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_explicit_sums(name):
    layer = build(VARIANTS[name], memory_dim=12)
    x, memory = draw(0, 2, 5, 24), draw(1, 2, 7, 12)
    ids = jnp.asarray([[0, 0, 1, 1, -1], [0, 0, 0, 2, 2]])
    memory_ids = jnp.asarray([[0, 0, 1, 1, 1, -1, -1], [-1, 0, 0, 0, 3, 3, -1]])
    visible = (np.asarray(ids)[:, :, None] == np.asarray(memory_ids)[:, None]) & (
        np.asarray(ids) >= 0
    )[:, :, None]
    kv = layer.project_memory(memory, segment_ids=memory_ids)
    got = layer(x, kv, segment_ids=ids)
    assert_close(got, explicit(layer, x, memory, visible), atol=2e-5)
    everything = np.ones((2, 5, 7), bool)
    assert_close(layer(x, memory), explicit(layer, x, memory, everything), atol=2e-5)
    mask = np.random.default_rng(2).random((2, 1, 5, 7)) < 0.5
    mask[0, 0, 3] = False
    got = layer(x, memory, mask=jnp.asarray(mask))
    assert_close(got, explicit(layer, x, memory, mask[:, 0]), atol=2e-5)
    assert not np.asarray(got)[0, 3].any()
    positions, memory_positions = draw(3, 2, 5) * 0 + 9, jnp.tile(jnp.arange(7)[::-1], (2, 1))
    positions = positions.astype(jnp.int32)
    got = layer(x, layer.project_memory(memory, positions=memory_positions), positions=positions)
    expected = explicit(layer, x, memory, everything, positions, memory_positions)
    assert_close(got, expected, atol=2e-5)


@pytest.mark.torch
def test_equals_torch_multi_head_attention():
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(BASE, num_kv_heads=4, head_dim=6, qkv_bias=True, out_bias=True)
    layer = build(config)
    peer = torch.nn.MultiheadAttention(24, 4, bias=True, batch_first=True)
    tensor = lambda a: torch.tensor(np.array(a))
    rows = lambda a: tensor(a).reshape(24, 24).T  # [M, K, 1, D] -> [K*D, M]
    kernel, kv = np.asarray(layer.q.kernel[...]), np.asarray(layer.kv.kernel[...])
    bias, kv_bias = np.asarray(layer.q.bias[...]), np.asarray(layer.kv.bias[...])
    with torch.no_grad():
        peer.in_proj_weight.copy_(
            torch.cat([rows(kernel[:, :, 0]), rows(kv[:, :, 0]), rows(kv[:, :, 1])])
        )
        peer.in_proj_bias.copy_(
            torch.cat([tensor(b).reshape(24) for b in (bias[:, 0], kv_bias[:, 0], kv_bias[:, 1])])
        )
        peer.out_proj.weight.copy_(tensor(layer.out.kernel[...]).reshape(24, 24).T)
        peer.out_proj.bias.copy_(tensor(layer.out.bias[...]))
    x, memory = draw(0, 2, 5, 24), draw(1, 2, 7, 24)
    real = np.arange(7)[None] < np.asarray([[7], [4]])
    tx, tm = tensor(x).requires_grad_(), tensor(memory).requires_grad_()
    expected, _ = peer(tx, tm, tm, key_padding_mask=torch.tensor(~real), need_weights=False)
    ids = jnp.where(jnp.asarray(real), 0, -1)
    forward = lambda x, m: layer(x, layer.project_memory(m, segment_ids=ids))
    assert_close(forward(x, memory), expected, atol=2e-5)
    (expected**2).sum().backward()
    grads = jax.grad(lambda x, m: (forward(x, m) ** 2).sum(), argnums=(0, 1))(x, memory)
    assert_close(grads[0], tx.grad, atol=2e-4, rtol=2e-4)
    assert_close(grads[1], tm.grad, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_see_nothing_are_zero_with_finite_gradients(name):
    layer = build(dataclasses.replace(VARIANTS[name], out_bias=True))
    x, memory = draw(0, 2, 5, 24), draw(1, 2, 7, 24)
    ids = jnp.full((2, 7), -1).at[1, 2].set(0)
    graph, state = nnx.split(layer)

    def loss(state, x, memory):
        layer = nnx.merge(graph, state)
        out = layer(x, layer.project_memory(memory, segment_ids=ids))
        return (out**2).sum() + out.sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(state, x, memory)
    assert not np.asarray(out[0]).any()
    assert np.asarray(out[1]).any(axis=-1).all()
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(grads))
    assert not np.asarray(grads[1][0]).any()
    unseen = np.asarray(grads[2]).copy()
    unseen[1, 2] = 0
    assert not unseen.any()


def test_a_memory_projected_once_serves_every_step():
    layer = build(VARIANTS["everything"])
    x, memory = draw(0, 2, 6, 24), draw(1, 2, 7, 24)
    kv = jax.jit(lambda m: layer.project_memory(m))(memory)
    assert kv.key.shape == kv.value.shape == (2, 7, 2, 8)
    step = jax.jit(lambda x, kv, at: layer(x, kv, positions=at))
    outs = [step(x[:, t : t + 1], kv, jnp.full((2, 1), t)) for t in range(6)]
    assert_close(jnp.concatenate(outs, axis=1), layer(x, memory), atol=1e-5)


def test_low_precision_and_injected_parts():
    narrow = CrossAttention(BASE, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x, memory = draw(0, 2, 5, 24).astype(jnp.bfloat16), draw(1, 2, 7, 24).astype(jnp.bfloat16)
    out = narrow(x, memory)
    assert out.dtype == jnp.bfloat16
    assert narrow.project_memory(memory).key.dtype == jnp.bfloat16
    layer = build(BASE)
    same = CrossAttention(
        BASE, rngs=nnx.Rngs(5),
        q=lambda a: layer.q(a), kv=lambda a: layer.kv(a), out=lambda a: layer.out(a),
    )  # fmt: skip
    wide = draw(0, 2, 5, 24), draw(1, 2, 7, 24)
    assert_bitwise_equal(same(*wide), layer(*wide))


def test_dropout_needs_a_key_and_reproduces_from_it():
    layer = build(dataclasses.replace(BASE, dropout_rate=0.5), keep_rngs=False)
    x, memory = draw(0, 2, 5, 24), draw(1, 2, 7, 24)
    with pytest.raises(ValueError, match="`dropout_key` must be given when deterministic=False"):
        layer(x, memory, deterministic=False)
    run = lambda seed: layer(x, memory, deterministic=False, dropout_key=jax.random.key(seed))
    assert_bitwise_equal(run(1), run(1))
    assert (run(1) != run(2)).any()
    assert_bitwise_equal(layer(x, memory, deterministic=True), layer(x, memory))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build(dataclasses.replace(BASE, is_causal=True)), "`config.is_causal` must be False for cross"),
        (lambda: build(BASE, memory_dim=0), "`memory_dim` must be positive, got 0"),
        (lambda: build(BASE)(draw(0, 2, 5, 23), draw(0, 2, 5, 24)), r"`x` must have shape \[B, T, M=24\]"),
        (lambda: build(BASE)(draw(0, 2, 5, 24), draw(0, 2, 5, 23)), r"`memory` must have shape \[B, S, Mm=24\]"),
        (lambda: build(BASE)(draw(0, 2, 5, 24), draw(0, 1, 5, 24)), "`memory` must have the batch size of `x`, 2"),
        (
            lambda: build(BASE).project_memory(draw(0, 2, 5, 24), segment_ids=jnp.zeros((2, 4), jnp.int32)),
            r"`segment_ids` must have shape \(2, 5\), got \(2, 4\)",
        ),
        (lambda: build(BASE, q_norm=lambda a: a), "`q_norm` and `k_norm` must be given together"),
        (lambda: build(BASE, q_norm=lambda a: a, k_norm=lambda a: a), "must be None when `config.qk_norm` is 'none'"),
    ],
)  # fmt: skip
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
