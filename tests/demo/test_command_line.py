"""`python -m gqa_jax`: the demo runs to its end, generation reads what it saved, mistakes are answered."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gqa_jax.__main__ import main


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gqa_jax", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run("demo", "--steps", "3", "--held-out-bytes", "2000", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.timeout(900)
def test_demo_runs_to_its_end(demo):
    folder, output = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 0 < summary["held_out_bits_per_byte"] < 9
    assert summary["cached_difference"] < 1e-3
    assert summary["reloaded_difference"] == 0.0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in output
    assert "zlib -9 of the same bytes" in output


def test_generate_reads_the_demo_checkpoint(demo, capfd):
    folder = str(demo[0] / "checkpoint")
    arguments = ["generate", "--checkpoint", folder, "--max-new-tokens", "5"]
    assert main([*arguments, "--prompt", "def "]) == 0
    assert capfd.readouterr().out.startswith("def ")
    assert main([*arguments, "--tokens", "100,101,102,32"]) == 0
    assert len(capfd.readouterr().out.split()) == 5
    assert main([*arguments, "--tokens", "1", "--seed", str(2**70)]) == 2
    assert "`--seed` must be an integer of 32 bits" in capfd.readouterr().err
    assert main([*arguments, "--tokens", "1", "--top-k", "3"]) == 2
    assert "`top_k` must be None when `temperature=0`" in capfd.readouterr().err
    saved = json.loads((demo[0] / "checkpoint/config.json").read_text())
    first = main([*arguments, "--tokens", "100,101"]) or capfd.readouterr().out.split()[0]
    config = demo[0] / "checkpoint/config.json"
    config.write_text(json.dumps(saved | {"eos_token_id": int(first)}))
    assert main([*arguments, "--tokens", "100,101"]) == 0
    assert capfd.readouterr().out.split() == [first]
    assert main([*arguments, "--tokens", "100,101", "--stop", "none"]) == 0
    assert len(capfd.readouterr().out.split()) == 5
    config.write_text(json.dumps(saved))
    assert main([*arguments, "--tokens", "999"]) == 2
    assert "`prompts` must lie in [0, vocab_size=256), got 999" in capfd.readouterr().err


def test_no_driver_no_traceback():
    """The CUDA plugin is installed here without a driver: JAX takes the CPU without a word."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or jax.default_backend() == "gpu":
        pytest.skip("needs JAX's CUDA plugin and no GPU")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "gqa_jax", "info"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gqa_attention: blockwise" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_info_explains_every_operator(capfd):
    assert main(["info"]) == 0
    output = capfd.readouterr().out
    for word in ("jax", "devices:", "gqa_attention:", "decode_attention:", "gated_deltanet_step:"):
        assert word in output


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["demo", "--seconds", "0"], 2, "--seconds must be positive, got 0.0"),
        (["demo", "--steps", "0"], 2, "--steps must be positive, got 0"),
        (["demo", "--held-out-bytes", "1"], 2, "--held-out-bytes must be at least 2, got 1"),
        (
            ["generate", "--checkpoint", "x", "--tokens", "1,b"],
            2,
            "--tokens must be token ids joined by commas, got '1,b'",
        ),
        (
            [
                "plan",
                "--config",
                "tiny_hybrid",
                "--mesh",
                "dp=1",
                "--seq",
                "8",
                "--bf16-flops",
                "-1",
            ],
            2,
            "--bf16-flops must be positive, got -1.0",
        ),
        (["generate", "--checkpoint", "no such folder", "--tokens", "1"], 2, "no such folder"),
    ],
)
def test_mistakes_are_answered(arguments, status, text, capfd):
    assert main(arguments) == status
    assert text in capfd.readouterr().err


def test_demo_names_what_is_not_installed(monkeypatch, capfd):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert main(["demo", "--steps", "1"]) == 2
    assert "the demo needs matplotlib: pip install 'gqa-jax[demo]'" in capfd.readouterr().err


def test_bad_checkpoints_are_answered_in_one_line(tmp_path, capfd):
    """Damaged folders themselves: tests/hf/test_hostile_files.py."""
    arguments = ["generate", "--checkpoint", str(tmp_path), "--tokens", "1"]
    fields = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 10_000, "vocab_size": 9}
    fields |= {"num_attention_heads": 2, "intermediate_size": 4}
    save_file({"model.norm.weight": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    for changes, words in (
        ({}, "`config` has 10000 layers"),
        ({"hidden_size": "32"}, "`config.hidden_size` must be an integer, got '32'"),
        ({"rope_parameters": [1]}, "`config.rope_parameters` must be an object, got [1]"),
        ({"model_type": "mamba"}, "`config.model_type` must be one of ['llama', 'qwen2'"),
        ({"logit_scale": 2.0}, "pass `ignore=('logit_scale',)`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | changes))
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps(fields | {"logit_scale": 2.0}))
    assert main([*arguments, "--ignore", "logit_scale"]) == 2
    assert "`config` has 10000 layers" in capfd.readouterr().err
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert main(arguments) == 2
    assert "config.json is not JSON" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "--checkpoint", "x"]])
def test_usage_errors_exit_with_two(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capfd.readouterr().err
