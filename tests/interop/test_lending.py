"""The end of a process that has just called JAX: XLA's threads and the interpreter must not meet."""

import gc
import time

import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import lending  # noqa: E402
from tests.support.fresh_process import run_python  # noqa: E402

pytestmark = pytest.mark.torch


def test_a_process_may_end_right_after_its_last_call():
    """XLA's thread asks for the interpreter's lock, which the main thread keeps until it has begun to finalise.

    What is kept holds the client, and so its threads, beyond JAX's own clean-up. Without the wait this aborts.
    """
    run_python(
        """
        import resource, sys, time, torch, jax, interop
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        class Lingering:
            def __del__(self, sleep=time.sleep):
                sleep(0.5)
        lingering, kept = Lingering(), interop.to_torch(jax.numpy.ones(3))
        square = jax.jit(lambda x: (x @ x).sum())
        square = square.lower(jax.ShapeDtypeStruct((400, 400), "float32")).compile()
        x = interop.to_jax(torch.randn(400, 400))
        sys.setswitchinterval(1000)
        square(x)
        del x
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
        """
    )


def test_arrays_that_live_until_the_end_are_not_waited_for():
    run_python(
        """
        import time, torch, interop
        kept = interop.to_jax(torch.randn(4, 4)), interop.to_jax(torch.randn(0, 4))
        from interop import lending
        began = time.monotonic()
        lending._wait_until_returned()
        assert time.monotonic() - began < lending._LONGEST_WAIT / 2
        """
    )


@pytest.mark.parametrize("way", ["to_jax", "wrap"])
def test_every_way_in_is_recorded_and_forgotten(way):
    call = {"to_jax": interop.to_jax, "wrap": interop.wrap(lambda x: x + 1)}[way]
    x = torch.randn(16, 16)
    call(x)  # the first use lends a probe of its own
    lending._lent.clear()
    result = call(x)
    assert len(lending._lent) == 1
    del result
    for _ in range(1000):
        if lending._lent[0]() is None:
            return
        gc.collect()
        time.sleep(0.01)
    raise AssertionError("XLA still holds the tensor")
