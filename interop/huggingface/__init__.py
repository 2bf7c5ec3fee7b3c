"""Hugging Face transformers (5.17 and newer) with our attention and our gated delta rule.

    interop.huggingface.register_attention("gqa_jax")
    model.set_attn_implementation("gqa_jax")           # or from_pretrained(..., attn_implementation="gqa_jax")
    with interop.huggingface.patch_gated_delta(model): ...

Nothing is ignored silently: an argument that is neither used nor known to change no result raises (`arguments.py` has
the list). Documents packed in a row do not see each other, whether told by `cu_seq_lens_q` and `cu_seq_lens_k`,
`seq_idx`, or `position_ids` that start again (these alone as transformers reads them: with use_cache=False and without
padding). `torch.autocast` casts what it casts for PyTorch's own attention. During inference lengths are padded to a
few sizes (masked, so that results do not change), and generation with a growing cache compiles O(log T) times.
"""

from interop.huggingface.attention import attention_forward as attention_forward
from interop.huggingface.attention import register_attention as register_attention
from interop.huggingface.gated_delta import GatedDeltaPatch as GatedDeltaPatch
from interop.huggingface.gated_delta import causal_conv1d as causal_conv1d
from interop.huggingface.gated_delta import chunk_gated_delta_rule as chunk_gated_delta_rule
from interop.huggingface.gated_delta import patch_gated_delta as patch_gated_delta
from interop.huggingface.gated_delta import recurrent_gated_delta_rule as recurrent_gated_delta_rule
