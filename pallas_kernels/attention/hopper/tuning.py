"""Tile sizes of the Mosaic GPU attention kernels, each with its reason, and what the kernels cannot do."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, _sharding
from pallas_kernels.attention.tuning import Call

HEAD_DIMS = (64, 96, 128, 256)
ATOMIC_HEAD_DIMS = (64, 96, 128)
DTYPES = ("bfloat16", "float16")
# JAX 0.12 compiles through nvJitLink, which ignores setmaxnreg: three warpgroups then keep 168 registers each.
FIXED_REGISTERS = jax.__version_info__ >= (0, 12)
# Queries up to which one tuned configuration serves, and one more for everything longer: a new length needs no tuning.
# 64: less than a tile; then a fraction of a wave of blocks, some waves, many, and keys that do not fit in L2.
LENGTHS = (64, 1024, 4096, 16384)
DIRECTIONS = ("forward", "backward", "backward_atomic")


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
      atomic: one kernel of 5 matrix products, whose blocks add to dq in any order, instead of two kernels of 7 products
        in all, whose results repeat bit for bit.
      split: dk and dv of the same 64 keys live in two warpgroups, instead of each warpgroup having 64 keys.
    """

    block_q: int = 64
    stages: int = 2
    block_kv: int = 64
    kv_stages: int = 2
    value_stages: int = 2
    compute_registers: int = 240
    memory_registers: int = 24
    atomic: bool = False
    split: bool = False

    def __post_init__(self):
        if self.atomic and self.split:
            raise ValueError("`split` must be False with `atomic=True`, got True")

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of the tiles of the larger kernel."""
        keys = 64 if self.split else 128
        over_queries = 4 * head_dim * (keys + self.stages * self.block_q)
        if self.split:  # weights on their way from one warpgroup to the other
            over_queries += 2 * 2 * 64 * self.block_q
        if self.atomic:  # ds, twice, and the block's share of dq
            return over_queries + 4 * self.block_q * (128 + head_dim)
        tiles = (self.kv_stages + self.value_stages) * self.block_kv
        return max(over_queries, 2 * head_dim * (2 * 128 + tiles))


Config = ForwardConfig | BackwardConfig


def bucket(direction: str, *, head_dim: int, q_len: int, is_causal: bool) -> str:
    """The key under which a tuned configuration is kept, for example "forward/D128/T<=4096/causal"."""
    length = next((f"<={n}" for n in LENGTHS if q_len <= n), f">{LENGTHS[-1]}")
    return f"{direction}/D{head_dim}/T{length}/{'causal' if is_causal else 'full'}"


def _tuned(key: str) -> Config | None:
    return _dispatch.tuned("gqa_attention", key)


def use_tuned(table: Mapping[str, Config]) -> None:
    """Replaces the tuned configurations; `pallas_kernels.autotune.load` is the one that calls this."""
    _dispatch.use_tuned("gqa_attention", table)


def forward_config(
    *,
    q_len: int,
    kv_len: int,
    head_dim: int,
    group: int,
    batch: int,
    kv_heads: int,
    segments: bool = False,
    is_causal: bool = False,
) -> ForwardConfig:
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
    tuned = _tuned(bucket("forward", head_dim=head_dim, q_len=q_len, is_causal=is_causal))
    # Ids of segments take registers that no candidate was timed with.
    if isinstance(tuned, ForwardConfig) and not segments:
        return dataclasses.replace(tuned, pack=pack)
    # Half of L2 (50 MB on H100 and H200): keys and values of all batch rows stay resident beside the rest.
    resident = 4 * batch * kv_heads * kv_len * head_dim <= 24 * 2**20
    return ForwardConfig(block_kv, stages, pack=pack, heads_then_batch=resident)


def backward_config(
    *,
    head_dim: int,
    atomic: bool = False,
    q_len: int = 0,
    is_causal: bool = False,
    segments: bool = False,
) -> BackwardConfig:
    """The configuration used when none is given."""
    direction = "backward_atomic" if atomic else "backward"
    tuned = _tuned(bucket(direction, head_dim=head_dim, q_len=q_len, is_causal=is_causal))
    if isinstance(tuned, BackwardConfig) and not segments:
        return tuned
    # At the tensor cores' peak a step of dk_dv takes 1.4 us at head_dim 128 and half of that at 64, TMA about 1 us:
    # below 128 a tile must be fetched two steps ahead. Registers allow one block per SM, so the memory is free.
    stages = 2 if head_dim >= 128 else 3
    # dk and dv of 64 keys are `head_dim` registers: at 256 more than a warpgroup has beside the scores, and from 96 on
    # more than 168 hold (dk_dv at 128: 1176 spilled bytes and serialised products with JAX 0.12, none when split).
    split = not atomic and (head_dim > 128 or (FIXED_REGISTERS and head_dim > 64))
    # At 256 the 128 queries and output gradients of a block leave room for three tiles: values, needed for the shorter
    # time, get one.
    return BackwardConfig(
        stages=stages,
        kv_stages=stages,
        value_stages=1 if head_dim == 256 else stages,
        atomic=atomic,
        split=split,
    )


def forward_candidates(*, head_dim: int, pack: int = 1) -> list[ForwardConfig]:
    """Configurations that `autotune` tries; all fit shared memory. `pack` follows from the shape, not from timing."""
    found = [
        ForwardConfig(block_kv, stages, overlap=overlap, pack=pack, heads_then_batch=order)
        for block_kv in (64, 128)
        for stages in (2, 3, 4)
        for overlap in (True, False)
        for order in (True, False)
    ]
    return [c for c in found if fits(c, head_dim)]


def backward_candidates(*, head_dim: int, atomic: bool = False) -> list[BackwardConfig]:
    """As `forward_candidates`. A block of 64 queries is what the registers hold beside dk and dv."""
    if atomic:
        found = [BackwardConfig(stages=stages, atomic=True) for stages in (2, 3, 4)]
    else:
        split = backward_config(head_dim=head_dim).split
        found = [
            BackwardConfig(
                stages=stages,
                block_kv=block_kv,
                kv_stages=kv_stages,
                value_stages=value_stages,
                split=split,
            )
            for stages in (2, 3, 4)
            for block_kv in (64, 128)
            for kv_stages in (2, 3, 4)
            for value_stages in (1, 2, 3)
        ]
    return [c for c in found if fits(c, head_dim)]


def fits(config: Config, head_dim: int) -> bool:
    """Whether the tiles leave room in shared memory for statistics, ids and barriers, and in registers for scores."""
    if isinstance(config, BackwardConfig) and head_dim > 128 and not config.split:
        return False
    return config.shared_bytes(head_dim) + 2048 <= _dispatch.SHARED_MEMORY_BYTES


def unsupported_reason(call: Call, *, atomic: bool = False) -> str | None:
    """Why the kernels cannot run a call that the operator accepts, or None; `atomic`: adding up dq by atomics."""
    head_dim, options = call.head_dim, call.options
    if call.is_symbolic:
        return _dispatch.SYMBOLIC
    machine = _dispatch.target().not_hopper()
    if machine is not None:
        return machine
    if jnp.dtype(call.dtype).name not in DTYPES:
        return f"it needs float16 or bfloat16, got {jnp.dtype(call.dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"D must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if atomic and head_dim not in ATOMIC_HEAD_DIMS:
        return f"dk and dv of D = {head_dim} leave no registers for dq: `mosaic_gpu` makes it in a second kernel"
    if call.value_dim != head_dim:
        return f"it needs Dv == D, got {call.value_dim} and {head_dim}"
    if options["scale"] is not None and not options["scale"] > 0:
        return f"it needs a positive `scale`, got {options['scale']}"
    for name in ("mask", "bias", "query_positions"):
        if options[name] is not None:
            return f"it has no `{name}`"
    if options["query_cu_seqlens"] is not options["kv_cu_seqlens"]:
        return "it needs the same array as `query_cu_seqlens` and `kv_cu_seqlens`"
    if options["dropout_rate"] > 0.0:
        return "it has no dropout"
    if call.is_varying:
        return _sharding.UNTYPED
    return None
