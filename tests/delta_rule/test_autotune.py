"""Timing layouts of the delta rule's Hopper kernels, keeping them in a file, and using the file only when told to."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch, autotune, gated_delta_rule
from pallas_kernels.attention.hopper import tuning as attention_tuning
from pallas_kernels.autotune import command, measure
from pallas_kernels.delta_rule import autotune_cases
from pallas_kernels.delta_rule.hopper import bwd, fwd, tuning
from pallas_kernels.delta_rule.hopper.tuning import BackwardConfig, ForwardConfig, LanesConfig
from tests.support import compare
from tests.support.aot import require
from tests.support.mosaic_gpu_interpreter import interpreted

H200 = "NVIDIA H200"
FORWARD, BACKWARD = "gated_delta_rule/forward/D64/H<=8", "gated_delta_rule/backward/H<=8"
LANES = "gated_delta_rule/lanes/D64/H<=8/N<=32"
# None of them the default.
BEST = {
    FORWARD: ForwardConfig(stages=4, overlap=False),
    BACKWARD: BackwardConfig(chain_owners=1, stages=2),
    LANES: LanesConfig(2),
    "gated_delta_rule/forward/D128/H>132": ForwardConfig(
        overlap=False, chain_registers=200, ahead_registers=104
    ),
}


@pytest.fixture(autouse=True)
def _nothing_tuned():
    yield
    tuning.use_tuned({})
    attention_tuning.use_tuned({})


def saved(path, best):
    found = {key: [autotune.Result(config, 1.0)] for key, config in best.items()}
    autotune.save(path, found, device=H200, basis=autotune.TIMED)
    return path


@pytest.fixture
def tuned(tmp_path):
    return saved(tmp_path / "tuned.json", BEST)


def test_one_entry_serves_a_bucket_of_heads_and_for_lanes_of_chunks():
    forward = lambda heads: tuning.bucket("forward", width=128, heads=heads)
    assert forward(34) == forward(66) == "gated_delta_rule/forward/D128/H<=66"
    assert forward(133) == forward(9999) == "gated_delta_rule/forward/D128/H>132"
    lanes = lambda chunks: tuning.bucket("lanes", width=64, heads=16, chunks=chunks)
    assert lanes(33) == lanes(128) == "gated_delta_rule/lanes/D64/H<=16/N<=128"
    assert lanes(513) == "gated_delta_rule/lanes/D64/H<=16/N>512"
    assert tuning.bucket("backward", heads=9) == "gated_delta_rule/backward/H<=16"


def test_every_bucket_is_timed_once_and_can_be_loaded():
    keys = [cell.key for cell in autotune_cases.asked({}, timed=True)]
    assert len(keys) == len(set(keys))
    lanes = {key for key in autotune_cases.kinds() if "/lanes/" in key}
    assert set(keys) - lanes == set(autotune_cases.kinds()) - lanes
    # With more heads than half of the SMs there is room for one lane only.
    assert set(keys) & lanes == {key for key in lanes if "H<=132" not in key and "H>" not in key}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("width", tuning.HEAD_DIMS)
def test_candidates_differ_and_are_valid(monkeypatch, width, fixed):
    monkeypatch.setattr(tuning, "FIXED_REGISTERS", fixed)
    for cell in autotune_cases.cells(tuning.DIRECTIONS, [width], autotune_cases.HEADS, [40, 1000]):
        candidates = cell.candidates()
        assert candidates[0] == cell.default()
        assert 1 < len(candidates) == len(set(candidates))
        for config in candidates:
            assert autotune_cases.refusal(cell.key, config) is None
        if fixed and cell.direction != "lanes":  # what is ignored is not varied
            registers = {
                tuple(v for k, v in vars(c).items() if "registers" in k) for c in candidates
            }
            assert len(registers) == 1


def test_shared_memory_is_counted_as_documented():
    """The files' headers and reasons: 222 KiB and some of the forward, 221 of the reverse chain, in three stages."""
    forward = autotune_cases.shared_bytes(ForwardConfig(), 128) / 1024
    backward = autotune_cases.shared_bytes(BackwardConfig(), 128) / 1024
    assert 222 <= forward <= 224
    assert 220 <= backward <= 222


def timed(cell, candidates):
    """Results of the cell's candidates, and the outputs of each: interpreted."""
    outputs = {}
    check = measure._require_equal

    def recording(cell, config, out, expected):
        outputs[config] = out
        check(cell, config, out, expected)

    with (
        interpreted(),
        mock.patch.object(type(cell), "candidates", return_value=candidates),
        mock.patch.object(measure, "_require_equal", recording),
    ):
        results = autotune.time_cell(cell, rounds=1)
    assert {result.config for result in results} == set(candidates) == set(outputs)
    assert 0 < results[0].seconds <= results[-1].seconds
    return outputs


@pytest.mark.parametrize("direction, count", [("forward", 2), ("backward", 1)])
def test_candidates_are_timed_in_turn(direction, count):
    # With 64 channels also the backward, whose own cells have 128.
    cell = autotune_cases.Cell(direction, 64, 1, 1)
    outputs = timed(cell, cell.candidates()[:count])
    for out in jax.tree.leaves([*outputs.values()]):
        assert np.isfinite(out.astype(jnp.float32)).all()


def test_operands_are_what_the_delta_rule_is_given():
    cell = autotune_cases.Cell("lanes", 64, 4, 5)
    query, key, value, g, beta, start = (np.asarray(x, np.float32) for x in cell.inputs())
    assert key.shape == query.shape == (1, 320, 2, 64)
    assert value.shape == (1, 320, 4, 64)
    assert start.shape == (1, 4, 64, 64)
    assert np.abs(np.linalg.norm(key, axis=-1) - 1).max() < 2**-6
    assert -0.1 <= g.min() < g.max() <= 0
    assert 0 < beta.min() < beta.max() < 1


def test_the_timed_call_is_the_operators():
    """What `lanes` times gives the numbers of the public operator."""
    cell = autotune_cases.Cell("lanes", 64, 1, 2)
    outputs = timed(cell, [LanesConfig(1), LanesConfig(2)])
    query, key, value, g, beta, start = cell.inputs()
    expected = gated_delta_rule(
        query, key, value, g, beta, initial_state=start, use_qk_l2norm=True, implementation="chunked"
    )  # fmt: skip
    for found in outputs.values():
        for ours, theirs in zip(found, expected, strict=True):
            assert compare.relative_error(ours, np.asarray(theirs, np.float32)) <= 2**-7


def test_a_wrong_candidate_does_not_win():
    cell, zeros = autotune_cases.Cell("lanes", 64, 1, 2), np.zeros(3)
    small = 1e-6 * np.ones(3)
    measure._require_equal(cell, LanesConfig(2), (small, zeros), (small, zeros))
    for wrong in (2 * small, zeros, np.nan * small):
        with pytest.raises(RuntimeError, match=r"LanesConfig\(lanes=2\) differs from the default"):
            measure._require_equal(cell, LanesConfig(2), (wrong, zeros), (small, zeros))


def test_a_file_is_used_when_asked_and_only_then(tuned):
    wide = {"width": 128, "heads": 4096}
    before = tuning.forward_config(width=64, heads=8), tuning.backward_config(heads=8)
    assert tuning.lanes(heads=8, value_dim=64, chunks=32) == 4
    assert autotune.load(tuned, device=H200) == 4
    assert tuning.forward_config(width=64, heads=5) == BEST[FORWARD]
    assert tuning.forward_config(width=64, heads=5, key_width=64) == BEST[FORWARD]
    assert tuning.forward_config(**wide).chain_registers == 200
    assert tuning.backward_config(heads=1) == BEST[BACKWARD] != before[1]
    assert tuning.lanes(heads=8, value_dim=40, chunks=32) == 2
    # Elsewhere nothing changes: more heads, wider keys; and a lane has eight chunks.
    assert tuning.forward_config(width=64, heads=9) == before[0] != BEST[FORWARD]
    assert tuning.forward_config(width=64, heads=5, key_width=128) == before[0]
    assert tuning.backward_config(heads=9).stages == 3
    assert tuning.lanes(heads=8, value_dim=64, chunks=15) == 1


def used(batch: int, length: int) -> set:
    """The kernels of a traced call and its gradient, each with its layout."""
    seen = set()
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((batch, length, *shape), dtype)
    gate = array(2, dtype=jnp.float32)

    def record(module, name, original):
        def call(*arguments, config, **options):
            seen.add((name, config))
            return original(*arguments, config=config, **options)

        return mock.patch.object(module, name, call)

    def call(*operands):
        found = gated_delta_rule(*operands, implementation="mosaic_gpu")
        return found.out.astype(jnp.float32).sum()

    with (
        _dispatch.targeting(_dispatch.Target("gpu", "9.0")),
        record(fwd, "forward", fwd.forward),
        record(fwd, "final_state", fwd.final_state),
        record(bwd, "backward", bwd.backward),
    ):
        jax.clear_caches()  # a call traced before keeps what it was traced with
        jax.make_jaxpr(jax.grad(call))(array(1, 64), array(1, 64), array(2, 64), gate, gate)
    return seen


def test_a_traced_call_is_laid_out_by_the_file(tuned):
    four_lanes = {"final_state", "forward", "backward"}
    assert {name for name, _ in used(1, 2048)} == four_lanes
    autotune.load(tuned, device=H200)
    assert used(1, 192) == {("forward", BEST[FORWARD]), ("backward", BEST[BACKWARD])}
    # Two lanes of two heads are four heads.
    walks = {("final_state", BEST[FORWARD]), ("forward", BEST[FORWARD])}
    assert used(1, 2048) == walks | {("backward", BEST[BACKWARD])}
    default = {("forward", ForwardConfig()), ("backward", tuning.backward_config(heads=16))}
    assert used(8, 192) == default
    autotune.load(saved(tuned, {LANES: LanesConfig(1)}), device=H200)
    assert {name for name, _ in used(1, 2048)} == {"forward", "backward"}


def test_operators_files_do_not_replace_each_other(tuned, tmp_path):
    attention = {"forward/D64/T<=64/causal": attention_tuning.ForwardConfig(64, 4)}
    asked = {"q_len": 64, "kv_len": 64, "head_dim": 64, "group": 1, "batch": 1, "kv_heads": 1}
    autotune.load(tuned, device=H200)
    assert autotune.load(saved(tmp_path / "attention.json", attention), device=H200) == 1
    assert tuning.forward_config(width=64, heads=8) == BEST[FORWARD]
    assert attention_tuning.forward_config(**asked, is_causal=True).stages == 4
    autotune.load(saved(tmp_path / "lanes.json", {LANES: LanesConfig(1)}), device=H200)
    assert tuning.forward_config(width=64, heads=8) != BEST[FORWARD]
    assert attention_tuning.forward_config(**asked, is_causal=True).stages == 4


WIDE = "gated_delta_rule/forward/D128/H>132"


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("gated_delta_rule/forward/D96/H<=8", {}, r"the unknown key '.*/D96/H<=8'"),
        (FORWARD, {"stages": None}, r"must have a `best` with exactly splits, stages, overlap"),
        (FORWARD, {"stages": 3.0}, r"`stages` of .* must be int, got 3.0"),
        (FORWARD, {"stages": 2}, r"H<=8' in .*: `stages` must be at least 3, got 2"),
        (FORWARD, {"stages": 9}, r"it does not fit into a block: ForwardConfig"),
        (FORWARD, {"splits": 2}, r"`splits` must be from 1 to 1, got 2"),
        (FORWARD, {"chain_registers": 240}, r"`ahead_registers` must be 0 for two warpgroups"),
        (WIDE, {"splits": 0}, r"`splits` must be from 1 to 2, got 0"),
        (WIDE, {"stages": 4}, r"it does not fit into a block"),
        (WIDE, {"chain_registers": 204}, r"multiples of 8, 168 to 240 and 24 to 168, .* 204 and"),
        (WIDE, {"chain_registers": 208}, r"the other at most 504, got 208 and 104"),
        (WIDE, {"ahead_registers": 0}, r"`ahead_registers` must be multiples of 8, .* 200 and 0"),
        (BACKWARD, {"chain_owners": 3}, r"`chain_owners` must be 1 or 2, got 3"),
        (BACKWARD, {"stages": 1}, r"`stages` must be at least 2, got 1"),
        (BACKWARD, {"stages": 4}, r"it does not fit into a block: BackwardConfig"),
        (BACKWARD, {"feeding_registers": 96}, r"`chain_registers` and `feeding_registers` must"),
        (LANES, {"lanes": 0}, r"`lanes` must be at least 1, got 0"),
    ],
)
def test_a_bad_file_is_refused_whole(tuned, key, change, message):
    record = json.loads(tuned.read_text())
    best = record["entries"].setdefault(key, {"best": {}})["best"]
    best |= change
    for name in [name for name, value in change.items() if value is None]:
        del best[name]
    tuned.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        autotune.load(tuned, device=H200)
    assert tuning.lanes(heads=8, value_dim=64, chunks=32) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        ("--operator gated_delta_rule --mask causal", "--mask does not apply to --operator gated"),
        ("--heads 8", "--heads does not apply to --operator gqa_attention"),
        ("--operator gated_delta_rule --head-dim 256", "--head-dim must be one of 64, 128, got 256"),
        ("--operator gated_delta_rule --heads 0", "--heads must be at least 1, got 0"),
        ("--operator gated_delta_rule --direction backward_atomic", "--direction must be one of"),
        (
            "--operator gated_delta_rule --direction forward --length 64",
            "--length does not apply to --direction forward",
        ),
        (
            "--operator gated_delta_rule --direction backward --head-dim 64",
            "--head-dim does not apply to --direction backward",
        ),
        (
            "--operator gated_delta_rule --by-machine-code --direction lanes",
            "--direction lanes does not apply to --by-machine-code",
        ),
        (
            "--operator gated_delta_rule --direction lanes --heads 100",
            "there is nothing to tune: the options name no entry",
        ),
        ("--target h200", "--target applies to --by-machine-code only"),
        ("--by-machine-code --rounds 3", "--rounds does not apply to --by-machine-code"),
        ("--limit 0", "--limit must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_apply(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        command.main([str(tmp_path / "tuned.json"), *words.split()])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_hopper_gpu_the_command_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"autotune times kernels on an H100 or H200, this is"):
        command.main([str(tmp_path / "tuned.json"), "--operator", "gated_delta_rule"])


def test_by_machine_code(tmp_path, capsys):
    require()
    path = tmp_path / "facts.json"
    words = "--by-machine-code --direction forward --head-dim 64 --heads 8 --limit 2"
    command.main([str(path), "--operator", "gated_delta_rule", *words.split()])
    assert FORWARD in capsys.readouterr().out
    record = json.loads(path.read_text())
    rows = record["entries"][FORWARD]["candidates"]
    assert len(rows) == 2
    for row in rows:
        (fact,) = row["facts"]
        assert fact["kernel"].startswith("delta_rule_forward")
        assert row["seconds"] is None
    assert {ForwardConfig(**row["config"]).overlap for row in rows} == {True, False}
    with pytest.raises(ValueError, match=r"`basis` in .* must be 'time'"):
        autotune.load(path, device=record["device"])
