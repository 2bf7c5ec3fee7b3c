"""`DecoderConfig` to `config.json`, refused where reading it back would give another model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqa_jax.config import (
    AttentionConfig,
    DecoderConfig,
    GatedDeltaNetConfig,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)
from gqa_jax.hf.config.families import FAMILIES, Family
from gqa_jax.hf.config.fields import is_inert
from gqa_jax.hf.config.read import from_hf


def to_hf_config(
    config: DecoderConfig, *, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The inverse of `from_hf`: what `config.json` holds.

    Args:
      config: `config.family` names the `model_type`.
      extra: fields that do not concern the decoder, such as `bos_token_id` and `max_position_embeddings`; they win
        over those of `config`.

    Raises:
      ValueError: no family, a config that the family cannot express, or an `extra` field that would change the model.

    Example:
      >>> to_hf_config(from_hf(values))["model_type"] == values["model_type"]  # doctest: +SKIP
      True
    """
    if config.family not in FAMILIES:
        raise ValueError(
            f"`config.family` must be one of {sorted(FAMILIES)}, got {config.family!r}"
        )
    family = FAMILIES[config.family]
    if config.attention is None or config.attention.rope is None:
        raise ValueError(f"`config.attention` must be given, with RoPE, for {config.family!r}")
    if family.hybrid and config.gated_deltanet is None:
        raise ValueError(f"`config.gated_deltanet` must be given for {config.family!r}")
    values = _write(family, config)
    expressed, wanted = from_hf(values), _mathematics(config)
    if expressed != wanted:
        differing = [
            f"{field.name}={getattr(wanted, field.name)!r}"
            for field in dataclasses.fields(DecoderConfig)
            if getattr(wanted, field.name) != getattr(expressed, field.name)
        ]
        raise ValueError(f"family {config.family!r} cannot express {', '.join(differing)}")
    for name, value in (extra or {}).items():
        if not is_inert(name, value) or (name in values and not is_inert(name, True)):
            raise ValueError(
                f"`extra` must hold only fields that do not change the model, got {name!r}"
            )
    return values | dict(extra or {})


def _write(family: Family, config: DecoderConfig) -> dict[str, Any]:
    attention = config.attention
    assert attention is not None
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": attention.dropout_rate,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _write_rope(family, attention),
    }
    if config.stop_tokens:
        several = len(config.stop_tokens) > 1
        values["eos_token_id"] = list(config.stop_tokens) if several else config.stop_tokens[0]
    if config.pad_token is not None:
        values["pad_token_id"] = config.pad_token
    if family.qkv_bias is None or attention.head_dim * attention.num_heads != config.model_dim:
        values["head_dim"] = attention.head_dim  # Qwen2 has no such field, but reads it
    if family.qkv_bias is None:
        values["attention_bias"] = attention.qkv_bias
    if family.dense_blocks and config.intermediate_size is not None:
        values["intermediate_size"] = config.intermediate_size
    if family.windows != "none":
        values["use_sliding_window"] = config.sliding_window is not None
        values["sliding_window"] = config.sliding_window
    if family.windows == "per_layer":
        kinds = list(config.layers)
        full = kinds.count("full_attention")
        values["layer_types"] = kinds
        # Readers that predate `layer_types` know only "sliding from this layer on".
        values["max_window_layers"] = full if "full_attention" not in kinds[full:] else len(kinds)
    if family.hybrid:
        values["layer_types"] = list(config.layers)
        gdn = config.gated_deltanet
        assert gdn is not None
        values |= {
            "linear_num_key_heads": gdn.num_key_heads,
            "linear_num_value_heads": gdn.num_value_heads,
            "linear_key_head_dim": gdn.key_head_dim,
            "linear_value_head_dim": gdn.value_head_dim,
            "linear_conv_kernel_dim": gdn.conv_width,
        }
    if family.moe and config.moe is not None:
        moe = config.moe
        values |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_token,
            "moe_intermediate_size": moe.intermediate_size,
        }
        if family.hybrid:
            values["shared_expert_intermediate_size"] = moe.shared_intermediate_size
        if not family.fixed_normalize_top_k:
            values["norm_topk_prob"] = moe.normalize_top_k
        if family.dense_blocks:
            values["decoder_sparse_step"] = 1
            values["mlp_only_layers"] = [
                i for i in range(len(config.layers)) if not config.is_moe(i)
            ]
    return values


def _write_rope(family: Family, attention: AttentionConfig) -> dict[str, Any]:
    rope = attention.rope
    assert rope is not None
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if family.hybrid:
        values["partial_rotary_factor"] = (
            rope.rotary_dim or attention.head_dim
        ) / attention.head_dim
    if rope.mrope_sections is not None:
        values["mrope_section"] = list(rope.mrope_sections)
        values["mrope_interleaved"] = rope.mrope_interleaved
    match rope.scaling:
        case LinearScaling(factor=factor):
            values |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            values |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case YarnScaling() as scaling:
            optional = {
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            }
            values |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            } | {name: value for name, value in optional.items() if value is not None}
    return values


def _mathematics(config: DecoderConfig) -> DecoderConfig:
    """`config` without what a checkpoint need not carry: how to run it and how it was initialised."""
    gdn = config.gated_deltanet
    if gdn is not None:
        fresh = {f.name: f.default for f in dataclasses.fields(GatedDeltaNetConfig)}
        runtime = ("chunk_size", "decay_init", "A_init_range")
        gdn = dataclasses.replace(gdn, **{name: fresh[name] for name in runtime})
    return dataclasses.replace(
        config, gated_deltanet=gdn, source=None, scan_layers=False, remat=False
    )
