"""The README's examples run as they stand, in order, in one session."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block_with(text: str) -> str:
    found = [block for block in BLOCKS if text in block]
    assert len(found) == 1, f"{len(found)} blocks hold {text!r}"
    return found[0]


@pytest.mark.torch
@pytest.mark.usefixtures("loose_promotion")
def test_layer_training_step_and_call_from_torch():
    pytest.importorskip("torch")
    session: dict = {}
    exec(block_with("SelfAttention(config"), session)
    assert session["y"].shape == (2, 1, 512)
    exec(block_with("def train_step"), session)
    assert 0 < float(session["loss"]) < 10
    exec(block_with("interop.to_torch"), session)
    assert tuple(session["out"].shape) == (2, 128, 512)


def test_readme_is_short():
    assert len(README.splitlines()) < 200
