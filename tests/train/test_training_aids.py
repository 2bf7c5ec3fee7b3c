"""Named checkpoints and policies, QK-clip, replica check."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding

from gqa_jax import (
    AttentionConfig,
    CrossAttention,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    SelfAttention,
    qk_clip,
    recompute,
)
from gqa_jax.layers import records
from gqa_jax.train import replica_check
from pallas_kernels import gqa_attention_with_lse
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.random_layers import draw

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True)
DELTA = GatedDeltaNetConfig(
    model_dim=24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4
)


def layer_of(kind):
    if kind == "attention":
        return SelfAttention(dataclasses.replace(BASE, qk_norm="rms"), rngs=nnx.Rngs(0))
    if kind == "cross":
        config = dataclasses.replace(BASE, is_causal=False)
        return CrossAttention(config, rngs=nnx.Rngs(0))
    return GatedDeltaNet(DELTA, rngs=nnx.Rngs(0))


def loss_of(kind, policy):
    graph, state = nnx.split(layer_of(kind))
    x = draw(0, 2, 9, 24)

    def forward(state, x):
        layer = nnx.merge(graph, state)
        return layer(x, draw(1, 2, 5, 24)) if kind == "cross" else layer(x)

    if policy is not None:
        forward = jax.checkpoint(forward, policy=policy)
    return lambda state: (forward(state, x) ** 2).sum(), state


NAMED = {
    "attention": {
        "qkv": (2, 9, 2, 4, 8), "norm_out": (2, 9, 4, 8), "core_attention": (2, 9, 4, 8)
    },
    "delta": {"qkv": (2, 9, 2, 32), "norm_out": (2, 9, 4, 4), "core_attention": (2, 9, 4, 4)},
    "cross": {"qkv": (2, 9, 2, 2, 8), "core_attention": (2, 9, 4, 8)},
}  # fmt: skip


def saved(loss, state):
    """Lines like `f32[2,9,4,8] named 'qkv' from ...`, one per value that the backward pass is given."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_saved_residuals(loss, state)
    return [line for line in out.getvalue().splitlines() if "named" in line]


@pytest.mark.parametrize("kind", NAMED)
def test_every_name_is_saved_when_asked_for(kind):
    for name, shape in NAMED[kind].items():
        loss, state = loss_of(kind, recompute.policy(save=(name,)))
        kept = saved(loss, state)
        expected = f"f32[{','.join(map(str, shape))}] named '{name}'"
        assert any(line.startswith(expected) for line in kept), f"{expected}: {kept}"
        assert all(f"named '{name}'" in line for line in kept)
    loss, state = loss_of(kind, recompute.policy())
    assert not saved(loss, state)


@pytest.mark.parametrize("kind", NAMED)
def test_recomputation_changes_no_gradient(kind):
    loss, state = loss_of(kind, None)
    expected = jax.jit(jax.grad(loss))(state)
    loss, _ = loss_of(kind, recompute.policy(save=("core_attention",)))
    jax.tree.map(
        lambda a, b: assert_close(a, b, atol=2e-5, rtol=2e-5),
        jax.jit(jax.grad(loss))(state),
        expected,
    )


def test_offload_moves_the_named_values_to_the_host():
    loss, state = loss_of("attention", recompute.policy(save=("qkv",), offload=("core_attention",)))
    assert "f32<host>[2,9,4,8]" in str(jax.make_jaxpr(jax.grad(loss))(state))
    plain, _ = loss_of("attention", None)
    expected = jax.jit(jax.grad(plain))(state)
    jax.tree.map(
        lambda a, b: assert_close(a, b, atol=2e-5, rtol=2e-5),
        jax.jit(jax.grad(loss))(state),
        expected,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(save=("attention",)), r"`save` must hold names out of \('qkv', 'norm_out'"),
        (dict(save="qkv"), "`save` must hold names out of"),
        (dict(offload=("x",)), "`offload` must hold names out of"),
        (dict(save=("qkv",), offload=("qkv",)), r"must not share names, got \['qkv'\]"),
    ],
)
def test_bad_policies(options, message):
    with pytest.raises(ValueError, match=message):
        recompute.policy(**options)


def test_offload_without_host_memory_is_refused(monkeypatch):
    class Device:
        platform = "toy"
        addressable_memories = staticmethod(list)

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match="`offload` cannot run on toy"):
        recompute.policy(offload=("qkv",))


# QK-clip ----------------------------------------------------------------------------------------------------------


def explicit_max_logits(query, key, scale, visible):
    """`[K, R]` in float64, one product per head."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    groups = key.shape[2]
    per_group = query.shape[2] // groups
    top = np.full((groups, per_group), -np.inf)
    for head in range(query.shape[2]):
        group, r = divmod(head, per_group)
        for row in range(query.shape[0]):
            logits = scale * query[row, :, head] @ key[row, :, group].T
            logits[~visible[row]] = -np.inf
            top[group, r] = max(top[group, r], logits.max())
    return top


@pytest.mark.parametrize(
    "is_causal, window, scale", [(True, None, None), (True, 3, 0.7), (False, None, 2.0)]
)
def test_max_logits_equal_the_explicit_maximum(is_causal, window, scale, monkeypatch):
    monkeypatch.setattr(records, "KEY_BLOCK", 4)  # 11 keys: two whole blocks and one moved back
    query, key = draw(1, 2, 11, 6, 8), draw(2, 2, 11, 3, 8)
    ids = jnp.asarray([[0] * 6 + [1] * 5, [-1] * 2 + [0] * 9])
    distance = np.subtract.outer(np.arange(11), np.arange(11))
    visible = np.ones((2, 11, 11), bool)
    if is_causal:
        visible &= distance >= 0
    if window:
        visible &= distance < window
    ids_np = np.asarray(ids)
    visible &= (ids_np[:, :, None] == ids_np[:, None, :]) & (ids_np >= 0)[:, :, None]
    options = dict(scale=scale, is_causal=is_causal, sliding_window=window)
    got = qk_clip.max_logits(query, key, segment_ids=ids, **options)
    assert_close(got, explicit_max_logits(query, key, scale or 8**-0.5, visible), atol=1e-5)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 6, 11, 11)) < 0.4)
    got = qk_clip.max_logits(query, key, mask=mask[:, :1], segment_ids=ids, **options)
    both = visible & np.asarray(mask[:, 0])
    assert_close(got, explicit_max_logits(query, key, scale or 8**-0.5, both), atol=1e-5)


def test_max_logits_bound_the_lse():
    query, key = draw(1, 2, 11, 6, 8), draw(2, 2, 11, 3, 8)
    top = qk_clip.max_logits(query, key)
    lse = gqa_attention_with_lse(query, key, key, is_causal=True).lse
    highest = np.asarray(lse).max(axis=(0, 1)).reshape(3, 2)
    assert (highest >= np.asarray(top) - 1e-5).all()
    assert (highest <= np.asarray(top) + np.log(11) + 1e-5).all()


def test_a_layer_records_its_logits_only_when_asked():
    layer, x = SelfAttention(BASE, rngs=nnx.Rngs(0)), draw(0, 2, 9, 24)
    out, recorded = nnx.capture(lambda m, x: m(x), qk_clip.MaxLogits)(layer, x)
    assert_bitwise_equal(out, layer(x))
    (top,) = recorded["max_logits"]
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    query, key, _, _ = layer.project(x, positions)
    visible = np.broadcast_to(np.tril(np.ones((9, 9), bool)), (2, 9, 9))
    assert_close(top, explicit_max_logits(query, key, 8**-0.5, visible), atol=1e-5)
    assert not hasattr(layer, "max_logits")


@pytest.mark.parametrize(
    "logits, groups, clipped",
    [
        ([50, 60, 70, 80], 4, [False] * 4),
        ([150, 160, 170, 180], 4, [True] * 4),
        ([80, 150, 90, 200], 4, [False, True, False, True]),
        ([80, 150, 90, 200], 2, [True, True]),
        ([150, 160, 170, 180, 190, 200, 210, 220], 4, [True] * 4),
        ([-5, -3, 100, 100.5], 2, [False, True]),
    ],
)
def test_clip_scales_exactly_the_groups_over_the_threshold(logits, groups, clipped):
    top = jnp.asarray(logits, jnp.float32).reshape(groups, -1)
    per_group = top.shape[1]
    kernel, bias = draw(0, 6, groups, per_group + 2, 8), draw(1, groups, per_group + 2, 8)
    for alpha in (0.5, 0.25):
        out = qk_clip.clip_qkv(kernel, top, threshold=100.0, alpha=alpha)
        moved = np.asarray((out != kernel).any(axis=(0, 2, 3)))
        assert moved.tolist() == clipped
        eta = np.minimum(1.0, 100.0 / np.maximum(np.asarray(top, np.float64).max(axis=1), 1e-9))
        expected = np.asarray(kernel, np.float64).copy()
        expected[:, :, :per_group] *= eta[None, :, None, None] ** alpha
        expected[:, :, -2] *= eta[None, :, None] ** (1 - alpha)
        assert_close(out, expected, atol=1e-6)
        assert_bitwise_equal(out[:, :, -1], kernel[:, :, -1])
        key_bias = np.asarray(bias)[:, -2] * eta[:, None] ** (1 - alpha)
        assert_close(qk_clip.clip_qkv(bias, top, alpha=alpha)[:, -2], key_bias, atol=1e-6)


@pytest.mark.parametrize("gate", [False, True])
def test_the_largest_logit_after_a_clip_is_the_threshold(gate):
    config = dataclasses.replace(BASE, output_gate=gate)
    layer = SelfAttention(config, rngs=nnx.Rngs(0))
    layer.qkv.bias[...] = draw(3, *layer.qkv.bias.shape)
    before, x = jax.tree.map(jnp.copy, nnx.state(layer)), draw(0, 2, 9, 24)
    record = nnx.capture(lambda m: m(x), qk_clip.MaxLogits)
    top = record(layer)[1]["max_logits"][0]
    threshold = 0.6 * float(top.max())
    masters = {"kernel": layer.qkv.kernel[...] * 1.0, "bias": layer.qkv.bias[...] * 1.0}
    clipped = qk_clip.clip_layer(layer, top, threshold=threshold, masters=masters)
    after = record(layer)[1]["max_logits"][0].max(axis=1)
    assert_close(after, np.minimum(np.asarray(top).max(axis=1), threshold), atol=1e-4)
    assert_bitwise_equal(clipped["kernel"], layer.qkv.kernel[...])
    assert_bitwise_equal(clipped["bias"], layer.qkv.bias[...])
    if gate:
        old = before["qkv"]["kernel"][...]
        assert_bitwise_equal(layer.qkv.kernel[...][:, :, 2:4], old[:, :, 2:4])


def test_clip_of_stacked_layers_and_of_low_precision():
    kernel, top = draw(0, 3, 6, 2, 4, 8), 60.0 + 60.0 * jnp.abs(draw(1, 3, 2, 2))
    out = qk_clip.clip_qkv(kernel, top)
    for i in range(3):
        assert_bitwise_equal(out[i], qk_clip.clip_qkv(kernel[i], top[i]))
    narrow = kernel[0].astype(jnp.bfloat16)
    assert qk_clip.clip_qkv(narrow, top[0]).dtype == jnp.bfloat16


def test_clip_is_the_same_on_shards_of_whole_groups():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    kernel, top = draw(0, 6, 4, 4, 8), 200.0 * jnp.abs(draw(1, 4, 2))
    expected = qk_clip.clip_qkv(kernel, top)
    sharded = jax.device_put(kernel, NamedSharding(mesh, jax.P(None, "model")))
    logits = jax.device_put(top, NamedSharding(mesh, jax.P("model")))
    out = jax.jit(qk_clip.clip_qkv)(sharded, logits)
    assert out.sharding.is_equivalent_to(sharded.sharding, 4)
    assert_bitwise_equal(out, expected)
    # Inside shard_map each device clips its own groups.
    local = jax.shard_map(
        qk_clip.clip_qkv, mesh=mesh,
        in_specs=(jax.P(None, "model"), jax.P("model")), out_specs=jax.P(None, "model"),
    )  # fmt: skip
    assert_bitwise_equal(local(sharded, logits), expected)


def test_clip_refuses_what_it_cannot_do():
    layer = SelfAttention(dataclasses.replace(BASE, qk_norm="rms"), rngs=nnx.Rngs(0))
    top = jnp.full((2, 2), 200.0)
    message = "`layer` must not normalise queries and keys, got qk_norm='rms'"
    with pytest.raises(ValueError, match=message):
        qk_clip.clip_layer(layer, top)
    kernel = draw(0, 6, 2, 4, 8)
    with pytest.raises(ValueError, match="`max_logits` must be recorded in a forward pass"):
        qk_clip.clip_qkv(kernel, None)
    with pytest.raises(ValueError, match="`threshold` must be positive, got 0"):
        qk_clip.clip_qkv(kernel, top, threshold=0)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got 2"):
        qk_clip.clip_qkv(kernel, top, alpha=2)
    with pytest.raises(ValueError, match=r"`fused` must have shape \[..., K=3, R \+ 2 or 2R"):
        qk_clip.clip_qkv(kernel, jnp.ones((3, 2)))
    plain = SelfAttention(BASE, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`masters` must hold only \['bias', 'kernel'\], got"):
        qk_clip.clip_layer(plain, top, masters={"weight": kernel})


# Replica check ----------------------------------------------------------------------------------------------------


def replicas(mesh, spec, value, change=None):
    """An array whose replica on device `change[0]` has `change[1]` applied."""
    sharding = NamedSharding(mesh, spec)
    pieces = []
    for device, index in sharding.devices_indices_map(value.shape).items():
        piece = np.array(value[index])
        if change is not None and device.id == change[0]:
            piece = change[1](piece)
        pieces.append(jax.device_put(piece, device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, pieces)


def one_bit(piece):
    flat = piece.reshape(-1).view(np.uint8)
    flat[-1] ^= 1
    return piece


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_one_bit_on_one_device_is_found_and_named(mesh, dtype):
    value = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 6))).astype(dtype))
    for device in (0, 3, 7):
        change = (device, one_bit if dtype != "bool" else np.logical_not)
        tree = {
            "good": replicas(mesh, jax.P(), value),
            "layers": [{"scale": replicas(mesh, jax.P(), value, change)}],
            "sharded": replicas(mesh, jax.P("data", None), value),
        }
        (found,) = replica_check.find_mismatches(tree)
        assert found.path == "layers.0.scale"
        assert found.device.id == device
        assert (found.agreeing, found.differing) == (7, 1)
        message = r"1 replicas differ[^:]*:\n  layers\.0\.scale on .*differs from 7"
        with pytest.raises(RuntimeError, match=message):
            replica_check.check_replicas(tree)
        del tree["layers"]
        replica_check.check_replicas(tree)


def test_pieces_are_compared_with_their_own_copies_only(mesh):
    value = np.arange(32, dtype=np.float32).reshape(8, 4)  # every piece differs from every other
    replica_check.check_replicas(replicas(mesh, jax.P("model", None), value))
    replica_check.check_replicas(replicas(mesh, jax.P(("data", "model")), value))
    (found,) = replica_check.find_mismatches(
        replicas(mesh, jax.P("model", None), value, (5, one_bit))
    )
    # Two copies, no majority: the first in mesh order counts as right, device 5 is the other.
    assert found.device.id == 5
    assert (found.agreeing, found.differing) == (1, 1)


def test_order_and_sign_of_zero_count(mesh):
    value = np.arange(6, dtype=np.float32)
    swap = lambda piece: piece[[1, 0, 2, 3, 4, 5]]
    assert replica_check.find_mismatches(replicas(mesh, jax.P(), value, (2, swap)))
    minus = lambda piece: np.copysign(piece, -1.0)
    zeros = np.zeros(3, np.float32)
    assert replica_check.find_mismatches(replicas(mesh, jax.P(), zeros, (2, minus)))
    nan = np.full(3, np.nan, np.float32)  # equal bits are equal
    replica_check.check_replicas(replicas(mesh, jax.P(), nan))


def test_a_whole_module_and_arrays_on_one_device(mesh):
    layer = SelfAttention(dataclasses.replace(BASE, qk_norm="rms"), rngs=nnx.Rngs(0))
    replica_check.check_replicas(layer)
    scale = np.ones(8, np.float32)
    layer.q_norm.scale[...] = replicas(mesh, jax.P(), scale, (4, one_bit))
    (found,) = replica_check.find_mismatches(layer)
    assert found.path.startswith("q_norm.scale")
    assert found.device.id == 4
