"""What two Mosaic GPU kernels need in the same words: tiles in shared memory, padding, interpretation."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _dispatch

# A reference to memory of the GPU inside a kernel, for which Pallas has no public type.
Ref = Any
LOG2E = 1.4426950408889634
# Threads of a warpgroup; the unit in which a kernel is specialised.
WARPGROUP = 128
# Rows of one warpgroup's accumulator tile: what one wgmma instruction computes.
ROWS = 64


def interpreted(**parameters: Any) -> contextlib.AbstractContextManager[None]:
    """Runs the kernels traced inside on the CPU, by Pallas' Mosaic GPU interpreter.

    Args:
      **parameters: for `plgpu.InterpretGPUParams`, for example `detect_races=True`.
    """
    interpret = plgpu.InterpretGPUParams(**parameters)
    return _dispatch.targeting(_dispatch.Target("cpu", "9.0", interpret))


def interpreting() -> bool:
    """Whether kernels traced now are interpreted."""
    return _dispatch.target().interpret is not None


def kernel_options() -> dict[str, Any]:
    """Keywords of `plgpu.kernel` that every kernel here passes."""
    options: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Barriers between the roles are explicit, and rows are reduced inside a warp.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        )
    }
    if interpreting():
        options["interpret"] = _dispatch.target().interpret
    return options


def transforms(columns: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """How a `[rows, columns]` tile lies in shared memory so that both TMA and wgmma read it without conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    tiling = plgpu.TilingTransform((8, swizzle // size))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def tile(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """A matrix (or several) in shared memory, for TMA and wgmma."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


class Scratch:
    """Scratch references by name."""

    def __init__(self, references: dict[str, Any]):
        self.__dict__.update(references)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def accumulator(rows: int, columns: int) -> Any:
    """A float32 accumulator of wgmma, for `pl.run_scoped`."""
    return plgpu.ACC((rows, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def added(product: Callable[[Any], Any], value: Any) -> Any:
    """`value` plus what `product(accumulator)` adds to it, waited for."""
    start = plgpu.ACC.init(value)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(product)(start)


def opaque(*indices):
    """Indices that the compiler may not trace: else it keeps the descriptors of every operand that stays the same
    throughout a loop in registers, and spills them."""
    return lax.optimization_barrier(indices)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def pad_axis(array: jax.Array, axis: int, size: int, value: float = 0.0) -> jax.Array:
    """`array` with `axis` grown to `size` at its end (the array itself where it has that size)."""
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=jnp.asarray(value, array.dtype))
