"""Flax NNX modules for grouped-query attention and gated delta linear attention.

The parts of a model are imported here; the modules around it (`gqa_jax.checkpoint`,
`.training`, `.sharding` ...) load when first used.
"""

import importlib
from types import ModuleType

from gqa_jax.cache import GatedDeltaNetState as GatedDeltaNetState
from gqa_jax.cache import KVCache as KVCache
from gqa_jax.cache import QuantizedKVCache as QuantizedKVCache
from gqa_jax.cache import RingKVCache as RingKVCache
from gqa_jax.config import AttentionConfig as AttentionConfig
from gqa_jax.config import DecoderConfig as DecoderConfig
from gqa_jax.config import GatedDeltaNetConfig as GatedDeltaNetConfig
from gqa_jax.config import LinearScaling as LinearScaling
from gqa_jax.config import Llama3Scaling as Llama3Scaling
from gqa_jax.config import MoEConfig as MoEConfig
from gqa_jax.config import RopeConfig as RopeConfig
from gqa_jax.config import YarnScaling as YarnScaling
from gqa_jax.layers.attention import SelfAttention as SelfAttention
from gqa_jax.layers.cross_attention import CrossAttention as CrossAttention
from gqa_jax.layers.cross_attention import ProjectedMemory as ProjectedMemory
from gqa_jax.layers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from gqa_jax.layers.mlp import MLP as MLP
from gqa_jax.layers.moe import MoE as MoE
from gqa_jax.layers.norms import RMSNorm as RMSNorm
from gqa_jax.models.decoder import Decoder as Decoder
from gqa_jax.models.generation import generate as generate
from gqa_jax.models.generation import stream as stream
from gqa_jax.parallel.context import ContextParallel as ContextParallel
from gqa_jax.parallel.layers import spread as spread
from gqa_jax.parallel.sharding import MeshAxes as MeshAxes

_ROOMS = {  # attribute -> the module behind it
    "checkpoint": "gqa_jax.hf.checkpoint",
    "hf_config": "gqa_jax.hf.config",
    "layout": "gqa_jax.layout",
    "lora": "gqa_jax.train.lora",
    "masks": "gqa_jax.layers.masks",
    "memory": "gqa_jax.models.memory",
    "planner": "gqa_jax.planner",
    "qk_clip": "gqa_jax.train.qk_clip",
    "recompute": "gqa_jax.train.recompute",
    "replica_check": "gqa_jax.train.replica_check",
    "sharding": "gqa_jax.parallel.sharding",
    "train_checkpoint": "gqa_jax.train.checkpoint",
    "training": "gqa_jax.train.step",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _ROOMS:
        raise AttributeError(f"module 'gqa_jax' has no attribute {name!r}")
    return importlib.import_module(_ROOMS[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
