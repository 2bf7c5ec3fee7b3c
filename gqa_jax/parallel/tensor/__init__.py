"""Layers on a mesh: each runs its one-device code on its own heads, inside one `shard_map`.

A layer with `axes` hands its call over. Every device gathers the parts of parameters that fsdp spreads, becomes the
ordinary layer of its own groups, and the partial results of row-parallel products are summed: one all-reduce per block
forward and one backward (Megatron, arXiv 1909.08053), or a reduce-scatter and an all-gather where the residual stream
is split too (arXiv 2205.05198). Inside a caller's own `shard_map` the same code runs as it is.
"""

from gqa_jax.parallel.tensor.decoding import cache_specs as cache_specs
from gqa_jax.parallel.tensor.decoding import divisible_capacity as divisible_capacity
from gqa_jax.parallel.tensor.decoding import for_steps as for_steps
from gqa_jax.parallel.tensor.decoding import on_every_device as on_every_device
from gqa_jax.parallel.tensor.decoding import shard_cache as shard_cache
from gqa_jax.parallel.tensor.decoding import step as step
from gqa_jax.parallel.tensor.layers import cross_attention as cross_attention
from gqa_jax.parallel.tensor.layers import gated_deltanet as gated_deltanet
from gqa_jax.parallel.tensor.layers import mlp as mlp
from gqa_jax.parallel.tensor.layers import moe as moe
from gqa_jax.parallel.tensor.layers import project_memory as project_memory
from gqa_jax.parallel.tensor.layers import self_attention as self_attention
from gqa_jax.parallel.tensor.on_mesh import check_layer as check_layer
from gqa_jax.parallel.tensor.on_mesh import check_positions as check_positions
from gqa_jax.parallel.tensor.on_mesh import check_rows as check_rows
from gqa_jax.parallel.tensor.on_mesh import hide_padding as hide_padding
from gqa_jax.parallel.tensor.vocabulary import as_labels as as_labels
from gqa_jax.parallel.tensor.vocabulary import cross_entropy as cross_entropy
from gqa_jax.parallel.tensor.vocabulary import embed as embed
from gqa_jax.parallel.tensor.vocabulary import logits as logits
