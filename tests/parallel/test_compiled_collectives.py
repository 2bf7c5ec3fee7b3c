"""What crosses eight H200s: counted, weighed, and looked up in the schedule of programs compiled for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gqa_jax import (
    AttentionConfig,
    DecoderConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    SelfAttention,
)
from gqa_jax.models.decoder_layer import DecoderLayer
from gqa_jax.parallel import caches, region
from gqa_jax.parallel.context import ContextParallel, context_attention
from gqa_jax.parallel.context.affine import cheapest_exchange
from gqa_jax.parallel.layers import spread
from gqa_jax.parallel.sharding import MeshAxes, parameter_shardings
from gqa_jax.planner import costs
from pallas_kernels import aot
from pallas_kernels.aot import hlo
from tests.support.aot import require
from tests.support.meshes import mesh as cpu_mesh

# The machine code is not looked at; without optimising it the schedule is the same, sooner.
OPTIONS = {"xla_backend_optimization_level": 0}
MIB = 2**20


class Program:
    """One program compiled for a mesh of H200s."""

    def __init__(self, build, shape: dict[str, int], *, explicit: bool = False, **jit_options):
        require()
        mesh = aot.topology("h200", shape=shape, explicit=explicit)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            function, arguments = build(mesh)
            compiled = aot.compile_only(
                function, *arguments, mesh=mesh, compiler_options=OPTIONS, **jit_options
            )
        self.memory: Any = compiled.executable.memory_analysis()
        self.text = compiled.executable.as_text() or ""
        self.collectives = costs(self.text, shape, aot.rates("h200")).collectives

    def of(self, kind: str) -> list:
        """Collectives of a kind, in the order of the schedule."""
        return [each for each in self.collectives if each.kind == kind]

    def bytes(self, kind: str) -> int:
        """Of the results of all collectives of a kind."""
        return sum(each.times * each.result_bytes for each in self.of(kind))

    def large(self, size: int) -> list[str]:
        """Kinds of the collectives whose result has at least so many bytes."""
        return sorted(c.kind for c in self.collectives if c.result_bytes >= size)


def _struct(mesh, spec, *shape, dtype: Any = jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _placed(make, mesh, axes):
    module = jax.eval_shape(make)
    place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
    return jax.tree.map(place, module, parameter_shardings(module, mesh, axes))


BLOCK = DecoderConfig(
    vocab_size=8, model_dim=512, layers=("full_attention",), intermediate_size=1024,
    attention=AttentionConfig(model_dim=512, num_heads=16, num_kv_heads=8, head_dim=64),
)  # fmt: skip
TOKENS = (2, 1024)


def _block(mesh, *, axes: MeshAxes, differentiate: bool):
    options: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    block = _placed(lambda: DecoderLayer(BLOCK, 0, rngs=nnx.Rngs(0), **options), mesh, axes)
    x = _struct(mesh, axes.residual, *TOKENS, BLOCK.model_dim)

    def forward(block, x):
        body, residual = (lambda block, x: block(x)[0]), axes.residual
        return region.run(block, body, (x,), axes=axes, in_specs=(residual,), out_specs=residual)

    def loss(block, x):
        return jnp.sum(jnp.sin(forward(block, x).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1)) if differentiate else forward, (block, x)


@pytest.mark.parametrize("differentiate, explicit", [(False, False), (True, False), (True, True)])
def test_a_transformer_block_makes_the_reductions_that_megatron_needs(differentiate, explicit):
    """One after attention and one after the feed-forward block; as many again in the backward."""
    axes = MeshAxes(heads="tp")
    build = functools.partial(_block, axes=axes, differentiate=differentiate)
    program = Program(build, {"tp": 8}, explicit=explicit)
    activations = TOKENS[0] * TOKENS[1] * BLOCK.model_dim * 2
    assert program.large(activations) == ["all-reduce"] * (4 if differentiate else 2)
    assert {c.axes for c in program.collectives} == {("tp",)}


def test_with_a_split_residual_stream_they_become_gathers_and_scatters():
    axes = MeshAxes(heads="tp", seq_residual="tp")
    program = Program(functools.partial(_block, axes=axes, differentiate=False), {"tp": 8})
    activations = TOKENS[0] * TOKENS[1] * BLOCK.model_dim * 2
    assert not program.of("all-reduce")
    assert [c.result_bytes for c in program.of("all-gather")] == [activations] * 2
    assert [c.result_bytes for c in program.of("reduce-scatter")] == [activations // 8] * 2


def _attention(mesh, *, mode, layout, kv_heads=2, length=1024, differentiate=False):
    devices = mesh.shape["cp"]
    rows = "dp" if "dp" in mesh.shape else None
    spec = P(rows, "cp")
    batch = mesh.shape.get("dp", 1)
    plan = ContextParallel(mode=mode, layout=layout, axis_name="cp")
    run = jax.shard_map(
        functools.partial(context_attention, context_parallel=plan),
        in_specs=(spec, spec, spec),
        out_specs=spec,
    )
    query = _struct(mesh, spec, batch, length * devices, 8, 64)
    key = _struct(mesh, spec, batch, length * devices, kv_heads, 64)
    if differentiate:
        forward = run
        run = jax.grad(
            lambda *inputs: jnp.sum(jnp.sin(forward(*inputs).astype(jnp.float32))), argnums=(0, 1, 2)
        )  # fmt: skip
    return run, (query, key, key)


KEYS = 1024 * 2 * 64 * 2  # bytes of one device's keys, or values


BLOCKS = 8  # of a ring on 8 devices; each skips tiles that nothing sees, by one conditional


def test_a_ring_makes_one_hop_less_than_devices_each_behind_a_block():
    program = Program(functools.partial(_attention, mode="ring", layout="zigzag"), {"cp": 8})
    hops = program.of("collective-permute")
    assert [hop.result_bytes for hop in hops] == [2 * KEYS] * 7
    assert all(hop.asynchronous for hop in hops)
    assert all(hop.overlapped_kernels > 0 for hop in hops)
    assert program.text.count(" conditional(") == BLOCKS


def test_the_backward_of_a_ring_hides_the_hops_of_keys():
    build = functools.partial(_attention, mode="ring", layout="zigzag", differentiate=True)
    program = Program(build, {"dp": 2, "cp": 4})
    hops = program.of("collective-permute")
    # Forward 3, keys again 3; their gradients in float32 3, and once more, rounded before they are sent home.
    assert program.bytes("collective-permute") == (3 + 3) * 2 * KEYS + 3 * 4 * KEYS + 2 * KEYS
    hidden = [hop for hop in hops if hop.asynchronous and hop.overlapped_kernels > 0]
    assert sum(hop.result_bytes for hop in hidden) >= 6 * 2 * KEYS
    assert {hop.axes for hop in hops} == {("cp",)}


def test_contiguous_chunks_do_not_send_keys_to_where_nothing_sees_them():
    build = functools.partial(_attention, mode="ring", layout="contiguous")
    program = Program(build, {"cp": 8})
    module = hlo.parse(program.text)
    sent = [
        len(hlo.groups(instruction.attributes, 8))
        for instruction in module.computations[module.entry]
        if instruction.opcode in ("collective-permute-start", "collective-permute")
    ]
    assert sorted(sent) == [1, 2, 3, 4, 5, 6, 7]
    assert program.text.count(" conditional(") == BLOCKS + 7  # whole blocks, all but one's own
    assert all(hop.result_bytes == 2 * KEYS for hop in program.of("collective-permute"))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_all_gather_gathers_keys_and_values_once(layout):
    program = Program(functools.partial(_attention, mode="all_gather", layout=layout), {"cp": 8})
    positions = 8 * 1024 * 4
    assert {c.kind for c in program.collectives} == {"all-gather"}
    assert program.bytes("all-gather") == 2 * 8 * KEYS + positions


def test_all_to_all_trades_queries_keys_values_and_the_output():
    build = functools.partial(_attention, mode="a2a", layout="zigzag", kv_heads=8)
    program = Program(build, {"cp": 8})
    queries = 1024 * 8 * 64 * 2
    statistics = 0  # the lse is not asked for, and the compiler drops it
    assert program.bytes("all-to-all") == 3 * queries + queries + statistics
    assert program.bytes("all-gather") == 8 * 1024 * 4  # positions
    assert {c.kind for c in program.collectives} == {"all-to-all", "all-gather"}


DELTA = GatedDeltaNetConfig(
    model_dim=256, num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128
)


def test_gated_deltanet_sends_states_and_gathers_no_activations():
    """Qwen3-Next's heads on 8 devices: at most the 12 MiB that log2(n) hops of summaries move."""
    axes = MeshAxes(seq="cp")

    def build(mesh):
        options: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        plan = dict(axes=axes, context_parallel=ContextParallel(layout="contiguous"))
        make = lambda: spread(GatedDeltaNet(DELTA, rngs=nnx.Rngs(0), **options), **plan)
        layer = _placed(make, mesh, axes)
        return lambda layer, x: layer(x), (layer, _struct(mesh, axes.residual, 1, 8 * 256, 256))

    program = Program(build, {"cp": 8})
    assert not program.of("all-gather")
    state = 32 * 128 * 128 * 4
    assert program.bytes("all-to-all") == 2 * state + state  # (M, E), then the states: 6 MiB
    halo = 3 * 32 * (128 + 128) * 2
    assert 0 < program.bytes("collective-permute") <= 2 * halo
    total = sum(c.result_bytes for c in program.collectives)
    assert total <= 12 * MIB


def test_the_exchange_of_states_is_the_one_that_sends_least():
    assert cheapest_exchange(8, 32, 128, 128) == "all_to_all"
    assert cheapest_exchange(2, 4, 128, 128) == "all_to_all"
    assert cheapest_exchange(8, 4, 128, 128) == "prefix_scan"
    assert cheapest_exchange(4, 6, 128, 128) == "all_gather"
    assert cheapest_exchange(3, 4, 64, 128) == "all_gather"


@pytest.mark.parametrize("explicit", [False, True])
def test_a_decode_step_sends_a_tenth_of_a_mebibyte_and_keeps_its_cache_in_place(explicit):
    axes = MeshAxes(seq="cp", heads="tp")
    config = AttentionConfig(model_dim=2048, num_heads=16, num_kv_heads=2, head_dim=256)
    batch, capacity = 4, 131072

    def build(mesh):
        options: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        plan = dict(axes=axes, context_parallel=ContextParallel())
        make = lambda: spread(SelfAttention(config, rngs=nnx.Rngs(0), **options), **plan)
        layer = _placed(make, mesh, axes)
        cache = jax.eval_shape(lambda: make().init_cache(batch, capacity))
        specs = caches.cache_specs(cache, axes, 2, mesh)
        place = lambda leaf, spec: _struct(mesh, spec, *leaf.shape, dtype=leaf.dtype)
        cache = jax.tree.map(place, cache, specs)
        x = _struct(mesh, axes.without_seq.residual, batch, 1, 2048)
        return lambda cache, layer, x: layer.step(x, cache), (cache, layer, x)

    program = Program(build, {"cp": 4, "tp": 2}, explicit=explicit, donate_argnums=0)
    assert {c.kind for c in program.collectives} == {"all-reduce"}
    assert program.bytes("all-reduce") <= 0.1 * MIB
    assert {c.axes for c in program.collectives} == {("tp",), ("cp",)}
    held = 2 * batch * 1 * (capacity // 4) * 256 * 2 + batch * 4
    assert program.memory.alias_size_in_bytes == held


def test_blocks_that_nothing_sees_are_not_computed():
    """On one's own devices: what is not a number on the last one stays there, forward and backward."""
    devices, length = 4, 4
    plan = ContextParallel(mode="ring", layout="contiguous", axis_name="cp")
    rng = np.random.default_rng(5)
    normal = lambda heads: rng.normal(size=(1, devices * length, heads, 8)).astype(np.float32)
    query, key, value = normal(4), normal(2), normal(2)
    key[:, -length:] = value[:, -length:] = np.nan
    with jax.set_mesh(cpu_mesh("auto", cp=devices)):
        spec = P(None, "cp")
        run = jax.shard_map(
            functools.partial(context_attention, context_parallel=plan),
            in_specs=(spec, spec, spec),
            out_specs=spec,
        )

        def loss(query, key, value):
            out = run(query, key, value)
            return jnp.sum(out[:, :-length]), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
            *map(jnp.asarray, (query, key, value))
        )
    assert np.isfinite(np.asarray(out)[:, :-length]).all()
    assert np.isnan(np.asarray(out)[:, -length:]).all()
    assert np.isfinite(np.asarray(gradients[0])[:, :-length]).all()
