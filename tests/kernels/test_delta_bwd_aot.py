"""The backward kernels of the gated delta rule as machine code for Hopper, compiled without a GPU."""

import pytest

from pallas_kernels import _aot_delta_bwd_cases, aot
from tests.support.aot import assert_fast, require

CASES = {case.name: case for case in _aot_delta_bwd_cases.cases()}
SHAPES = {shape.label: shape for shape in _aot_delta_bwd_cases.SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_registered_cases_use_the_tensor_cores_as_derived(name):
    require()
    report = aot.compile_case(CASES[name])
    assert_fast(report)
    assert not report.collectives
    # Beside its outputs the program needs the states of every chunk twice, and tables.
    states = SHAPES[name.rpartition("/")[2]].chain_bytes
    assert report.temporary_bytes <= states + 0.15 * report.hbm_bytes + 2**20
