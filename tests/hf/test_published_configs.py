"""`config.json` files as published: read, built as transformers builds them, refused where due.

`published_configs.json` holds field sets and sizes. Most follow dumps of such files that stand in public repositories;
some releases (TinyLlama, some Instruct variants, Qwen3-Coder) are a dump with fields changed, or written from memory.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import DecoderConfig, checkpoint
from gqa_jax.hf.config import to_hf_config
from tests.support.compare import assert_close

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "full_attention_interval": 2,
    "pad_token_id": 2,
}


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A published config with tiny sizes; every other field stays as it is."""
    if "text_config" in values:
        text = shrunk(values["text_config"]) | {"head_dim": 16}
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [1, 1, 0]}
        return values | {"text_config": text}
    tiny = {name: size for name, size in TINY.items() if values.get(name)}
    if "layer_types" in values:
        tiny["layer_types"] = [values["layer_types"][0], values["layer_types"][-1]]
    return values | tiny


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_read(name):
    values = PUBLISHED[name]
    text = values.get("text_config", values)
    config = DecoderConfig.from_hf(values)
    assert config.model_dim == text["hidden_size"]
    assert len(config.layers) == text["num_hidden_layers"]
    eos = text["eos_token_id"]
    assert config.stop_tokens == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert config.pad_token == text.get("pad_token_id")
    assert "sliding_attention" not in config.layers  # published windows are all switched off
    written = to_hf_config(config)
    assert DecoderConfig.from_hf(written) == config
    if name.startswith("Qwen3.5"):
        assert config.layers[:4] == ("linear_attention",) * 3 + ("full_attention",)
        assert config.attention.rope.mrope_sections == (11, 11, 10)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        "DeepSeek-R1-Distill-Qwen-7B",
        "unsloth/Llama-3.2-1B-Instruct",
        "Qwen3-Coder-30B-A3B-Instruct",
        "Qwen3-Next-80B-A3B-Instruct",
        "Qwen3.5-27B",
    ],
)
def test_decoders_equal_what_transformers_builds(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = shrunk(PUBLISHED[name])
    text = values.get("text_config", values)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.CONFIG_MAPPING[text["model_type"]].from_dict(dict(text)),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(4).integers(0, 61, (2, 11))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    decoder = checkpoint.load_hf(tmp_path)
    logits = jax.jit(lambda tokens: decoder(tokens))(jnp.asarray(tokens))
    assert_close(logits, expected, atol=1e-5, what=name)


REFUSED = [
    ("a scale that no one reads", "Llama-3.2-1B", {"residual_multiplier": 0.22}),
    ("custom code", "Qwen2.5-7B", {"auto_map": {"AutoModel": "modeling.Model"}}),
    ("dual chunks of Qwen2.5-1M", "Qwen2.5-7B", {"dual_chunk_attention_config": {"chunk_size": 9}}),
    ("an encoder", "Qwen2.5-7B", {"is_causal": False}),
    ("interleaved rotation", "SmolLM2-135M", {"rope_interleaved": True}),
    ("a sigmoid gate", "Qwen3.5-27B", {"output_gate_type": "sigmoid"}),
    ("no norm of queries", "Qwen3-Coder-30B-A3B-Instruct", {"use_qk_norm": False}),
    ("a bias", "Qwen3-Coder-30B-A3B-Instruct", {"qkv_bias": True}),
    ("image positions", "Qwen2.5-0.5B", {"use_mrope": True}),
    ("windows of Llama", "TinyLlama-1.1B-Chat-v1.0", {"layer_types": ["sliding_attention"] * 22}),
    ("windows", "Qwen3-Next-80B-A3B-Instruct", {"use_sliding_window": True}),
    ("not a number", "Qwen3-0.6B", {"some_factor": float("nan")}),
]


@pytest.mark.parametrize("name, changes", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_could_matter_is_refused_and_can_be_ignored(name, changes):
    values = PUBLISHED[name]
    changed = values | changes
    if "text_config" in values:
        changed = values | {"text_config": values["text_config"] | changes}
    ((field, value),) = changes.items()
    with pytest.raises(ValueError, match=field) as caught:
        DecoderConfig.from_hf(changed)
    assert str(value).lower()[:10] in str(caught.value).lower()
    absent = {k: v for k, v in values.items() if k != field}
    assert DecoderConfig.from_hf(changed, ignore=(field,)) == DecoderConfig.from_hf(absent)


def test_unknown_fields_that_say_nothing_pass():
    values = PUBLISHED["Llama-3.2-1B"]
    nothing = {"a": None, "b": False, "c": 0, "d": 0.0, "e": "", "f": [], "g": {}}
    nothing |= {"layer_types": ["full_attention"] * 16}
    bookkeeping = {"_h": 1, "unsloth_i": "x", "transformers.js_config": {"j": 1}, "k_token_id": 7}
    plain = DecoderConfig.from_hf(values)
    assert DecoderConfig.from_hf(values | nothing | bookkeeping) == plain
    many = {f"field_{i}": i + 1 for i in range(9)}
    with pytest.raises(ValueError, match=r"'field_4': 5} and 4 more; .* pass `ignore=\('field_0',"):
        DecoderConfig.from_hf(values | many)
    assert DecoderConfig.from_hf(values | many, ignore=list(many)) == plain
    with pytest.raises(
        ValueError, match=r"`ignore` must name fields of the config, got \['typo'\]"
    ):
        DecoderConfig.from_hf(values, ignore=("typo",))
    with pytest.raises(TypeError, match="`ignore` must be a collection of field names, got 'a'"):
        DecoderConfig.from_hf(values, ignore="a")
