"""MoE against a dense loop over experts and against Hugging Face's blocks; the balancing loss against theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import MLP, MoE, MoEConfig
from gqa_jax.layers.moe import RouterStatistics, load_balancing_loss
from tests.support.compare import assert_bitwise_equal, assert_close

BASE = MoEConfig(
    num_experts=5, num_experts_per_token=2, intermediate_size=6, shared_intermediate_size=7
)
CONFIGS = {
    "shared, normalised": BASE,
    "no shared expert": dataclasses.replace(BASE, shared_intermediate_size=None),
    "weights as they are": dataclasses.replace(BASE, normalize_top_k=False),
    "one of five": dataclasses.replace(BASE, num_experts_per_token=1),
    "all of five": dataclasses.replace(BASE, num_experts_per_token=5),
    "one expert": dataclasses.replace(BASE, num_experts=1, num_experts_per_token=1),
}
CALL = jax.jit(MoE.__call__)


def build(config: MoEConfig, seed: int = 0, **kwargs) -> MoE:
    abstract = nnx.eval_shape(lambda: MoE(config, 8, rngs=nnx.Rngs(0), **kwargs))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), abstract
    )


def silu(x):
    return x / (1.0 + np.exp(-x))


def dense_oracle(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    config = moe.config
    router, gate_up, down = (
        np.asarray(p[...], np.float64)
        for p in (moe.router.kernel, moe.experts.gate_up, moe.experts.down)
    )
    out = np.zeros_like(x)
    for i, token in enumerate(x):
        logits = token @ router
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        chosen = np.argsort(-probabilities, kind="stable")[: config.num_experts_per_token]
        total = probabilities[chosen].sum() if config.normalize_top_k else 1.0
        for expert in chosen:
            gate, up = np.moveaxis(np.einsum("m,mfc->fc", token, gate_up[expert]), -1, 0)
            out[i] += probabilities[expert] / total * ((silu(gate) * up) @ down[expert])
        if moe.shared is not None:
            kernels = moe.shared_gate.kernel, moe.shared.gate_up.kernel, moe.shared.down.kernel
            switch, fused, back = (np.asarray(p[...], np.float64) for p in kernels)
            gate, up = np.moveaxis(np.einsum("m,mfc->fc", token, fused), -1, 0)
            out[i] += (silu(gate) * up) @ back / (1.0 + np.exp(-(token @ switch)))
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_experts(name):
    rng = np.random.default_rng(0)
    moe = build(CONFIGS[name])
    x = rng.normal(size=(2, 7, 8))
    out = CALL(moe, jnp.asarray(x, jnp.float32))
    assert_close(out, dense_oracle(moe, x.reshape(-1, 8)).reshape(x.shape), atol=1e-5, rtol=1e-5)


def test_experts_that_no_token_chooses_get_no_gradient():
    moe = build(dataclasses.replace(BASE, num_experts_per_token=1))
    x = jnp.ones((1, 3, 8)) * 0.7
    gradient = jax.jit(jax.grad(lambda moe: moe(x).sum()))(moe)
    touched = np.asarray(jnp.abs(gradient.experts.down[...]).sum((1, 2)) > 0)
    assert touched.sum() == 1
    assert touched[int((x[0, 0] @ moe.router.kernel[...]).argmax())]


def test_gradients_equal_finite_differences():
    moe = build(dataclasses.replace(BASE, num_experts_per_token=2), 1)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 8))
    weights = rng.normal(size=(4, 8))
    loss = lambda x: float((dense_oracle(moe, x) * weights).sum())
    gradient = jax.jit(jax.grad(lambda x: (moe(x) * jnp.asarray(weights, jnp.float32)).sum()))(
        jnp.asarray(x, jnp.float32)
    )
    for i, j in ((0, 0), (1, 5), (3, 7)):
        step = np.zeros_like(x)
        step[i, j] = 1e-6
        numeric = (loss(x + step) - loss(x - step)) / 2e-6
        assert_close(gradient[i, j], numeric, atol=1e-3, rtol=1e-3)


def test_statistics_add_up_and_leave_out_padding():
    moe = build(BASE, 2)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    real = jnp.asarray([[True] * 6, [True] * 2 + [False] * 4])
    run = jax.jit(lambda x, real: moe.with_statistics(x, real=real).statistics)
    both = run(x, real)
    assert both.num_tokens == 8
    assert both.assignments.sum() == 16
    halves = run(x[:1], real[:1]).merge(run(x[1:], real[1:]))
    for a, b in zip(both, halves, strict=True):
        assert_close(a, b, atol=1e-5)
    noisy = jnp.where(real[..., None], x, 100.0)
    for a, b in zip(run(noisy, real), both, strict=True):
        assert_close(a, b, atol=1e-5)


def test_balance_is_k_at_best_and_zero_for_no_token():
    even = RouterStatistics(jnp.full((4,), 6.0), jnp.full((4,), 3.0), jnp.asarray(12.0))
    assert_close(load_balancing_loss(even), 2.0, atol=1e-6)
    collapsed = RouterStatistics(
        jnp.asarray([12.0, 12, 0, 0]), jnp.asarray([6.0, 6, 0, 0]), jnp.asarray(12.0)
    )
    assert_close(load_balancing_loss(collapsed), 4.0, atol=1e-6)
    assert load_balancing_loss(RouterStatistics.empty(4)) == 0.0


def test_balancing_pushes_towards_balance():
    moe = build(BASE, 3)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(40, 8)) + 1.0, jnp.float32)

    @jax.jit
    def step(router):
        def loss(router):
            changed = nnx.clone(moe)
            changed.router.kernel = nnx.Param(router)
            return load_balancing_loss(changed.with_statistics(x).statistics)

        value, gradient = jax.value_and_grad(loss)(router)
        return value, router - 0.3 * gradient

    router, losses = moe.router.kernel[...], []
    for _ in range(30):
        value, router = step(router)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1


def test_bfloat16():
    moe = build(BASE, 4, param_dtype=jnp.bfloat16)
    x = np.random.default_rng(4).normal(size=(9, 8))
    out = CALL(moe, jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), moe)
    assert_close(out, CALL(exact, jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)), atol=0.1)
    mixed = build(BASE, 4, dtype=jnp.bfloat16)
    assert mixed.experts.down.dtype == jnp.float32
    assert CALL(mixed, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_one_expert_is_a_dense_block():
    config = dataclasses.replace(CONFIGS["one expert"], shared_intermediate_size=None)
    moe = build(config, 5)
    mlp = MLP(8, 6, rngs=nnx.Rngs(0))
    mlp.gate_up.kernel = nnx.Param(moe.experts.gate_up[...][0])
    mlp.down.kernel = nnx.Param(moe.experts.down[...][0])
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, 8)), jnp.float32)
    assert_close(CALL(moe, x), mlp(x), atol=1e-6)
    assert_bitwise_equal(CALL(moe, x[:0]), x[:0])


@pytest.mark.torch
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_equals_hugging_face(family):
    torch = pytest.importorskip("torch")
    common = dict(
        hidden_size=8,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
        hidden_act="silu",
    )
    if family == "qwen3_moe":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

        config = hf.Qwen3MoeConfig(**common, norm_topk_prob=False)
        block, ours = hf.Qwen3MoeSparseMoeBlock(config), CONFIGS["weights as they are"]
        ours = dataclasses.replace(ours, shared_intermediate_size=None)
    elif family == "qwen3_next":
        from transformers.models.qwen3_next import modeling_qwen3_next as hf

        config = hf.Qwen3NextConfig(
            **common, shared_expert_intermediate_size=7, norm_topk_prob=True
        )
        block, ours = hf.Qwen3NextSparseMoeBlock(config), BASE
    else:
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

        config = hf.Qwen3_5MoeTextConfig(**common, shared_expert_intermediate_size=7)
        block, ours = hf.Qwen3_5MoeSparseMoeBlock(config), BASE
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        x = torch.randn(2, 5, 8, generator=generator)
        expected = block(x)

    def transposed(weight) -> np.ndarray:
        return weight.detach().numpy().swapaxes(-1, -2)

    def paired(weight) -> np.ndarray:
        """`[..., 2 F, M]`, gates then ups, to `[..., M, F, 2]`."""
        gate, up = np.split(transposed(weight), 2, axis=-1)
        return np.stack([gate, up], axis=-1)

    moe = build(ours)
    moe.router.kernel = nnx.Param(jnp.asarray(transposed(block.gate.weight)))
    moe.experts.gate_up = nnx.Param(jnp.asarray(paired(block.experts.gate_up_proj)))
    moe.experts.down = nnx.Param(jnp.asarray(transposed(block.experts.down_proj)))
    if moe.shared is not None:
        shared = block.shared_expert
        gate_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        moe.shared.gate_up.kernel = nnx.Param(jnp.asarray(paired(gate_up)))
        moe.shared.down.kernel = nnx.Param(jnp.asarray(transposed(shared.down_proj.weight)))
        moe.shared_gate.kernel = nnx.Param(jnp.asarray(transposed(block.shared_expert_gate.weight)))
    assert_close(CALL(moe, jnp.asarray(x.numpy())), expected, atol=1e-5, rtol=1e-5)

    logits = x.reshape(-1, 8) @ block.gate.weight.T
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    theirs = load_balancing_loss_func((logits, logits[:4]), 5, 2)
    flat = jnp.asarray(x.numpy()).reshape(-1, 8)
    first, second = (moe.with_statistics(part).statistics for part in (flat, flat[:4]))
    assert_close(load_balancing_loss(first.merge(second)), theirs, atol=1e-5)
