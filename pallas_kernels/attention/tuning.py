"""Block sizes of each implementation, and which requests it cannot run."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _dispatch

# Rows (queries times the heads of their group) and keys of a tile. 1024 x 512 float32 logits are 2 MiB, about a core's
# L2 cache between the product, the softmax and the next product, and each product is large enough (67 MFLOP at D = 64)
# to hide the cost of starting it on every core. On 2 cores at T = 2048, R = 4: 256 x 512 to 1024 x 512 lie within 15 %
# of each other; 1024 x 1024 is a quarter slower and wastes more of a causal diagonal.
TILE_ROWS = 1024
TILE_KEYS = 512
# Groups of heads share a tile while its logits stay under this, so that short sequences do not become tiny products.
TILE_ELEMENTS = TILE_ROWS * TILE_KEYS
# A device with its own memory wants all heads in flight at once; this bounds the tile to 256 MiB of float32.
TILE_ELEMENTS_ACCELERATOR = 1 << 26
# Vector registers hold 16 float32: blocks are padded to whole registers, not to whole tiles.
GRANULE = 16


class Blocks(NamedTuple):
    """Sizes of a tile: batch rows, key/value heads, queries (each with its R heads), keys."""

    batch: int
    heads: int
    queries: int
    keys: int


def blocks(batch: int, num_kv_heads: int, group: int, q_len: int, kv_len: int) -> Blocks:
    """Tile sizes of `blockwise` for shapes B, K, R, T, S."""
    queries = _split(q_len, max(GRANULE, TILE_ROWS // group))
    keys = _split(kv_len, TILE_KEYS)
    budget = TILE_ELEMENTS if _dispatch.target().platform == "cpu" else TILE_ELEMENTS_ACCELERATOR
    together = max(1, budget // (queries * group * keys))
    heads = _largest_divisor(num_kv_heads, together)
    rows = _largest_divisor(batch, together // heads) if heads == num_kv_heads else 1
    return Blocks(rows, heads, queries, keys)


def _split(length: int, target: int) -> int:
    """The block length that cuts `length` into the fewest blocks of at most `target`, padded least."""
    count = math.ceil(length / target)
    if count == 1:
        return length
    return math.ceil(length / count / GRANULE) * GRANULE


def _largest_divisor(number: int, limit: int) -> int:
    if not isinstance(number, int):  # symbolic (jax.export)
        return 1
    return max(d for d in range(1, max(1, min(number, limit)) + 1) if number % d == 0)


class Call(NamedTuple):
    """What decides which implementation can run a call.

    Attributes:
      dtype, head_dim, value_dim: of query and value.
      lengths: T and S, which may be symbolic (`jax.export`).
      options: the keyword arguments of `gqa_attention`.
      with_lse: whether the caller also takes the lse.
      is_symbolic: whether any size is a symbol.
      is_varying: whether the arrays are typed as varying over mesh axes.
    """

    dtype: DTypeLike
    head_dim: int
    value_dim: int
    lengths: tuple[Any, Any]
    options: dict[str, Any]
    with_lse: bool
    is_symbolic: bool
    is_varying: bool


def blockwise_reason(call: Call) -> str | None:
    """Why "blockwise" cannot run a call, or None."""
    return None if all(isinstance(n, int) for n in call.lengths) else _dispatch.SYMBOLIC


def cudnn_reason(call: Call) -> str | None:
    """Why "cudnn" cannot run a call, or None."""
    target, options = _dispatch.target(), call.options
    if target.platform != "gpu":
        return f"it needs an NVIDIA GPU, this is {target.platform}"
    capability = target.compute_capability or "0.0"
    if float(capability) < 8.0:
        return f"it needs compute capability 8.0, this is {capability}"
    if call.is_symbolic:
        return _dispatch.SYMBOLIC
    if call.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it needs float16 or bfloat16, got {call.dtype}"
    widest = 256 if float(capability) >= 9.0 else 128
    if call.head_dim > widest or call.head_dim % 8:
        return f"D must be a multiple of 8 up to {widest}, got {call.head_dim}"
    if call.value_dim != call.head_dim:
        return f"it needs Dv == D, got {call.value_dim} and {call.head_dim}"
    if call.with_lse:
        return "it cannot differentiate the lse"
    if options["mask"] is not None or options["bias"] is not None:
        return "it gives no zeros for a query that `mask` or `bias` hides from every key"
    names = "query_segment_ids", "query_positions", "query_cu_seqlens", "sinks", "logits_soft_cap"
    for name in names:
        if options[name] is not None:
            return f"it has no `{name}`"
    if options["dropout_rate"] > 0.0:
        return "its dropout cannot be reproduced from `dropout_key` by the other implementations"
    if options["is_causal"]:
        if options["q_offset"] is not None:
            return "it has no `q_offset`"
        if options["causal_alignment"] != "upper_left":
            return "it aligns the causal mask to the upper left only"
    return None
