"""How much of the cache one step works on."""

import math
import os

from pallas_kernels import _dispatch


def pairs_at_once(num_pairs: int) -> int:
    """(row, kv head) pairs that `blockwise` computes together.

    On a CPU one per core, in equal shares: keys and values stream through the caches once, and a cache of fewer bits
    is widened a few heads at a time. With B = 8, K = 1...8, S = 8192 on 2 cores, two take 0.75-0.85 of the time of one,
    and all together 2-4 times that. An accelerator wants them all in flight.
    """
    if _dispatch.target().platform != "cpu":
        return num_pairs
    if not isinstance(num_pairs, int):  # a symbolic batch (jax.export)
        return 1
    return math.gcd(num_pairs, os.cpu_count() or 1)
