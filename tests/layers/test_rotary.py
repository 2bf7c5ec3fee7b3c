"""Rotary embedding against Hugging Face's frequency functions and against complex rotation."""

import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from gqa_jax.layers.rotary import apply_rotary, inverse_frequencies, rotary_tables
from tests.support.compare import assert_close

HEAD_DIM = 16


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize("rotary_dim", [None, 4, 12])
def test_rotation_is_a_complex_product(pairing, rotary_dim):
    rng = np.random.default_rng(0)
    config = RopeConfig(theta=100.0, rotary_dim=rotary_dim, pairing=pairing)
    x = rng.normal(size=(2, 5, 3, HEAD_DIM)).astype(np.float32)
    positions = rng.integers(0, 50, (2, 5))
    dim = rotary_dim or HEAD_DIM
    angles = positions[..., None] * 100.0 ** -(np.arange(0, dim, 2) / dim)
    turned = x[..., :dim].astype(np.float64)
    pairs = (turned[..., : dim // 2], turned[..., dim // 2 :])
    if pairing == "adjacent":
        pairs = (turned[..., 0::2], turned[..., 1::2])
    product = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)[:, :, None, :]
    expected = x.astype(np.float64)
    if pairing == "half":
        expected[..., :dim] = np.concatenate([product.real, product.imag], axis=-1)
    else:
        expected[..., 0:dim:2], expected[..., 1:dim:2] = product.real, product.imag
    cos, sin = rotary_tables(config, HEAD_DIM, jnp.asarray(positions))
    actual = apply_rotary(jnp.asarray(x), cos, sin, pairing=pairing)
    assert_close(actual, expected, atol=2e-5)
    assert (np.asarray(actual)[..., dim:] == x[..., dim:]).all()


def test_rotary_keeps_the_dtype():
    cos, sin = rotary_tables(RopeConfig(), HEAD_DIM, jnp.zeros((1, 2), jnp.int32))
    assert apply_rotary(jnp.ones((1, 2, 1, HEAD_DIM), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


SCALINGS = [
    (None, {"rope_type": "default"}),
    (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (
        Llama3Scaling(factor=8.0, original_max_positions=64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    (
        YarnScaling(factor=4.0, original_max_positions=128),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    (
        YarnScaling(
            factor=16.0, original_max_positions=64, beta_fast=16.0, beta_slow=2.0,
            mscale=0.7, mscale_all_dim=1.3, truncate=False,
        ),
        {
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
            "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
        },
    ),
    (
        YarnScaling(factor=2.0, original_max_positions=64, attention_factor=1.25),
        {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
            "attention_factor": 1.25,
        },
    ),
]  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("scaling, parameters", SCALINGS)
@pytest.mark.parametrize("rotary_dim", [32, 8])
def test_scaling_equals_hugging_face(scaling, parameters, rotary_dim):
    pytest.importorskip("torch")
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    parameters = {**parameters, "rope_theta": 5000.0}
    config = Qwen3Config(
        head_dim=rotary_dim, rope_parameters=parameters, max_position_embeddings=256
    )
    theirs = Qwen3RotaryEmbedding(config)
    ours, concentration = inverse_frequencies(
        RopeConfig(theta=5000.0, rotary_dim=rotary_dim, scaling=scaling), 64
    )
    assert_close(ours, theirs.inv_freq, atol=0.0, rtol=1e-5)
    assert concentration == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_the_concentration_multiplies_every_rotated_channel():
    scaling = YarnScaling(factor=8.0, original_max_positions=64, attention_factor=1.5)
    cos, sin = rotary_tables(RopeConfig(scaling=scaling), 16, jnp.arange(300)[None])
    assert_close(cos**2 + sin**2, np.full((1, 300, 8), 1.5**2), atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("sections", [(3, 3, 2), (6, 1, 1), (2, 3, 3)])
def test_interleaved_sections_equal_hugging_face(sections):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

    config = Qwen3_5TextConfig(
        head_dim=16,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1000.0, "mrope_section": list(sections),
            "mrope_interleaved": True, "partial_rotary_factor": 1.0,
        },
    )  # fmt: skip
    positions = np.random.default_rng(1).integers(0, 90, (3, 2, 7))
    cos, sin = Qwen3_5TextRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    ours = RopeConfig(theta=1000.0, mrope_sections=sections, mrope_interleaved=True)
    our_cos, our_sin = rotary_tables(ours, 16, jnp.asarray(positions))
    assert_close(our_cos, cos[..., :8], atol=1e-5)
    assert_close(our_sin, sin[..., :8], atol=1e-5)


def test_blocked_sections_follow_their_axis():
    config = RopeConfig(theta=10.0, mrope_sections=(1, 2, 1))
    frequencies, _ = inverse_frequencies(config, 8)
    positions = np.array([[[2]], [[3]], [[5]]])
    cos, _ = rotary_tables(config, 8, jnp.asarray(positions))
    assert_close(cos[0, 0], np.cos(np.array([2, 3, 3, 5]) * frequencies), atol=1e-6)


def test_three_axes_of_equal_positions_are_plain_rotary():
    plain, sections = RopeConfig(), RopeConfig(mrope_sections=(3, 3, 2), mrope_interleaved=True)
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    expected = rotary_tables(plain, 16, positions)
    actual = rotary_tables(sections, 16, jnp.broadcast_to(positions, (3, 1, 9)))
    for ours, theirs in zip(actual, expected, strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RopeConfig(rotary_dim=5), "`rotary_dim` must be positive and even, got 5"),
        (lambda: RopeConfig(pairing="full"), "`pairing` must be one of"),
        (lambda: RopeConfig(theta=0.0), "`theta` must be positive, got 0.0"),
        (
            lambda: RopeConfig(rotary_dim=8, mrope_sections=(1, 1, 1)),
            "must sum to rotary_dim / 2 = 4",
        ),
        (lambda: LinearScaling(factor=0.5), "`factor` must be at least 1, got 0.5"),
        (lambda: Llama3Scaling(factor=2.0, low_freq_factor=5.0), "`low_freq_factor=5.0` must lie"),
        (
            lambda: rotary_tables(RopeConfig(), 8, jnp.zeros((3, 1, 2), jnp.int32)),
            r"`positions` must have shape \[B, T\] without `mrope_sections`",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
