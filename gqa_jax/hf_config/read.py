"""`config.json` to `DecoderConfig`: every field is translated, known not to matter, or refused by name."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gqa_jax.config import (
    AttentionConfig,
    DecoderConfig,
    GatedDeltaNetConfig,
    LinearScaling,
    Llama3Scaling,
    MoEConfig,
    RopeConfig,
    YarnScaling,
)
from gqa_jax.hf_config.families import FAMILIES, REQUIRED, TEXT_MODEL_OF, Family, Fields


def from_hf(source: Mapping[str, Any] | str | os.PathLike) -> DecoderConfig:
    """`DecoderConfig` of a Hugging Face config.

    Args:
      source: the dict, or a path to `config.json` or to its folder. A Qwen3.5 vision-language config yields its text
        model.

    Raises:
      ValueError: a `model_type`, a field or a value that is not supported, each by name.

    Example:
      >>> from_hf("Qwen3-0.6B/config.json").attention.qk_norm  # doctest: +SKIP
      'rms'
    """
    values = dict(source) if isinstance(source, Mapping) else _read_json(source)
    model_type = values.get("model_type")
    if model_type in TEXT_MODEL_OF:
        values = _text_config(values, TEXT_MODEL_OF[model_type])
        model_type = values["model_type"]
    if model_type not in FAMILIES:
        known = sorted([*FAMILIES, *TEXT_MODEL_OF])
        raise ValueError(f"`config.model_type` must be one of {known}, got {model_type!r}")
    return _read(FAMILIES[model_type], model_type, Fields(values))


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    file = pathlib.Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"`path` must be a config.json or a folder that holds one, got {path}")
    return json.loads(file.read_text())


def _text_config(outer: dict[str, Any], text_type: str) -> dict[str, Any]:
    fields = Fields(outer)
    fields.take("model_type")
    text = dict(fields.take("text_config"))
    tied = fields.take("tie_word_embeddings", text.get("tie_word_embeddings", False))
    fields.finish()
    if text.get("tie_word_embeddings", tied) != tied:
        raise ValueError(
            f"`config.tie_word_embeddings={tied}` must agree with that of `config.text_config`"
        )
    if (inner := text.get("model_type", text_type)) not in (text_type, outer["model_type"]):
        raise ValueError(f"`config.text_config.model_type` must be {text_type!r}, got {inner!r}")
    return text | {"model_type": text_type, "tie_word_embeddings": tied}


def _read(family: Family, model_type: str, fields: Fields) -> DecoderConfig:
    fields.take("model_type")
    fields.expect("hidden_act", "silu")
    model_dim = fields.take("hidden_size")
    num_layers = fields.take("num_hidden_layers")
    eps = fields.take("rms_norm_eps", 1e-6)
    if model_type == "llama":
        fields.expect("mlp_bias", False)
    if family.hybrid:
        fields.expect("attn_output_gate", True)
        fields.expect("mamba_ssm_dtype", "float32")
    num_heads = fields.take("num_attention_heads")
    kv_default = num_heads if model_type == "llama" else REQUIRED
    default_head_dim = family.default_head_dim or model_dim // num_heads
    head_dim = fields.take("head_dim", default_head_dim)
    bias = fields.take("attention_bias", False) if family.qkv_bias is None else None
    attention = AttentionConfig(
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", kv_default),
        head_dim=head_dim,
        qkv_bias=bool(family.qkv_bias) if bias is None else bias,
        out_bias=bool(bias),
        output_gate=family.hybrid,
        qk_norm=family.qk_norm,  # pyright: ignore[reportArgumentType]
        norm_eps=eps,
        rope=_read_rope(family, fields, head_dim),
        dropout_rate=float(fields.take("attention_dropout", 0.0)),
    )
    layers, window = _read_layers(family, fields, num_layers)
    moe, moe_layers = _read_moe(family, fields, num_layers)
    config = DecoderConfig(
        vocab_size=fields.take("vocab_size"),
        model_dim=model_dim,
        layers=layers,
        attention=attention,
        sliding_window=window,
        gated_deltanet=_read_gated_deltanet(fields, model_dim, eps) if family.hybrid else None,
        intermediate_size=_read_intermediate_size(family, fields),
        moe=moe,
        moe_layers=moe_layers,
        norm_eps=eps,
        norm_zero_centred=family.hybrid,
        tie_embeddings=fields.take("tie_word_embeddings", False),
        family=model_type,
    )
    fields.finish()
    return config


def _read_intermediate_size(family: Family, fields: Fields) -> int | None:
    if not family.dense_blocks:
        return None
    return fields.take("intermediate_size", None if family.moe else REQUIRED)


def _read_layers(
    family: Family, fields: Fields, num_layers: int
) -> tuple[tuple[Any, ...], int | None]:
    """The kind of every layer, and the window of sliding ones."""
    if family.hybrid:
        interval = fields.take("full_attention_interval", 4)
        default = [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(num_layers)
        ]
        layers, window = fields.take("layer_types", default), None
    elif family.windows == "none":
        layers, window = ["full_attention"] * num_layers, None
    else:
        windowed = fields.take("use_sliding_window", False)
        window = fields.take("sliding_window", None)
        window = window if windowed else None
        first = fields.take("max_window_layers", 28 if family.windows == "per_layer" else None)
        if window is None:
            layers = ["full_attention"] * num_layers
        elif family.windows == "all":
            layers = ["sliding_attention"] * num_layers
        else:
            layers = [
                "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
            ]
        if family.windows == "per_layer":
            layers = fields.take("layer_types", layers)
            if "sliding_attention" in layers and window is None:
                raise ValueError(
                    "`config.use_sliding_window` and `config.sliding_window` must be set when "
                    "`config.layer_types` has sliding_attention"
                )
    if len(layers) != num_layers:
        raise ValueError(
            f"`config.layer_types` must have num_hidden_layers={num_layers} entries, got {len(layers)}"
        )
    return tuple(layers), window


def _read_moe(
    family: Family, fields: Fields, num_layers: int
) -> tuple[MoEConfig | None, tuple[bool, ...] | None]:
    if not family.moe:
        return None, None
    experts = fields.take("num_experts", None) or fields.take("num_local_experts", None)
    fields.take("num_local_experts", None)
    if experts is None:
        raise ValueError("`config` must hold `num_experts`")
    step, dense = fields.take("decoder_sparse_step", 1), set(fields.take("mlp_only_layers", ()))
    moe_layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    if not family.dense_blocks and not all(moe_layers):
        raise ValueError(
            "`config.mlp_only_layers` must be empty and `config.decoder_sparse_step` 1 in a family without dense "
            f"blocks, got {sorted(dense)} and {step}"
        )
    if family.fixed_normalize_top_k:
        fields.expect("norm_topk_prob", True)
        normalize = True
    else:
        normalize = fields.take("norm_topk_prob", family.hybrid)
    moe = MoEConfig(
        num_experts=experts,
        num_experts_per_token=fields.take("num_experts_per_tok"),
        intermediate_size=fields.take("moe_intermediate_size"),
        shared_intermediate_size=fields.take("shared_expert_intermediate_size")
        if family.hybrid
        else None,
        normalize_top_k=normalize,
    )
    return moe, None if all(moe_layers) else moe_layers


def _read_gated_deltanet(fields: Fields, model_dim: int, eps: float) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        model_dim=model_dim,
        num_key_heads=fields.take("linear_num_key_heads"),
        num_value_heads=fields.take("linear_num_value_heads"),
        key_head_dim=fields.take("linear_key_head_dim"),
        value_head_dim=fields.take("linear_value_head_dim"),
        conv_width=fields.take("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )


def _read_rope(family: Family, fields: Fields, head_dim: int) -> RopeConfig:
    new, old = fields.take("rope_parameters", {}), fields.take("rope_scaling", {})
    if new and old:
        raise ValueError("`config` must hold `rope_parameters` or `rope_scaling`, got both")
    rope = Fields(new or old)
    theta = rope.take("rope_theta", fields.take("rope_theta", 10_000.0))
    partial = fields.take("partial_rotary_factor", 0.25 if family.hybrid else 1.0)
    partial = rope.take("partial_rotary_factor", partial)
    if partial != 1.0 and not family.hybrid:
        raise ValueError(f"`config.partial_rotary_factor` must be 1 in this family, got {partial}")
    legacy = rope.take("type", "default")
    kind = rope.take("rope_type", legacy)
    sections = interleaved = None
    if family.mrope:
        sections = rope.take("mrope_section", None)
        rope.expect("mrope_interleaved", True)
        interleaved = sections is not None
        kind = "default" if kind == "mrope" else kind
    rotary_dim = int(head_dim * partial)
    scaling = _read_scaling(kind, rope, fields)
    try:
        rope.finish()
    except ValueError as error:
        raise ValueError(f"in `config.rope_parameters`: {error}") from error
    return RopeConfig(
        theta=float(theta),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        scaling=scaling,
        mrope_sections=None if sections is None else tuple(sections),
        mrope_interleaved=bool(interleaved),
    )


def _read_scaling(
    kind: str, rope: Fields, fields: Fields
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=float(rope.take("factor")))
    if kind not in ("llama3", "yarn"):
        raise ValueError(
            f"`config.rope_parameters.rope_type` must be default, linear, llama3 or yarn, got {kind!r}"
        )
    # Hugging Face lets the outer field win, and falls back to the context length of the checkpoint itself.
    inner = rope.take("original_max_position_embeddings", None)
    outer = fields.take("original_max_position_embeddings", inner)
    original = outer or fields.take("max_position_embeddings")
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(rope.take("factor")),
            low_freq_factor=float(rope.take("low_freq_factor")),
            high_freq_factor=float(rope.take("high_freq_factor")),
            original_max_positions=original,
        )
    return YarnScaling(
        factor=float(rope.take("factor")),
        original_max_positions=original,
        beta_fast=float(rope.take("beta_fast", 32.0)),
        beta_slow=float(rope.take("beta_slow", 1.0)),
        attention_factor=rope.take("attention_factor", None),
        mscale=rope.take("mscale", None),
        mscale_all_dim=rope.take("mscale_all_dim", None),
        truncate=rope.take("truncate", True),
    )
