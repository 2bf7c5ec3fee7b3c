"""The GPU harness of attention, where there is no GPU: it runs from end to end at toy size, and its report is drawn."""

import json

import jax
import pytest

from benchmarks import report
from benchmarks.suites import attention_gpu


@pytest.mark.slow
def test_a_toy_shape_from_end_to_end():
    if jax.default_backend() == "gpu":
        pytest.skip("`make bench` runs the whole harness here")
    rows = attention_gpu.measure(quick=True)
    timed = [row for row in rows if "seconds" in row]
    assert {row["implementation"] for row in timed} == {
        "mosaic_gpu",
        "mosaic_gpu_atomic",
        "blockwise",
    }
    assert {row["direction"] for row in timed} == {"forward", "backward"}
    for row in timed:
        assert row["relative_error"] < 0.01
        assert "tflops" not in row  # an interpreter's
    left_out = {row["implementation"]: row["left_out"] for row in rows if "left_out" in row}
    assert set(left_out) == {"cudnn", "tokamax"}


def test_the_report_is_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    rows = [{"matmul_tflops": 700.0}]
    for length in (1024, 4096):
        shape = attention_gpu.Shape(length)
        for direction in ("forward", "backward"):
            row = {"shape": shape.label, "problem": shape.problem, "length": length}
            row |= {"implementation": "mosaic_gpu", "direction": direction, "seconds": 1e-3}
            rows.append(row | {"tflops": 100.0, "of_matmul": 0.5, "relative_error": 2e-3})
    rows.append({"shape": "T1024", "implementation": "tokamax", "left_out": "not installed"})
    record = {"suite": "attention_gpu", "date": "today", "machine": "toy", "backend": "gpu"}
    record |= {"python": "3", "versions": {"jax": "0"}, "commit": "0" * 10, "rows": rows}
    path = tmp_path / "benchmarks" / "results" / "toy" / "attention_gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    report.write(path)
    page = path.with_suffix(".md").read_text()
    cell = "| T1024 32/8 D128 causal | mosaic_gpu | forward | 1.000 | 100 | 0.50 | 2.0e-03 |"
    assert cell in page
    assert "2 of 6 rows were not measured" in page
    assert path.with_suffix(".png").stat().st_size > 1000


def test_visible_pairs_are_counted():
    full = attention_gpu.Shape(64, causal=False).flops(1)
    assert attention_gpu.Shape(64).flops(1) == full * 65 / 128
    assert attention_gpu.Shape(64, window=64).flops(1) == full * 65 / 128
    assert attention_gpu.Shape(64, window=1).flops(1) == full / 64
