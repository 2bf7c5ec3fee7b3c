"""Sizes that measurement chose, and which implementation can run a call."""

import math

# A chunk of 64 balances the C^2 work inside a chunk against the D^2 work on the state for D = 64...256.
CHUNK = 64
CHUNK_SIZES = (16, 32, 64, 128)

# Up to this many tokens the recurrence is as fast as one chunk, and has no padding to compute.
RECURRENT_TOKENS = 4

# Chunks that one scan should take at most where launches, not arithmetic, bound a step (GPU, TPU).
_SCAN_STEPS = 32


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


def unsupported_reason(implementation: str, *, chunk_size: int | None) -> str | None:
    """Why `implementation` cannot run a call, or None if it can."""
    if implementation == "reference" and chunk_size is not None:
        return "`chunk_size` has no meaning for the token recurrence"
    return None
