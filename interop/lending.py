"""Tensors lent to XLA: waited for before Python ends, because XLA's threads give them back on their own time.

XLA lets go of its inputs in a thread of its own, a moment after the results are ready, and torch needs the
interpreter's lock to forget them. Where the interpreter is ending by then, the process aborts: "terminate called
without an active exception", for one script in twenty-five that ends right after its last call.
"""

import atexit
import collections
import sys
import time
import weakref

import jax
import torch

_LONGEST_WAIT = 2.0  # seconds
_GRACE = 0.05  # seconds
# XLA works in order: once the last ones are back, so are all before them.
_lent: collections.deque[weakref.ref[torch.Tensor]] = collections.deque(maxlen=256)


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory under a new name, to be given to JAX and dropped: once it is gone, XLA has let go."""
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
