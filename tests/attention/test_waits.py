"""Every wait of the attention kernels is needed: without any one of them the interpreter reports a race.

`IMPLIED` names those without which it does not, and says why.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.hopper import bwd, fwd
from pallas_kernels.attention.hopper.bwd import atomic, keys, queries
from pallas_kernels.attention.hopper.tuning import BackwardConfig, ForwardConfig
from tests.attention import kernel_cases as cases
from tests.support.kernel_waits import COMPLAINT, Site, waits, without
from tests.support.mosaic_gpu_interpreter import interpreted


def forward(site: Site) -> None:
    """Both warpgroups of one block, five key tiles long in two stages, so that every buffer is used again."""
    query, key, value, _ = cases.inputs(0, q_len=128, kv_len=310)
    ids = [jnp.zeros((1, n), jnp.int32) for n in (128, 310)]
    config = ForwardConfig(block_kv=64, overlap=site.function != "alternating_step")
    call = lambda *arrays: fwd.forward(
        *arrays, config=config, scale=0.1, query_segment_ids=ids[0], kv_segment_ids=ids[1]
    )
    jax.block_until_ready(jax.jit(call)(query, key, value))


def backward(site: Site) -> None:
    """One block of the kernel in question, five tiles long, so that every buffer is used again."""
    lengths = {"q_len": 128, "kv_len": 310} if site.file == queries.__file__ else {}
    lengths = lengths or {"q_len": 310, "kv_len": 120}
    halves = site.function in ("value_half", "key_half") or site in SPLIT
    query, key, value, d_out = cases.inputs(0, **lengths)
    ids = [jnp.zeros((1, n), jnp.int32) for n in lengths.values()]
    out, lse = cases.truth(query, key, value, scale=0.1)
    # Every slot is used again within five tiles. With as many stages as a second ring has slots (two of `multiples`,
    # and keys beside values), waits for the first would stand in for waits for the second.
    config = BackwardConfig(
        stages=3 if halves else 2,
        value_stages=1,
        atomic=site.file == atomic.__file__,
        split=halves,
    )
    call = lambda *arrays: bwd.backward(
        *arrays, config=config, scale=0.1, query_segment_ids=ids[0], kv_segment_ids=ids[1]
    )
    jax.block_until_ready(jax.jit(call)(query, key, value, out.astype(query.dtype), lse, d_out))


# Waits of `keys.compute_role` that only split warpgroups reach: everything above the last wait but the first.
SPLIT = [s for s in waits(keys) if s.function == "compute_role"][1:-1]
SITES = [site for module in (fwd, keys, queries, atomic) for site in waits(module)]
IMPLIED = {
    # The warpgroups take turns so that one's softmax meets the other's products: for speed, it orders no memory.
    ("overlapped_step", "plgpu.barrier_wait(s.turn.at[wg])"),
    ("alternating_step", "plgpu.barrier_wait(s.turn.at[wg])"),
    # `key_half` has waited for `multiples_ready`, at which `value_half` arrives after it has waited for these queries.
    ("key_half", "plgpu.barrier_wait(s.query_ready.at[slot])"),
    # `key_half` commits later, before the slot is free, and has seen all that `value_half` did. On a GPU this one
    # also gathers the four warps before one of their threads arrives; the interpreter has one thread per warpgroup.
    ("value_half", "plgpu.commit_smem()"),
    # Superfluous: the last step has waited for `slopes_ready`, at which the other warpgroup arrives after its products
    # of the step before. Only the wait behind the loop, which covers the last two steps, orders more.
    ("all_three", "plgpu.barrier_wait(s.slopes_free.at[buffer])"),
}
NEEDED = [site for site in SITES if (site.function, site.call) not in IMPLIED]
# One of each kind in every run of CI; the others take turns.
ALWAYS = {
    ("fwd", "memory_role", "barrier_wait"),
    ("fwd", "compute_role", "commit_smem"),
    ("fwd", "alternating_step", "barrier_wait"),
    ("keys", "both_halves", "wgmma_wait"),
    ("atomic", "add_to", "wait_smem_to_gmem"),
}


def run(site: Site) -> None:
    (forward if site.file == fwd.__file__ else backward)(site)


def rotating(site: Site):
    return pytest.param(site, marks=[] if site.kind in ALWAYS else [pytest.mark.slow], id=str(site))


MODULES = pytest.mark.parametrize("module", [fwd, keys, queries, atomic], ids=lambda m: m.__name__)


def test_waits_are_found():
    assert len(NEEDED) >= 50
    assert len(SITES) - len(NEEDED) == len(IMPLIED)


@pytest.mark.slow
@MODULES
def test_nothing_is_wrong_with_all_of_them(module):
    with interpreted():
        run(Site(module.__file__, 0, "", ""))


@MODULES
def test_reading_a_product_too_early_is_caught(module, monkeypatch):
    original = plgpu.wgmma_accumulator_load
    unwaited = lambda accumulator, wait_n=0: original(accumulator, wait_n=None)
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", unwaited)
    with pytest.raises(Exception, match="an accumulator still in flight"), interpreted():
        run(Site(module.__file__, 0, "", ""))


@pytest.mark.parametrize("site", map(rotating, NEEDED))
def test_a_kernel_without_one_wait_is_caught(site):
    with pytest.raises(Exception, match=COMPLAINT), without(site):
        run(site)


@pytest.mark.slow
@pytest.mark.parametrize("site", [site for site in SITES if site not in NEEDED], ids=str)
def test_implied_waits_are_implied(site):
    with without(site):
        run(site)
