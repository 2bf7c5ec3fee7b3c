"""Layers on a mesh equal the same layers on one device: outputs and gradients of input and every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gqa_jax import (
    AttentionConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    MoEConfig,
    RopeConfig,
    SelfAttention,
)
from gqa_jax.context_parallel import ContextParallel, from_layout, to_layout
from gqa_jax.mlp import MLP
from gqa_jax.moe import MoE
from gqa_jax.sharding import MeshAxes, parameter_shardings, shard_parameters
from tests.support.compare import assert_close
from tests.support.meshes import mesh, pairwise

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


def _attention(axes, plan, rich):
    config = AttentionConfig(
        model_dim=M, num_heads=4 * (2 if rich else 1), num_kv_heads=2, head_dim=8, rope=RopeConfig(theta=100.0),
        qkv_bias=rich, out_bias=rich, output_gate=rich, qk_norm="rms_zero_centred" if rich else "none",
        sinks="learnable" if rich else "none", sliding_window=5 if rich else None,
    )  # fmt: skip
    return SelfAttention(config, rngs=nnx.Rngs(1), axes=axes, context_parallel=plan)


def _delta(axes, plan, rich):
    config = GatedDeltaNetConfig(
        model_dim=M, num_key_heads=4, num_value_heads=8 if rich else 4, key_head_dim=4, value_head_dim=3, conv_bias=rich
    )  # fmt: skip
    return GatedDeltaNet(config, rngs=nnx.Rngs(2), axes=axes, context_parallel=plan)


def _mlp(axes, plan, rich):
    return MLP(M, 24, rngs=nnx.Rngs(3), axes=axes)


def _moe(axes, plan, rich):
    config = MoEConfig(
        num_experts=4, num_experts_per_token=2, intermediate_size=8, shared_intermediate_size=8 if rich else None
    )  # fmt: skip
    return MoE(config, M, rngs=nnx.Rngs(4), axes=axes)


KINDS = {"attention": _attention, "delta": _delta, "mlp": _mlp, "moe": _moe}
CASES = pairwise(
    2, kind=list(KINDS), mesh=list(MESHES), rich=[False, True], packed=[False, True], axis_type=["auto", "explicit"],
    layout=["contiguous", "zigzag", "positions"],
)  # fmt: skip


def _randomised(module, rng):
    """Zero-initialised biases and sinks would hide mistakes."""
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), module)


def _run(module, x, positions, ids):
    """Output, and for a mixture its statistics."""
    match module:
        case SelfAttention():
            return module(x, positions=positions, segment_ids=ids), ()
        case GatedDeltaNet():
            any_order = (
                module.context_parallel is not None
                and module.context_parallel.layout == "positions"
            )
            return module(x, positions=positions if any_order else None, segment_ids=ids), ()
        case MoE():
            out, statistics = module.with_statistics(x, real=None if ids is None else ids >= 0)
            return out, tuple(statistics)
    return module(x), ()


def _assert_equal(actual, expected, what):
    """To float32 rounding of the largest element: gradients are sums over many tokens."""
    top = max(1.0, float(np.abs(expected).max()))
    assert_close(actual, expected, atol=3e-5 * top, what=what)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_equals_one_device(case):
    rng = np.random.default_rng(CASES.index(case))
    sizes, axes = MESHES[case["mesh"]]
    batch, length = 4, 24
    spread = sizes.get("cp", 1)
    plan = None if axes.seq is None else ContextParallel(layout=case["layout"])
    build = KINDS[case["kind"]]
    alone = _randomised(build(None, None, case["rich"]), rng)
    x = rng.normal(size=(batch, length, M)).astype(np.float32)
    weights = rng.normal(size=x.shape).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    ids = None
    if case["packed"]:
        ids = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)

    def total(module, x, weights, positions, ids):
        out, extras = _run(module, x, positions, ids)
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
        put = lambda x: to_layout(x, axis_size=spread, layout=layout)
        back = lambda x: from_layout(np.asarray(x), axis_size=spread, layout=layout)
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
    _assert_equal(back(got), want, "output")
    for a, b in zip(got_extras, want_extras, strict=True):
        _assert_equal(a, b, "statistics")
    _assert_equal(back(got_x), want_x, "gradient of x")
    shardings = jax.tree.leaves(parameter_shardings(module, the_mesh, axes))
    paths = jax.tree_util.tree_leaves_with_path(want_module)
    for (path, b), a, expected in zip(paths, jax.tree.leaves(got_module), shardings, strict=True):
        name = jax.tree_util.keystr(path)
        _assert_equal(a, b, f"gradient of {name}")
        assert a.sharding.is_equivalent_to(expected, a.ndim), name
