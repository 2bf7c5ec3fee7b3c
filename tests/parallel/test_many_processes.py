"""Two processes with gloo between them train and generate as one device does, and their checkpoints are anyone's."""

import jax
import numpy as np
import pytest

from gqa_jax import checkpoint, generate
from gqa_jax.parallel.sharding import MeshAxes, path_name, shard_parameters
from gqa_jax.train.checkpoint import TrainCheckpoints
from tests.parallel import two_process_training as training
from tests.support import two_processes
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh

pytestmark = [
    pytest.mark.usefixtures("loose_promotion"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def whole(folder, name) -> dict[str, np.ndarray]:
    """The arrays that both processes wrote piece by piece; pieces that overlap must agree in every bit."""
    arrays: dict[str, np.ndarray] = {}
    filled: dict[str, np.ndarray] = {}
    for process in range(2):
        held = np.load(folder / f"{name}-{process}.npz")
        for key in (key for key in held if not key.endswith("|index")):
            shape, start, stop = map(tuple, held[f"{key}|index"].T)
            path, piece = key.split("|")[0], held[key]
            array = arrays.setdefault(path, np.empty(shape, piece.dtype))
            done = filled.setdefault(path, np.zeros(shape, bool))
            index = tuple(map(slice, start, stop))
            assert_bitwise_equal(np.where(done[index], array[index], piece), piece, what=key)
            array[index], done[index] = piece, True
    assert all(done.all() for done in filled.values())
    return arrays


def by_path(tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(tree, arrays) -> None:
    tree = by_path(tree)
    assert tree.keys() == arrays.keys()
    for path, leaf in tree.items():
        assert_bitwise_equal(leaf, arrays[path], what=path)


def test_two_processes_equal_one(tmp_path):
    eight = mesh("auto", fsdp=4, tp=2)
    other_axes = MeshAxes(batch="fsdp", heads="tp", embed="fsdp")
    alone, losses = training.create(None), []
    for index in range(training.STEPS):
        alone, loss, _ = training.step(alone, training.batch(index))
        losses.append(float(loss))
        if index == 0:
            gradients = jax.tree.map(np.array, alone.opt_state)
    checkpoint.save_hf(alone.decoder, tmp_path / "hf_from_one")
    with TrainCheckpoints(tmp_path / "from_one") as checkpoints:
        spread = shard_parameters(alone, eight, other_axes)
        checkpoints.save(7, spread, data=["kept"])

    two_processes.run("tests.parallel.two_process_training", str(tmp_path))

    for process in range(2):
        assert_close(np.load(tmp_path / f"losses-{process}.npy"), losses, atol=1e-5, what="losses")
    got = whole(tmp_path, "gradients")
    for path, want in by_path(gradients).items():
        top = max(1e-3, float(np.abs(want).max()))
        assert_close(got[path], want, atol=1e-5 * top, what=path)
    assert_same_bits(alone, whole(tmp_path, "restored"))
    assert_same_bits(alone.decoder, whole(tmp_path, "hf"))
    tokens = generate(alone.decoder, training.PROMPTS, max_new_tokens=training.NEW_TOKENS).tokens
    for process in range(2):
        assert_bitwise_equal(np.load(tmp_path / f"tokens-{process}.npy"), tokens)

    wanted = whole(tmp_path, "state")
    with TrainCheckpoints(tmp_path / "from_two") as checkpoints:
        for like in (
            training.create(None),
            shard_parameters(training.create(None), eight, other_axes),
        ):
            restored = checkpoints.restore(like)
            assert (restored.step, restored.data) == (training.STEPS, {"position": training.STEPS})
            assert_same_bits(restored.state, wanted)
            for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    saved = checkpoint.load_hf(tmp_path / "hf_from_two")
    assert_same_bits(saved, by_path(restored.state.decoder))
