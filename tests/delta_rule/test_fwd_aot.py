"""The forward kernels of the gated delta rule as machine code for Hopper, compiled without a GPU."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.suites import delta_rule_floor
from gqa_jax.planner.costs import costs
from pallas_kernels import aot, gated_delta_rule
from pallas_kernels.aot import command
from pallas_kernels.delta_rule.hopper import aot_fwd_cases
from tests.support.aot import assert_fast, require

CASES = {case.name: case for case in aot_fwd_cases.cases()}


@pytest.mark.parametrize("name", CASES)
def test_registered_cases_use_the_tensor_cores_and_spill_nothing(name):
    require()
    report = aot.compile_case(CASES[name])
    assert_fast(report)
    assert not report.collectives
    # Beside its outputs a kernel needs the states transposed, nothing else.
    assert report.temporary_bytes <= 0.05 * report.hbm_bytes + 2**20
    # What the program reads and writes is what the floor on paper counts.
    assert report.argument_bytes + report.output_bytes == pytest.approx(report.hbm_bytes, rel=0.15)


@pytest.mark.parametrize("label, products", [("8k", 16), ("d64", 8)])
def test_products_of_one_state_are_in_flight_together(label, products):
    """`S^T K^T` and `S^T Q^T` are issued back to back, and what to write is computed while the second runs."""
    require()
    (kernel,) = aot.compile_case(CASES[f"gated_delta_rule/forward/{label}"]).kernels
    assert len(kernel.loops) == 2  # the chain's, and of who runs ahead
    runs = [(op, len(list(group))) for op, group in itertools.groupby(kernel.sequence)]
    start = runs.index(("HGMMA", products))
    assert [op for op, _ in runs[start + 1 : start + 3]] == ["WAIT<=1", "WAIT<=0"], runs
    # The state and the output are updated together; the next chunk waits for the state only.
    assert runs[start + 3] == ("HGMMA", 8), runs
    assert [op for op, _ in runs[start + 4 : start + 6]] == ["WAIT<=1", "WAIT<=0"], runs


def test_bytes_of_a_whole_call():
    """Within 15 % of what the plan of kernels moves, on paper: docs/MEASURED_KERNELS.md."""
    require()
    mesh, tokens = aot.topology("h200"), 8192
    here = NamedSharding(mesh, PartitionSpec())

    def wide(heads):
        return jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16, sharding=here)

    gate = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32, sharding=here)
    compiled = aot.compile_only(
        lambda *x: gated_delta_rule(*x, use_qk_l2norm=True, implementation="mosaic_gpu"),
        wide(16), wide(16), wide(32), gate, gate, mesh=mesh,
    )  # fmt: skip
    moved = costs(compiled.executable.as_text(), {}, aot.rates("h200")).traffic_bytes
    plan = delta_rule_floor.bytes_per_token("forward", 32, design=True)
    assert plan < moved / tokens < 1.15 * plan


def test_list_names_every_case(capsys):
    command.main(["--list"])
    assert set(CASES) <= set(capsys.readouterr().out.split())
