"""The fused decode kernels of Gated DeltaNet, interpreted against a float64 recurrence, and as machine code."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as pk
from pallas_kernels import _dispatch, aot
from pallas_kernels.delta_rule.step import aot_cases, triton
from tests.support.aot import require
from tests.support.compare import (
    DELTA_RULE_TOLERANCES,
    assert_bitwise_equal,
    assert_close,
    relative_error,
)
from tests.support.deltanet_cases import nasty_case, random_case, truth
from tests.support.mosaic_gpu_interpreter import interpreted

CONTEXTS = {"mosaic_gpu": interpreted, "triton": triton.interpreted}
KERNELS = tuple(CONTEXTS)
FLOAT32 = ("state", "A_log", "dt_bias")


def arrays(case, dtype="float32", state_dtype="float32"):
    """The case as the operator takes it; states and the parameters of the gates are wide."""
    found = {n: jnp.asarray(x, "float32" if n in FLOAT32 else dtype) for n, x in case.items()}
    return found | {"state": found["state"].astype(state_dtype)}


def run(implementation, given, **options):
    """The public step, in one program, by an interpreted kernel."""
    static = {n: options.pop(n) for n in tuple(options) if not hasattr(options[n], "shape")}

    def call(given):
        return pk.gated_deltanet_step(**given, **static, implementation=implementation)

    with CONTEXTS.get(implementation, contextlib.nullcontext)():
        return jax.block_until_ready(jax.jit(call)(given | options))


SHAPES = {
    "one token": (dict(length=1, group=2, width=4, extra=12), {}, "bfloat16", "bfloat16"),
    "eight tokens": (dict(length=8, group=1, width=2, value_dim=32), {}, "float32", "float32"),
    "one tap": (
        dict(length=2, group=4, width=1, bias=False, value_dim=32),
        dict(allow_negative_eigenvalues=True),
        "float16",
        "float32",
    ),
}
WIDE = {
    f"{dim}-{dtype}": (dict(length=2, key_dim=dim, value_dim=dim, key_heads=2), {}, dtype, "float32")
    for dim in (128, 256)
    for dtype in ("float32", "bfloat16")
}  # fmt: skip
CASES = [*SHAPES, *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", KERNELS)
def test_nasty_inputs_against_the_float64_recurrence(implementation, name):
    sizes, options, dtype, state_dtype = (SHAPES | WIDE)[name]
    given = arrays(nasty_case(0, **({"key_dim": 64, "value_dim": 64} | sizes)), dtype, state_dtype)
    result = run(implementation, given, **options, return_states=True)
    out, final, windows, states = truth(given, **options)
    assert result.out.dtype == result.final_conv_state.dtype == jnp.dtype(dtype)
    assert result.final_state.dtype == result.states.dtype == jnp.dtype(state_dtype)
    of_state = DELTA_RULE_TOLERANCES[state_dtype]["final_state"]
    for row in range(len(out)):
        assert relative_error(result.out[row], out[row]) < DELTA_RULE_TOLERANCES[dtype]["out"]
        assert relative_error(result.final_state[row], final[row]) < of_state
        assert relative_error(result.states[row], states[row]) < of_state
    assert_bitwise_equal(result.final_conv_state, windows.astype(result.final_conv_state.dtype))


@pytest.mark.parametrize("implementation", KERNELS)
def test_rows_without_a_slot_and_tokens_that_are_not_real(implementation):
    """Both may hold anything, NaN included; slots that no row names and rows without a token keep their bits."""
    case = random_case(1, rows=5, length=3, key_dim=64, value_dim=32, pool=7)
    lengths, slots = np.array([2, 3, 0, 3, 1]), np.array([5, -1, 0, 7, 2])
    real = np.array([0, 2, 4])
    mixed, logits = case["mixed"], case["logits"]
    case["state"][4], case["conv_state"][4] = np.nan, np.nan
    for row, length in enumerate(lengths):
        mixed[row, 0 if row in (1, 3) else length :] = np.nan
        logits[row, 0 if row in (1, 3) else length :] = np.nan
    given = arrays(case)
    result = run(
        implementation, given, lengths=jnp.asarray(lengths, jnp.int32),
        slots=jnp.asarray(slots, jnp.int32), return_states=True,
    )  # fmt: skip
    by_row = {n: np.asarray(given[n])[real] for n in ("mixed", "logits")}
    by_row |= {n: np.asarray(given[n])[slots[real]] for n in ("state", "conv_state")}
    out, final, windows, states = truth(given | by_row, lengths=lengths[real])
    assert_close(result.out[real], out, atol=1e-5)
    assert_close(result.states[real], states, atol=1e-5)
    assert_close(result.final_state[slots[real]], final, atol=1e-5)
    assert_bitwise_equal(result.final_conv_state[slots[real]], windows.astype(np.float32))
    for row in (1, 3):
        assert not np.asarray(result.out[row]).any()
        assert not np.asarray(result.states[row]).any()
    for slot in (0, 1, 3, 4, 6):
        for name in ("state", "conv_state"):
            after = getattr(result, f"final_{name}")[slot]
            assert_bitwise_equal(after, given[name][slot], what=f"{name} {slot}")


@pytest.mark.parametrize("implementation", KERNELS)
def test_random_splits_equal_convolution_and_chunked_rule(implementation):
    """Rows advance by different numbers of tokens, in steps of three."""
    rng, total = np.random.default_rng(2), 5
    case = arrays(random_case(2, rows=2, length=total, group=1, key_dim=64, value_dim=32))
    flat = lambda x, leading: x.reshape(*x.shape[:leading], -1)
    convolved = pk.causal_conv1d(
        flat(case["mixed"], 2), flat(case["conv_kernel"], 1), bias=flat(case["conv_bias"], 0),
        activation="silu", initial_state=flat(case["conv_state"], 2),
    ).out.reshape(2, total, 1, -1)  # fmt: skip
    logits = case["logits"]
    g = -jnp.exp(case["A_log"])[None] * jax.nn.softplus(logits[..., 1] + case["dt_bias"][None])
    whole = pk.gated_delta_rule(
        convolved[..., :64], convolved[..., 64:128], convolved[..., 128:], g,
        jax.nn.sigmoid(logits[..., 0]), initial_state=case["state"], use_qk_l2norm=True,
    )  # fmt: skip

    weights = {n: x for n, x in case.items() if n.startswith(("conv_k", "conv_b", "A_", "dt_"))}
    held = {n: case[n] for n in ("state", "conv_state")}

    @jax.jit
    def advance(tokens, held, lengths):
        return pk.gated_deltanet_step(
            **tokens, **held, **weights, lengths=lengths, implementation=implementation
        )

    done, outs = np.zeros(2, int), [[], []]
    with CONTEXTS[implementation]():
        while (done < total).any():
            lengths = np.minimum(rng.integers(0, 4, 2), total - done)
            pick = np.minimum(done[:, None] + np.arange(3), total - 1)
            tokens = {n: case[n][np.arange(2)[:, None], pick] for n in ("mixed", "logits")}
            result = advance(tokens, held, jnp.asarray(lengths, jnp.int32))
            jax.block_until_ready(result)
            held = {"state": result.final_state, "conv_state": result.final_conv_state}
            for row, count in enumerate(lengths):
                outs[row].append(result.out[row, :count])
            done = done + lengths
    assert_close(jnp.stack([jnp.concatenate(x) for x in outs]), whole.out, atol=1e-5)
    assert_close(held["state"], whole.final_state, atol=1e-5)
    assert_bitwise_equal(held["conv_state"], case["mixed"][:, -4:])


@pytest.mark.parametrize("batched_weights", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vmap_is_more_rows(batched_weights):
    stack = [arrays(random_case(seed, rows=2, length=1)) for seed in (3, 4)]
    stack = {n: jnp.stack([case[n] for case in stack]) for n in stack[0]}
    weights = ("conv_kernel", "conv_bias", "A_log", "dt_bias")
    if not batched_weights:
        stack |= {n: stack[n][0] for n in weights}
    axes = {n: 0 if batched_weights or n not in weights else None for n in stack}
    slots = jnp.array([[1, -1], [0, 1]])

    def step(implementation):
        def call(given, slots):
            return pk.gated_deltanet_step(**given, slots=slots, implementation=implementation)

        return jax.jit(jax.vmap(call, in_axes=(axes, 0)))(stack, slots)

    with triton.interpreted():
        found = jax.block_until_ready(step("triton"))
    for actual, expected in zip(found[:3], step("reference")[:3], strict=True):
        assert_close(actual, expected, atol=1e-5)


def test_gradients_are_those_of_the_composition():
    given = arrays(random_case(5, rows=1, length=2, key_dim=64, value_dim=32, group=1))
    lengths = jnp.array([1])

    def loss(given, implementation):
        result = pk.gated_deltanet_step(**given, lengths=lengths, implementation=implementation)
        return sum(jnp.sum(jnp.sin(x)) for x in result[:3])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(given, "reference")
    for implementation, interpretation in CONTEXTS.items():
        with interpretation():
            found = jax.block_until_ready(gradient(given, implementation))
        for name in given:
            assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("implementation", KERNELS)
def test_on_the_hardware(implementation, length):
    sizes = dict(length=length, key_dim=128, value_dim=128, key_heads=2)
    given = arrays(nasty_case(8, **sizes), "bfloat16")
    step = jax.jit(lambda given: pk.gated_deltanet_step(**given, implementation=implementation))
    result, again = step(given), step(given)
    out, final, windows, _ = truth(given)
    for row in range(len(out)):
        limit = DELTA_RULE_TOLERANCES["bfloat16"]["out"]
        assert relative_error(result.out[row], out[row]) < limit
        assert relative_error(result.final_state[row], final[row]) < 1e-5
    assert_bitwise_equal(result.final_conv_state, windows.astype(jnp.bfloat16))
    for found, repeated in zip(result[:3], again[:3], strict=True):
        assert_bitwise_equal(found, repeated)


# --- choice ----------------------------------------------------------------------------------------------------------


def reasons(capability, **changes):
    sizes = dict(rows=1, length=1, key_dim=64, value_dim=64) | changes
    dtype = sizes.pop("dtype", "float32")
    with _dispatch.targeting(_dispatch.Target("gpu", capability)):
        return pk.explain("gated_deltanet_step", **arrays(random_case(6, **sizes), dtype)).reasons


def test_reasons():
    given = arrays(random_case(6, rows=1, length=1))
    found = pk.explain(pk.gated_deltanet_step, **given)
    assert found.chosen == "reference"
    assert found.reasons["mosaic_gpu"].endswith("capability 9.0 (H100, H200)")
    assert found.reasons["triton"].endswith("capability 8.0 or newer")
    on_hopper = reasons("9.0", dtype="bfloat16")
    assert on_hopper["mosaic_gpu"] == on_hopper["triton"] == "reference is preferred here"
    odd = reasons("9.0", key_dim=96, value_dim=48)
    assert odd["mosaic_gpu"] == "Dv must be a multiple of 32, got 48"
    assert odd["triton"] == "Dk must be 16, 32, 64, 128 or 256, got 96"
    assert reasons("9.0", key_dim=32)["mosaic_gpu"] == "Dk must be a multiple of 64, got 32"
    ragged = reasons("9.0", extra=5)
    assert ragged["mosaic_gpu"] == "`mixed` must have a multiple of 4 channels, got 261"
    assert ragged["triton"] == "reference is preferred here"
    wide = reasons("9.0", width=9)
    assert wide["mosaic_gpu"] == wide["triton"] == "W must be at most 8, got 9"
    with pytest.raises(NotImplementedError, match=r"triton.*cannot run this call.*8\.0"):
        pk.gated_deltanet_step(**given, implementation="triton")
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        pk.gated_deltanet_step(**given, implementation="cuda")


# --- machine code ----------------------------------------------------------------------------------------------------


def described(rows, length, *, dim=128, state_dtype="float32", slots=None, lengths=False):
    """Operands by name, and those to donate, of the heads of Qwen3-Next."""
    key_heads, group, width, struct = 16, 2, 4, jax.ShapeDtypeStruct
    features, narrow = 2 * dim + group * dim, jnp.bfloat16
    given = {
        "mixed": struct((rows, length, key_heads, features + group * dim), narrow),
        "logits": struct((rows, length, key_heads, 2 * group), narrow),
        "conv_kernel": struct((width, key_heads, features), narrow),
        "A_log": struct((key_heads, group), jnp.float32),
        "dt_bias": struct((key_heads, group), jnp.float32),
    }
    for name, wanted in (("slots", slots), ("lengths", lengths)):
        given |= {name: struct((rows,), jnp.int32)} if wanted else {}
    states = {
        "state": struct((slots or rows, key_heads * group, dim, dim), jnp.dtype(state_dtype)),
        "conv_state": struct((slots or rows, width, key_heads, features), narrow),
    }
    return given, states


def compiled(implementation, target, given, states, **options):
    def gated_deltanet_step(given, states):
        return pk.gated_deltanet_step(**given, **states, implementation=implementation, **options)

    return aot.compile_program(gated_deltanet_step, given, states, target=target, donate_argnums=1)


def assert_registers_only(report, registers):
    (kernel,) = report.kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert not kernel.slow_paths
    assert kernel.registers <= registers
    assert 4 * kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES
    assert "HGMMA" not in kernel.instructions


@pytest.mark.parametrize(
    "dim, state_dtype",
    [
        (128, "float32"),
        pytest.param(128, "bfloat16", marks=pytest.mark.slow),
        pytest.param(256, "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "implementation, target", [("mosaic_gpu", "h200"), ("triton", "h200"), ("triton", "a100")]
)
def test_states_in_place_and_nothing_spilled(implementation, target, dim, state_dtype):
    """Beside the two pools, updated in place, there are the output and the new windows of the rows."""
    require()
    given, states = described(64, 1, dim=dim, state_dtype=state_dtype, slots=80)
    report = compiled(implementation, target, given, states)
    size = lambda x: x.size * x.dtype.itemsize
    windows = 64 * size(states["conv_state"]) // 80
    assert report.aliased_bytes == sum(map(size, states.values()))
    assert windows <= report.temporary_bytes <= windows + 1024
    assert_registers_only(report, 255 if dim == 256 else 168)


@pytest.mark.parametrize(
    "implementation", ["mosaic_gpu", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_eight_tokens_of_padded_rows_with_every_state_spill_nothing(implementation):
    require()
    given, states = described(2, 8, lengths=True)
    report = compiled(implementation, "h200", given, states, return_states=True)
    assert_registers_only(report, 255)


def launches(function, *arguments, donated):
    """What an H200 starts one after the other, by name."""
    mesh = aot.topology("h200")
    whole = NamedSharding(mesh, PartitionSpec())
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    compiled = aot.compile_only(
        function, *jax.tree.map(describe, arguments), mesh=mesh, donate_argnums=donated
    )
    entry = re.search(r"^ENTRY .*?^}", compiled.executable.as_text(), re.M | re.S).group()
    found = re.findall(r"= \S.*? ([a-z-]+)\(", entry)
    return [name for name in found if name in ("fusion", "custom-call", "copy", "scatter")]


def test_one_launch_where_the_operators_apart_need_several():
    require()
    given, states = described(1, 1)
    state, conv_state = states.values()

    def together(given, state, conv_state):
        return pk.gated_deltanet_step(
            **given, state=state, conv_state=conv_state, implementation="mosaic_gpu"
        )[:3]

    def apart(given, state, conv_state):
        query, key, value, window = pk.causal_conv1d_qkv(
            given["mixed"], given["conv_kernel"], key_dim=128, value_dim=128,
            initial_state=conv_state,
        )  # fmt: skip
        write, decay = jnp.split(given["logits"].astype(jnp.float32), 2, axis=-1)
        g = -jnp.exp(given["A_log"])[None, None] * jax.nn.softplus(
            decay + given["dt_bias"][None, None]
        )
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        step = pk.gated_delta_rule_step(
            query, key, value, flat(g), flat(jax.nn.sigmoid(write)), state, use_qk_l2norm=True,
            implementation="mosaic_gpu",
        )  # fmt: skip
        return step.out, step.final_state, window

    arguments = (given, state, conv_state)
    assert launches(together, *arguments, donated=1) == ["custom-call"]
    assert sorted(launches(together, *arguments, donated=(1, 2))) == ["copy", "custom-call"]
    assert len(launches(apart, *arguments, donated=(1, 2))) >= 4


REGISTERED = {case.name: case for case in aot_cases.kernel_cases()}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "gated_deltanet/step_mosaic_gpu/b1" else pytest.param(name, marks=pytest.mark.slow)
        for name in REGISTERED
    ],
)  # fmt: skip
def test_registered_cases(name):
    require()
    report = aot.compile_case(REGISTERED[name])
    assert_registers_only(report, 255)
    assert report.tensor_instructions == (0,)
