"""Sizes of the Mosaic GPU delta rule kernels, each with its reason, and what the kernels cannot do."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, _sharding
from pallas_kernels.delta_rule.tuning import Call

# Tokens of a chunk: the rows of one wgmma instruction. Every kernel is written for it.
CHUNK = 64
# Merges that make the inverse of a chunk out of its diagonal: blocks of 1, 2, ..., 32; the first needs no product.
LEVELS = 6
# Widths of a tile that both TMA and wgmma read without conflicts; other head dims are filled up.
HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
# JAX 0.12 compiles through nvJitLink, which ignores setmaxnreg.
FIXED_REGISTERS = jax.__version_info__ >= (0, 12)
# Of three warpgroups, per thread: what `setmaxnreg` may hand out together, and what the launch gives each.
REGISTERS, LAUNCHED = 504, 168
# Batch rows times value heads up to which one tuned configuration serves, and one more for everything above: 132 SMs
# hold that many heads 16, 8, 4, 2 times and once.
HEADS = (8, 16, 33, 66, 132)
# The same in chunks of a row, for what depends on its length: 2k, 8k and 32k tokens.
CHUNKS = (32, 128, 512)
DIRECTIONS = ("forward", "backward", "lanes")
# A segment that is shorter spends its time on starting.
LANE_CHUNKS = 8


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


@dataclasses.dataclass(frozen=True)
class LanesConfig:
    """How rows are cut.

    Attributes:
      lanes: segments of a row that run side by side.
    """

    lanes: int = 1


Config = ForwardConfig | BackwardConfig | LanesConfig


def bucket(direction: str, *, heads: int, width: int = 0, chunks: int = 0) -> str:
    """The key under which a tuned configuration is kept.

    "gated_delta_rule/forward/D128/H<=66"; "gated_delta_rule/backward/H<=66", timed at 128 channels, since what fits
    there fits at 64, where only its stages count; "gated_delta_rule/lanes/D128/H<=16/N<=128".

    Args:
      direction: one of `DIRECTIONS`.
      heads: batch rows times value heads; except for "lanes" times segments.
      width: value channels, 64 or 128; not for "backward".
      chunks: of a row; for "lanes" only.
    """
    bound = lambda count, bounds: next((f"<={n}" for n in bounds if count <= n), f">{bounds[-1]}")
    parts = [] if direction == "backward" else [f"D{width}"]
    parts.append(f"H{bound(heads, HEADS)}")
    if direction == "lanes":
        parts.append(f"N{bound(chunks, CHUNKS)}")
    return "/".join(["gated_delta_rule", direction, *parts])


def _tuned(key: str) -> Config | None:
    return _dispatch.tuned("gated_delta_rule", key)


def use_tuned(table: Mapping[str, Config]) -> None:
    """Replaces the tuned configurations; `pallas_kernels.autotune.load` is the one that calls this."""
    _dispatch.use_tuned("gated_delta_rule", table)


def forward_config(*, width: int, heads: int, key_width: int | None = None) -> ForwardConfig:
    """The configuration used when none is given.

    Args:
      width: value channels, 64 or 128.
      heads: batch rows (times segments) times value heads.
      key_width: key channels; as many as value channels by default.
    """
    tuned = _tuned(bucket("forward", width=width, heads=heads))
    # Wider keys might not fit into as many stages as were timed.
    if isinstance(tuned, ForwardConfig) and key_width in (None, width):
        return tuned
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


def backward_config(*, heads: int) -> BackwardConfig:
    """The configuration used when none is given, for batch rows (times segments) times value heads."""
    tuned = _tuned(bucket("backward", heads=heads))
    if isinstance(tuned, BackwardConfig):
        return tuned
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
    width = padded_dim(value_dim)
    tuned = _tuned(bucket("lanes", width=width, heads=heads, chunks=chunks))
    if isinstance(tuned, LanesConfig):
        return max(1, min(tuned.lanes, chunks // LANE_CHUNKS))
    blocks = heads * forward_config(width=width, heads=heads).splits
    most = min(132 // max(blocks, 1), chunks // LANE_CHUNKS)
    return most if most > 3 else 1


def forward_candidates(*, width: int) -> list[ForwardConfig]:
    """Configurations that `autotune` tries; all fit shared memory."""
    if width == 64:
        return [
            ForwardConfig(stages=stages, overlap=overlap)
            for stages in (3, 4, 6)
            for overlap in (True, False)
        ]
    # Three stages are the fewest that work and the most that fit.
    found = [ForwardConfig(splits=2, overlap=overlap) for overlap in (True, False)]
    if not FIXED_REGISTERS:
        found += [
            ForwardConfig(
                overlap=overlap, chain_registers=chain, ahead_registers=REGISTERS - 2 * chain
            )
            for chain in (184, 192, 200)
            for overlap in (False, True)
        ]
    return found


def backward_candidates() -> list[BackwardConfig]:
    """As `forward_candidates`."""
    found = [BackwardConfig(chain_owners=1, stages=stages) for stages in (3, 2)]
    if FIXED_REGISTERS:
        return found
    return found + [
        BackwardConfig(
            stages=stages, chain_registers=chain, feeding_registers=REGISTERS - 2 * chain
        )
        for stages in (3, 2)
        for chain in (192, 200, 208)
    ]


def lanes_candidates(*, heads: int, chunks: int) -> list[LanesConfig]:
    """As `forward_candidates`: while every SM has at most a head, and every segment chunks enough."""
    most = max(1, min(132 // max(heads, 1), chunks // LANE_CHUNKS))
    return [LanesConfig(lanes) for lanes in (1, 2, 4, 8, 16) if lanes <= most]


def layout_error(config: Config, *, width: int) -> str | None:
    """Why the kernels cannot be laid out so for `width` value channels, shared memory apart, or None."""
    if isinstance(config, LanesConfig):
        return None if config.lanes >= 1 else f"`lanes` must be at least 1, got {config.lanes}"
    if isinstance(config, BackwardConfig):
        if config.chain_owners not in (1, 2):
            return f"`chain_owners` must be 1 or 2, got {config.chain_owners}"
        if config.stages < 2:
            return f"`stages` must be at least 2, got {config.stages}"
        return _registers_error(config, "chain_registers", "feeding_registers")
    if not 1 <= config.splits <= width // CHUNK:
        return f"`splits` must be from 1 to {width // CHUNK}, got {config.splits}"
    # An output leaves its tile while the chain is at the next chunk: with two stages both roles would wait.
    if config.stages < 3:
        return f"`stages` must be at least 3, got {config.stages}"
    if config.chain_registers == config.ahead_registers == 0:
        return None
    if width // config.splits == CHUNK:
        return "`chain_registers` and `ahead_registers` must be 0 for two warpgroups"
    return _registers_error(config, "chain_registers", "ahead_registers")


def _registers_error(config: Any, taking: str, giving: str) -> str | None:
    """Why two warpgroups cannot take, and the third give, so many."""
    takes, gives = getattr(config, taking), getattr(config, giving)
    fit = takes % 8 == gives % 8 == 0 and 24 <= gives <= LAUNCHED <= takes <= 240
    if fit and 2 * takes + gives <= REGISTERS:
        return None
    return (
        f"`{taking}` and `{giving}` must be multiples of 8, {LAUNCHED} to 240 and 24 to {LAUNCHED}, "
        f"twice the one and the other at most {REGISTERS}, got {takes} and {gives}"
    )


def unsupported_reason(call: Call) -> str | None:
    """Why the kernels cannot run a call that the operator accepts, or None."""
    if call.is_symbolic:
        return _dispatch.SYMBOLIC
    machine = _dispatch.target().not_hopper()
    if machine is not None:
        return machine
    for dtype in call.dtypes:
        if jnp.dtype(dtype).name not in DTYPES:
            return f"it needs float16 or bfloat16, got {jnp.dtype(dtype).name}"
    query, key = (jnp.dtype(dtype).name for dtype in call.dtypes[:2])
    if query != key:
        return f"it needs query and key of one dtype, got {query} and {key}"
    for letter, dim in ((letter, call.sizes[letter]) for letter in ("Dk", "Dv")):
        if dim > HEAD_DIMS[-1]:
            # At 256 the state of 64 value channels alone would fill 128 registers of every thread.
            return f"{letter} must be at most {HEAD_DIMS[-1]}, got {dim}"
    if call.per_channel:
        return "it has no decay per key channel"
    if call.chunk_size not in (None, CHUNK):
        return f"its chunks hold {CHUNK} tokens, got `chunk_size={call.chunk_size}`"
    if call.is_varying:
        return _sharding.UNTYPED
    return None
