"""Layers of `gqa_jax` as `torch.nn.Module`s: PyTorch owns parameters and projections, JAX computes what is between."""

from interop.torch_modules.cross_attention import CrossAttention as CrossAttention
from interop.torch_modules.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from interop.torch_modules.jax_cache import JaxCache as JaxCache
from interop.torch_modules.multi_head_attention import KVCache as KVCache
from interop.torch_modules.multi_head_attention import MultiHeadAttention as MultiHeadAttention
from interop.torch_modules.multi_head_attention import delete_kv_caches as delete_kv_caches
from interop.torch_modules.multi_head_attention import disable_kv_cache as disable_kv_cache
from interop.torch_modules.multi_head_attention import local_kv_cache as local_kv_cache
from interop.torch_modules.nnx_module import NNXModule as NNXModule
from interop.torch_modules.self_attention import SelfAttention as SelfAttention
