"""Every wait of the convolution's Hopper kernels is needed: without any one of them the interpreter reports a race."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.causal_conv.hopper import bwd, fwd, tile
from tests.support.kernel_waits import COMPLAINT, waits, without

FORWARD, BACKWARD, TILE = map(waits, (fwd, bwd, tile))
ONE_THREAD = "it gathers the four warps of a warpgroup, which in the interpreter is one thread"
IMPLIED = {
    TILE[0]: ONE_THREAD,
    BACKWARD[1]: ONE_THREAD,  # the gradients of sums before other warps read them
}


def run(site) -> None:
    """One kernel on three tokens, with an initial state."""
    mixed, weight = jnp.ones((1, 3, 1, 192)), jnp.ones((2, 1, 192))
    key = jnp.ones((1, 3, 1, 64))
    options: dict[str, Any] = dict(
        bias=None, taps=None, first=None, initial_state=weight[None], key_dim=64, value_dim=64,
        use_qk_l2norm=True,
    )  # fmt: skip

    def call(mixed, weight, key):
        if site in BACKWARD:
            return bwd.backward(mixed, weight, (key, key, key), rows=32, **options)
        return fwd.forward(mixed, weight, **options)

    jax.block_until_ready(jax.jit(call)(mixed, weight, key))


def test_waits_are_found():
    assert [site.name for site in FORWARD] == ["barrier_wait", "commit_smem", "wait_smem_to_gmem"]
    assert [site.name for site in BACKWARD] == [
        "barrier_wait", "commit_smem", "commit_smem", "wait_smem_to_gmem",
    ]  # fmt: skip
    assert [site.name for site in TILE] == ["commit_smem"]


@pytest.mark.parametrize("site", [s for s in FORWARD + BACKWARD if s not in IMPLIED], ids=str)
def test_a_kernel_without_one_wait_is_caught(site):
    with pytest.raises(Exception, match=COMPLAINT), without(site):
        run(site)


@pytest.mark.parametrize("site", IMPLIED, ids=str)
def test_implied_waits_are_implied(site):
    with without(site):
        run(site)
