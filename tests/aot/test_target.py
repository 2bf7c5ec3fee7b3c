"""For which machine a program is: one explicit value, read by every choice and part of what programs are keyed by."""

import contextlib
import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from gqa_jax import DecoderConfig
from gqa_jax.hf.config import PRESETS
from gqa_jax.planner import plan
from pallas_kernels import _dispatch, aot
from pallas_kernels.attention.hopper import tuning
from pallas_kernels.decode import tuning as decode_tuning
from pallas_kernels.delta_rule import api as delta_rule
from pallas_kernels.delta_rule import tuning as delta_tuning
from pallas_kernels.delta_rule.step import triton
from tests.support.aot import require

H200 = _dispatch.Target("gpu", "9.0")


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def looks_like_a_gpu():
    return mock.patch.object(jax, "default_backend", return_value="gpu")


def on_both(make):
    """What `make()` gives in this process, and where it seems to have a GPU: from the same line of source."""
    found = []
    for context in (contextlib.nullcontext, looks_like_a_gpu):
        jax.clear_caches()
        with context():
            found.append(make())
    return found


ATTENTION = (struct(1, 2048, 8, 64), struct(1, 2048, 2, 64), struct(1, 2048, 2, 64))
RULE = (
    *(struct(1, 2112, 2, 64) for _ in range(3)),
    *(struct(1, 2112, 2, dtype=jnp.float32) for _ in range(2)),
)
DECODE = (struct(2, 1, 8, 64), *(struct(2, 2, 256, 64) for _ in range(2)), struct(2, dtype=jnp.int32))  # fmt: skip


def test_a_cpu_compiles_for_a_gpu_what_a_gpu_compiles():
    require()

    def step(attention, rule, decode):
        return (
            pk.gqa_attention(*attention, is_causal=True),
            pk.gated_delta_rule(*rule, use_qk_l2norm=True).out,
            pk.decode_attention(*decode),
        )

    mesh = aot.topology("h200")
    replicated = jax.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda x: x.update(sharding=replicated), (ATTENTION, RULE, DECODE))
    options = {"xla_backend_optimization_level": 0}

    def text():
        compiled = aot.compile_only(step, *arguments, mesh=mesh, compiler_options=options)
        return compiled.executable.as_text()

    ours, theirs = on_both(text)
    assert ours == theirs
    assert "__cudnn$fmha" in ours
    # 33 chunks are two lanes of 17 steps; on a CPU one lane of 33.
    trips = re.findall(r'"known_trip_count":\{"n":"(\d+)"', ours)
    assert "17" in trips
    assert "33" not in trips


def test_a_decode_step_for_a_gpu_copies_no_cache():
    require()
    cache = struct(8, 2, 2048, 64)
    report = aot.compile_program(
        pk.decode_attention, struct(8, 1, 4, 64), cache, cache, struct(8, dtype=jnp.int32)
    )
    assert report.temporary_bytes < cache.size * 2 / 4  # logits and weights


def test_a_long_row_is_cut_into_lanes_for_a_gpu():
    sizes = dict(B=1, T=262144, Hk=16, Hv=32, Dk=128, Dv=128, sequences=1)
    call = delta_tuning.Call(sizes, (), False, 1.0, True, None, is_symbolic=False, is_varying=False)
    planned = lambda: delta_rule._plan(call, None)
    assert planned().lanes == 1
    with _dispatch.targeting(H200):
        assert (planned().lanes, planned().steps) == (128, 32)


def test_a_plan_is_of_the_program_that_a_gpu_runs():
    require()
    config = DecoderConfig.from_hf(PRESETS["tiny_hybrid"])
    config = dataclasses.replace(config, layers=("full_attention",))
    options = {"xla_backend_optimization_level": 0}

    def made():
        with jax.numpy_dtype_promotion("standard"):  # optax's
            found = plan(config, mesh={"dp": 1}, length=128, compiler_options=options)
        return found.as_json() | {"compile_seconds": 0}

    ours, theirs = on_both(made)
    assert ours == theirs
    assert any("cudnn" in name for name in ours["kernels"])


def test_every_choice_reads_the_target():
    query = struct(1, 8192, 32, 128)
    key = struct(1, 8192, 8, 128)
    explained = lambda: pk.explain("gqa_attention", query, key, key, is_causal=True).chosen
    assert explained() == "blockwise"
    assert decode_tuning.pairs_at_once(4096) < 4096
    with _dispatch.targeting(H200):
        assert explained() == "cudnn"
        assert decode_tuning.pairs_at_once(4096) == 4096
    with _dispatch.targeting(_dispatch.Target("tpu")):
        assert explained() == "blockwise"
        assert decode_tuning.pairs_at_once(4096) == 4096


def test_work_for_the_cpu_of_a_machine_with_a_gpu():
    q = struct(1, 64, 2, 64)
    hopper = mock.Mock(compute_capability="9.0")
    with looks_like_a_gpu(), mock.patch.object(jax, "local_devices", return_value=[hopper]):
        assert _dispatch.target() == H200
        with jax.default_device(jax.devices("cpu")[0]):
            assert _dispatch.target() == _dispatch.Target("cpu")
            assert pk.explain("gqa_attention", q, q, q).chosen == "blockwise"
    with jax.default_device("cpu"):
        assert _dispatch.target() == _dispatch.Target("cpu")


def test_a_gpu_of_another_maker_has_no_compute_capability():
    radeon = mock.Mock(compute_capability="gfx942")
    with looks_like_a_gpu(), mock.patch.object(jax, "local_devices", return_value=[radeon]):
        assert _dispatch.target() == _dispatch.Target("gpu")
        assert pk.explain("gqa_attention", *ATTENTION).chosen == "blockwise"


# What is traced for one machine is not served for another.


def step_operands():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, gate = normal(2, 1, 2, 64) / 8, -abs(normal(2, 1, 2))
    return q, q, q, gate, gate + 1, normal(2, 2, 64, 64)


def by_triton(*operands):
    return pk.gated_delta_rule_step(*operands, implementation="triton").out


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["operator", "jit of a user"])
def test_an_interpreted_program_is_not_served_outside(wrap):
    operands, call = step_operands(), wrap(by_triton)
    with triton.interpreted():
        assert np.isfinite(call(*operands)).all()
    with pytest.raises(NotImplementedError, match="compute capability 8.0"):
        call(*operands)
    # A GPU that is not there: compiled for it, the kernel cannot be run by a CPU.
    with (
        _dispatch.targeting(_dispatch.Target("gpu", "8.0")),
        pytest.raises(Exception, match="Only interpret mode is supported on CPU backend"),
    ):
        call(*operands)
    with triton.interpreted():
        assert np.isfinite(call(*operands)).all()


def test_a_program_for_this_machine_is_not_served_to_the_interpreter():
    traced = []

    @jax.jit
    def call(x):
        traced.append(_dispatch.target())
        return pk.gqa_attention(x, x, x)

    x = jnp.ones((1, 8, 2, 16))
    for context in (contextlib.nullcontext, triton.interpreted, contextlib.nullcontext):
        with context():
            call(x)
    assert [target.interpret for target in traced] == [None, True]


def test_tuned_configurations_reach_programs_that_were_traced_before():
    traced = []

    @jax.jit
    def call(x):
        traced.append(tuning.backward_config(head_dim=64, q_len=64).stages)
        return x

    key = tuning.bucket("backward", head_dim=64, q_len=64, is_causal=False)
    call(1.0)
    try:
        tuning.use_tuned({key: tuning.BackwardConfig(stages=4)})
        call(1.0)
    finally:
        tuning.use_tuned({})
    call(1.0)
    assert traced == [3, 4]


# Kernels inside `jax.shard_map`.

Q, KV, GATE = struct(2, 64, 2, 64), struct(2, 64, 1, 64), struct(2, 64, 2, dtype=jnp.float32)
ON_MESH = {
    "gqa_attention": (Q, KV, KV),
    "gqa_attention_with_lse": (Q, KV, KV),
    "gqa_attention_qkv": (struct(2, 64, 1, 4, 64),),
    "gated_delta_rule": (Q, Q, Q, GATE, GATE),
    "causal_conv1d_qkv": (struct(2, 8, 1, 192), struct(8, 1, 192)),
}


def on_mesh(operator, check_vma, implementation):
    options = {"key_dim": 64, "value_dim": 64} if operator == "causal_conv1d_qkv" else {}
    run = functools.partial(getattr(pk, operator), implementation=implementation, **options)
    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("device")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.eval_shape(mapped, *ON_MESH[operator])


@pytest.mark.parametrize("operator", ON_MESH)
def test_kernels_need_an_unchecked_shard_map(operator):
    with _dispatch.targeting(H200):
        expected = on_mesh(operator, True, "reference")
        with pytest.raises(NotImplementedError, match=r"jax\.shard_map\(check_vma=False\)"):
            on_mesh(operator, True, "mosaic_gpu")
        assert on_mesh(operator, False, "mosaic_gpu") == expected
