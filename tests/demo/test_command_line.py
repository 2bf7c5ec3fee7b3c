"""`python -m gqa_jax`: the demo runs to its end, generation reads what it saved, mistakes are answered."""

import json
import subprocess
import sys

import pytest

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
    assert main([*arguments, "--tokens", "1", "--top-k", "3"]) == 2
    assert "`top_k` must be None when `temperature=0`" in capfd.readouterr().err
    assert main([*arguments, "--tokens", "999"]) == 2
    assert "`prompts` must lie in [0, vocab_size=256), got 999" in capfd.readouterr().err


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
            "--tokens must be integers joined by commas, got '1,b'",
        ),
        (["generate", "--checkpoint", "no such folder", "--tokens", "1"], 1, "no such folder"),
    ],
)
def test_mistakes_are_answered(arguments, status, text, capfd):
    assert main(arguments) == status
    assert text in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "--checkpoint", "x"]])
def test_usage_errors_exit_with_two(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capfd.readouterr().err
