"""Resuming equals not having stopped, bit for bit."""

import dataclasses
import gc
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqa_jax import AttentionConfig, Decoder, DecoderConfig, GatedDeltaNetConfig, train_checkpoint
from gqa_jax.train.checkpoint import TrainCheckpoints
from gqa_jax.train.replica_check import hash_bits
from gqa_jax.train.step import TrainState, train_step
from tests.support.compare import assert_bitwise_equal
from tests.support.meshes import mesh

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collect_what_orbax_left():
    """Orbax leaves coroutines behind where a restore fails, which complain when they are collected: here, not later."""
    yield
    gc.collect()


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


# Damage -----------------------------------------------------------------------------------------------------------


def large(seed, step=7):
    """Arrays that are stored in files of their own, beside small ones."""
    return small(step, seed) | {"noise": jax.random.normal(jax.random.key(seed), (64, 96))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with TrainCheckpoints(folder) as checkpoints:
        assert checkpoints.save(3, large(1), data={"index": 4096})
        checkpoints.wait()
        checkpoints.save(5, large(2), data={"index": 8192})
    return folder


def restored_or_refused(folder, *, must_refuse=False):
    """What was saved, or an error that names step and item."""
    message = ""
    with TrainCheckpoints(folder) as checkpoints:
        try:
            state, step, data = checkpoints.restore(large(0, step=0), step=5)
        except ValueError as error:
            message = str(error)
            state, step, data = checkpoints.restore(large(0, step=0), step=3)
    assert (step, data) == ((3, {"index": 4096}) if message else (5, {"index": 8192}))
    assert_same(state, large(1 if message else 2))
    where = (
        r"checkpoint of step 5 in .* must be whole, but its item '(state|about)' cannot be read: .*"
    )
    assert re.fullmatch(where + r"; the other steps are \[3\]", message) or not message, message
    assert message or not must_refuse
    return message


@pytest.mark.usefixtures("loose_promotion")
def test_flipped_bits_and_files_cut_are_refused_by_step_and_item(saved, tmp_path):
    rng = np.random.default_rng(0)
    messages = []
    for path in sorted(p for p in (saved / "5").rglob("*") if p.is_file()):
        for change in ("flip", "cut", "delete"):
            copy = tmp_path / "copy"
            shutil.copytree(saved, copy)
            broken = copy / path.relative_to(saved)
            raw = bytearray(broken.read_bytes())
            if change == "flip":
                raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
                broken.write_bytes(raw)
            elif change == "cut":
                broken.write_bytes(raw[: len(raw) // 2])
            else:
                broken.unlink()
            messages.append(restored_or_refused(copy))
            shutil.rmtree(copy)
    assert any("the bits of noise are not those saved" in message for message in messages)
    assert sum(map(bool, messages)) >= 8
    for item in ("state", "about"):
        copy = tmp_path / item
        shutil.copytree(saved, copy)
        shutil.rmtree(copy / "5" / item)
        assert f"item '{item}'" in restored_or_refused(copy, must_refuse=True)


@pytest.mark.usefixtures("loose_promotion")
def test_a_position_that_changed_on_disk_is_refused_and_old_checkpoints_are_read_with_a_warning(
    saved, tmp_path
):
    shutil.copytree(saved, tmp_path / "copy")
    about = tmp_path / "copy/5/about/metadata"
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content).replace("8192", "8193"))
    assert "item 'about' cannot be read: its bits" in restored_or_refused(
        tmp_path / "copy", must_refuse=True
    )
    about.write_text(json.dumps({name: content[name] for name in ("manifest", "data")}))
    with pytest.warns(UserWarning, match="checkpoint of step 5 has no checksums to check"):
        assert not restored_or_refused(tmp_path / "copy")


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_checksums_do_not_depend_on_where_an_array_lies(kind):
    rng = np.random.default_rng(1)
    the_mesh = mesh(kind, x=4, y=2)
    arrays = [
        rng.normal(size=(8, 6, 4)).astype("f4"),
        jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        rng.integers(-9, 9, (8, 4)).astype("i1"),
        rng.integers(0, 2, (4, 2)).astype(bool),
        jnp.asarray(rng.normal(size=(4, 2)), jnp.float8_e4m3fn),
    ]
    seen = set()
    for array in map(jnp.asarray, arrays):
        alone = np.asarray(jax.jit(hash_bits)(array))
        for spec in (jax.P("x"), jax.P("x", "y"), jax.P(None, "y"), jax.P()):
            spread = jax.device_put(array, jax.NamedSharding(the_mesh, spec))
            np.testing.assert_array_equal(np.asarray(jax.jit(hash_bits)(spread)), alone)
        swapped = array.at[0].set(array[1]).at[1].set(array[0])
        assert (np.asarray(jax.jit(hash_bits)(swapped)) != alone).any()
        seen.add(tuple(alone.tolist()))
    assert len(seen) == len(arrays)


@pytest.mark.usefixtures("loose_promotion")
def test_data_is_kept_as_it_was_or_refused_at_once(tmp_path):
    data = {
        "index": np.int64(2**40), "share": np.float32(0.25), "done": np.bool_(True), "files": ("a", ["b", None]),
        "far": float("inf"),
    }  # fmt: skip
    with TrainCheckpoints(tmp_path) as checkpoints:
        for value, message in (
            (
                {"at": {"x": [np.ones(2)]}},
                r"`data\['at'\]\['x'\]\[0\]` must be what JSON .*ndarray: arr",
            ),
            (jnp.ones(()), "`data` must be what JSON holds .*, got ArrayImpl"),
            ([b"bytes"], r"`data\[0\]` must be what JSON holds .*, got bytes"),
            ({1: "a"}, "`data` must have str as keys, got 1"),
            ({"a": {2, 3}}, r"`data\['a'\]` must be what JSON holds .*, got set"),
            (1 + 2j, "`data` must be what JSON holds .*, got complex"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoints.save(1, small(1), data=value)
        for step, error in (
            (1.0, TypeError),
            (True, TypeError),
            ("1", TypeError),
            (-1, ValueError),
        ):
            with pytest.raises(error, match="`step` must (not )?be"):
                checkpoints.save(step, small(1))
        assert checkpoints.save(np.int32(1), small(1), data=data)
        data["index"] = 0  # while it may still be on its way
        data["files"][1].append("c")
        restored = checkpoints.restore(small(0))
    expected = {"index": 2**40, "share": 0.25, "done": True, "files": ["a", ["b", None]]}
    assert restored.data.pop("far") == float("inf")
    assert restored.data == expected
    assert [type(restored.data[name]) for name in ("index", "share", "done")] == [int, float, bool]


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize("ask", ["wait", "close", "save", "skipped", "restore"])
def test_a_save_that_fails_in_its_thread_is_reported_by_what_comes_next(ask, tmp_path, monkeypatch):
    write = json.dumps

    def fail(value, **options):
        if isinstance(value, dict) and "manifest" in value:  # ours, not Orbax's own
            raise OSError("no space left on device")
        return write(value, **options)

    checkpoints = TrainCheckpoints(tmp_path, save_every=2)
    checkpoints.save(2, small(2), data=2)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", fail)
        patch.setattr(train_checkpoint, "_crc32", lambda about: 0)
        assert checkpoints.save(4, small(4))
        while checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)
    calls = {
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "save": lambda: checkpoints.save(6, small(6)),
        "skipped": lambda: checkpoints.save(5, small(5)),
        "restore": lambda: checkpoints.restore(small(0)),
    }
    message = "checkpoint of step 4 was not saved: no space left on device"
    with pytest.raises(RuntimeError, match=message):
        calls[ask]()
    assert checkpoints.steps == [2]
    if ask != "close":
        assert checkpoints.restore(small(0)).step == 2
        assert checkpoints.save(8, small(8), data=8)
        assert checkpoints.restore(small(0)).data == 8
        checkpoints.close()
