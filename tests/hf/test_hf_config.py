"""Configs against transformers' own classes: read, written, read again; everything else refused by name."""

import dataclasses
import json

import pytest

from gqa_jax.config import DecoderConfig, LinearScaling, Llama3Scaling, YarnScaling
from gqa_jax.hf.config import to_hf_config
from tests.hf.hf_models import FAMILIES, hf_config

pytestmark = pytest.mark.torch
pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "attention_factor": 1.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = [
    *[(family, {}) for family in FAMILIES],
    ("llama", {"attention_bias": False, "num_key_value_heads": None, "head_dim": None}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("llama", {"attention_dropout": 0.25, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"head_dim": 6}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    ("qwen3", {"rope_parameters": YARN}),
    (
        "qwen3",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}},
    ),
    ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2}),
    ("qwen3_next", {"rope_parameters": YARN | {"partial_rotary_factor": 0.25}}),
    ("qwen3_5_text", {"partial_rotary_factor": None}),
    (
        "qwen3_5_text",
        {
            "partial_rotary_factor": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.75,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
    ),
]
IDS = [f"{family}-{i}" for i, (family, _) in enumerate(VARIANTS)]


@pytest.mark.parametrize("family, changes", VARIANTS, ids=IDS)
def test_configs_survive_both_directions(family, changes, tmp_path):
    theirs = hf_config(family, **changes)
    theirs.save_pretrained(tmp_path)
    ours = DecoderConfig.from_hf(tmp_path)
    assert ours.family == family
    assert DecoderConfig.from_hf(theirs.to_dict()) == ours
    assert DecoderConfig.from_hf(tmp_path / "config.json") == ours
    assert DecoderConfig.from_hf(to_hf_config(ours)) == ours

    written = to_hf_config(ours, extra={"eos_token_id": 3, "max_position_embeddings": 99})
    again = type(theirs)(**{k: v for k, v in written.items() if k != "model_type"})
    assert (again.eos_token_id, again.max_position_embeddings) == (3, 99)
    before, after = theirs.to_dict(), again.to_dict()
    differing = {k for k in before | after if before.get(k) != after.get(k)}
    # How the file was made, and fields that older readers want although `layer_types` or zero windows say it all.
    allowed = {"architectures", "eos_token_id", "max_position_embeddings", "max_window_layers"}
    allowed |= {"partial_rotary_factor", "decoder_sparse_step", "mlp_only_layers"}
    allowed |= {"sliding_window"} if ours.sliding_window is None else set()
    allowed |= {"rope_parameters"}  # may only gain defaults: see below
    assert differing <= allowed, {k: (before.get(k), after.get(k)) for k in differing}
    for key, value in before["rope_parameters"].items():
        assert after["rope_parameters"][key] == value


def test_what_the_fields_mean():
    config = DecoderConfig.from_hf(hf_config("qwen2").to_dict())
    assert config.layers == ("full_attention", "sliding_attention")
    assert config.attention_at(1).sliding_window == 5
    assert config.attention.qkv_bias
    assert not config.attention.out_bias
    assert config.attention.head_dim == 4

    config = DecoderConfig.from_hf(hf_config("llama", attention_dropout=0.25).to_dict())
    assert config.attention.qkv_bias
    assert config.attention.out_bias
    assert config.attention.dropout_rate == 0.25

    config = DecoderConfig.from_hf(hf_config("qwen3_next").to_dict())
    assert config.layers == ("linear_attention",) * 3 + ("full_attention",)
    assert config.moe_layers == (True, False, True, True)
    assert config.norm_zero_centred
    assert config.attention.output_gate
    assert config.attention.qk_norm == "rms_zero_centred"
    assert config.attention.rope.rotary_dim == 8
    assert config.gated_deltanet.norm_eps == config.norm_eps == 1e-5
    assert config.moe.shared_intermediate_size == 10


def test_older_rope_forms():
    values = hf_config("llama").to_dict()
    del values["rope_parameters"]
    assert DecoderConfig.from_hf(values).attention.rope.theta == 10_000.0
    config = DecoderConfig.from_hf(values | {"rope_theta": 5e5, "rope_scaling": None})
    assert config.attention.rope.theta == 5e5
    scaled = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    config = DecoderConfig.from_hf(values | {"rope_theta": 5e5, "rope_scaling": scaled})
    assert config.attention.rope.scaling == Llama3Scaling(factor=8.0, original_max_positions=64)
    linear = {"type": "linear", "factor": 2.0}
    config = DecoderConfig.from_hf(values | {"rope_scaling": linear})
    assert config.attention.rope.scaling == LinearScaling(factor=2.0)
    yarn = {"type": "yarn", "factor": 4.0}
    config = DecoderConfig.from_hf(values | {"rope_scaling": yarn, "max_position_embeddings": 77})
    assert config.attention.rope.scaling == YarnScaling(factor=4.0, original_max_positions=77)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_vision_language_configs_yield_their_text_model(family):
    import transformers

    outer = {
        "qwen3_5_text": transformers.Qwen3_5Config,
        "qwen3_5_moe_text": transformers.Qwen3_5MoeConfig,
    }[family]
    text = hf_config(family).to_dict()
    tied = text["tie_word_embeddings"]
    values = json.loads(
        outer(text_config=text, tie_word_embeddings=tied).to_json_string(use_diff=False)
    )
    assert values["model_type"] == family.removesuffix("_text")
    assert DecoderConfig.from_hf(values) == DecoderConfig.from_hf(text)
    with pytest.raises(ValueError, match=r"`config.tie_word_embeddings=\w+` must agree"):
        DecoderConfig.from_hf(values | {"tie_word_embeddings": not tied})


REFUSED = [
    (
        "llama",
        {"hidden_act": "gelu"},
        "`config.hidden_act` must be 'silu' to be supported, got 'gelu'",
    ),
    ("llama", {"mlp_bias": True}, "`config.mlp_bias` must be False to be supported, got True"),
    (
        "llama",
        {"logit_scale": 2.0},
        r"`config` has fields that are not supported: {'logit_scale': 2.0}",
    ),
    ("llama", {"model_type": "gpt2"}, r"`config.model_type` must be one of \[.*\], got 'gpt2'"),
    ("llama", {"hidden_size": None}, "`config` must hold `hidden_size`"),
    (
        "llama",
        {"quantization_config": {"quant_method": "fp8"}},
        "`config.quantization_config` is not supported",
    ),
    ("llama", {"num_key_value_heads": 4}, "`num_heads=6` must be a multiple of `num_kv_heads=4`"),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "`config.partial_rotary_factor` must be 1 in this family, got 0.5",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "`config.rope_parameters.rope_type` must be default, linear, llama3 or yarn, got 'dynamic'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "short_factor": [1.0]}},
        r"in `config.rope_parameters`: `config` has fields that are not supported: {'short_factor'",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "`rope_parameters` or `rope_scaling`, got both",
    ),
    (
        "qwen2",
        {"use_sliding_window": False},
        "must be set when `config.layer_types` has sliding_attention",
    ),
    ("qwen2", {"layer_types": ["full_attention"]}, "must have num_hidden_layers=2 entries, got 1"),
    ("qwen3", {"num_key_value_heads": None}, "`config` must hold `num_key_value_heads`"),
    (
        "qwen3_next",
        {"layer_types": ["conv"] * 4},
        "`layers` must hold full_attention.*, got 'conv'",
    ),
    (
        "qwen3_next",
        {"attn_output_gate": False},
        "`config.attn_output_gate` must be True to be supported",
    ),
    (
        "qwen3_5_moe_text",
        {"mlp_only_layers": [1]},
        r"`config.mlp_only_layers` must be empty .*, got \[1\]",
    ),
    ("qwen3_5_moe_text", {"norm_topk_prob": False}, "`config.norm_topk_prob` must be True"),
    ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "`config.mamba_ssm_dtype` must be 'float32'"),
]


@pytest.mark.parametrize("family, changes, message", REFUSED, ids=[m[:45] for _, _, m in REFUSED])
def test_what_we_do_not_run_is_refused_by_name(family, changes, message):
    values = hf_config(family).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(values)


def test_paths_are_checked(tmp_path):
    with pytest.raises(
        ValueError, match=r"`path` must be a config.json or a folder that holds one"
    ):
        DecoderConfig.from_hf(tmp_path)


def test_writing_refuses_what_a_family_cannot_express():
    config = DecoderConfig.from_hf(hf_config("llama").to_dict())
    with pytest.raises(ValueError, match=r"`config.family` must be one of \[.*\], got None"):
        to_hf_config(dataclasses.replace(config, family=None))
    with pytest.raises(
        ValueError, match=r"family 'llama' cannot express attention=AttentionConfig"
    ):
        to_hf_config(
            dataclasses.replace(
                config, attention=dataclasses.replace(config.attention, qk_norm="rms")
            )
        )
    with pytest.raises(ValueError, match=r"`config.attention` must be given, with RoPE"):
        to_hf_config(
            dataclasses.replace(config, attention=dataclasses.replace(config.attention, rope=None))
        )
    with pytest.raises(
        ValueError, match="`extra` must hold only fields that do not change the model"
    ):
        to_hf_config(config, extra={"vocab_size": 7})
    hybrid = DecoderConfig.from_hf(hf_config("qwen3_next").to_dict())
    runtime = dataclasses.replace(
        hybrid,
        scan_layers=True,
        remat=True,
        gated_deltanet=dataclasses.replace(hybrid.gated_deltanet, chunk_size=16),
    )
    assert to_hf_config(runtime) == to_hf_config(hybrid)
