"""Tiles of the convolution kernels, each with its reason, and what those kernels cannot do."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import _dispatch, _sharding

DTYPES = ("bfloat16", "float16", "float32")
# Channels of one head, which one block normalises: 32 lanes times 4 values, half or twice that. (At 96 channels a warp
# is 8 lanes by 4 rows; the backward kernel then holds 12 values of each tap's gradient per thread, and spills.)
HEAD_DIMS = (64, 128, 256)
# Tokens of a block. The tokens before it are read again (`HALO / ROWS`, from the L2 cache): fewer would read more. At
# 128 channels of 16 bits a block holds 34 KiB, so that six share a multiprocessor and 108 KiB of inputs are in flight
# (bandwidth times latency is about 40 KiB).
ROWS = 64
# Tokens before a block that are copied with it: a copy into shared memory must begin at 128 bytes.
HALO = 8
# Places that a table of taps has beyond its last block: the backward kernel looks at the tokens after a block.
AFTER = 16


def slab(dim: int) -> int:
    """Tokens that a block works on at once: 16 values per thread, independent enough to hide latencies, with the
    filter beside them in 64 registers."""
    return 2048 // dim


def backward_slab(dim: int) -> int:
    """As `slab`, for the backward kernel, which holds the filter's gradient too: 8 values per thread."""
    return 1024 // dim


def backward_rows(dim: int, *, itemsize: int) -> int:
    """Tokens of a backward block: 64 where three blocks then share a multiprocessor (72 KiB at 128 channels of 16
    bits); wider ones hold 32, so that two do."""
    return ROWS if dim * itemsize <= 256 else ROWS // 2


class Call(NamedTuple):
    """What decides whether the kernel can run a call.

    Attributes:
      dtype: of `mixed`.
      sizes: of the letters B, T, F and W.
      key_dim, value_dim: Dk, Dv.
      is_varying: whether the arrays are typed as varying over mesh axes.
    """

    dtype: DTypeLike
    sizes: dict[str, int]
    key_dim: int
    value_dim: int
    is_varying: bool


def unsupported_reason(call: Call) -> str | None:
    """Why the kernel cannot run a call of `causal_conv1d_qkv` that the operator accepts, or None."""
    dtype, sizes = call.dtype, call.sizes
    machine = _dispatch.target().not_hopper()
    if machine is not None:
        return machine
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it needs {', '.join(DTYPES)}, got {jnp.dtype(dtype).name}"
    if call.is_varying:
        return _sharding.UNTYPED
    for letter, dim in (("Dk", call.key_dim), ("Dv", call.value_dim)):
        if dim not in HEAD_DIMS:
            return f"{letter} must be one of {', '.join(map(str, HEAD_DIMS))}, got {dim}"
    if not 1 <= sizes["W"] <= HALO + 1:
        return f"W must be at most {HALO + 1}, got {sizes['W']}"
    if sizes["F"] * jnp.dtype(dtype).itemsize % 16:
        return f"F values must fill a multiple of 16 bytes, got F={sizes['F']}"
    if not sizes["B"] or not sizes["T"]:
        return "it needs at least one token"
    return None
