"""Tiles of the decode kernels, each with its reason, and what those kernels cannot do."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _dispatch

# Tokens of a step: they are unrolled, and more are a prefill.
MAX_STEP_TOKENS = 8
DTYPES = ("bfloat16", "float16", "float32")
# Below one tile per multiprocessor (H100 and H200 have 132) a step is bound by latency: narrower tiles spread the work.
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How the state `[Dk, Dv]` of a head is cut into blocks.

    Attributes:
      columns: of the state, per block. All Dk rows are in the block, because both sums of a step run over them.
      warps: per block (the Mosaic GPU kernel always has four).
    """

    columns: int
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about one kernel: sizes by their letters, then as for the operator."""

    rows: int
    length: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    states: bool
    scale: float
    use_qk_l2norm: bool
    config: StepConfig

    @property
    def tiles(self) -> int:
        """Blocks of one head."""
        return self.value_dim // self.config.columns

    @property
    def group(self) -> int:
        """Value heads of one key head."""
        return self.value_heads // self.key_heads


def shapes(implementation: str, tokens: Sequence[int], state: jax.Array, options) -> Shapes:
    """What a kernel is built for.

    Args:
      implementation: "mosaic_gpu" or "triton".
      tokens: rows, T, Hk.
      state: `[P, Hv, Dk, Dv]`, an array or its shape and dtype.
      options: of the step, with `return_states`, `scale` and `use_qk_l2norm`.
    """
    return Shapes(
        *tokens,
        *state.shape[1:],
        states=options.return_states,
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        config=config(implementation, rows=tokens[0], state=state),
    )


def config(implementation: str, *, rows: int, state: jax.Array) -> StepConfig:
    """The tile of a kernel for a state `[P, Hv, Dk, Dv]` (an array or its shape and dtype)."""
    value_heads, key_dim, value_dim = state.shape[1:]
    if implementation == "triton":
        return triton_config(key_dim=key_dim, value_dim=value_dim)
    return mosaic_gpu_config(
        rows=rows,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        state_dtype=state.dtype,
    )


def mosaic_gpu_config(
    *, rows: int, value_heads: int, key_dim: int, value_dim: int, state_dtype
) -> StepConfig:
    """The tile of the Hopper kernel: 64 columns, which at Dk = 128 are 64 registers per thread and 32 KiB of shared
    memory, so that four blocks per multiprocessor keep 128 KiB in flight (bandwidth times latency is about 40 KiB)."""
    if jnp.dtype(state_dtype).itemsize == 2:
        # 32 columns of 16 bits are half of what the widest swizzle of shared memory spreads over all banks.
        return StepConfig(64)
    narrow = key_dim > 128 or value_dim % 64
    few = rows * value_heads * value_dim < 64 * _MULTIPROCESSORS
    return StepConfig(32 if narrow or few else 64)


def triton_config(*, key_dim: int, value_dim: int) -> StepConfig:
    """The tile of the portable kernel: one warp, whose sums need neither shared memory nor a barrier, and 64 registers
    of state per thread."""
    columns = max(8, 2048 // key_dim)
    return StepConfig(min(columns, value_dim), warps=1)


class Call(NamedTuple):
    """What decides which kernel can run a step.

    Attributes:
      dtypes: of query, key and value.
      state_dtype: of the state after the operator's cast.
      key_dim, value_dim: Dk, Dv.
      is_varying: whether the arrays are typed as varying over mesh axes.
    """

    dtypes: Sequence[DTypeLike]
    state_dtype: DTypeLike
    key_dim: int
    value_dim: int
    is_varying: bool


def mosaic_gpu_reason(call: Call) -> str | None:
    """Why "mosaic_gpu" cannot run a step that the operator accepts, or None."""
    reason = _dispatch.target().not_hopper() or _array_reason(call)
    if reason is not None:
        return reason
    if call.key_dim % 16 or not 16 <= call.key_dim <= 256:
        return f"Dk must be a multiple of 16 up to 256, got {call.key_dim}"
    multiple = 64 if jnp.dtype(call.state_dtype).itemsize == 2 else 32
    if call.value_dim % multiple:
        return f"Dv must be a multiple of {multiple}, got {call.value_dim}"
    return None


def triton_reason(call: Call) -> str | None:
    """Why "triton" cannot run a step that the operator accepts, or None."""
    capability = _dispatch.target().compute_capability
    if capability is None:
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    if float(capability) < 8.0:
        return f"it needs compute capability 8.0 or newer, this is {capability}"
    reason = _array_reason(call)
    if reason is not None:
        return reason
    for name, size in (("Dk", call.key_dim), ("Dv", call.value_dim)):
        if size & (size - 1) or not 16 <= size <= 256:
            return f"{name} must be 16, 32, 64, 128 or 256, got {size}"
    return None


def _array_reason(call: Call) -> str | None:
    for dtype in (*call.dtypes, call.state_dtype):
        if jnp.dtype(dtype).name not in DTYPES:
            return f"it needs {', '.join(DTYPES)}, got {jnp.dtype(dtype).name}"
    if call.is_varying:
        return "it updates the state in place, which `jax.shard_map` allows with `check_vma=False` only"
    return None
