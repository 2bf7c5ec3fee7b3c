"""Timing tile sizes, keeping them in a file, and using the file only when told to."""

import dataclasses
import json

import jax
import pytest

from pallas_kernels import autotune
from pallas_kernels.attention import autotune_cases
from pallas_kernels.attention.hopper import tuning
from pallas_kernels.autotune import command
from tests.support.aot import require
from tests.support.mosaic_gpu_interpreter import interpreted

FORWARD = autotune_cases.Cell("forward", 64, 100, True)
ASKED = {"q_len": 100, "kv_len": 100, "head_dim": 64, "group": 1, "batch": 1, "kv_heads": 1}


@pytest.fixture(autouse=True)
def _nothing_tuned():
    yield
    tuning.use_tuned({})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(autotune_cases, "TOKENS", 1)
    monkeypatch.setattr(autotune_cases, "HEADS", {64: (1, 1)})


@pytest.fixture
def tuned(tmp_path):
    """A file with one entry per direction, none of them the default."""
    best = {
        "forward": tuning.ForwardConfig(64, 4, overlap=False, heads_then_batch=False),
        "backward": tuning.BackwardConfig(stages=4),
        "backward_atomic": tuning.BackwardConfig(stages=4, atomic=True),
    }
    found = {
        dataclasses.replace(FORWARD, direction=direction).key: [autotune.Result(config, 1.0)]
        for direction, config in best.items()
    }
    path = tmp_path / "tuned.json"
    autotune.save(path, found, device="NVIDIA H200", basis=autotune.TIMED)
    return path


def test_one_entry_serves_every_length_of_its_bucket():
    key = lambda n: tuning.bucket("forward", head_dim=128, q_len=n, is_causal=True)
    assert key(1) == key(64) == "forward/D128/T<=64/causal"
    assert key(65) == key(777) == key(1024) == "forward/D128/T<=1024/causal"
    assert key(16385) == key(500_000) == "forward/D128/T>16384/causal"


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
@pytest.mark.parametrize("head_dim", tuning.HEAD_DIMS)
def test_candidates_differ_and_fit(direction, head_dim):
    for cell in autotune_cases.cells([direction], [head_dim], [4096], [True]):
        candidates = cell.candidates()
        assert candidates[0] == cell.default()
        assert len(candidates) == len(set(candidates))
        assert all(tuning.fits(config, head_dim) for config in candidates)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("direction", ["forward", "backward_atomic"])
def test_candidates_are_timed_in_turn(direction):
    cell = dataclasses.replace(FORWARD, direction=direction)
    with interpreted():
        results = autotune.time_cell(cell, rounds=1, limit=2)
    assert {result.config for result in results} == set(cell.candidates()[:2])
    assert 0 < results[0].seconds <= results[1].seconds


def test_a_file_is_used_when_asked_and_only_then(tuned):
    before = tuning.forward_config(**ASKED, is_causal=True)
    assert autotune.load(tuned, device="NVIDIA H200") == 3
    asked = lambda **change: tuning.forward_config(**(ASKED | {"is_causal": True} | change))
    assert asked() == tuning.ForwardConfig(64, 4, overlap=False, heads_then_batch=False)
    assert asked(q_len=1000).stages == 4
    assert asked(q_len=4000).stages == before.stages
    assert asked(is_causal=False).stages == before.stages
    assert not asked(segments=True).heads_then_batch or asked(segments=True).overlap
    backward = {"head_dim": 64, "q_len": 100, "is_causal": True}
    assert tuning.backward_config(**backward).stages == 4
    assert tuning.backward_config(**backward, atomic=True).atomic
    assert tuning.backward_config(**backward | {"q_len": 4000}).stages == 3
    # Heads packed into a tile follow from the shape of the call.
    entry = {"forward/D64/T<=64/causal": tuning.ForwardConfig(64, 4)}
    tuning.use_tuned(entry)
    assert asked(q_len=16, group=4).pack == 4


def change(record, path, value):
    *parents, last = path
    for name in parents:
        record = record[name]
    if value is None:
        del record[last]
    else:
        record[last] = value


ENTRY = ("entries", "forward/D64/T<=1024/causal")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("format",), 2, r"`format` in .* must be 1, got 2"),
        (("device",), "NVIDIA B200", r"`device` in .* must be 'NVIDIA H200', got 'NVIDIA B200'"),
        (("jax",), "0.9", r"`jax` in .* must be '0\.\d+', got '0.9'"),
        (("basis",), autotune.COMPILED, r"`basis` in .* must be 'time', got 'machine code'"),
        (("entries",), [], r"`entries` in .* must be an object, got list"),
        (("entries", "forward/D80/T<=1/causal"), {}, r"the unknown key 'forward/D80/T<=1/causal'"),
        ((*ENTRY, "best"), None, r"must have a `best` with exactly block_kv, stages, overlap"),
        ((*ENTRY, "best", "warps"), 4, r"must have a `best` with exactly block_kv"),
        ((*ENTRY, "best", "overlap"), 1, r"`overlap` of .* must be bool, got 1"),
        ((*ENTRY, "best", "stages"), 0, r"causal' in .*: `stages` must be at least 1, got 0"),
        (
            (*ENTRY, "best", "block_kv"),
            80,
            r"causal' in .*: `block_kv` must be a multiple of 64, got 80",
        ),
        ((*ENTRY, "best", "stages"), 99, r"does not fit into a block"),
        (
            ("entries", "backward/D64/T<=1024/causal", "best", "atomic"),
            True,
            r"causal' in .*: `atomic` must be False, got True",
        ),
    ],
)
def test_a_bad_file_is_refused(tuned, path, value, message):
    record = json.loads(tuned.read_text())
    change(record, path, value)
    tuned.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        autotune.load(tuned, device="NVIDIA H200")
    assert tuning.forward_config(**ASKED, is_causal=True).heads_then_batch


def test_a_file_of_another_machine_and_a_file_of_something_else(tuned):
    with pytest.raises(ValueError, match=f"must be {jax.devices()[0].device_kind!r}"):
        autotune.load(tuned)
    tuned.write_text("stages = 3")
    with pytest.raises(ValueError, match=r"`path` must hold JSON"):
        autotune.load(tuned)


def test_without_a_hopper_gpu_the_command_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"autotune times kernels on an H100 or H200, this is"):
        command.main([str(tmp_path / "tuned.json")])


def test_by_machine_code(tmp_path, capsys):
    require()
    path = tmp_path / "facts.json"
    words = (
        "--by-machine-code --direction forward --head-dim 64 --length 1024 --mask causal --limit 2"
    )
    command.main([str(path), *words.split()])
    assert "forward/D64/T<=1024/causal" in capsys.readouterr().out
    record = json.loads(path.read_text())
    rows = record["entries"]["forward/D64/T<=1024/causal"]["candidates"]
    spilled = [sum(fact["spilled_bytes"] for fact in row["facts"]) for row in rows]
    assert spilled == sorted(spilled)
    assert all(row["seconds"] is None for row in rows)
    with pytest.raises(ValueError, match=r"`basis` in .* must be 'time'"):
        autotune.load(path, device=record["device"])
