"""The climate of every test: eight CPU devices, strict promotion, nothing skipped in silence."""

import os
import pathlib
import subprocess
import zlib

import jax
import pytest

if os.environ.get("GQA_JAX_TEST_PLATFORM", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REQUIRE_TORCH = os.environ.get("GQA_JAX_REQUIRE_TORCH") == "1"

try:
    import torch
except ImportError:
    torch = None
    if REQUIRE_TORCH:
        raise
else:
    torch.set_num_threads(1)


# Of tests marked `slow`, a run takes every eighth, another eighth for each commit; GQA_JAX_ALL=1 takes all.
SLOW_SHARE = 1 if os.environ.get("GQA_JAX_ALL") == "1" else 8


def commit_number() -> int:
    """A number that belongs to the commit, so that what a commit samples is the same for ever; 0 outside git."""
    root = pathlib.Path(__file__).parents[1]
    git = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return int(git.stdout[:8] or "0", 16)


def pytest_collection_modifyitems(config, items):
    commit = commit_number()
    arguments = (argument.removeprefix(f"{config.rootpath}/") for argument in config.args)
    named = tuple(argument for argument in arguments if "::" in argument)  # these run

    def is_due(item) -> bool:
        slow = item.get_closest_marker("slow") is not None
        if not slow or item.nodeid.startswith(named):
            return True
        return (zlib.crc32(item.nodeid.encode()) + commit) % SLOW_SHARE == 0

    not_due = [item for item in items if not is_due(item)]
    if not_due:
        config.hook.pytest_deselected(items=not_due)
        items[:] = [item for item in items if is_due(item)]
    for item in items:
        if item.get_closest_marker("torch") and torch is None:
            item.add_marker(pytest.mark.skip(reason="PyTorch is not installed"))
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs go with the module that made them.

    Each holds several memory maps and Linux gives a process 65,530: a thousand tests in one process reach that, and
    it crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """64-bit types inside one test: oracles run in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def loose_promotion():
    """JAX's default promotion, for third-party code (optax, orbax) that relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
