"""Shapes of public models, as the fields of their `config.json` that decide what is computed."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "llama3_8b": dict(
        model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14336, vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
    "qwen3_8b": dict(
        model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=12288, vocab_size=151936, rope_theta=1e6,
    ),
    "qwen3_32b": dict(
        model_type="qwen3", hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, intermediate_size=25600, vocab_size=151936, rope_theta=1e6,
    ),
    "qwen3_30b_a3b": dict(
        model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, vocab_size=151936, rope_theta=1e6,
    ),
    "qwen3_next": dict(
        model_type="qwen3_next", hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
        head_dim=256, partial_rotary_factor=0.25, intermediate_size=5120, moe_intermediate_size=512, num_experts=512,
        num_experts_per_tok=10, shared_expert_intermediate_size=512, norm_topk_prob=True, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
        vocab_size=151936, rope_theta=1e7,
    ),
    "tiny_hybrid": dict(
        model_type="qwen3_5_text", hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, partial_rotary_factor=0.25, full_attention_interval=2, intermediate_size=512,
        linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64,
        linear_conv_kernel_dim=4, vocab_size=1024, rope_theta=1e7,
    ),
}  # fmt: skip
