"""Every wait of the delta rule's forward kernels is needed: without any one of them the interpreter reports a race."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import mosaic_gpu_fwd, mosaic_gpu_prologue, order
from pallas_kernels.delta_rule.mosaic_gpu_tuning import CHUNK, ForwardConfig
from tests.support.kernel_waits import COMPLAINT, Site, waits, without
from tests.support.mosaic_gpu_interpreter import interpreted

CHAIN, INVERSE = waits(mosaic_gpu_fwd), waits(mosaic_gpu_prologue)
# The last wait of the chain is superfluous: every copy's tile has been waited for, and device memory is complete when
# the kernel is. In the inverse the first commit gathers the four warps, of which one waited for the copy; the
# interpreter has one thread per warpgroup.
IMPLIED = [CHAIN[-1], next(s for s in INVERSE if (s.function, s.name) == ("role", "commit_smem"))]
NEEDED = [site for site in CHAIN + INVERSE if site not in IMPLIED]
# The slot of a chunk is free again at another place where no output is wanted.
WITHOUT_OUTPUT = [s for s in CHAIN if (s.function, s.name) == ("chain_role", "commit_smem")][1:]
# More than there are stages: every slot is used again.
CHUNKS = 5


def chain(*, output: bool) -> None:
    """One head of `forward`, or of `final_state`."""
    random = np.random.default_rng(0)
    operand = jnp.asarray(random.normal(size=(1, CHUNKS * CHUNK, 1, 64)) / 8.0, jnp.float16)
    stacked = jnp.zeros((1, 1, CHUNKS, order.READ + 1, CHUNK), jnp.float32)
    inverse = jnp.asarray(random.normal(size=(1, 1, CHUNKS, CHUNK, CHUNK)), jnp.float16)
    start = jnp.zeros((1, 1, 64, 64), jnp.float32)
    config = ForwardConfig()

    def call(x, *rest):
        if output:
            return mosaic_gpu_fwd.forward(x, x, x, *rest, config=config, segments=False)
        return mosaic_gpu_fwd.final_state(x, x, *rest, config=config)

    jax.block_until_ready(jax.jit(call)(operand, stacked, inverse, start))


def inverse() -> None:
    """One chunk of a key head that three value heads share: the tile of the result is used again."""
    random = np.random.default_rng(0)
    key = jnp.asarray(random.normal(size=(1, CHUNK, 1, 64)) / 8.0, jnp.float16)
    stacked = jnp.zeros((1, 3, 1, order.READ + 1, CHUNK), jnp.float32)
    call = lambda *arrays: mosaic_gpu_prologue.inverse(*arrays, segments=False)
    jax.block_until_ready(jax.jit(call)(key, stacked))


def run(site: Site) -> None:
    if site in INVERSE:
        inverse()
    else:
        chain(output=site not in WITHOUT_OUTPUT)


def rotating(site: Site):
    always = site.name == "wait_smem_to_gmem"
    return pytest.param(site, marks=[] if always else [pytest.mark.slow], id=str(site))


def test_waits_are_found():
    assert len(NEEDED) >= 15


@pytest.mark.slow
def test_nothing_is_wrong_with_all_of_them():
    with interpreted():
        inverse()
        chain(output=True)
        chain(output=False)


@pytest.mark.parametrize("site", map(rotating, NEEDED))
def test_a_kernel_without_one_wait_is_caught(site):
    with pytest.raises(Exception, match=COMPLAINT), without(site):
        run(site)


@pytest.mark.slow
@pytest.mark.parametrize("site", IMPLIED, ids=str)
def test_implied_waits_are_implied(site):
    with without(site):
        run(site)
