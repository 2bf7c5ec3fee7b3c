"""Tiles of the decode kernels, each with its reason, and what those kernels cannot do."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _dispatch

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


def config(implementation: str, *, rows: int, state) -> StepConfig:
    """The tile of a kernel for a state `[P, Hv, Dk, Dv]` (an array or its shape and dtype)."""
    value_heads, key_dim, value_dim = state.shape[1:]
    if implementation == "triton":
        return triton_config(key_dim=key_dim, value_dim=value_dim)
    return mosaic_gpu_config(
        rows=rows, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim,
        state_dtype=state.dtype,
    )  # fmt: skip


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


def preferred(implementation: str) -> bool:
    """Whether `implementation=None` takes this kernel before the recurrence in XLA.

    Not yet: `python -m benchmarks.run delta_rule_gpu` has not run them on a GPU, so nobody is given kernels that only
    an interpreter and a compiler have seen. They are there by name.
    """
    del implementation
    return False


def unsupported_reason(
    implementation: str, *, dtypes, state_dtype, key_dim: int, value_dim: int, varying: bool,
) -> str | None:  # fmt: skip
    """Why `implementation` cannot run a step that the operator accepts, or None.

    Args:
      implementation: "reference", "mosaic_gpu" or "triton".
      dtypes: of query, key and value.
      state_dtype: of the state after the operator's cast.
      key_dim, value_dim: Dk, Dv.
      varying: whether the arrays are typed as varying over mesh axes.
    """
    if implementation == "reference":
        return None
    machine = _machine_reason(implementation)
    if machine is not None:
        return machine
    for dtype in (*dtypes, state_dtype):
        if jnp.dtype(dtype).name not in DTYPES:
            return f"it needs {', '.join(DTYPES)}, got {jnp.dtype(dtype).name}"
    if varying:
        return "it updates the state in place, which `jax.shard_map` allows with `check_vma=False` only"
    if implementation == "mosaic_gpu":
        if key_dim % 16 or not 16 <= key_dim <= 256:
            return f"Dk must be a multiple of 16 up to 256, got {key_dim}"
        multiple = 64 if jnp.dtype(state_dtype).itemsize == 2 else 32
        if value_dim % multiple:
            return f"Dv must be a multiple of {multiple}, got {value_dim}"
        return None
    for name, size in (("Dk", key_dim), ("Dv", value_dim)):
        if size & (size - 1) or not 16 <= size <= 256:
            return f"{name} must be 16, 32, 64, 128 or 256, got {size}"
    return None


def _machine_reason(implementation: str) -> str | None:
    target = _dispatch.target()
    if implementation == "mosaic_gpu":
        return target.not_hopper()
    if target.compute_capability is None:
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    if float(target.compute_capability) < 8.0:
        return f"it needs compute capability 8.0 or newer, this is {target.compute_capability}"
    return None
