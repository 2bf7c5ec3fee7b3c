"""Tensors lent to XLA: waited for before Python ends, because XLA's threads give them back on their own time.

XLA lets go of its inputs in a thread of its own, a moment after the results are ready, and torch needs the
interpreter's lock to forget them. Where the interpreter is ending by then, the process aborts: "terminate called
without an active exception", for one script in twenty-five that ends right after its last call.
"""

import atexit
import collections
import os
import sys
import time
import weakref

import jax
import torch
from jax._src import xla_bridge

_LONGEST_WAIT = 2.0  # seconds
_GRACE = 0.05  # seconds
# XLA works in order: once the last ones are back, so are all before them.
_lent: collections.deque[weakref.ref[torch.Tensor]] = collections.deque(maxlen=256)


forked = False  # whether JAX was in use when this process was forked


def _after_fork() -> None:
    global forked
    forked = xla_bridge.backends_are_initialized()


os.register_at_fork(after_in_child=_after_fork)


def refuse_fork() -> None:
    """Raises `RuntimeError` where JAX would wait for threads that the fork has left behind."""
    if forked:
        raise RuntimeError(
            "JAX was in use before this process was forked and would hang: start it with 'spawn' or 'forkserver' "
            "(DataLoader: multiprocessing_context='spawn'), or keep JAX out of the worker"
        )


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory under a new name, to be given to JAX and dropped: once it is gone, XLA has let go.

    Raises:
      RuntimeError: see `refuse_fork`.
    """
    refuse_fork()
    alias = tensor.detach()
    _lent.append(weakref.ref(alias))
    return alias


@atexit.register
def _wait_until_returned() -> None:
    if not _lent:
        return
    # Held here, they are not destroyed by XLA's thread, which would leave the lock and take it again on the way.
    tensors = [tensor for tensor in (ref() for ref in _lent) if tensor is not None]
    # What an array still holds is given back by the thread that ends the interpreter.
    held = {
        array.unsafe_buffer_pointer()
        for array in jax.live_arrays()
        if not array.is_deleted() and len(array.sharding.device_set) == 1
    }
    tensors = [tensor for tensor in tensors if tensor.numel() and tensor.data_ptr() not in held]
    deadline = time.monotonic() + _LONGEST_WAIT
    # References: the list's, the loop's, the call's; one more while XLA has the tensor.
    while any(sys.getrefcount(t) > 3 for t in tensors) and time.monotonic() < deadline:
        time.sleep(1e-3)
    # A tensor that was being destroyed as this began cannot be seen any more. Its thread waits for the lock.
    time.sleep(_GRACE)
