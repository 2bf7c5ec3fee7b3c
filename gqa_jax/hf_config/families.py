"""What each `model_type` fixes, and which config fields matter."""

import dataclasses
from collections.abc import Mapping
from typing import Any


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

# Fields that do not change what the decoder computes.
IRRELEVANT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "image_token_id",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "language_model_only",
        "max_position_embeddings",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
    }
)
REQUIRED: Any = object()


class Fields:
    """A config dict whose every field must be taken."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = dict(values)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The field, which counts as read; null stands for the default."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"`config` must hold `{name}`")
        return default

    def expect(self, name: str, *allowed: Any) -> None:
        """Reads a field of which only `allowed` values (the first if absent) are supported."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"`config.{name}` must be {supported} to be supported, got {value!r}")

    def finish(self) -> None:
        unknown = {k: v for k, v in self._left.items() if k not in IRRELEVANT}
        if "quantization_config" in unknown:
            raise ValueError(
                "`config.quantization_config` is not supported: save the model dequantized"
            )
        if unknown:
            raise ValueError(f"`config` has fields that are not supported: {unknown}")
