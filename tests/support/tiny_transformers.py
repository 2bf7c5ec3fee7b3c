"""Tiny random models of transformers, with and without our operators."""

import torch
import transformers

from interop import huggingface

FAMILIES = ("llama", "qwen3", "qwen3_next", "qwen3_5")
HYBRIDS = FAMILIES[2:]
NAME = "gqa_jax"
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128,
)  # fmt: skip
_LINEAR = dict(
    num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=4, linear_conv_kernel_dim=4,
)  # fmt: skip
_EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)


def build(family: str):
    torch.manual_seed(0)
    match family:
        case "llama":
            config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2)
            return transformers.LlamaForCausalLM(config).eval()
        case "qwen3":
            config = transformers.Qwen3Config(**SIZES, num_hidden_layers=2)
            return transformers.Qwen3ForCausalLM(config).eval()
        case "qwen3_next":
            config = transformers.Qwen3NextConfig(**SIZES, **_LINEAR, **_EXPERTS)
            return transformers.Qwen3NextForCausalLM(config).eval()
        case "mistral":
            config = transformers.MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=3)
            return transformers.MistralForCausalLM(config).eval()
        case "gemma2":
            config = transformers.Gemma2Config(
                **SIZES,
                num_hidden_layers=2,
                sliding_window=3,
                attn_logit_softcapping=0.5,
                query_pre_attn_scalar=8,
            )
            return transformers.Gemma2ForCausalLM(config).eval()
        case "gpt_oss":
            sizes = {**SIZES, "intermediate_size": 16}
            config = transformers.GptOssConfig(
                **sizes, num_hidden_layers=2, sliding_window=3, num_local_experts=4
            )
            return transformers.GptOssForCausalLM(config).eval()
    config = transformers.Qwen3_5TextConfig(**SIZES, **_LINEAR)
    return transformers.Qwen3_5ForCausalLM(config).eval()


class Ours:
    """The model with our operators, inside the block."""

    def __init__(self, model):
        self.model, self.patch = model, None

    def __enter__(self):
        self.model.set_attn_implementation(NAME)
        if "linear_attention" in (getattr(self.model.config, "layer_types", None) or ()):
            self.patch = huggingface.patch_gated_delta(self.model)

    def __exit__(self, *exception):
        self.model.set_attn_implementation("eager")
        if self.patch:
            self.patch.undo()


def tokens(length=13, seed=1):
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(seed))


def both(model, function):
    """`function()` with our operators, then with transformers' eager ones."""
    with Ours(model):
        ours = function()
    model.set_attn_implementation("eager")
    return ours, function()


def left_padding(ids, count=4):
    mask = torch.ones_like(ids)
    mask[1, :count] = 0
    return mask


def is_ours(model) -> bool:
    return model.config._attn_implementation == NAME
