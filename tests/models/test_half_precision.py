"""Training of a hybrid decoder in 16 bits, jitted: loss and gradients are read and held against float32, on one device
and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa_jax.parallel.sharding import MeshAxes, shard_parameters
from gqa_jax.train.step import TrainState, next_token_loss, train_step
from tests.support.compare import assert_close
from tests.support.meshes import mesh
from tests.support.tiny_decoders import HYBRID, build, tokens


@jax.jit
def loss_and_gradients(decoder, ids):
    loss = lambda decoder: next_token_loss(decoder(ids), jnp.roll(ids, -1, axis=1))
    return jax.value_and_grad(loss)(decoder)


def assert_near(got, wanted, dtype):
    """Every parameter's gradient, by its norm, within tens of roundings: what a sum over layers and tokens collects."""
    unit = float(jnp.finfo(dtype).eps)
    assert_close(got[0], wanted[0], atol=4 * unit * float(wanted[0]), what="loss")
    total = float(optax.global_norm(wanted[1]))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(wanted[1]), jax.tree.leaves(got[1]), strict=True
    )
    for (path, b), a in pairs:
        error, size = (float(jnp.linalg.norm(x)) for x in (a - b, b))
        name = jax.tree_util.keystr(path)
        assert error <= 48 * unit * max(size, 0.01 * total), f"{name}: {error} of {size}"
        assert error <= 20 * unit * total, f"{name}: {error} of {total} in all"


@pytest.mark.parametrize(
    "dtype, batch, length",
    [("bfloat16", 1, 2), ("bfloat16", 3, 17), ("bfloat16", 3, 130), ("float16", 3, 17)],
)
def test_loss_and_gradients(dtype, batch, length):
    ids = tokens(np.random.default_rng(length), batch, length)
    wide, narrow = build(HYBRID, 1), build(HYBRID, 1, dtype=jnp.dtype(dtype))
    assert_near(loss_and_gradients(narrow, ids), loss_and_gradients(wide, ids), jnp.dtype(dtype))


def test_on_eight_devices():
    axes = MeshAxes(batch="fsdp", embed="fsdp", heads="tp")
    ids = tokens(np.random.default_rng(3), 4, 17)
    spread = build(HYBRID, 1, dtype=jnp.bfloat16, axes=axes)
    the_mesh = mesh("auto", fsdp=4, tp=2)
    with jax.set_mesh(the_mesh):
        got = loss_and_gradients(shard_parameters(spread, the_mesh, axes), ids)
    assert_near(got, loss_and_gradients(build(HYBRID, 1), ids), jnp.bfloat16)


@pytest.mark.usefixtures("loose_promotion")
def test_a_training_step_in_bfloat16_throughout():
    """Parameters in bfloat16 too: the update is that of float32, as far as their rounding lets it be seen."""
    ids, optimizer = tokens(np.random.default_rng(5), 3, 18), optax.sgd(0.5)
    narrow = build(HYBRID, 1, param_dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: jnp.array(x, jnp.float32), narrow)  # copies: a step donates
    steps = [
        train_step(TrainState.create(d, optimizer), ids, optimizer=optimizer)
        for d in (narrow, wide)
    ]
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    assert_close(steps[0].loss, steps[1].loss, atol=4 * unit * float(steps[1].loss))
    norms = [step.gradient_norm for step in steps]
    assert_close(norms[0], norms[1], atol=8 * unit * float(norms[1]))
