"""Resuming equals not having stopped, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, Decoder, DecoderConfig, GatedDeltaNetConfig
from gqa_jax.train_checkpoint import TrainCheckpoints
from gqa_jax.training import TrainState, train_step
from tests.support.compare import assert_bitwise_equal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=16,
    layers=("linear_attention", "full_attention"),
    attention=AttentionConfig(
        model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, dropout_rate=0.2
    ),
    gated_deltanet=GatedDeltaNetConfig(
        model_dim=16, num_key_heads=1, num_value_heads=2, key_head_dim=4, value_head_dim=4
    ),
    intermediate_size=16,
)
OPTIMIZER = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 6))
TEXT = np.random.default_rng(0).integers(0, 31, (64, 9))


def fresh(seed, config=CONFIG):
    return TrainState.create(Decoder(config, rngs=nnx.Rngs(seed)), OPTIMIZER)


def train(state, key, position, updates):
    """Updates that depend on the data's position and on keys that are split off as it goes."""
    for _ in range(updates):
        key, dropout_key = jax.random.split(key)
        tokens = jnp.asarray(TEXT[position : position + 2], jnp.int32)
        state = train_step(state, tokens, optimizer=OPTIMIZER, dropout_key=dropout_key).state
        position += 2
    return state, key, position


def assert_same(actual, expected):
    left, right = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    for (path, a), (other, b) in zip(left, right, strict=True):
        assert path == other
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_bitwise_equal(a, b, what=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("loose_promotion")
def test_resuming_is_bitwise_equal_to_not_stopping(tmp_path):
    whole = train(fresh(0), jax.random.key(5), 0, 6)

    state, key, position = train(fresh(0), jax.random.key(5), 0, 3)
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.save(3, (state, key), data={"position": position})
        train(state, key, position, 1)  # donates the state while it is still being written

    with TrainCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore((fresh(1), jax.random.key(0)))
    assert restored.step == 3
    assert int(restored.state[0].step) == 3
    resumed = train(*restored.state, restored.data["position"], 3)
    assert_same(resumed[:2], whole[:2])
    assert resumed[2] == whole[2]


def small(value, seed=0):
    return {
        "weight": jnp.full((4, 8), value, jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "step": jnp.asarray(7, jnp.int32),
    }


@pytest.mark.usefixtures("loose_promotion")
def test_every_checkpoint_that_is_kept_can_be_restored(tmp_path):
    with TrainCheckpoints(tmp_path, max_to_keep=2, save_every=2) as checkpoints:
        saved = [step for step in range(1, 8) if checkpoints.save(step, small(step), data=[step])]
        assert saved == [2, 4, 6]
        assert checkpoints.save(7, small(7), data=[7], force=True)
        checkpoints.wait()
        assert checkpoints.steps == [6, 7]
        for step in (6, 7):
            restored = checkpoints.restore(small(0, seed=1), step=step)
            assert restored.data == [step]
            assert_same(restored.state, small(step))
        assert checkpoints.restore(small(0)).step == 7
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint of step 4 in .*, there are \[6, 7\]"
        ):
            checkpoints.restore(small(0), step=4)
        with pytest.raises(
            ValueError, match="`step` must be larger than the last one saved, 7, got 7"
        ):
            checkpoints.save(7, small(7))


@pytest.mark.usefixtures("loose_promotion")
def test_states_are_restored_into_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.NamedSharding(mesh, jax.P(None, "x"))
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(3))
        like = small(0) | {"weight": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=columns)}
        restored = checkpoints.restore(like).state
    assert restored["weight"].sharding.is_equivalent_to(columns, 2)
    assert {s.data.shape for s in restored["weight"].addressable_shards} == {(4, 1)}
    assert_same(restored, small(3))


@pytest.mark.usefixtures("loose_promotion")
def test_another_state_is_refused_by_name(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint of step any in .*, there are \[\]"
        ):
            checkpoints.restore(small(0))
        with pytest.raises(TypeError, match="`state`.weight must be a jax array, got ndarray"):
            checkpoints.save(1, {"weight": np.ones(3)})
        checkpoints.save(1, small(3))
        changes = {
            "missing bias": small(0) | {"bias": jnp.ones(2)},
            "unexpected step": {k: v for k, v in small(0).items() if k != "step"},
            r"weight is bfloat16\[4, 8\], not float32\[4, 8\]": small(0)
            | {"weight": jnp.ones((4, 8))},
            r"keys is key<rbg>\[3\], not key<fry>\[3\]": small(0)
            | {"keys": jax.random.split(jax.random.key(0), 3)},
        }
        for message, like in changes.items():
            with pytest.raises(ValueError, match=f"`like` must have the leaves .*{message}"):
                checkpoints.restore(like)
    with pytest.raises(ValueError, match="`save_every` must be positive, got 0"):
        TrainCheckpoints(tmp_path, save_every=0)
    with pytest.raises(ValueError, match="`max_to_keep` must be positive, got -1"):
        TrainCheckpoints(tmp_path, max_to_keep=-1)


@pytest.mark.usefixtures("loose_promotion")
def test_a_state_of_another_model_is_refused(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, fresh(0))
        wider = dataclasses.replace(CONFIG, intermediate_size=24)
        with pytest.raises(
            ValueError,
            match=r"params.layers.0.mlp.*is float32\[16, 16, 2\], not float32\[16, 24, 2\]",
        ):
            checkpoints.restore(fresh(0, wider))
