"""What each of two processes runs in `test_many_processes.py`: `python -m ... {process} {port} {folder}`."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gqa_jax import Decoder, checkpoint, generate
from gqa_jax.parallel.context import ContextParallel, context_attention, to_layout
from gqa_jax.parallel.sharding import MeshAxes, parameter_shardings, path_name
from gqa_jax.train import replica_check
from gqa_jax.train.checkpoint import TrainCheckpoints
from gqa_jax.train.step import TrainState, train_step
from pallas_kernels import gqa_attention
from tests.support import two_processes
from tests.support.tiny_decoders import ATTENTION, HYBRID

CONFIG = dataclasses.replace(
    HYBRID,
    layers=("linear_attention", "full_attention"),
    attention=dataclasses.replace(ATTENTION, dropout_rate=0.1),
    sliding_window=None,
    family="qwen3_5_text",
)
# With momentum the optimizer's state after the first step is the gradient.
OPTIMIZER = optax.sgd(0.02, momentum=0.9)
AXES = MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp")
PLAN = ContextParallel(mode="ring")
STEPS, BATCH, LENGTH = 2, 4, 16
PROMPTS, NEW_TOKENS = [[3, 1, 4], [1]], 3


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of `train_step`, the same wherever they are made."""
    text = np.random.default_rng(step).integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    text = text.astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "positions": places}


def step(state: TrainState, rows: dict[str, jax.Array]):
    """One update, with dropout."""
    return train_step(state, **rows, optimizer=OPTIMIZER, dropout_key=jax.random.key(2))


def create(mesh) -> TrainState:
    """The state before the first step, on a mesh or, with None, on one device."""

    def build() -> Decoder:
        spread = {} if mesh is None else {"axes": AXES, "context_parallel": PLAN}
        return Decoder(CONFIG, rngs=nnx.Rngs(0), keep_rngs=False, **spread)

    if mesh is None:
        return TrainState.create(build(), OPTIMIZER)
    return TrainState.create_on_mesh(build, OPTIMIZER, mesh)


def pieces(tree) -> dict[str, np.ndarray]:
    """What this process holds: "path|device" -> its piece of the array, and "path|device|index" -> where that is."""
    held = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for shard in leaf.addressable_shards:
            name = f"{path_name(path)}|{shard.device.id}"
            held[name] = np.asarray(shard.data)
            bounds = [
                (size, *part.indices(size)[:2])
                for part, size in zip(shard.index, leaf.shape, strict=True)
            ]
            held[f"{name}|index"] = np.asarray(bounds, int).reshape(-1, 3)
    return held


def main(process: int, folder: pathlib.Path) -> None:
    # Processes are the first axis: each reads its own rows and holds half of the parameters.
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "cp", "tp"), (jax.sharding.AxisType.Auto,) * 3)
    assert {d.process_index for d in mesh.devices[0].flat} == {0}, mesh
    rows = jax.NamedSharding(mesh, AXES.tokens)
    losses = []
    with jax.set_mesh(mesh):
        state = create(mesh)
        for index in range(STEPS):
            mine = jax.tree.map(lambda x: np.split(x, 2)[process], batch(index))
            local = to_layout(mine, axis_size=2)
            spread = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), local)
            state, loss, _ = step(state, spread)
            losses.append(float(loss))
            if index == 0:
                np.savez(folder / f"gradients-{process}.npz", **pieces(state.opt_state))
    np.savez(folder / f"state-{process}.npz", **pieces(state))
    np.save(folder / f"losses-{process}.npy", np.asarray(losses))
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(parameter_shardings(state, mesh, AXES)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)

    replica_check.check_replicas(state)
    find_a_difference(state, process)
    with TrainCheckpoints(folder / "from_two") as checkpoints:
        checkpoints.save(STEPS, state, data={"position": STEPS})
    with TrainCheckpoints(folder / "from_one") as checkpoints:
        restored = checkpoints.restore(state)
    assert (restored.step, restored.data) == (7, ["kept"]), restored[1:]
    np.savez(folder / f"restored-{process}.npz", **pieces(restored.state))

    checkpoint.save_hf(state.decoder, folder / "hf_from_two")
    loaded = checkpoint.load_hf(folder / "hf_from_one", mesh=mesh, axes=AXES, context_parallel=PLAN)
    np.savez(folder / f"hf-{process}.npz", **pieces(loaded))
    with jax.set_mesh(mesh):
        tokens = generate(loaded, PROMPTS, max_new_tokens=NEW_TOKENS).tokens
    np.save(folder / f"tokens-{process}.npy", np.asarray(tokens))
    ring_across_processes()


def ring_across_processes() -> None:
    """Keys and values pass from process to process, forward and backward."""
    rng = np.random.default_rng(8)
    query, key, value = (
        rng.normal(size=(1, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2)
    )
    mesh = jax.make_mesh((8,), ("cp",), (jax.sharding.AxisType.Auto,))
    tokens = jax.NamedSharding(mesh, jax.P(None, "cp"))
    plan = ContextParallel(mode="ring", axis_name="cp")
    ring = jax.shard_map(
        functools.partial(context_attention, context_parallel=plan),
        mesh=mesh, in_specs=(tokens.spec,) * 3, out_specs=tokens.spec,
    )  # fmt: skip

    def gradients(attend, *inputs):
        return jax.jit(jax.grad(lambda *x: jnp.sin(attend(*x)).sum(), argnums=(0, 1, 2)))(*inputs)

    alone = gradients(functools.partial(gqa_attention, is_causal=True), query, key, value)
    inputs = to_layout((query, key, value), axis_size=8)
    spread = (jax.make_array_from_callback(x.shape, tokens, x.__getitem__) for x in inputs)
    for got, want in zip(gradients(ring, *spread), alone, strict=True):
        want = to_layout(np.asarray(want), axis_size=8)
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, want[shard.index], atol=1e-5)


def find_a_difference(state: TrainState, process: int) -> None:
    """One bit on one device of process 1; both processes name it."""
    scale = state.decoder.norm.scale[...]
    copies = []
    for shard in scale.addressable_shards:
        piece = np.array(shard.data)
        if shard.device.id == jax.devices()[6].id:
            piece.view(np.uint8)[3] ^= 1
        copies.append(jax.device_put(piece, shard.device))
    torn = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, copies)
    (found,) = replica_check.find_mismatches({"norm": {"scale": torn}})
    assert (found.path, found.device) == ("norm.scale", jax.devices()[6]), found
    assert found.device.process_index == 1
    assert (found.agreeing, found.differing) == (7, 1)


if __name__ == "__main__":
    two_processes.join(int(sys.argv[1]), int(sys.argv[2]), devices=4)
    main(int(sys.argv[1]), pathlib.Path(sys.argv[3]))
