"""Named layouts of fused weights, and exact conversions among them.

Everything here only reshapes, slices and concatenates: bits are never changed, numpy views stay views where the layout
allows, and any array with `shape`, `ndim`, `reshape` and a namespace that has `concat` and `stack` will do (numpy, jax
arrays and tracers, torch tensors). `axis` says where the features are: -1 for a JAX `[in, out]` kernel, 0 for a torch
`[out, in]` weight or a LoRA B `[out, rank]`, either for a bias or a DoRA magnitude `[out]`.
"""

from gqa_jax.layout.gate_up import GateUp, fuse_gate_up, split_gate_up
from gqa_jax.layout.gated_delta import (
    GDNInputs,
    KeyHeadInputs,
    Qwen3_5Inputs,
    Qwen3NextInputs,
    conv_from_key_heads,
    conv_to_key_heads,
    convert_gdn,
    fuse_gdn,
    split_gdn,
)
from gqa_jax.layout.metadata import FusedLayout, layout_metadata, read_layout_metadata
from gqa_jax.layout.qkv import (
    QKV,
    HFGatedQ,
    convert,
    from_group_axes,
    fuse_qkv,
    merge_shards,
    split_qkv,
    split_shards,
    to_group_axes,
)
from gqa_jax.layout.rope_pairing import convert_rope_pairing
from gqa_jax.layout.state import fuse_state, split_state

__all__ = [
    "QKV",
    "FusedLayout",
    "GDNInputs",
    "GateUp",
    "HFGatedQ",
    "KeyHeadInputs",
    "Qwen3NextInputs",
    "Qwen3_5Inputs",
    "conv_from_key_heads",
    "conv_to_key_heads",
    "convert",
    "convert_gdn",
    "convert_rope_pairing",
    "from_group_axes",
    "fuse_gate_up",
    "fuse_gdn",
    "fuse_qkv",
    "fuse_state",
    "layout_metadata",
    "merge_shards",
    "read_layout_metadata",
    "split_gate_up",
    "split_gdn",
    "split_qkv",
    "split_shards",
    "split_state",
    "to_group_axes",
]
