"""Tiny random Hugging Face models of every family: the truth that we did not write."""

import functools

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)
_CLASSES = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_next": "Qwen3NextConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
}
_SHARED = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
_DENSE = {"intermediate_size": 20}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
_OWN = {
    "llama": _DENSE | {"attention_bias": True},
    "qwen2": _DENSE
    | {
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen3_moe": _DENSE | _MOE | {"mlp_only_layers": [0], "norm_topk_prob": False},
    "qwen3_next": _DENSE
    | _MOE
    | _HYBRID
    | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 10},
    "qwen3_5_text": _DENSE | _HYBRID | {"tie_word_embeddings": True},
    "qwen3_5_moe_text": _MOE | _HYBRID | {"shared_expert_intermediate_size": 10},
}


def hf_config(family: str, **changes):
    """A tiny transformers config of `family`."""
    import transformers

    values = {k: v for k, v in (_SHARED | _OWN[family] | changes).items() if v is not None}
    return getattr(transformers, _CLASSES[family])(**values)


def build(family: str, *, seed: int, dtype: str = "float32", **changes):
    """A random model whose every parameter, norms and biases too, differs from its initial constant."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = hf_config(family, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype)).eval()


@functools.cache
def shared_model(family: str):
    """One float32 model per family and test session; never changed."""
    return build(family, seed=7)
