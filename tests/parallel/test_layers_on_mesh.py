"""Layers on a mesh equal the same layers on one device: outputs and gradients of input and every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gqa_jax import (
    AttentionConfig,
    CrossAttention,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    MoEConfig,
    RopeConfig,
    SelfAttention,
    lora,
    qk_clip,
)
from gqa_jax.layers.mlp import MLP
from gqa_jax.layers.moe import MoE
from gqa_jax.parallel.context import ContextParallel, from_layout, to_layout
from gqa_jax.parallel.layers import spread
from gqa_jax.parallel.sharding import (
    MeshAxes,
    parameter_shardings,
    parameter_spec,
    shard_parameters,
)
from tests.support.compare import assert_close
from tests.support.meshes import mesh, mostly_slow, pairwise

M = 16
MESHES = {
    "tp": (dict(tp=2), MeshAxes(heads="tp")),
    "dp-tp-sp": (dict(dp=2, tp=2), MeshAxes(batch="dp", heads="tp", seq_residual="tp")),
    "fsdp-tp": (dict(dp=2, fsdp=2, tp=2), MeshAxes(batch=("dp", "fsdp"), heads="tp", embed="fsdp")),
    "cp": (dict(cp=3), MeshAxes(seq="cp")),
    "fsdp-cp-tp-sp": (
        dict(fsdp=2, cp=2, tp=2),
        MeshAxes(batch="fsdp", seq="cp", heads="tp", embed="fsdp", seq_residual="tp"),
    ),
    "cp-tk-tr": (dict(cp=2, tk=2, tr=2), MeshAxes(seq="cp", heads=("tk", "tr"))),
    "tk-tr-sp": (
        dict(fsdp=2, tk=2, tr=2),
        MeshAxes(batch="fsdp", embed="fsdp", heads=("tk", "tr"), seq_residual=("tk", "tr")),
    ),
}


def _on(layer, axes, plan=None):
    return layer if axes is None else spread(layer, axes=axes, context_parallel=plan)


def _attention(axes, plan, rich):
    config = AttentionConfig(
        model_dim=M, num_heads=4 * (2 if rich else 1), num_kv_heads=2, head_dim=8, rope=RopeConfig(theta=100.0),
        qkv_bias=rich, out_bias=rich, output_gate=rich, qk_norm="rms_zero_centred" if rich else "none",
        sinks="learnable" if rich else "none", sliding_window=5 if rich else None, dropout_rate=0.3 if rich else 0.0,
    )  # fmt: skip
    return _on(SelfAttention(config, rngs=nnx.Rngs(1), keep_rngs=False), axes, plan)


def _delta(axes, plan, rich):
    config = GatedDeltaNetConfig(
        model_dim=M, num_key_heads=4, num_value_heads=8 if rich else 4, key_head_dim=4, value_head_dim=3, conv_bias=rich
    )  # fmt: skip
    return _on(GatedDeltaNet(config, rngs=nnx.Rngs(2)), axes, plan)


def _mlp(axes, plan, rich):
    return _on(MLP(M, 24, rngs=nnx.Rngs(3)), axes)


def _moe(axes, plan, rich):
    config = MoEConfig(
        num_experts=4, num_experts_per_token=2, intermediate_size=8, shared_intermediate_size=8 if rich else None
    )  # fmt: skip
    return _on(MoE(config, M, rngs=nnx.Rngs(4)), axes)


def _adapted(axes, plan, rich):
    """LoRA, or with `rich` DoRA, on everything that attention projects."""
    layer = _attention(axes, plan, True)
    lora.apply(layer, lora.LoRAConfig(rank=3, alpha=2.0, use_dora=rich), rngs=nnx.Rngs(6))
    return layer


MEMORY = np.random.default_rng(6).normal(size=(4, 10, 12)).astype(np.float32)
MEMORY_IDS = np.random.default_rng(7).integers(-1, 3, (4, 10)).astype(np.int32)


def _cross(axes, plan, rich):
    config = AttentionConfig(
        model_dim=M, num_heads=4 * (2 if rich else 1), num_kv_heads=2, head_dim=8, is_causal=False,
        rope=RopeConfig(theta=100.0) if rich else None, qkv_bias=rich, out_bias=rich, output_gate=rich,
        qk_norm="rms" if rich else "none", sinks="learnable" if rich else "none", dropout_rate=0.0 if rich else 0.3,
    )  # fmt: skip
    return _on(CrossAttention(config, memory_dim=12, rngs=nnx.Rngs(5), keep_rngs=False), axes)


KINDS = {
    "adapted": _adapted,
    "attention": _attention,
    "cross": _cross,
    "delta": _delta,
    "mlp": _mlp,
    "moe": _moe,
}
CASES = pairwise(
    2, kind=list(KINDS), mesh=list(MESHES), rich=[False, True], packed=[False, True], axis_type=["auto", "explicit"],
    layout=["contiguous", "zigzag", "positions"],
)  # fmt: skip


def _name(case):
    return "-".join(map(str, case.values()))


def _randomised(module, rng):
    """Zero-initialised biases and sinks would hide mistakes."""
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), module)


def _run(module, x, positions, ids, drops):
    """Output, and for a mixture its statistics."""
    drop = dict(deterministic=not drops, dropout_key=jax.random.key(4))
    match module:
        case CrossAttention():
            memory = MEMORY * (1.0 + jnp.sin(x).mean())  # so that its gradient reaches that of x
            if ids is not None:
                memory = module.project_memory(memory, segment_ids=jnp.asarray(MEMORY_IDS))
            mask = np.arange(10)[None, None, None] % 7 != 3
            mask = jnp.asarray(np.broadcast_to(mask, (1, 1, x.shape[1], 10)))
            out = module(x, memory, positions=positions, segment_ids=ids, mask=mask, **drop)
            return out, ()
        case SelfAttention():
            return module(x, positions=positions, segment_ids=ids, **drop), ()
        case GatedDeltaNet():
            plan = getattr(module, "context_parallel", None)
            any_order = plan is not None and plan.layout == "positions"
            places = dict(positions=positions) if any_order else {}
            return module(x, segment_ids=ids, **places), ()
        case MoE():
            out, statistics = module.with_statistics(x, real=None if ids is None else ids >= 0)
            return out, tuple(statistics)
    return module(x), ()


# Of the largest element. Where a key of four numbers is nearly zero, its norm's derivative is large: of such a gradient
# one device in float32 misses its own float64 result by 1e-4.
TOLERANCES = {"delta": 2e-4}


def _assert_equal(actual, expected, what, tolerance=1e-5):
    top = max(1.0, float(np.abs(expected).max()))
    assert_close(actual, expected, atol=tolerance * top, what=what)


@pytest.mark.parametrize("case", mostly_slow(CASES, _name, every=("kind", "axis_type")))
def test_equals_one_device(case):
    rng = np.random.default_rng(CASES.index(case))
    sizes, axes = MESHES[case["mesh"]]
    batch, length = 4, 24
    parts = sizes.get("cp", 1)
    plan = None if axes.seq is None else ContextParallel(layout=case["layout"])
    build = KINDS[case["kind"]]
    alone = _randomised(build(None, None, case["rich"]), rng)
    x = rng.normal(size=(batch, length, M)).astype(np.float32)
    weights = rng.normal(size=x.shape).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    ids = None
    if case["packed"]:
        ids = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)

    # What cross-attention drops goes by the index of a token, which context parallelism hides.
    drops = plan is None or case["kind"] != "cross"

    def total(module, x, weights, positions, ids):
        out, extras = _run(module, x, positions, ids, drops)
        return jnp.sum(jnp.sin(out) * weights) + sum(jnp.sum(jnp.sin(e / 7)) for e in extras), (
            out,
            extras,
        )

    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (want_module, want_x), (want, want_extras) = gradient(
        alone, *map(jnp.asarray, (x, weights, positions)), ids
    )

    if plan is not None and plan.layout == "positions":
        order = rng.permutation(length)
        put, back = (lambda x: x[:, order]), (lambda x: np.asarray(x)[:, np.argsort(order)])
    else:
        layout = "contiguous" if plan is None else plan.layout
        put = lambda x: to_layout(x, axis_size=parts, layout=layout)
        back = lambda x: from_layout(np.asarray(x), axis_size=parts, layout=layout)
    the_mesh = mesh(case["axis_type"], **sizes)
    module = build(axes, plan, case["rich"])
    leaves = jax.tree.leaves(alone)
    module = jax.tree.unflatten(jax.tree.structure(module), leaves)
    with jax.set_mesh(the_mesh):
        module = shard_parameters(module, the_mesh, axes)
        place = lambda x, spec: (
            None if x is None else jax.device_put(put(x), NamedSharding(the_mesh, spec))
        )
        (got_module, got_x), (got, got_extras) = gradient(
            module, place(x, axes.residual), place(weights, axes.residual), place(positions, axes.tokens),
            place(ids, axes.tokens),
        )  # fmt: skip
    tolerance = TOLERANCES.get(case["kind"], 1e-5)
    _assert_equal(back(got), want, "output")
    for a, b in zip(got_extras, want_extras, strict=True):
        _assert_equal(a, b, "statistics")
    _assert_equal(back(got_x), want_x, "gradient of x", tolerance)
    shardings = jax.tree.leaves(parameter_shardings(module, the_mesh, axes))
    paths = jax.tree_util.tree_leaves_with_path(want_module)
    for (path, b), a, expected in zip(paths, jax.tree.leaves(got_module), shardings, strict=True):
        name = jax.tree_util.keystr(path)
        _assert_equal(a, b, f"gradient of {name}", tolerance)
        assert a.sharding.is_equivalent_to(expected, a.ndim), name


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["fsdp-cp-tp-sp", "tk-tr-sp"])
def test_the_largest_logits_are_recorded_and_clipped(name, kind):
    sizes, axes = MESHES[name]
    rng = np.random.default_rng(11)
    plan = None if axes.seq is None else ContextParallel()
    config = AttentionConfig(
        model_dim=M, num_heads=8, num_kv_heads=2, head_dim=8, qkv_bias=True, output_gate=True
    )
    alone = _randomised(SelfAttention(config, rngs=nnx.Rngs(0)), rng)
    on_mesh = spread(alone, axes=axes, context_parallel=plan)
    x = rng.normal(size=(4, 24, M)).astype(np.float32)
    ids = np.sort(rng.integers(-1, 3, (4, 24)), axis=1).astype(np.int32)
    record = jax.jit(
        lambda layer, x, ids: nnx.capture(
            lambda layer, x, ids: layer(x, positions=jnp.maximum(ids, 0), segment_ids=ids),
            qk_clip.MaxLogits,
        )(layer, x, ids)
    )
    want, wanted = record(alone, jnp.asarray(x), jnp.asarray(ids))
    (top,) = wanted["max_logits"]
    threshold = float(np.sort(np.asarray(top).max(axis=1))[:2].mean())  # between the two groups
    the_mesh = mesh(kind, **sizes)
    put = lambda x: to_layout(x, axis_size=sizes.get("cp", 1))
    with jax.set_mesh(the_mesh):
        on_mesh = shard_parameters(on_mesh, the_mesh, axes)
        place = lambda x, spec: jax.device_put(put(x), NamedSharding(the_mesh, spec))
        got, recorded = record(on_mesh, place(x, axes.residual), place(ids, axes.tokens))
        (largest,) = recorded["max_logits"]
        qk_clip.clip_layer(on_mesh, largest, threshold=threshold)
    _assert_equal(from_layout(np.asarray(got), axis_size=sizes.get("cp", 1)), want, "output")
    assert_close(largest, top, atol=1e-5, rtol=1e-5, what="largest logits")
    before = np.array(alone.qkv.kernel[...])
    qk_clip.clip_layer(alone, top, threshold=threshold)
    assert np.array_equal(before[:, 1], alone.qkv.kernel[...][:, 1]) or np.array_equal(
        before[:, 0], alone.qkv.kernel[...][:, 0]
    )
    for a, b in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(alone), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6, what="clipped")
    kernel = on_mesh.qkv.kernel[...]
    spec = parameter_spec("qkv.kernel", kernel.shape, axes, the_mesh)
    assert kernel.sharding.is_equivalent_to(NamedSharding(the_mesh, spec), 4)


def test_a_call_without_jit():
    """JAX then runs the layer one operation at a time; an empty operand there once ended the process."""
    rng = np.random.default_rng(15)
    axes = MeshAxes(heads="tp")
    alone = _randomised(_attention(None, None, False), rng)
    x = jnp.asarray(rng.normal(size=(2, 6, M)), jnp.float32)
    the_mesh = mesh("auto", tp=2)
    with jax.set_mesh(the_mesh):
        got = shard_parameters(spread(alone, axes=axes), the_mesh, axes)(x)
    _assert_equal(got, alone(x), "output")


def test_what_dropout_and_masks_cannot_have_is_said():
    x = jnp.zeros((2, 8, M))
    drop = dict(deterministic=False, dropout_key=jax.random.key(0))

    def call(layer, *inputs, **options):  # all is said before anything is compiled
        return jax.eval_shape(lambda *inputs: layer(*inputs, **options), *inputs)

    config = AttentionConfig(model_dim=M, num_heads=8, num_kv_heads=4, head_dim=8, dropout_rate=0.1)
    shared = spread(SelfAttention(config, rngs=nnx.Rngs(0)), axes=MeshAxes(heads=("tk", "tr")))
    with jax.set_mesh(mesh("auto", tk=2, tr=2)):
        call(shared, x, **drop)  # two groups go over each axis: nobody shares
    config = AttentionConfig(
        model_dim=M, num_heads=12, num_kv_heads=6, head_dim=8, dropout_rate=0.1
    )
    shared = spread(SelfAttention(config, rngs=nnx.Rngs(0)), axes=MeshAxes(heads=("tk", "tr")))
    with jax.set_mesh(mesh("auto", tk=3, tr=2)):
        call(shared, x, **drop)
    with jax.set_mesh(mesh("auto", tk=2, tr=2)):
        with pytest.raises(
            NotImplementedError,
            match=r"mesh axes \('tr',\) split the queries of groups, of which a device has 3",
        ):
            call(shared, x, **drop)
        with pytest.raises(
            ValueError, match="`dropout_offset` must be None for a layer with `axes`"
        ):
            call(shared, x, dropout_offset=(0, 0))
        with pytest.raises(NotImplementedError, match="`mask` must be the same for all heads"):
            call(shared, x, mask=jnp.ones((1, 12, 8, 8), bool))
    cross = _cross(MeshAxes(batch="dp", seq="cp"), None, False)
    with jax.set_mesh(mesh("auto", dp=2, cp=2)):
        with pytest.raises(
            NotImplementedError, match="dropout of cross-attention goes by the index"
        ):
            call(cross, x, MEMORY[:2], **drop)
        with pytest.raises(ValueError, match="`memory` must have a batch that is a multiple of 2"):
            cross.project_memory(jnp.asarray(MEMORY[:3]))
        with pytest.raises(ValueError, match="`positions` must be given where axes.seq='cp'"):
            call(_cross(cross.axes, None, True), x, MEMORY[:2])
