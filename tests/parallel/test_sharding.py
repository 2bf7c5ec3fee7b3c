"""Which mesh axis splits what: nothing is replicated in silence, nothing is cut inside a group, errors name numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gqa_jax import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    GatedDeltaNetConfig,
    MoEConfig,
    SelfAttention,
    sharding,
)
from gqa_jax.layers.mlp import MLP
from gqa_jax.parallel.context import ContextParallel, from_layout, to_layout
from gqa_jax.parallel.layers import spread
from gqa_jax.parallel.sharding import MeshAxes
from gqa_jax.train.step import TrainState, train_step
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.meshes import mesh

ATTENTION = AttentionConfig(
    model_dim=32, num_heads=8, num_kv_heads=2, head_dim=8, sinks="learnable", qkv_bias=True
)
HYBRID = DecoderConfig(
    vocab_size=64, model_dim=32, layers=("linear_attention", "full_attention") * 2, attention=ATTENTION,
    gated_deltanet=GatedDeltaNetConfig(
        model_dim=32, num_key_heads=4, num_value_heads=8, key_head_dim=8, value_head_dim=8
    ),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=16, shared_intermediate_size=16),
    moe_layers=(True, False) * 2, intermediate_size=32,
)  # fmt: skip


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "sizes, axes",
    [
        (dict(fsdp=2, tp=4), MeshAxes(batch="fsdp", embed="fsdp", heads="tp")),
        (dict(fsdp=2, tk=2, tr=2), MeshAxes(batch="fsdp", embed="fsdp", heads=("tk", "tr"))),
    ],
)
def test_every_large_parameter_is_stored_once(sizes, axes, scan):
    """Also of the optimizer: shards of eight devices add up to the model, but for vectors of a few numbers."""
    groups = 2 if "tk" in sizes else 4
    attention = dataclasses.replace(ATTENTION, num_kv_heads=groups)
    config = dataclasses.replace(HYBRID, scan_layers=scan, attention=attention)
    the_mesh = mesh("auto", **sizes)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    optimizer = nnx.eval_shape(
        lambda: nnx.Optimizer(Decoder(config, rngs=nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)
    )
    for tree in (model, optimizer):
        specs = sharding.parameter_specs(tree, axes, the_mesh)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(tree), specs, strict=True
        ):
            if leaf.ndim == 0:
                continue
            shard = np.prod(jax.NamedSharding(the_mesh, spec).shard_shape(leaf.shape))
            name = sharding.path_name(path)
            small = name.endswith((".scale", ".bias", "sinks", "A_log", "dt_bias", "conv.kernel"))
            split_by_width_only = name.endswith(("router.kernel", "shared_gate.kernel"))
            want = leaf.size / 8
            if small:
                want = leaf.size
            if split_by_width_only:
                want = leaf.size / 2
            assert shard <= want, f"{name} {leaf.shape} as {spec}: {shard} numbers per device"


def test_shards_are_whole_groups():
    the_mesh = mesh("auto", fsdp=2, tk=2, tr=2)
    axes = MeshAxes(batch="fsdp", embed="fsdp", heads=("tk", "tr"))
    layer = sharding.shard_parameters(SelfAttention(ATTENTION, rngs=nnx.Rngs(0)), the_mesh, axes)
    sharding.assert_colwise_parallel("qkv.kernel", layer.qkv.kernel[...], group_axis=1)
    torn = jax.device_put(layer.qkv.kernel[...], jax.NamedSharding(the_mesh, P(None, None, "tk")))
    with pytest.raises(
        ValueError,
        match=r"`qkv.kernel` is interleaved by groups .* \(32, 2, 6, 8\) in shards of \(32, 2, 3, 8\)",
    ):
        sharding.assert_colwise_parallel("qkv.kernel", torn, group_axis=1)
    assert layer.qkv.kernel[...].sharding.spec == P(("fsdp", "tr"), "tk", None, None)
    assert layer.out.kernel[...].sharding.spec == P("tk", "tr", None, "fsdp")


def test_a_checkpoint_does_not_depend_on_the_mesh():
    layer = SelfAttention(ATTENTION, rngs=nnx.Rngs(0))
    axes = MeshAxes(heads="tp")
    once = sharding.shard_parameters(layer, mesh("auto", tp=2), axes)
    again = sharding.shard_parameters(
        once, mesh("explicit", dp=4, tp=2), MeshAxes(batch="dp", embed="dp", heads="tp")
    )
    for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(again), strict=True):
        assert_bitwise_equal(b, a)


def test_one_parameter_at_a_time():
    the_mesh = mesh("auto", tp=2)
    at = sharding.sharding_of_path(the_mesh, MeshAxes(heads="tp"), overrides={"lora_a": P()})
    assert at("layers.3.mixer.qkv.kernel", (32, 2, 6, 8)).spec == P(None, "tp", None, None)
    assert at("layers.0.mixer.out.kernel", (5, 2, 4, 8, 32)).spec == P(None, "tp", None, None, None)
    assert at("layers.0.mixer.qkv.lora_a", (32, 4)).spec == P()


def test_errors_name_the_numbers():
    the_mesh = mesh("auto", tp=4)
    axes = MeshAxes(heads="tp")
    spec = lambda *a, **k: sharding.parameter_spec(*a, axes, the_mesh, **k)
    with pytest.raises(ValueError, match="`overrides` must give a PartitionSpec for 'x.strange'"):
        spec("x.strange", (4,))
    with pytest.raises(
        ValueError,
        match=r"dimension 1 of `out.kernel` must be a multiple of 4 .* got shape .*; factor `heads`",
    ):
        spec("out.kernel", (2, 2, 8, 32))
    with pytest.raises(
        ValueError,
        match=r"dimension 1 of `in_proj.kernel` must be a multiple of 4 .*got shape \(32, 2, 20\)",
    ):
        spec("in_proj.kernel", (32, 2, 20))
    with pytest.raises(
        ValueError,
        match=r"`qkv.kernel` must have 4 dimensions, or one more when stacked, got shape \(2, 3\)",
    ):
        spec("qkv.kernel", (2, 3))
    with pytest.raises(
        ValueError, match=r"`heads` must name axes of the mesh {'tp': 4}, got 'model'"
    ):
        sharding.check_axes(MeshAxes(heads="model"), the_mesh)
    with pytest.raises(ValueError, match=r"must not share axes, got \['a'\] twice"):
        MeshAxes(batch="a", heads="a")
    with pytest.raises(ValueError, match="`embed` must be among the axes of `batch`"):
        MeshAxes(embed="fsdp")
    with pytest.raises(
        ValueError, match="`seq_residual` must be None or equal `heads='tp'`, got 'cp'"
    ):
        MeshAxes(heads="tp", seq_residual="cp")
    with pytest.raises(ValueError, match="must be used under `jax.set_mesh"):
        spread(MLP(8, 8, rngs=nnx.Rngs(0)), axes=axes)(jnp.zeros((1, 2, 8)))
    with pytest.raises(
        ValueError, match="`context_parallel` and `axes.seq` must be given together"
    ):
        spread(SelfAttention(ATTENTION, rngs=nnx.Rngs(0)), axes=MeshAxes(seq="cp"))
    for field, value in (("mode", "p2p"), ("layout", "striped"), ("state_exchange", "tree")):
        with pytest.raises(ValueError, match=f"`{field}` must be one of .*, got '{value}'"):
            ContextParallel(**{field: value})
    axes = MeshAxes(batch="dp", seq="cp")
    layer = SelfAttention(ATTENTION, rngs=nnx.Rngs(0))
    layer = spread(layer, axes=axes, context_parallel=ContextParallel())
    with jax.set_mesh(mesh("auto", dp=2, cp=4)):
        with pytest.raises(
            ValueError, match=r"length that is a multiple of 8 \(mesh axes \('cp',\)\), got T=12"
        ):
            layer(jnp.zeros((2, 12, 32)))
        with pytest.raises(
            ValueError, match=r"batch that is a multiple of 2 \(mesh axes \('dp',\)\), got B=3"
        ):
            layer(jnp.zeros((3, 16, 32)))
        with pytest.raises(ValueError, match="`mask` must be None under context parallelism"):
            layer(jnp.zeros((2, 16, 32)), mask=jnp.ones((1, 1, 16, 16), bool))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_layout_and_back(layout):
    batch = {"tokens": np.arange(24).reshape(2, 12), "x": jnp.arange(72.0).reshape(2, 12, 3)}
    there = to_layout(batch, axis_size=3, layout=layout)
    again = from_layout(there, axis_size=3, layout=layout)
    assert isinstance(there["tokens"], np.ndarray)
    for name in batch:
        assert_bitwise_equal(again[name], batch[name])
    assert there["tokens"][0].tolist() == (
        list(range(12)) if layout == "contiguous" else [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    )
    with pytest.raises(ValueError, match="T=12 must be a multiple of"):
        to_layout(batch, axis_size=5, layout=layout)
    with pytest.raises(
        ValueError, match="`layout` must be 'contiguous' or 'zigzag', got 'positions'"
    ):
        to_layout(batch, axis_size=3, layout="positions")


# Optimizers ---------------------------------------------------------------------------------------------------------

SMALL = DecoderConfig(
    vocab_size=40, model_dim=16, layers=("full_attention",), intermediate_size=24, tie_embeddings=True,
    attention=AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8),
)  # fmt: skip
AXES = MeshAxes(batch="dp", embed="dp", heads="tp")


def by_part(params):
    """Labels for `optax.partition`: embeddings, mlp, attention and the rest go to an optimizer each."""
    parts = ("embed", "mlp.", "mixer.")

    def label(path, _):
        name = sharding.path_name(path)
        return next((part for part in parts if part in name), "rest")

    return jax.tree_util.tree_map_with_path(label, params)


ADAFACTOR = optax.adafactor(1e-2, min_dim_size_to_factor=4)
EVERY_KIND = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition(
        {
            "embed": ADAFACTOR,
            "mlp.": optax.contrib.muon(1e-2),
            "mixer.": optax.sm3(1e-2),
            "rest": optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(1e-2, 1e-3, 5)),
        },
        by_part,
    ),
    optax.masked(optax.trace(0.9), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
)


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(EVERY_KIND, id="every_kind"),
        *(
            pytest.param(optimizer, id=name, marks=pytest.mark.slow)
            for name, optimizer in dict(
                adafactor=ADAFACTOR, muon=optax.contrib.muon(1e-2), sm3=optax.sm3(1e-2), lion=optax.lion(1e-3),
                momentum=optax.sgd(0.1, momentum=0.9), adamw=optax.adamw(1e-2),
            ).items()
        ),
    ],
)  # fmt: skip
def test_optimizers_train_on_a_mesh_as_on_one_device(optimizer):
    the_mesh = mesh("auto", dp=4, tp=2)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 40, (4, 9)).astype(np.int32) for _ in range(3)]
    alone = TrainState.create(Decoder(SMALL, rngs=nnx.Rngs(0)), optimizer)
    with jax.set_mesh(the_mesh):
        spread = TrainState.create_on_mesh(
            lambda: Decoder(SMALL, rngs=nnx.Rngs(0), axes=AXES), optimizer, the_mesh
        )
        before = jax.tree.map(lambda x: np.asarray(x), spread.params)
        for tokens in batches:
            alone, expected, _ = train_step(alone, tokens, optimizer=optimizer)
            there = jax.device_put(tokens, jax.NamedSharding(the_mesh, AXES.tokens))
            spread, loss, _ = train_step(spread, there, optimizer=optimizer)
            assert_close(loss, expected, atol=2e-6)
    for got, want, old in zip(
        *map(jax.tree.leaves, (spread.params, alone.params, before)), strict=True
    ):
        assert_close(got, want, atol=2e-5)
        assert np.abs(np.asarray(want) - old).max() > 1e-3  # it moved, by fifty times the tolerance


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("optimizer", [ADAFACTOR, EVERY_KIND], ids=["adafactor", "every_kind"])
def test_an_optimizers_state_lies_as_its_parameters(optimizer, scan):
    """Moments of a parameter's shape are split as it is; those with fewer dimensions as those that they have."""
    config = dataclasses.replace(HYBRID, scan_layers=scan)
    the_mesh, axes = mesh("auto", dp=2, tp=2), MeshAxes(batch="dp", embed="dp", heads="tp")
    state = nnx.eval_shape(
        lambda: TrainState.create(Decoder(config, rngs=nnx.Rngs(0), axes=axes), optimizer)
    )
    specs = sharding.parameter_specs(state, axes, the_mesh)
    placed = {}
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(state), specs, strict=True):
        jax.NamedSharding(the_mesh, spec).shard_shape(leaf.shape)  # raises if it does not fit
        placed[sharding.path_name(path)] = (leaf.shape, tuple(spec))
    params = {n.removeprefix("params."): v for n, v in placed.items() if n.startswith("params.")}
    moments = {n: v for n, v in placed.items() if n.startswith("opt_state.")}
    for name, (shape, spec) in moments.items():
        owner = [value for n, value in params.items() if name.endswith("." + n)]
        if owner and owner[0][0] == shape:
            assert spec == owner[0][1], name
    embedding = {
        name.split(".embed.embedding")[0].split(".")[-1] + name.split("embedding")[1]: value
        for name, value in moments.items()
        if ".embed.embedding" in name
    }
    assert embedding["v_row"] == ((32,), ("dp",))
    assert embedding["v_col"] == ((64,), ("tp",))
    covers = [v for name, v in moments.items() if "qkv.kernel.value" in name]  # of SM3
    assert not covers or ((32,), ("dp",)) in covers
    assert not covers or scan or ((2,), ("tp",)) in covers  # there are as many layers as groups
    alone = sharding.parameter_specs(state.opt_state, axes, the_mesh)  # without the parameters
    for leaf, spec in zip(jax.tree.leaves(state.opt_state), alone, strict=True):
        jax.NamedSharding(the_mesh, spec).shard_shape(leaf.shape)


def test_the_advice_of_the_error_can_be_followed():
    the_mesh = mesh("auto", tp=2)

    class Odd(nnx.Module):
        axes = MeshAxes(heads="tp")

        def __init__(self):
            self.strange = nnx.Param(jnp.zeros((4, 2)))

    create = functools.partial(TrainState.create_on_mesh, Odd, ADAFACTOR, the_mesh)
    with pytest.raises(ValueError, match="`overrides` must give a PartitionSpec for 'params.stran"):
        create()
    state = create(overrides={"strange": P("tp")})
    factored = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (4, 2)]
    for leaf in (state.params["strange"][...], *factored):
        assert leaf.sharding.spec == P("tp", None) or leaf.sharding.spec == P("tp")
    assert factored
    with pytest.raises(ValueError, match="`qkv.kernel` must have 4 dimensions"):  # a parameter
        sharding.parameter_specs(
            {"qkv": {"kernel": jnp.ones((2, 3))}}, AXES, mesh("auto", dp=4, tp=2)
        )
