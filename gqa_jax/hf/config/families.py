"""What each `model_type` fixes."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What one `model_type` fixes, and which fields it reads."""

    architecture: str
    qkv_bias: bool | None = (
        None  # None: the field `attention_bias` decides, for the output projection too
    )
    qk_norm: str = "none"
    default_head_dim: int | None = None  # None: hidden_size // num_attention_heads
    windows: str = (
        "none"  # "per_layer": `layer_types`, `max_window_layers`; "all": one window for all layers
    )
    hybrid: bool = False  # Gated DeltaNet layers, output gate, zero-centred norms, partial rotary
    moe: bool = False
    dense_blocks: bool = True  # some layers can have a dense feed-forward block
    fixed_normalize_top_k: bool = False
    mrope: bool = False


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, windows="per_layer"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", qk_norm="rms", default_head_dim=128, windows="per_layer"
    ),
    "qwen3_moe": Family(architecture="Qwen3MoeForCausalLM", qk_norm="rms", windows="all", moe=True),
    "qwen3_next": Family(
        architecture="Qwen3NextForCausalLM",
        qk_norm="rms_zero_centred",
        default_head_dim=256,
        hybrid=True,
        moe=True,
    ),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        qk_norm="rms_zero_centred",
        default_head_dim=256,
        hybrid=True,
        mrope=True,
    ),
    "qwen3_5_moe_text": Family(
        architecture="Qwen3_5MoeForCausalLM",
        qk_norm="rms_zero_centred",
        default_head_dim=256,
        hybrid=True,
        moe=True,
        dense_blocks=False,
        fixed_normalize_top_k=True,
        mrope=True,
    ),
}
TEXT_MODEL_OF = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
