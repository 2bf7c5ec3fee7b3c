"""Tensors lent to XLA: waited for before Python ends, because XLA's threads give them back on their own time.

XLA lets go of its inputs in a thread of its own, a moment after the results are ready, and torch needs the
interpreter's lock to forget them. Where the interpreter is ending by then, the process aborts: "terminate called
without an active exception", for one script in twenty-five that ends right after its last call.
"""

import atexit
import collections
import time
import weakref

import jax
import torch

_LONGEST_WAIT = 2.0  # seconds
# XLA works in order: once the last ones are back, so are all before them.
_lent: collections.deque[weakref.ref[torch.Tensor]] = collections.deque(maxlen=256)


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory under a new name, to be given to JAX and dropped: once it is gone, XLA has let go."""
    alias = tensor.detach()
    _lent.append(weakref.ref(alias))
    return alias


@atexit.register
def _wait_until_returned() -> None:
    if not _awaited(frozenset()):
        return
    # What an array still holds is given back by the thread that ends the interpreter.
    held = frozenset(
        array.unsafe_buffer_pointer()
        for array in jax.live_arrays()
        if not array.is_deleted() and len(array.sharding.device_set) == 1
    )
    deadline = time.monotonic() + _LONGEST_WAIT
    while _awaited(held) and time.monotonic() < deadline:
        time.sleep(1e-3)


def _awaited(held: frozenset[int]) -> bool:
    """Whether XLA still has a tensor that starts at none of the addresses `held`; keeps none alive itself."""
    tensors = [ref() for ref in _lent]
    return any(t is not None and t.numel() and t.data_ptr() not in held for t in tensors)
