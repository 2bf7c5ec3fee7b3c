"""Tile sizes of the Mosaic GPU attention kernels, each with its reason, and what the kernels cannot do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
# 227 KiB: the most shared memory that one block may have on sm_90.
SHARED_BYTES = 232448
# JAX 0.12 compiles through nvJitLink, which ignores setmaxnreg: three warpgroups then keep 168 registers each.
FIXED_REGISTERS = jax.__version_info__ >= (0, 12)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel is tiled.

    Attributes:
      block_kv: keys per tile.
      stages: key and value tiles in flight.
      overlap: issue the next tile's `Q K^T` before this tile's `P V`, so that the softmax runs behind the tensor cores.
      pack: query heads of one group that share a tile of 64 rows (1, 2, 4 or 8).
      compute_registers, memory_registers: per thread, after `setmaxnreg`.
      heads_then_batch: grid order (heads, batch, tiles), so that all batch rows' longest tiles come first; otherwise
        (heads, tiles, batch), which keeps one batch row's keys in L2.
    """

    block_kv: int = 128
    stages: int = 2
    overlap: bool = True
    pack: int = 1
    compute_registers: int = 240
    memory_registers: int = 24
    heads_then_batch: bool = True

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of the tiles: 128 query rows, and `stages` tiles each of keys and values."""
        return 2 * head_dim * (128 + 2 * self.stages * self.block_kv)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the backward kernels are tiled.

    Attributes:
      block_q: query rows per step of the dk/dv kernel.
      stages: query and output-gradient tiles in flight in the dk/dv kernel.
      block_kv: keys per step of the dq kernel.
      kv_stages, value_stages: key and value tiles in flight in the dq kernel.
      compute_registers, memory_registers: per thread, after `setmaxnreg`.
    """

    block_q: int = 64
    stages: int = 2
    block_kv: int = 64
    kv_stages: int = 2
    value_stages: int = 2
    compute_registers: int = 240
    memory_registers: int = 24


def forward_config(
    *, q_len: int, kv_len: int, head_dim: int, group: int, batch: int, kv_heads: int, segments: bool = False
) -> ForwardConfig:  # fmt: skip
    """The configuration used when none is given; depends on nothing that changes from step to step."""
    block_kv, stages = 128, 2
    if head_dim == 256:
        # 128 accumulator registers for the output leave room for scores of 64 keys; 192 KiB of tiles.
        block_kv, stages = 64, 2
    elif segments or FIXED_REGISTERS:
        # A tile of 64 keys halves the registers of scores and ids; a third stage keeps as many bytes in flight.
        block_kv, stages = 64, 3
    # Tiles of few tokens would waste rows of the tensor core: heads of the group fill them.
    pack = 1
    while pack < 8 and group % (2 * pack) == 0 and q_len <= 64 // pack:
        pack *= 2
    # Half of L2 (50 MB on H100 and H200): keys and values of all batch rows stay resident beside the rest.
    resident = 4 * batch * kv_heads * kv_len * head_dim <= 24 * 2**20
    return ForwardConfig(block_kv, stages, pack=pack, heads_then_batch=resident)


def backward_config(*, head_dim: int) -> BackwardConfig:
    """The configuration used when none is given."""
    # At 256 the 128 queries and output gradients of a block leave room for three tiles: values, needed for the shorter
    # time, get one.
    return BackwardConfig(value_stages=1 if head_dim == 256 else 2)


def forward_candidates(*, head_dim: int, group: int) -> list[ForwardConfig]:
    """Configurations that `autotune` tries; all fit shared memory."""
    packs = [p for p in (1, 2, 4, 8) if group % p == 0]
    found = [
        ForwardConfig(block_kv, stages, overlap=overlap, pack=pack, heads_then_batch=order)
        for block_kv in (64, 128)
        for stages in (2, 3, 4)
        for overlap in (True, False)
        for pack in packs
        for order in (True, False)
    ]
    return [c for c in found if c.shared_bytes(head_dim) + 2048 <= SHARED_BYTES]


def preferred(compute_capability: str | None) -> bool:
    """Whether `implementation=None` takes these kernels before blockwise (XLA) attention.

    Not yet: the harness (`python -m benchmarks.run attention_gpu`) has not run them on a GPU, so nobody is given
    kernels that only an interpreter and a compiler have seen. They are there by name.
    """
    del compute_capability
    return False


def unsupported_reason(
    *, dtype, head_dim: int, value_dim: int, options: dict[str, Any], compute_capability: str | None
) -> str | None:  # fmt: skip
    """Why the kernels cannot run a call that the operator accepts, or None.

    Args:
      dtype, head_dim, value_dim: of query and value.
      options: the keyword arguments of `gqa_attention`.
      compute_capability: of the GPU to run on, None without one.
    """
    if compute_capability is None:
        return "it needs an NVIDIA GPU of compute capability 9.0 (H100, H200)"
    if compute_capability != "9.0":
        return (
            f"it is written for compute capability 9.0 (H100, H200), this is {compute_capability}"
        )
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it needs float16 or bfloat16, got {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"D must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if value_dim != head_dim:
        return f"it needs Dv == D, got {value_dim} and {head_dim}"
    if options["scale"] is not None and not options["scale"] > 0:
        return f"it needs a positive `scale`, got {options['scale']}"
    for name in ("mask", "bias", "query_positions"):
        if options[name] is not None:
            return f"it has no `{name}`"
    if options["query_cu_seqlens"] is not options["kv_cu_seqlens"]:
        return "it needs the same array as `query_cu_seqlens` and `kv_cu_seqlens`"
    if options["dropout_rate"] > 0.0:
        return "it has no dropout"
    return None
