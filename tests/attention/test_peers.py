"""`gqa_attention` against PyTorch's SDPA and Hugging Face's eager attention."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.support import attention_cases as cases
from tests.support.compare import assert_close, relative_error, rounding

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
IMPLEMENTATIONS = list(cases.IMPLEMENTATIONS)


def to_torch(array, dtype=None):
    """`[B, T, heads, D]` to `[B, heads, T, D]`."""
    return torch.from_numpy(np.array(array, np.float32)).transpose(1, 2).to(dtype or torch.float32)


def split(arrays):
    return [jnp.asarray(arrays[n]) for n in ("query", "key", "value")]


@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 16)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_equal_sdpa(implementation, causal, heads, monkeypatch):
    cases.small_blocks(monkeypatch)
    arrays, _ = cases.Case(heads=heads, lengths=(45, 45), dims=(32, 32), seed=3).arrays(np.float32)
    leaves = [to_torch(arrays[n]).requires_grad_() for n in ("query", "key", "value")]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=causal, enable_gqa=True
    )
    weights = (
        np.random.default_rng(4).normal(size=(2, 45, heads[0] * heads[1], 32)).astype(np.float32)
    )
    (expected * to_torch(weights)).sum().backward()

    def loss(*qkv):
        out = pk.gqa_attention(*qkv, is_causal=causal, implementation=implementation)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*split(arrays))
    assert_close(out, expected.transpose(1, 2), atol=4 * rounding(jnp.float32), what="out")
    for gradient, leaf, name in zip(gradients, leaves, "qkv", strict=True):
        size = max(1.0, float(leaf.grad.abs().max()))
        assert_close(
            gradient, leaf.grad.transpose(1, 2), atol=8 * size * rounding(jnp.float32), what=name
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_error_is_no_larger_than_that_of_sdpa(seed, causal):
    """Both against float64 on the same bfloat16 inputs."""
    case = cases.Case(batch=1, heads=(2, 4), lengths=(700, 700), dims=(64, 64), seed=seed)
    arrays, _ = case.arrays(jnp.bfloat16)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(to_torch(arrays[n], torch.bfloat16) for n in ("query", "key", "value")),
        is_causal=causal,
        enable_gqa=True,
    ).transpose(1, 2)
    ours = pk.gqa_attention(*split(arrays), is_causal=causal, implementation="blockwise")
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in split(arrays)]
        truth = np.asarray(pk.gqa_attention(*wide, is_causal=causal, implementation="reference"))
    assert relative_error(ours, truth) <= relative_error(theirs, truth)


def eager(module_name, query, key, value, mask, **options):
    """The eager attention of a Hugging Face model on `[B, T, heads, D]` arrays."""
    transformers_models = pytest.importorskip("transformers.models")
    del transformers_models
    import importlib

    module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    groups = query.shape[2] // key.shape[2]
    layer = types.SimpleNamespace(
        num_key_value_groups=groups, training=False, head_dim=query.shape[-1]
    )
    for name in ("sinks",):
        if name in options:
            setattr(layer, name, torch.from_numpy(np.array(options.pop(name))))
    out, _ = module.eager_attention_forward(
        layer, *(to_torch(a) for a in (query, key, value)), torch.from_numpy(mask), **options
    )
    return out


def additive_causal_mask(length, window):
    t, s = np.arange(length)[:, None], np.arange(length)[None]
    seen = (s <= t) & (s > t - window)
    return np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)[None, None]


@pytest.mark.parametrize("window", [64, 5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sinks_equal_gpt_oss(implementation, window):
    arrays, _ = cases.Case(sinks=True, lengths=(33, 33), seed=5).arrays(np.float32)
    qkv = [arrays[n] for n in ("query", "key", "value")]
    expected = eager(
        "gpt_oss", *qkv, additive_causal_mask(33, window), scaling=0.3, sinks=arrays["sinks"]
    )
    out = pk.gqa_attention(
        *split(arrays), is_causal=True, sliding_window=window, scale=0.3,
        sinks=jnp.asarray(arrays["sinks"]), implementation=implementation,
    )  # fmt: skip
    assert_close(out, expected, atol=8 * rounding(jnp.float32), what="out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_soft_cap_equals_gemma2(implementation):
    arrays, _ = cases.Case(lengths=(33, 33), seed=6).arrays(np.float32)
    qkv = [arrays[n] for n in ("query", "key", "value")]
    expected = eager("gemma2", *qkv, additive_causal_mask(33, 9), scaling=0.5, softcap=1.3)
    out = pk.gqa_attention(
        *split(arrays), is_causal=True, sliding_window=9, scale=0.5, logits_soft_cap=1.3,
        implementation=implementation,
    )  # fmt: skip
    assert_close(out, expected, atol=8 * rounding(jnp.float32), what="out")
