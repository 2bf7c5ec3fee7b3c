"""Layers in 16 bits, jitted: calls, steps and every gradient are read and held against float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import (
    MLP,
    AttentionConfig,
    CrossAttention,
    GatedDeltaNet,
    MoE,
    RopeConfig,
    SelfAttention,
)
from tests.support.half_precision import check, sweep
from tests.support.random_layers import random_layer, randomise
from tests.support.tiny_decoders import ATTENTION, DELTA, MIXTURE

WIDTH = ATTENTION.model_dim
MEMORY = dataclasses.replace(ATTENTION, is_causal=False, rope=None, sinks="zero")
CONFIGS = {
    "attention": (SelfAttention, ATTENTION),
    "plain attention": (
        SelfAttention,
        AttentionConfig(model_dim=WIDTH, num_heads=4, num_kv_heads=2, head_dim=8, rope=None),
    ),
    "window": (
        SelfAttention,
        dataclasses.replace(
            ATTENTION, sliding_window=5, sinks="learnable", logits_soft_cap=4.0, qkv_bias=True, out_bias=True,
            output_gate_dtype="float32", qk_norm="l2", rope=RopeConfig(pairing="adjacent"),
        ),
    ),
    "delta": (GatedDeltaNet, dataclasses.replace(DELTA, conv_bias=True, norm_eps=0.1)),
    "negative eigenvalues": (
        GatedDeltaNet,
        dataclasses.replace(
            DELTA, conv_bias=True, norm_eps=0.1, norm_zero_centred=True, allow_negative_eigenvalues=True,
            decay_init="mamba",
        ),
    ),
}  # fmt: skip


def build(name, dtype):
    if name == "memory":
        return random_layer(CrossAttention, MEMORY, param_dtype=dtype)
    options = dict(rngs=nnx.Rngs(0), param_dtype=dtype)
    if name == "mlp":
        return randomise(MLP(WIDTH, 24, **options))
    if name == "mixture":
        layer = randomise(MoE(MIXTURE, WIDTH, **options))
        # Logits that lie further apart than rounding moves them: the experts are chosen by the first inputs.
        layer.router.kernel[...] = jnp.eye(*layer.router.kernel.shape, dtype=dtype)
        return layer
    layer = random_layer(*CONFIGS[name], param_dtype=dtype)
    if isinstance(layer, GatedDeltaNet):
        # Keys and queries away from zero: of what cancels nothing but rounding is left to be made of length 1.
        layer.conv.bias[...] += 1.0
    return layer


def draw(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, WIDTH))
    chooses = np.tile(np.arange(MIXTURE.num_experts) - 1.5, (batch, length, 1))
    x[..., : MIXTURE.num_experts] = rng.permuted(chooses, axis=-1)
    return x


LAYERS = [*CONFIGS, "memory", "mlp", "mixture"]


@pytest.mark.parametrize(
    "case", sweep(layer=LAYERS, shape=[(3, 1), (1, 2), (3, 17), (1, 130), (3, 300)])
)
def test_calls(case):
    name, dtype, (batch, length) = case["layer"], case["dtype"], case["shape"]
    inputs = (draw(batch, length),)
    if name == "memory":
        inputs = (draw(batch, length), draw(batch, 11, seed=1))
    check(lambda layer, *inputs: layer(*inputs), (build(name, dtype), *inputs), dtype)


CACHES = [
    ("attention", "full"),
    ("window", "ring"),
    ("attention", "int8"),
    ("window", "fp8"),
    ("delta", "full"),
]


@pytest.mark.parametrize("case", sweep(layer=CACHES, shape=[(3, 1, 1), (1, 17, 3), (3, 130, 1)]))
def test_steps(case):
    """A prefill and a step after it."""
    (name, policy), dtype, (batch, prefill, new) = case["layer"], case["dtype"], case["shape"]
    options = {} if name == "delta" else {"policy": policy}
    if policy == "fp8":
        dtype = (
            jnp.bfloat16
        )  # whose tolerance is more than a step of the cache: rounding may flip a code

    def steps(layer, x):
        cache = layer.init_cache(batch, prefill + new, **options)
        first, cache = layer.step(x[:, :prefill], cache)
        return first, layer.step(x[:, prefill:], cache)[0]

    check(steps, (build(name, dtype), draw(batch, prefill + new)), dtype, gradients=False)
