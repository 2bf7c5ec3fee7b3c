"""Every wait of the delta rule's Hopper kernels is needed: without any one of them the interpreter reports a race."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper import chains, fwd
from pallas_kernels.delta_rule.hopper import gradients as hopper_gradients
from pallas_kernels.delta_rule.hopper import prologue as hopper_prologue
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, BackwardConfig, ForwardConfig
from tests.support.kernel_waits import COMPLAINT, Site, waits, without
from tests.support.mosaic_gpu_interpreter import interpreted

# More than there are stages: every slot is used again.
CHUNKS = 5


def operand(seed: int, *shape: int, scale: float = 0.125):
    """Numbers in float16."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape) * scale, jnp.float16)


def forward(*, output: bool) -> None:
    """One head of `forward`, or of `final_state`."""
    tokens = operand(0, 1, CHUNKS * CHUNK, 1, 64)
    tables = jnp.zeros((1, 1, CHUNKS, order.table_rows(segments=False), CHUNK), jnp.float32)
    inverse = operand(1, 1, 1, CHUNKS, CHUNK, CHUNK, scale=1.0)
    start = jnp.zeros((1, 1, 64, 64), jnp.float32)
    options = {"config": ForwardConfig(), "use_qk_l2norm": True}

    def call(x, *rest):
        if output:
            return fwd.forward(x, x, x, *rest, scale=0.125, segments=False, **options)
        return fwd.final_state(x, x, *rest, **options)

    jax.block_until_ready(jax.jit(call)(tokens, tables, inverse, start))


def prologue() -> None:
    """One chunk of a key head that three value heads share: the tile of the result is used again."""
    key = operand(0, 1, CHUNK, 1, 64)
    gate, segment = jnp.zeros((1, 3, 1, CHUNK)), jnp.zeros((1, 1, CHUNK))
    call = lambda *arrays: hopper_prologue.prologue(*arrays, use_qk_l2norm=True)
    jax.block_until_ready(jax.jit(call)(key, order.Gates(gate, gate, segment)))


def shapes(chunks: int, value_heads: int, value_dim: int) -> chains.Shapes:
    return chains.Shapes(
        1, chunks, 1, value_heads, 64, value_dim, jnp.float16, jnp.float16, True, 0.125, False, BackwardConfig(),
    )  # fmt: skip


def chain(*, backwards: bool) -> None:
    """One head of `delta_rule_states`, or of `delta_rule_d_states`."""
    tokens = operand(0, 1, CHUNKS * CHUNK, 1, 64)
    arrays = {"query": tokens} if backwards else {}
    arrays |= {
        "key": tokens,
        "tokens": tokens,
        "inverse": operand(1, 1, 1, CHUNKS, CHUNK, CHUNK),
        "tables": jnp.ones((1, 1, CHUNKS, order.table_rows(segments=False), CHUNK), jnp.float32),
        "edge": jnp.zeros((1, 1, 64, 64), jnp.float32),
        "spans": jnp.asarray([[0, 0, CHUNKS]], jnp.int32),
        "units": jnp.ones((3, 1, 1)),
    }
    call = functools.partial(chains.run_chain, shapes(CHUNKS, 1, 64), "chain")
    jax.block_until_ready(jax.jit(call)(arrays))


def gradients() -> None:
    """One chunk of a key head that two value heads share, their channels held by two warpgroups."""
    key, value = operand(0, 1, CHUNK, 1, 64), operand(1, 1, CHUNK, 2, 128)
    states = operand(2, 1, 2, 1, 128, 64)
    arrays = {
        "query": key,
        "key": key,
        "value": value,
        "d_out": value,
        "inverse": operand(3, 1, 2, 1, CHUNK, CHUNK),
        "tables": jnp.ones((1, 2, 1, order.table_rows(segments=False), CHUNK), jnp.float32),
        "units": jnp.ones((3, 1, 2)),
        "states": states,
        "d_states": states,
    }
    call = functools.partial(hopper_gradients.run_gradients, shapes(1, 2, 128))
    jax.block_until_ready(jax.jit(call)(arrays))


FORWARD, PROLOGUE, CHAIN, GRADIENTS = (
    waits(module) for module in (fwd, hopper_prologue, chains, hopper_gradients)
)


def found(sites: list[Site], function: str, name: str) -> list[Site]:
    return [site for site in sites if (site.function, site.name) == (function, name)]


ONE_THREAD = "it gathers the four warps of a warpgroup, which in the interpreter is one thread"
IMPLIED = {
    FORWARD[
        -1
    ]: "every copy's tile has been waited for, and device memory is complete when the kernel is",
    found(PROLOGUE, "role", "commit_smem")[1]: ONE_THREAD,
    # Sums before they are added to each other's, and before the last is read.
    found(PROLOGUE, "summed", "commit_smem")[0]: ONE_THREAD,
    found(PROLOGUE, "complete", "commit_smem")[0]: ONE_THREAD,
    # Positions before they are read.
    found(FORWARD, "ahead_role", "commit_smem")[0]: ONE_THREAD,
    # The largest value of each token before they are compared.
    found(FORWARD, "raised", "commit_smem")[0]: ONE_THREAD,
    found(FORWARD, "chain_role", "barrier_wait")[
        0
    ]: "whoever made X has waited for the chunk's tiles; the chain asks again, not to rest on what follows from what",
    found(CHAIN, "chain_role", "barrier_wait")[
        0
    ]: "whoever prepared the chunk has waited for its tiles; the chain asks again, as the forward's does",
    # R before dN takes its tile; P before the scores' cotangent takes its tile.
    found(GRADIENTS, "write_gradients", "commit_smem")[1]: ONE_THREAD,
    found(GRADIENTS, "read_gradients", "commit_smem")[0]: ONE_THREAD,
    # One thread arrives for the four warps.
    found(GRADIENTS, "gradient_role", "commit_smem")[-1]: ONE_THREAD,
    found(GRADIENTS, "recall_gradients", "wgmma_wait")[0]: "it saves registers",
}
# The slot of a chunk is free again at another place where no output is wanted.
WITHOUT_OUTPUT = found(FORWARD, "chain_role", "commit_smem")[1:]
# Only the backward chain makes P.
BACKWARDS = found(CHAIN, "feeding_role", "commit_smem")


def runs(site: Site) -> dict[str, Callable[[], None]]:
    """The kernels to which a wait belongs."""
    if site in PROLOGUE:
        return {"prologue": prologue}
    if site in FORWARD:
        return {"forward": functools.partial(forward, output=site not in WITHOUT_OUTPUT)}
    if site in GRADIENTS:
        return {"gradients": gradients}
    d_states = {"d_states": functools.partial(chain, backwards=True)}
    return d_states | (
        {} if site in BACKWARDS else {"states": functools.partial(chain, backwards=False)}
    )


def cases(*, implied: bool):
    for site in FORWARD + PROLOGUE + CHAIN + GRADIENTS:
        if (site in IMPLIED) != implied:
            continue
        often = site.name == "wait_smem_to_gmem" and not implied
        for name, run in runs(site).items():
            marks = [] if often else [pytest.mark.slow]
            yield pytest.param(site, run, marks=marks, id=f"{site}-{name}")


def test_waits_are_found():
    assert len([site for site in FORWARD + PROLOGUE if site not in IMPLIED]) >= 15
    assert len([site for site in CHAIN + GRADIENTS if site not in IMPLIED]) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("call", [
    prologue, functools.partial(forward, output=True), functools.partial(forward, output=False),
    functools.partial(chain, backwards=False), functools.partial(chain, backwards=True), gradients,
])  # fmt: skip
def test_nothing_is_wrong_with_all_of_them(call):
    with interpreted():
        call()


@pytest.mark.parametrize("site, run", cases(implied=False))
def test_a_kernel_without_one_wait_is_caught(site, run):
    with pytest.raises(Exception, match=COMPLAINT), without(site):
        run()


@pytest.mark.parametrize("site, run", cases(implied=True))
def test_implied_waits_are_implied(site, run):
    print(IMPLIED[site])
    with without(site):
        run()
