"""Benchmark suites of the delta rule: floors against numbers on paper, emulated roundings, the GPU suite on toys."""

import jax.numpy as jnp
import pytest

from benchmarks.suites import delta_rule_floor as floor
from benchmarks.suites import delta_rule_gpu as gpu
from benchmarks.suites import delta_rule_rounding as rounding
from benchmarks.suites import deltanet_gpu
from tests.support import delta_cases
from tests.support.compare import relative_error


def test_floors_are_those_on_paper():
    # D = 128, C = 64: 6 D^2 + 8 C D + 2 C^2; and q, k of 16 heads, v, o of 32, float32 gates, all in bytes.
    assert floor.flops_per_token_head("forward") == 98304 + 65536 + 8192
    assert floor.bytes_per_token("forward", 32, design=False) == 24832
    assert floor.flops_per_token_head("backward") == 401408 + 4 * 128**2 + 2 * 64 * 128
    whole = floor.row(floor.Shape("forward", 1, 32768, 32))
    assert whole["chain"] == 512
    assert whole["products_ms"] == pytest.approx(0.228, abs=1e-3)
    assert whole["memory_ms"] == pytest.approx(32768 * 24832 / 4.3e9)
    assert whole["predicted_ms"] >= max(whole["products_ms"], whole["memory_ms"])
    assert whole["published_ms"]["FLA"] == 1.890
    rows = floor.measure(False)
    assert {row["tokens"] for row in rows} == {2**n for n in range(11, 20)}


def test_more_sequences_never_take_longer_than_one_of_all_their_tokens():
    for direction in ("forward", "backward"):
        one, _ = floor.predicted_seconds(floor.Shape(direction, 1, 32768, 32))
        four, _ = floor.predicted_seconds(floor.Shape(direction, 4, 8192, 32))
        assert four <= one


def test_emulated_roundings():
    case = delta_cases.nasty_cases(1, 128, 64)["positive keys"]
    errors = rounding.row("positive keys", case)["relative_error"]
    for plan in rounding.PLANS:
        assert 1e-5 < errors["out"][plan] < 1e-2, plan
    assert errors["out"]["ours, float16"] < 0.3 * errors["out"]["ours"]
    out, final, _ = delta_cases.recurrence(case)
    for plan, (form, _) in rounding.PLANS.items():
        # Without rounding every plan is the rule; the state stays float32 between chunks.
        found = rounding.emulate(case, form, lambda x: x)
        assert relative_error(found["out"], out) < 1e-6, plan
        assert relative_error(found["final_state"], final) < 1e-6, plan


def test_the_gpu_suite_runs_at_toy_size():
    rows = gpu.measure(True)
    checked = {(row["shape"], row["implementation"]) for row in rows if row.get("checked")}
    rule, decode = (shape.label for shape in gpu.TOY)
    assert {(rule, "chunked"), *((decode, name) for name in gpu.STEPS)} <= checked
    reasons = {row["implementation"]: row["left_out"] for row in rows if "left_out" in row}
    assert set(gpu.PEERS) <= set(reasons)


def test_the_suite_of_the_layer_runs_at_toy_size():
    rows = deltanet_gpu.measure(True)
    checked = {(row["shape"], row["implementation"]) for row in rows if row.get("checked")}
    convolution, step = (shape.label for shape in deltanet_gpu.TOY)
    assert checked == {
        *((convolution, name) for name in ("reference", "mosaic_gpu")),
        *((step, name) for name in gpu.STEPS),
    }
    # 32 states of 64 KiB twice; windows and tokens are a few per cent.
    assert deltanet_gpu.SHAPES[2].least_bytes(False) == pytest.approx(2 * 32 * 2**16, rel=0.1)
    assert deltanet_gpu.SHAPES[0].least_bytes(False) == 2 * 8192 * 16 * 2**10


def test_a_failure_of_a_peer_is_a_row_and_one_of_ours_an_error(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(gpu, "STEPS", ("reference",))
    monkeypatch.setattr(gpu, "PEERS", {"FLA": broken})
    measure = lambda: gpu.measure_shape(gpu.TOY[1], rounds=1, chained=1, copied=0.0)
    (left,) = (row for row in measure() if row["implementation"] == "FLA")
    assert left["left_out"] == "no such kernel"
    monkeypatch.setattr(gpu, "step", lambda _: broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure()
    wrong = lambda _: lambda *x: (x[2] + 1, x[5].astype(jnp.float32))
    monkeypatch.setattr(gpu, "step", wrong)
    with pytest.raises(gpu.Left, match="reference is wrong: relative errors"):
        measure()
