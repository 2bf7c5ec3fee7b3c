"""Models are made, loaded and saved in shards, and a Hugging Face folder is the same from any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from gqa_jax import Decoder, checkpoint
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes, parameter_specs
from gqa_jax.train.step import TrainState, train_step
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh
from tests.support.tiny_decoders import REPEATING, build

CONFIG = dataclasses.replace(REPEATING, sliding_window=None, family="qwen3_next")
MESHES = {
    "fsdp-tp": (dict(fsdp=4, tp=2), MeshAxes(batch="fsdp", heads="tp", embed="fsdp")),
    "cp-tk-tr": (
        dict(cp=2, tk=2, tr=2),
        MeshAxes(batch="cp", heads=("tk", "tr"), embed="cp"),
    ),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", list(MESHES))
def test_a_folder_loads_into_shards_and_is_saved_from_them(name, scan, tmp_path):
    sizes, axes = MESHES[name]
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    if "tr" in sizes:  # value heads and channels that four devices divide
        delta = dataclasses.replace(CONFIG.gated_deltanet, num_key_heads=4, num_value_heads=8)
        config = dataclasses.replace(config, gated_deltanet=delta)
    decoder = build(config, 3)
    checkpoint.save_hf(decoder, tmp_path / "one")
    the_mesh = mesh("auto", **sizes)
    spread = checkpoint.load_hf(tmp_path / "one", config=config, mesh=the_mesh, axes=axes)
    assert spread.axes == axes
    specs = parameter_specs(spread, axes, the_mesh)
    held = dict.fromkeys(the_mesh.devices.flat, 0)
    small = 0
    for a, b, spec in zip(jax.tree.leaves(spread), jax.tree.leaves(decoder), specs, strict=True):
        assert_bitwise_equal(a, b)
        assert a.sharding.is_equivalent_to(jax.NamedSharding(the_mesh, spec), a.ndim)
        small += a.nbytes if a.ndim < 3 + scan and a.size < 200 else 0
        for shard in a.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    assert max(held.values()) <= whole / 8 + small + whole / 20, (whole, held)

    checkpoint.save_hf(spread, tmp_path / "again")
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_does_not_fit_is_refused(tmp_path):
    checkpoint.save_hf(build(CONFIG, 0), tmp_path)
    axes = MeshAxes(heads="tp")
    with pytest.raises(ValueError, match="`mesh` must be given with `axes=.*, got None"):
        checkpoint.load_hf(tmp_path, axes=axes)
    with pytest.raises(ValueError, match="`heads` must name axes of the mesh {'dp': 2}, got 'tp'"):
        checkpoint.load_hf(tmp_path, mesh=mesh("auto", dp=2), axes=axes)
    with pytest.raises(ValueError, match="must be given together"):
        checkpoint.load_hf(
            tmp_path, mesh=mesh("auto", tp=2), axes=axes, context_parallel=ContextParallel()
        )
    with pytest.raises(ValueError, match="must be a multiple of 3"):
        checkpoint.load_hf(tmp_path, mesh=mesh("auto", tp=3), axes=axes)


@pytest.mark.usefixtures("loose_promotion")
def test_a_training_state_is_made_in_its_shards():
    """Optimizer included; what the recipe needs under context parallelism is asked for."""
    axes = MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp")
    the_mesh, optimizer = mesh("auto", fsdp=2, cp=2, tp=2), optax.adam(1e-2)

    small = dataclasses.replace(CONFIG, layers=CONFIG.layers[:2], moe=None, moe_layers=None)

    def make(**spread):
        return Decoder(small, rngs=nnx.Rngs(0), **spread)

    spread = functools.partial(make, axes=axes, context_parallel=ContextParallel())
    state = TrainState.create_on_mesh(spread, optimizer, the_mesh)
    specs = parameter_specs(state, axes, the_mesh)
    for a, spec in zip(jax.tree.leaves(state), specs, strict=True):
        assert a.sharding.is_equivalent_to(jax.NamedSharding(the_mesh, spec), a.ndim)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(make()), strict=True):
        assert_close(a, b, atol=1e-6, what="parameters")
    with pytest.raises(ValueError, match="`build` must make a decoder with `axes`, got axes=None"):
        TrainState.create_on_mesh(make, optimizer, the_mesh)
    tokens = jnp.zeros((2, 8), jnp.int32)
    with jax.set_mesh(the_mesh):
        with pytest.raises(ValueError, match="`targets` must be given under context parallelism"):
            train_step(state, tokens, optimizer=optimizer)
        with pytest.raises(ValueError, match="`positions` must be None without `targets`"):
            train_step(state, tokens, optimizer=optimizer, positions=tokens)
        with pytest.raises(ValueError, match=r"`targets` must have shape \(2, 8\), got \(2, 7\)"):
            train_step(state, tokens, optimizer=optimizer, targets=tokens[:, 1:])
