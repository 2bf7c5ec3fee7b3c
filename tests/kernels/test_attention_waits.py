"""Every wait of the backward kernels is needed: without any one of them the interpreter reports a race or an error.

The waits are found in the source, so that a new one is tested from its first day. A kernel that passes with a wait
taken out means that other waits imply it, or that the interpreter does not see what it is for: `IMPLIED` says which.
"""

import ast
import contextlib
import dataclasses
import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mosaic_gpu_bwd
from pallas_kernels.attention.mosaic_gpu_bwd import atomic, keys, queries
from pallas_kernels.attention.mosaic_gpu_tuning import (
    BackwardConfig,
)
from tests.kernels import attention_cases as cases
from tests.support.mosaic_gpu_interpreter import interpreted

WAITS = ("barrier_wait", "wgmma_wait", "wait_smem_to_gmem", "commit_smem")


@dataclasses.dataclass(frozen=True)
class Site:
    """A wait in a file; `function` is the outermost one around it, `call` its text."""

    file: str
    line: int
    name: str
    function: str
    call: str = ""

    def __str__(self) -> str:
        return f"{pathlib.Path(self.file).stem}.{self.function}-{self.name}-{self.line}"


def waits(module) -> list[Site]:
    """All waits of a kernel file, but for those that only the interpreter makes."""
    path = inspect.getsourcefile(module)
    tree = ast.parse(pathlib.Path(path).read_text())
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        skipped = set()
        for node in ast.walk(function):
            if isinstance(node, ast.If) and "interpreting" in ast.unparse(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
        for node in ast.walk(function):
            call = isinstance(node, ast.Call) and ast.unparse(node.func).partition("plgpu.")[2]
            if call in WAITS and id(node) not in skipped:
                site = Site(path, node.lineno, call, function.name, ast.unparse(node))
                found.append(site)
    return sorted(found, key=lambda site: site.line)


@contextlib.contextmanager
def without(site: Site):
    """Kernels traced inside lack the wait (in every loop that the line is traced into)."""
    original = getattr(plgpu, site.name)

    def maybe(*arguments, **options):
        caller = sys._getframe(1)
        if (caller.f_code.co_filename, caller.f_lineno) != (site.file, site.line):
            original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, site.name, maybe)
        yield


def backward(site: Site) -> None:
    """One block of the kernel in question, five tiles long, so that every buffer is used again."""
    lengths = {"q_len": 128, "kv_len": 310} if site.file == queries.__file__ else {}
    lengths = lengths or {"q_len": 310, "kv_len": 120}
    halves = site.function in ("value_half", "key_half") or site in SPLIT
    query, key, value, d_out = cases.inputs(0, **lengths)
    ids = [jnp.zeros((1, n), jnp.int32) for n in lengths.values()]
    out, lse = cases.truth(query, key, value, scale=0.1)
    # Two stages: every slot is used again within five tiles.
    config = BackwardConfig(atomic=site.file == atomic.__file__, split=halves)
    run = lambda *arrays: mosaic_gpu_bwd.backward(
        *arrays, config=config, scale=0.1, query_segment_ids=ids[0], kv_segment_ids=ids[1]
    )
    jax.block_until_ready(jax.jit(run)(query, key, value, out.astype(query.dtype), lse, d_out))


# Waits of `keys.compute_role` that only split warpgroups reach: everything above the last wait but the first.
SPLIT = [s for s in waits(keys) if s.function == "compute_role"][1:-1]
BACKWARD = [site for module in (keys, queries, atomic) for site in waits(module)]
IMPLIED = {
    # `key_half` has waited for `multiples_ready`, at which `value_half` arrives after it has waited for these queries.
    ("key_half", "plgpu.barrier_wait(s.query_ready.at[slot])"),
    # `key_half` commits later, before the slot is free, and has seen all that `value_half` did. On a GPU this one
    # also gathers the four warps before one of their threads arrives; the interpreter has one thread per warpgroup.
    ("value_half", "plgpu.commit_smem()"),
}
NEEDED = [site for site in BACKWARD if (site.function, site.call) not in IMPLIED]
# One of each kind in every run of CI; the others take turns.
ALWAYS = {("keys", "both_halves", "wgmma_wait"), ("atomic", "add_to", "wait_smem_to_gmem")}


def rotating(site: Site):
    kind = (pathlib.Path(site.file).stem, site.function, site.name)
    return pytest.param(site, marks=[] if kind in ALWAYS else [pytest.mark.slow], id=str(site))


MODULES = pytest.mark.parametrize("module", [keys, queries, atomic], ids=lambda m: m.__name__)


def test_waits_are_found():
    assert len(NEEDED) >= 40
    assert len(BACKWARD) - len(NEEDED) == len(IMPLIED)


@pytest.mark.slow
@MODULES
def test_nothing_is_wrong_with_all_of_them(module):
    with interpreted():
        backward(Site(module.__file__, 0, "", ""))


@MODULES
def test_reading_a_product_too_early_is_caught(module, monkeypatch):
    original = plgpu.wgmma_accumulator_load
    unwaited = lambda accumulator, wait_n=0: original(accumulator, wait_n=None)
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", unwaited)
    with pytest.raises(Exception, match="an accumulator still in flight"), interpreted():
        backward(Site(module.__file__, 0, "", ""))


@pytest.mark.parametrize("site", map(rotating, NEEDED))
def test_backward_without_one_wait_is_caught(site):
    with (
        without(site),
        pytest.raises(Exception, match=r"race|RACE|barrier|flight|completed"),
        interpreted(),
    ):
        backward(site)


@pytest.mark.slow
@pytest.mark.parametrize("site", [site for site in BACKWARD if site not in NEEDED], ids=str)
def test_implied_waits_are_implied(site):
    with without(site), interpreted():
        backward(site)
