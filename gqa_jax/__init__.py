"""Flax NNX modules for grouped-query attention and gated delta linear attention."""

from gqa_jax.attention import SelfAttention as SelfAttention
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
from gqa_jax.context_parallel import ContextParallel as ContextParallel
from gqa_jax.cross_attention import CrossAttention as CrossAttention
from gqa_jax.cross_attention import ProjectedMemory as ProjectedMemory
from gqa_jax.decoder import Decoder as Decoder
from gqa_jax.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from gqa_jax.generate import generate as generate
from gqa_jax.generate import stream as stream
from gqa_jax.mlp import MLP as MLP
from gqa_jax.moe import MoE as MoE
from gqa_jax.norms import RMSNorm as RMSNorm
from gqa_jax.sharding import MeshAxes as MeshAxes
