"""Sizes of the Mosaic GPU delta rule kernels, each with its reason, and what the kernels cannot do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# Tokens of a chunk: the rows of one wgmma instruction. Every kernel is written for it.
CHUNK = 64
# Merges that make the inverse of a chunk out of its diagonal: blocks of 1, 2, ..., 32; the first needs no product.
LEVELS = 6
# Widths of a tile that both TMA and wgmma read without conflicts; other head dims are filled up.
HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
# JAX 0.12 compiles through nvJitLink, which ignores setmaxnreg.
FIXED_REGISTERS = jax.__version_info__ >= (0, 12)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward chain is laid out.

    Attributes:
      splits: blocks that share a value head, each with its part of the value channels (1 or 2).
      stages: tiles of keys, queries and values in flight.
      overlap: `S^T Q^T` is in flight while what to write is computed, at 32 registers more.
      chain_registers, ahead_registers: per thread of the two roles, after `setmaxnreg`; 0 leaves the launch's number.
    """

    splits: int = 1
    stages: int = 3
    overlap: bool = True
    chain_registers: int = 0
    ahead_registers: int = 0


def forward_config(*, width: int, heads: int) -> ForwardConfig:
    """The configuration used when none is given.

    Args:
      width: value channels, 64 or 128.
      heads: batch rows (times segments) times value heads.
    """
    # Two warpgroups, one of each role, keep 255 registers each.
    if width == 64:
        return ForwardConfig()
    # 132 SMs: up to 66 heads, a block for each half finishes sooner than one for both. Nor have three warpgroups
    # registers enough where each keeps the launch's 168.
    if heads <= 66 or FIXED_REGISTERS:
        return ForwardConfig(splits=2)
    # The numbers at which neither role spills; with overlap the chain would (at 200 and 104 it is 4 bytes). The other
    # half's products fill the tensor cores meanwhile.
    return ForwardConfig(overlap=False, chain_registers=192, ahead_registers=120)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the three backward kernels are laid out.

    Attributes:
      chain_owners: warpgroups of a block of the two chains, 64 value channels each: 1 spreads a head over more blocks.
      stages: chunks in flight in the chains.
      chain_registers, feeding_registers: per thread of the roles of a chain with two owners, after `setmaxnreg`.
    """

    chain_owners: int = 2
    # Three tiles of everything fill 221 KiB of the reverse chain.
    stages: int = 3
    # Of 504 for three warpgroups: eight fewer spill 8 bytes of the chain, eight more 28 to 76 of its feeder.
    chain_registers: int = 208
    feeding_registers: int = 88


def backward_config(*, heads: int) -> BackwardConfig:
    """The configuration used when none is given, for batch rows (times segments) times value heads."""
    # 132 SMs: up to 66 heads, a block for each half finishes sooner than one for both. Where `setmaxnreg` is ignored,
    # two warpgroups have 255 registers each, three 168.
    return BackwardConfig(chain_owners=1 if heads <= 66 or FIXED_REGISTERS else 2)


def padded_dim(dim: int) -> int:
    """Channels of a head inside the kernels: zeros fill it up."""
    return next(wide for wide in HEAD_DIMS if dim <= wide)


def lanes(*, heads: int, value_dim: int, chunks: int) -> int:
    """How many segments of a row run side by side, given batch rows times value heads.

    The maps of the segments cost two more walks, each as long as a segment: P segments take 3 / P of the time of one,
    as long as they all fit on the 132 SMs together, one block on each.
    """
    blocks = heads * forward_config(width=padded_dim(value_dim), heads=heads).splits
    most = min(132 // max(blocks, 1), chunks // 8)
    return most if most > 3 else 1


def preferred(compute_capability: str | None) -> bool:
    """Whether `implementation=None` takes these kernels before the chunk form in XLA.

    Not yet: they have not run on a GPU, so nobody is given kernels that only an interpreter and a compiler have seen.
    They are there by name.
    """
    del compute_capability
    return False


def unsupported_reason(
    *, dtypes: tuple[Any, ...], key_dim: int, value_dim: int, per_channel: bool, chunk_size: int | None,
    compute_capability: str | None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot run a call that the operator accepts, or None.

    Args:
      dtypes: of query, key and value.
      per_channel: whether g holds a decay per key channel.
      chunk_size: as the caller gave it.
      compute_capability: of the GPU to run on, None without one.
    """
    if compute_capability is None:
        return "it needs an NVIDIA GPU of compute capability 9.0 (H100, H200)"
    if compute_capability != "9.0":
        return (
            f"it is written for compute capability 9.0 (H100, H200), this is {compute_capability}"
        )
    for dtype in dtypes:
        if jnp.dtype(dtype).name not in DTYPES:
            return f"it needs float16 or bfloat16, got {jnp.dtype(dtype).name}"
    query, key = (jnp.dtype(dtype).name for dtype in dtypes[:2])
    if query != key:
        return f"it needs query and key of one dtype, got {query} and {key}"
    for letter, dim in (("Dk", key_dim), ("Dv", value_dim)):
        if dim > HEAD_DIMS[-1]:
            # At 256 the state of 64 value channels alone would fill 128 registers of every thread.
            return f"{letter} must be at most {HEAD_DIMS[-1]}, got {dim}"
    if per_channel:
        return "it has no decay per key channel"
    if chunk_size not in (None, CHUNK):
        return f"its chunks hold {CHUNK} tokens, got `chunk_size={chunk_size}`"
    return None
