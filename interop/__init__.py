"""PyTorch and Hugging Face call the operators and modules of this distribution.

Importing this package needs no PyTorch; using what needs it says so. The modules `huggingface` and `export` load when
first used, and `huggingface` imports transformers only when called.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from interop.environment import EnvironmentReport as EnvironmentReport
from interop.environment import check_environment as check_environment
from interop.environment import configure as configure

if TYPE_CHECKING:
    from interop.bucketing import bucket_length as bucket_length
    from interop.bucketing import pad_to as pad_to
    from interop.dlpack import dtype_to_jax as dtype_to_jax
    from interop.dlpack import dtype_to_torch as dtype_to_torch
    from interop.dlpack import to_jax as to_jax
    from interop.dlpack import to_torch as to_torch
    from interop.dlpack import tree_to_jax as tree_to_jax
    from interop.dlpack import tree_to_torch as tree_to_torch
    from interop.operators import AttentionOutput as AttentionOutput
    from interop.operators import CausalConvOutput as CausalConvOutput
    from interop.operators import GatedDeltaRuleOutput as GatedDeltaRuleOutput
    from interop.operators import attention as attention
    from interop.operators import attention_with_lse as attention_with_lse
    from interop.operators import causal_conv1d as causal_conv1d
    from interop.operators import decode_attention as decode_attention
    from interop.operators import gated_delta_rule as gated_delta_rule
    from interop.operators import gated_delta_rule_step as gated_delta_rule_step
    from interop.programs import RecompilationWarning as RecompilationWarning
    from interop.torch_function import wrap as wrap
    from interop.torch_modules import CrossAttention as CrossAttention
    from interop.torch_modules import GatedDeltaNet as GatedDeltaNet
    from interop.torch_modules import JaxCache as JaxCache
    from interop.torch_modules import KVCache as KVCache
    from interop.torch_modules import MultiHeadAttention as MultiHeadAttention
    from interop.torch_modules import NNXModule as NNXModule
    from interop.torch_modules import SelfAttention as SelfAttention
    from interop.torch_modules import delete_kv_caches as delete_kv_caches
    from interop.torch_modules import disable_kv_cache as disable_kv_cache
    from interop.torch_modules import local_kv_cache as local_kv_cache

_HOME = {  # public name -> the module that defines it, or is it; all of them import torch
    "export": "interop.export",
    "huggingface": "interop.huggingface",
    "to_jax": "interop.dlpack",
    "to_torch": "interop.dlpack",
    "tree_to_jax": "interop.dlpack",
    "tree_to_torch": "interop.dlpack",
    "dtype_to_jax": "interop.dlpack",
    "dtype_to_torch": "interop.dlpack",
    "bucket_length": "interop.bucketing",
    "pad_to": "interop.bucketing",
    "RecompilationWarning": "interop.programs",
    "wrap": "interop.torch_function",
    "AttentionOutput": "interop.operators",
    "CausalConvOutput": "interop.operators",
    "GatedDeltaRuleOutput": "interop.operators",
    "attention": "interop.operators",
    "attention_with_lse": "interop.operators",
    "causal_conv1d": "interop.operators",
    "decode_attention": "interop.operators",
    "gated_delta_rule": "interop.operators",
    "gated_delta_rule_step": "interop.operators",
    "CrossAttention": "interop.torch_modules",
    "GatedDeltaNet": "interop.torch_modules",
    "JaxCache": "interop.torch_modules",
    "KVCache": "interop.torch_modules",
    "MultiHeadAttention": "interop.torch_modules",
    "NNXModule": "interop.torch_modules",
    "SelfAttention": "interop.torch_modules",
    "delete_kv_caches": "interop.torch_modules",
    "disable_kv_cache": "interop.torch_modules",
    "local_kv_cache": "interop.torch_modules",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            f"interop.{name} needs PyTorch, which is not installed: pip install 'gqa-jax[torch]'"
        )
    module = importlib.import_module(_HOME[name])
    value = module if module.__name__ == f"interop.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
