"""Sizes that measurement chose, and which implementation can run a call."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.typing import DTypeLike

from pallas_kernels import _dispatch

# A chunk of 64 balances the C^2 work inside a chunk against the D^2 work on the state for D = 64...256.
CHUNK = 64
CHUNK_SIZES = (16, 32, 64, 128)

# Up to this many tokens the recurrence is as fast as one chunk, and has no padding to compute.
RECURRENT_TOKENS = 4

# Chunks that one scan should take at most where launches, not arithmetic, bound a step (GPU, TPU).
_SCAN_STEPS = 32


# (chunk, row, value head) triples of a block; each holds about ten 64 x 128 float32 arrays, 0.3 MiB. On 2 cores with
# 8 heads, blocks of 1 to 8 chunks take the same time forward and blocks of 32 a quarter more: they leave the caches.
_BLOCK_PAIRS = 8
_BLOCK_PAIRS_ACCELERATOR = 4096


def chunk_size(length: int, num_sequences: int | None) -> int:
    """Tokens of a chunk: packed sequences start a chunk each, so short ones get short chunks."""
    if num_sequences is None:
        return CHUNK
    mean = length / max(num_sequences, 1)
    return max(CHUNK_SIZES[0], min(CHUNK, 2 ** math.ceil(math.log2(max(mean, 1)))))


def segments(num_chunks: int, platform: str) -> int:
    """How many parts of a row run side by side, each entered by an affine map of its start state.

    The maps cost about 40 % more arithmetic. A CPU gains nothing from more parallel work; on GPU and TPU a long
    scan of small products is bound by launches.
    """
    if platform == "cpu":
        return 1
    return max(1, math.ceil(num_chunks / _SCAN_STEPS))


def block(num_chunks: int, pairs: int, platform: str) -> int:
    """Chunks whose state-free part is computed at once, so that they fill few blocks of one size.

    A block should give the device enough work at a time; what it holds should stay in a CPU's cache, and is scratch
    memory elsewhere. `pairs` counts rows times lanes times value heads.
    """
    if not isinstance(pairs, int):  # a symbolic batch (jax.export)
        return 1
    target = max(1, (_BLOCK_PAIRS if platform == "cpu" else _BLOCK_PAIRS_ACCELERATOR) // pairs)
    blocks = math.ceil(num_chunks / target)
    return max(1, math.ceil(num_chunks / max(blocks, 1)))


class Call(NamedTuple):
    """What decides which implementation can run a call, and what is static about it.

    Attributes:
      sizes: of the letters B, T, Hk, Hv, Dk and Dv, and `sequences`, how many states there are; symbolic under
        `jax.export`.
      dtypes: of query, key and value.
      per_channel: whether g holds a decay per key channel.
      scale, use_qk_l2norm, chunk_size: as for the operator.
      is_symbolic: whether any size is a symbol.
      is_varying: whether the arrays are typed as varying over mesh axes.
    """

    sizes: dict[str, int]
    dtypes: Sequence[DTypeLike]
    per_channel: bool
    scale: float
    use_qk_l2norm: bool
    chunk_size: int | None
    is_symbolic: bool
    is_varying: bool


def chunked_reason(call: Call) -> str | None:
    """Why "chunked" cannot run a call, or None."""
    return None if isinstance(call.sizes["T"], int) else _dispatch.SYMBOLIC


def reference_reason(call: Call) -> str | None:
    """Why "reference" cannot run a call, or None."""
    if call.chunk_size is None:
        return None
    return "`chunk_size` has no meaning for the token recurrence"
