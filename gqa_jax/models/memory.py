"""Bytes of parameters, gradients and caches: predicted without allocating, or summed over arrays."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gqa_jax.cache import Policy
from gqa_jax.config import AttentionConfig, DecoderConfig, GatedDeltaNetConfig
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet


class Memory(NamedTuple):
    """Bytes by purpose; add with `plus`.

    Attributes:
      parameters: of the model.
      gradients: as many again for every parameter that is trained.
      caches: of decoding.
    """

    parameters: int = 0
    gradients: int = 0
    caches: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def plus(self, other: "Memory") -> "Memory":
        """The sum, purpose by purpose."""
        return Memory(*(a + b for a, b in zip(self, other, strict=True)))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or `jax.ShapeDtypeStruct`s) of a pytree; types under 8 bits are packed, rounded up.

    Example:
      >>> tree_bytes({"w": jnp.zeros((3, 5), jnp.bfloat16)})
      30
    """

    def size(leaf) -> int:
        dtype = leaf.dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return 0
        bits = jax.dtypes.itemsize_bits(dtype)
        return -(-math.prod(leaf.shape) * bits // 8)

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def module_memory(module: nnx.Module, *, caches: Any = ()) -> Memory:
    """Memory of a model, real or abstract (`nnx.eval_shape`), and of the caches beside it.

    Args:
      module: gradients are counted for its `nnx.Param`s.
      caches: what `init_cache` returned.
    """
    parameters = tree_bytes(nnx.state(module, nnx.Param))
    return Memory(parameters, parameters, tree_bytes(caches))


def required_bytes(
    config: AttentionConfig | GatedDeltaNetConfig | DecoderConfig,
    *,
    batch_size: int,
    max_length: int,
    policy: Policy = "full",
    dtype=jnp.float32,
    chunk_size: int | None = None,
) -> int:
    """Bytes of the cache that a layer, or all layers of a decoder, would allocate; nothing is allocated.

    The layer's own `init_cache` is run on shapes alone, so prediction and allocation cannot differ.

    Args:
      config: of the layer or decoder.
      batch_size, max_length: B and S.
      policy: of attention layers; "ring" holds for a decoder's windowed layers, its others are then "full".
      dtype: of keys, values and convolution inputs where the policy leaves it open.
      chunk_size: with "ring", see `SelfAttention.init_cache`.

    Raises:
      ValueError: what `init_cache` would raise.

    Example:
      >>> config = AttentionConfig(model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128)
      >>> 32 * required_bytes(config, batch_size=1, max_length=8192, dtype=jnp.bfloat16)  # Llama 3.1 8B
      1073741952
    """
    options: dict[str, Any] = dict(batch_size=batch_size, max_length=max_length, dtype=dtype)
    if isinstance(config, DecoderConfig):
        return sum(
            required_bytes(layer, policy=kind, chunk_size=chunk, **options)
            for layer, kind, chunk in _layers(config, policy, chunk_size)
        )
    if isinstance(config, GatedDeltaNetConfig):
        make = lambda: GatedDeltaNet(config, rngs=nnx.Rngs(0)).init_cache(**options)
    else:
        if policy in ("int8", "fp8"):
            options["dtype"] = None
        make = lambda: SelfAttention(config, rngs=nnx.Rngs(0)).init_cache(
            **options, policy=policy, chunk_size=chunk_size
        )
    return tree_bytes(jax.eval_shape(make))


def _layers(config: DecoderConfig, policy: Policy, chunk_size: int | None):
    """`(config, policy, chunk_size)` of every layer."""
    if policy == "ring" and "sliding_attention" not in config.layers:
        windowed = config.attention is not None and config.attention.sliding_window is not None
        if not windowed:
            raise ValueError("`policy` must not be 'ring' for a decoder without sliding windows")
    for index, kind in enumerate(config.layers):
        if kind == "linear_attention":
            assert config.gated_deltanet is not None
            yield config.gated_deltanet, policy, None
            continue
        layer = config.attention_at(index)
        if policy == "ring" and layer.sliding_window is None:
            yield layer, "full", None
        else:
            yield layer, policy, chunk_size
