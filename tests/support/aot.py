"""Tests of machine code: where the CUDA plugin is missing they are skipped, or fail if GQA_JAX_REQUIRE_AOT=1."""

import os

import pytest

from pallas_kernels import aot


def require() -> None:
    """Skips the test where nothing can be compiled; in CI, which has the `aot` extra, that is a failure."""
    reason = aot.unavailable_reason()
    if reason is None:
        return
    if os.environ.get("GQA_JAX_REQUIRE_AOT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def assert_fast(report: aot.Report) -> None:
    """No spills, no stack, no slow instruction, shared memory within a block's limit, tensor cores as derived."""
    assert report.kernels, f"{report.name}: no kernel was compiled"
    for kernel in report.kernels:
        where = f"{report.name}, {kernel.name}"
        assert not kernel.slow_paths, f"{where}: {kernel.slow_paths}"
        assert kernel.spill_store_bytes == 0, f"{where}: {kernel.spill_store_bytes} bytes spilled"
        assert kernel.spill_load_bytes == 0, f"{where}: {kernel.spill_load_bytes} bytes reloaded"
        assert kernel.stack_bytes == 0, f"{where}: a stack of {kernel.stack_bytes} bytes"
        assert kernel.instructions.get("HGMMA", 0) > 0, f"{where}: no tensor-core instruction"
        assert kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES, f"{where}: {kernel.shared_bytes} B"
    if report.tensor_instructions:
        counts = tuple(kernel.instructions["HGMMA"] for kernel in report.kernels)
        assert counts == report.tensor_instructions, report.name
