"""The backward kernels of the gated delta rule as machine code for Hopper, compiled without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.suites import delta_rule_floor
from gqa_jax.planner.costs import costs
from pallas_kernels import aot
from pallas_kernels.delta_rule.hopper import aot_bwd_cases, lanes_bwd
from pallas_kernels.delta_rule.hopper.lanes import Kept
from pallas_kernels.delta_rule.order import Order, Plan, Tokens, table_rows
from tests.support.aot import assert_fast, require

CASES = {case.name: case for case in aot_bwd_cases.cases()}
SHAPES = {shape.label: shape for shape in aot_bwd_cases.SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_registered_cases_use_the_tensor_cores_as_derived(name):
    require()
    report = aot.compile_case(CASES[name])
    assert_fast(report)
    assert not report.collectives
    # Beside its outputs the program needs the states of every chunk twice, and tables.
    states = SHAPES[name.rpartition("/")[2]].chain_bytes
    assert report.temporary_bytes <= states + 0.15 * report.hbm_bytes + 2**20


def test_bytes_of_a_whole_call():
    """Within 15 % of the plan of kernels on paper: XLA finds the largest cotangent and sums what gates are owed."""
    require()
    mesh, chunks = aot.topology("h200"), 128
    here = NamedSharding(mesh, PartitionSpec())

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=here)

    wide = lambda heads: struct(chunks * 64, heads, 128, dtype=jnp.bfloat16)
    gate, state = struct(chunks * 64, 32), struct(32, 128, 128)
    tokens = Tokens(wide(16), wide(16), wide(32), gate, gate)
    inverse = struct(32, chunks, 64, 64, dtype=jnp.float16)
    tables = struct(32, chunks, table_rows(segments=False), 64)
    kept = Kept(inverse, tables, struct(32), struct(16, 2, 128, 128), None)
    plan = Plan(1, chunks * 64, 64, 1, chunks, 128**-0.5, True)
    compiled = aot.compile_only(
        lambda *given: lanes_bwd.backward(plan, Order(), *given),
        tokens, state, kept, wide(32), state, mesh=mesh,
    )  # fmt: skip
    moved = costs(compiled.executable.as_text(), {}, aot.rates("h200")).traffic_bytes
    design = delta_rule_floor.bytes_per_token("backward", 32, design=True)
    assert design < moved / plan.length < 1.15 * design
