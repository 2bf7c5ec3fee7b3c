"""`config.json` to `DecoderConfig`: every field is translated, known not to matter, or refused by name."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
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
from gqa_jax.hf.config.families import FAMILIES, TEXT_MODEL_OF, Family
from gqa_jax.hf.config.fields import REQUIRED, Fields, read_json, short, without

MAX_LAYERS = 10_000
GENERATION = "generation_config.json"


def from_hf(
    source: Mapping[str, Any] | str | os.PathLike, *, ignore: Collection[str] = ()
) -> DecoderConfig:
    """`DecoderConfig` of a Hugging Face config.

    A field that no one reads passes if it cannot matter: by its name (`torch_dtype`, `_name_or_path`, token ids) or
    because it is false, null, zero or empty. Any other raises, and `ignore` is the way round.

    Args:
      source: the dict, or a path to `config.json` or to its folder. A Qwen3.5 vision-language config yields its text
        model. Beside a file, `generation_config.json` has the last word on stop and padding tokens.
      ignore: names of fields to read as if they were absent.

    Raises:
      ValueError: a `model_type`, a field or a value that is not supported, each by name.

    Example:
      >>> from_hf("Qwen3-0.6B/config.json").attention.qk_norm  # doctest: +SKIP
      'rms'
    """
    if isinstance(source, Mapping):
        return _read(without(source, ignore), {})
    file = config_file(source)
    beside = file.parent / GENERATION
    values, generation = read_json(file), read_json(beside) if beside.is_file() else {}
    try:
        return _read(without(values, ignore), generation)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_file(path: str | os.PathLike) -> pathlib.Path:
    """The `config.json` that a path names, by itself or by its folder."""
    file = pathlib.Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"`path` must be a config.json or a folder that holds one, got {path}")
    return file


def text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model: `values`, or what a vision-language config holds for it."""
    outer_type = values.get("model_type")
    if not isinstance(outer_type, str) or outer_type not in TEXT_MODEL_OF:
        return dict(values)
    text_type = TEXT_MODEL_OF[outer_type]
    fields = Fields(values)
    fields.take("model_type", str)
    text = dict(fields.take("text_config", dict))
    inner_tied = text.get("tie_word_embeddings", False)
    tied = fields.take("tie_word_embeddings", bool, inner_tied)
    fields.finish()
    if text.get("tie_word_embeddings", tied) != tied:
        raise ValueError(
            f"`config.tie_word_embeddings={tied}` must agree with that of `config.text_config`"
        )
    if (inner := text.get("model_type", text_type)) not in (text_type, outer_type):
        raise ValueError(
            f"`config.text_config.model_type` must be {text_type!r}, got {short(inner)}"
        )
    ids = {k: v for k, v in values.items() if k.endswith("_token_id")}
    return ids | text | {"model_type": text_type, "tie_word_embeddings": tied}


def _read(values: Mapping[str, Any], generation: Mapping[str, Any]) -> DecoderConfig:
    values = text_config(values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted([*FAMILIES, *TEXT_MODEL_OF])
        raise ValueError(f"`config.model_type` must be one of {known}, got {short(model_type)}")
    try:
        config = _read_family(FAMILIES[model_type], model_type, Fields(values))
    except TypeError as error:  # of a config class
        raise ValueError(f"`config` does not describe a decoder: {error}") from error
    said = Fields(generation)  # what it holds wins, null does not
    stop = said.token_ids("eos_token_id") or config.stop_tokens
    pad = (*said.token_ids("pad_token_id"), config.pad_token)[0]
    return dataclasses.replace(config, stop_tokens=stop, pad_token=pad)


def _read_family(family: Family, model_type: str, fields: Fields) -> DecoderConfig:
    fields.take("model_type", str)
    fields.expect("hidden_act", "silu")
    fields.expect("is_causal", True)
    model_dim = fields.take("hidden_size", int)
    num_layers = fields.take("num_hidden_layers", int)
    if num_layers > MAX_LAYERS:
        raise ValueError(
            f"`config.num_hidden_layers` must be at most {MAX_LAYERS}, got {num_layers}"
        )
    eps = fields.take("rms_norm_eps", float, 1e-6)
    if model_type == "llama":
        fields.expect("mlp_bias", False)
    if family.hybrid:
        fields.expect("attn_output_gate", True)
        fields.expect("mamba_ssm_dtype", "float32")
        fields.expect("output_gate_type", "swish", "silu")
    layers, window = _read_layers(family, fields, num_layers)
    moe, moe_layers = _read_moe(family, fields, num_layers)
    tied = fields.take("tie_word_embeddings", bool, False)
    config = DecoderConfig(
        vocab_size=fields.take("vocab_size", int),
        model_dim=model_dim,
        layers=layers,
        attention=_read_attention(family, model_type, fields, model_dim, eps),
        sliding_window=window,
        gated_deltanet=_read_gated_deltanet(fields, model_dim, eps) if family.hybrid else None,
        intermediate_size=_read_intermediate_size(family, fields),
        moe=moe,
        moe_layers=moe_layers,
        norm_eps=eps,
        norm_zero_centred=family.hybrid,
        tie_embeddings=tied,
        family=model_type,
        stop_tokens=fields.token_ids("eos_token_id"),
        pad_token=(*fields.token_ids("pad_token_id"), None)[0],
    )
    fields.finish()
    return config


def _read_attention(
    family: Family, model_type: str, fields: Fields, model_dim: int, eps: float
) -> AttentionConfig:
    num_heads = fields.take("num_attention_heads", int)
    kv_default = num_heads if model_type == "llama" else REQUIRED
    head_dim = fields.take(
        "head_dim", int, family.default_head_dim or max(1, model_dim // num_heads)
    )
    bias = fields.take("attention_bias", bool, False)
    # A family whose bias is fixed has it whatever the field says, as in transformers.
    qkv_bias, out_bias = (bias, bias) if family.qkv_bias is None else (family.qkv_bias, False)
    fields.expect("qkv_bias", qkv_bias)
    fields.expect("use_qk_norm", family.qk_norm != "none")
    return AttentionConfig(
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, kv_default),
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        output_gate=family.hybrid,
        qk_norm=family.qk_norm,  # pyright: ignore[reportArgumentType]
        norm_eps=eps,
        rope=_read_rope(family, fields, head_dim),
        dropout_rate=fields.take("attention_dropout", float, 0.0),
    )


def _read_intermediate_size(family: Family, fields: Fields) -> int | None:
    if not family.dense_blocks:
        return None
    return fields.take("intermediate_size", int, None if family.moe else REQUIRED)


def _read_layers(
    family: Family, fields: Fields, num_layers: int
) -> tuple[tuple[Any, ...], int | None]:
    """The kind of every layer, and the window of sliding ones."""
    windowed = fields.take("use_sliding_window", bool, None)
    if windowed is False:  # whatever window it names
        fields.drop("sliding_window")
    if windowed and family.windows == "none":
        raise ValueError("`config.use_sliding_window` must be false in this family, got true")
    if family.hybrid:
        interval = fields.take("full_attention_interval", int, 4)
        default = [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(num_layers)
        ]
        layers, window = fields.take("layer_types", list, default), None
    elif family.windows == "none":
        layers, window = ["full_attention"] * num_layers, None
    else:
        window = fields.take("sliding_window", int, None) if windowed else None
        first = fields.take("max_window_layers", int, 28, minimum=0)
        if window is None:
            layers = ["full_attention"] * num_layers
        elif family.windows == "all":
            layers = ["sliding_attention"] * num_layers
        else:
            layers = [
                "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
            ]
        if family.windows == "per_layer":
            layers = fields.take("layer_types", list, layers)
            if "sliding_attention" in layers and window is None:
                raise ValueError(
                    "`config.use_sliding_window` and `config.sliding_window` must be set when "
                    "`config.layer_types` has sliding_attention"
                )
    if not family.hybrid and family.windows != "per_layer":
        fields.expect("layer_types", layers)
    if wrong := [kind for kind in layers if not isinstance(kind, str)]:
        raise ValueError(f"`config.layer_types` must hold strings, got {short(wrong[0])}")
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
    experts = fields.take("num_local_experts", int, None)
    experts = fields.take("num_experts", int, REQUIRED if experts is None else experts)
    step = fields.take("decoder_sparse_step", int, 1)
    dense = fields.take("mlp_only_layers", list, ())
    if wrong := [i for i in dense if type(i) is not int]:
        raise ValueError(f"`config.mlp_only_layers` must hold integers, got {short(wrong[0])}")
    dense = set(dense)
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
        normalize = fields.take("norm_topk_prob", bool, family.hybrid)
    moe = MoEConfig(
        num_experts=experts,
        num_experts_per_token=fields.take("num_experts_per_tok", int),
        intermediate_size=fields.take("moe_intermediate_size", int),
        shared_intermediate_size=fields.take("shared_expert_intermediate_size", int)
        if family.hybrid
        else None,
        normalize_top_k=normalize,
    )
    return moe, None if all(moe_layers) else moe_layers


def _read_gated_deltanet(fields: Fields, model_dim: int, eps: float) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        model_dim=model_dim,
        num_key_heads=fields.take("linear_num_key_heads", int),
        num_value_heads=fields.take("linear_num_value_heads", int),
        key_head_dim=fields.take("linear_key_head_dim", int),
        value_head_dim=fields.take("linear_value_head_dim", int),
        conv_width=fields.take("linear_conv_kernel_dim", int, 4),
        norm_eps=eps,
    )


def _read_rope(family: Family, fields: Fields, head_dim: int) -> RopeConfig:
    new = fields.take("rope_parameters", dict, {})
    old = fields.take("rope_scaling", dict, {})
    if new and old:
        raise ValueError("`config` must hold `rope_parameters` or `rope_scaling`, got both")
    theta = fields.take("rope_theta", float, 10_000.0)
    partial = fields.take("partial_rotary_factor", float, 0.25 if family.hybrid else 1.0)
    try:
        rope = Fields(new or old)
        theta = rope.take("rope_theta", float, theta)
        partial = rope.take("partial_rotary_factor", float, partial)
        if not 0.0 < partial <= 1.0:
            raise ValueError(f"`config.partial_rotary_factor` must be in (0, 1], got {partial}")
        if partial != 1.0 and not family.hybrid:
            raise ValueError(
                f"`config.partial_rotary_factor` must be 1 in this family, got {partial}"
            )
        kind = rope.take("rope_type", str, rope.take("type", str, "default"))
        sections = None
        rotary_dim = int(head_dim * partial)
        if family.mrope:
            sections = _read_mrope(rope, rotary_dim)
            kind = "default" if kind == "mrope" else kind
        scaling = _read_scaling(kind, rope, fields)
        rope.finish()
    except ValueError as error:
        raise ValueError(f"in `config.rope_parameters`: {error}") from error
    return RopeConfig(
        theta=theta,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        scaling=scaling,
        mrope_sections=sections,
        mrope_interleaved=sections is not None,
    )


def _read_mrope(rope: Fields, rotary_dim: int) -> tuple[int, int, int] | None:
    rope.expect("mrope_interleaved", True)
    sections = rope.take("mrope_section", list, None)
    if sections is None:
        return None
    counts = all(type(count) is int and count >= 0 for count in sections)
    if not counts or len(sections) != 3 or sum(sections) != rotary_dim // 2:
        raise ValueError(
            f"`config.mrope_section` must hold three counts whose sum is rotary_dim / 2 = {rotary_dim // 2}, got "
            f"{short(sections)}"
        )
    return tuple(sections)


def _read_scaling(
    kind: str, rope: Fields, fields: Fields
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "default":
        rope.expect("factor", 1.0, 1)
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            "`config.rope_parameters.rope_type` must be default, linear, llama3 or yarn, got "
            f"{short(kind)}"
        )
    factor = rope.take("factor", float)
    if kind == "linear":
        return LinearScaling(factor=factor)
    # Hugging Face lets the outer field win, and falls back to the context length of the checkpoint itself.
    name = "original_max_position_embeddings"
    original = fields.take(name, int, rope.take(name, int, None))
    original = original or fields.take("max_position_embeddings", int)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
            original_max_positions=original,
        )
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.take("beta_fast", float, 32.0),
        beta_slow=rope.take("beta_slow", float, 1.0),
        attention_factor=rope.take("attention_factor", float, None),
        mscale=rope.take("mscale", float, None),
        mscale_all_dim=rope.take("mscale_all_dim", float, None),
        truncate=rope.take("truncate", bool, True),
    )
