"""The backward kernels of the gated delta rule as machine code for Hopper, compiled without a GPU."""

import dataclasses

import pytest

from pallas_kernels import _aot_delta_bwd_cases, aot
from tests.support.aot import assert_fast, require

CASES = {case.name: case for case in _aot_delta_bwd_cases.cases()}
SHAPES = {shape.label: shape for shape in _aot_delta_bwd_cases.SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_registered_cases_use_the_tensor_cores_as_derived(name):
    require()
    report = aot.compile_case(CASES[name])
    states, d_states, gradients = report.kernels
    counts = tuple(kernel.instructions["HGMMA"] for kernel in report.kernels)
    assert counts == report.tensor_instructions
    assert_fast(dataclasses.replace(report, kernels=(states,), tensor_instructions=()))
    # The unit of a chunk's decays takes `d_states` two registers more than there are. dq and dk fill half of the
    # registers of `gradients`, what is made for them more than the rest: 472 bytes with two value heads on a key head,
    # 500 with segments, 528 with four. Both spill; no product is serialised.
    assert d_states.spill_store_bytes <= 8
    assert gradients.spill_store_bytes <= 528
    for kernel in (d_states, gradients):
        assert set(kernel.slow_paths) <= {"LDL", "STL"}
        assert kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES
    assert not report.collectives
    # Beside its outputs the program needs the states of every chunk twice, and tables.
    states = SHAPES[name.rpartition("/")[2]].chain_bytes
    assert report.temporary_bytes <= states + 0.15 * report.hbm_bytes + 2**20
