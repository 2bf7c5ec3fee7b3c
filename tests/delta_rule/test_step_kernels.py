"""The decode kernels of the gated delta rule, interpreted against a float64 recurrence, and as machine code."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import _dispatch, aot
from pallas_kernels.delta_rule.step import triton, tuning
from tests.support import delta_cases
from tests.support.aot import require
from tests.support.compare import (
    DELTA_RULE_TOLERANCES,
    assert_bitwise_equal,
    assert_close,
    relative_error,
    rounding,
)
from tests.support.mosaic_gpu_interpreter import interpreted

CONTEXTS = {"mosaic_gpu": interpreted, "triton": triton.interpreted}
KERNELS = tuple(CONTEXTS)


def run(implementation, *arguments, **options):
    """The public step, in one program, by an interpreted kernel."""

    slots = options.pop("slots", None)

    def call(arguments, slots):
        return pk.gated_delta_rule_step(
            *arguments, slots=slots, implementation=implementation, **options
        )

    with CONTEXTS.get(implementation, contextlib.nullcontext)():
        return jax.block_until_ready(jax.jit(call)(arguments, slots))


def truth(query, key, value, g, beta, state, *, use_qk_l2norm=False):
    """`(out, states [B, T, Hv, Dk, Dv])` in float64, head by head and token by token."""
    wide = lambda x: np.asarray(x).astype(np.float64)
    query, key, value, g, beta, state = map(wide, (query, key, value, g, beta, state))
    if use_qk_l2norm:
        query, key = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (query, key))
    rows, length, heads = value.shape[:3]
    group = heads // query.shape[2]
    out, states = np.zeros_like(value), np.zeros((rows, length, *state.shape[1:]))
    for b, h in itertools.product(range(rows), range(heads)):
        held = state[b, h]
        for t in range(length):
            k, q = key[b, t, h // group], query[b, t, h // group]
            decay = g[b, t, h] if g.ndim == 3 else g[b, t, h // group][:, None]
            held = np.exp(decay) * held
            held = held + np.outer(k, beta[b, t, h] * (value[b, t, h] - held.T @ k))
            out[b, t, h], states[b, t, h] = query.shape[-1] ** -0.5 * held.T @ q, held
    return out, states


def random(seed, rows=2, length=2, key_heads=1, heads=2, key_dim=32, value_dim=32, dtype=jnp.float32):  # fmt: skip
    case = delta_cases.random_case(seed, rows, length, key_heads, heads, key_dim, value_dim)
    narrow = [jnp.asarray(x, dtype) for x in (case.query, case.key, case.value)]
    wide = [jnp.asarray(x, jnp.float32) for x in (case.g, case.beta, case.initial_state)]
    return [*narrow, *wide]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", KERNELS)
def test_nasty_inputs_against_the_float64_recurrence(implementation, dtype):
    cases = delta_cases.nasty_cases(0, 4).values()
    operands = [np.concatenate(x) for x in zip(*(case.operands for case in cases), strict=True)]
    *narrow, g, beta, state = operands
    narrow = [jnp.asarray(x, dtype) for x in narrow]
    operands = [*narrow, *(jnp.asarray(x, jnp.float32) for x in (g, beta, state))]
    result = run(implementation, *operands, return_states=True)
    out, states = truth(*operands)
    assert result.out.dtype == jnp.dtype(dtype)
    limit = DELTA_RULE_TOLERANCES[dtype]["out"]
    of_state = DELTA_RULE_TOLERANCES["float32"]["final_state"]
    for row in range(len(cases)):
        assert relative_error(result.out[row], out[row]) < limit
        assert relative_error(result.states[row], states[row]) < of_state
    assert_close(result.states[:, -1], result.final_state, atol=1e-6)


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("implementation", KERNELS)
def test_lengths_normalisation_scale_and_grouped_heads(implementation, length):
    query, key, *rest = random(1, 1, length, key_heads=2, heads=4, key_dim=64, value_dim=32)
    operands = [3.0 * query, 0.2 * key.at[0, 0, 0].set(0.0), *rest]
    result = run(implementation, *operands, use_qk_l2norm=True, scale=0.5)
    out, states = truth(*operands, use_qk_l2norm=True)
    assert_close(result.out, out * 0.5 * 64**0.5, atol=1e-5, rtol=1e-5)
    assert_close(result.final_state, states[:, -1], atol=1e-5, rtol=1e-5)
    assert result.states is None


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_pool_of_slots_and_rows_without_one(implementation):
    """Padding rows may hold anything, NaN included; slots that no row names keep their bits."""
    tokens = [x.at[1].set(jnp.nan).at[3].set(jnp.nan) for x in random(2, 4)[:5]]
    pool = jnp.asarray(np.random.default_rng(2).normal(size=(7, 2, 32, 32)), jnp.float32)
    pool = pool.at[4].set(jnp.nan)
    slots = jnp.array([5, -1, 0, 7])
    result = run(implementation, *tokens, pool, slots=slots, return_states=True)
    real = np.array([0, 2])
    out, states = truth(*(x[real] for x in tokens), pool[slots[real]])
    assert_close(result.out[real], out, atol=1e-5)
    assert_close(result.states[real], states, atol=1e-5)
    assert_close(result.final_state[slots[real]], states[:, -1], atol=1e-5)
    for row in (1, 3):
        assert not np.asarray(result.out[row]).any()
        assert not np.asarray(result.states[row]).any()
    for slot in (1, 2, 3, 4, 6):
        assert_bitwise_equal(result.final_state[slot], pool[slot], what=f"slot {slot}")


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_narrow_states_are_rounded_once_per_call(implementation):
    *tokens, state = random(3, 1, 3, value_dim=64, dtype=jnp.bfloat16)
    state = state.astype(jnp.bfloat16)
    result = run(implementation, *tokens, state, return_states=True)
    out, states = truth(*tokens, state)
    assert result.final_state.dtype == result.states.dtype == jnp.bfloat16
    assert_close(result.states, states, atol=1e-5, rtol=rounding(jnp.bfloat16))
    assert relative_error(result.out, out) < DELTA_RULE_TOLERANCES["bfloat16"]["out"]


@pytest.mark.parametrize("implementation", KERNELS)
def test_one_decay_per_key_channel(implementation):
    query, key, value, _, beta, state = random(4)
    g = -jnp.asarray(np.random.default_rng(4).exponential(size=key.shape), jnp.float32)
    result = run(implementation, query, key, value, g, beta, state)
    out, states = truth(query, key, value, g, beta, state)
    assert_close(result.out, out, atol=1e-5)
    assert_close(result.final_state, states[:, -1], atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_vmap_is_more_rows(pooled):
    stack = [random(seed, 2, 1) for seed in (5, 6)]
    stack = [jnp.stack(x) for x in zip(*stack, strict=True)]
    slots = jnp.array([[1, -1], [0, 1]]) if pooled else None

    def step(implementation):
        call = lambda slots, *x: pk.gated_delta_rule_step(
            *x, slots=slots, implementation=implementation
        )
        axes = (0 if pooled else None, *[0] * 6)
        return jax.jit(jax.vmap(call, in_axes=axes))(slots, *stack)

    with triton.interpreted():
        found = jax.block_until_ready(step("triton"))
    for actual, expected in zip(found, step("reference"), strict=True):
        assert_close(actual, expected, atol=1e-5) if actual is not None else None


@pytest.mark.parametrize("implementation", KERNELS)
def test_gradients_are_those_of_the_recurrence(implementation):
    operands = random(7, 1, 2, value_dim=32)

    def loss(operands, implementation):
        out, final, states = pk.gated_delta_rule_step(
            *operands, return_states=True, use_qk_l2norm=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(final * final) + jnp.sum(jnp.cos(states))

    with CONTEXTS[implementation]():
        found = jax.block_until_ready(
            jax.jit(jax.grad(loss), static_argnums=1)(operands, implementation)
        )
    expected = jax.grad(loss)(operands, "reference")
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


# --- choice ----------------------------------------------------------------------------------------------------------


def reasons(capability, *operands):
    with _dispatch.targeting(_dispatch.Target("gpu", capability)):
        return pk.explain("gated_delta_rule_step", *operands).reasons


def test_reasons():
    operands = random(8)
    found = pk.explain("gated_delta_rule_step", *operands)
    assert found.chosen == "reference"
    assert found.reasons["mosaic_gpu"].endswith("capability 9.0 (H100, H200)")
    assert found.reasons["triton"].endswith("capability 8.0 or newer")
    on_hopper = reasons("9.0", *operands)
    assert on_hopper["mosaic_gpu"] == on_hopper["triton"] == "reference is preferred here"
    assert "this is 8.0" in reasons("8.0", *operands)["mosaic_gpu"]
    assert "this is 7.5" in reasons("7.5", *operands)["triton"]
    odd = reasons("9.0", *random(8, key_dim=40, value_dim=48))
    assert odd["mosaic_gpu"] == "Dk must be a multiple of 16 up to 256, got 40"
    assert odd["triton"] == "Dk must be 16, 32, 64, 128 or 256, got 40"
    odd = reasons("9.0", *random(8, value_dim=48))
    assert odd["mosaic_gpu"] == "Dv must be a multiple of 32, got 48"
    assert odd["triton"] == "Dv must be 16, 32, 64, 128 or 256, got 48"
    narrow = reasons("9.0", *operands[:5], operands[5].astype(jnp.bfloat16))
    assert narrow["mosaic_gpu"] == "Dv must be a multiple of 64, got 32"
    with pytest.raises(NotImplementedError, match=r"triton.*cannot run this call.*8\.0"):
        pk.gated_delta_rule_step(*operands, implementation="triton")


def test_reasons_of_types(x64):
    operands = random(9)
    wide = [x.astype(jnp.float64) for x in operands]
    assert "got float64" in reasons("9.0", *wide)["triton"]
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        float32 = jnp.dtype("float32")
        reason = tuning.triton_reason(tuning.Call([float32], float32, 64, 64, is_varying=True))
    assert (
        reason
        == "it updates the state in place, which `jax.shard_map` allows with `check_vma=False` only"
    )


# --- machine code ----------------------------------------------------------------------------------------------------


def arguments(
    rows, length, *, slots=None, dim=128, state_dtype=jnp.float32, key_heads=16, heads=32
):
    struct, narrow = jax.ShapeDtypeStruct, jnp.bfloat16
    found = [
        struct((rows, length, key_heads, dim), narrow),
        struct((rows, length, key_heads, dim), narrow),
        struct((rows, length, heads, dim), narrow),
        struct((rows, length, heads), jnp.float32),
        struct((rows, length, heads), jnp.float32),
        struct((slots or rows, heads, dim, dim), state_dtype),
    ]
    return found + ([struct((rows,), jnp.int32)] if slots else [])


@pytest.mark.parametrize(
    "dim, state_dtype", [(128, "float32"), (128, "bfloat16"), (256, "float32")]
)
@pytest.mark.parametrize(
    "implementation, target", [("mosaic_gpu", "h200"), ("triton", "h200"), ("triton", "a100")]
)
def test_state_in_place_and_nothing_spilled(implementation, target, dim, state_dtype):
    """No copy of the state: it is an argument and, as the same buffer, a result; no other memory is used."""
    require()
    operands = arguments(64, 1, slots=80, dim=dim, state_dtype=jnp.dtype(state_dtype))
    report = aot.compile_program(
        lambda *x: pk.gated_delta_rule_step(
            *x[:6], slots=x[6], use_qk_l2norm=True, implementation=implementation
        )[:2],
        *operands,
        target=target,
        donate_argnums=5,
    )
    size = lambda x: x.size * x.dtype.itemsize
    state, out = size(operands[5]), size(operands[2])
    assert report.aliased_bytes == state
    assert report.temporary_bytes == 0
    assert report.argument_bytes == sum(map(size, operands))
    # Beside the two results, a table of their addresses.
    assert state + out <= report.output_bytes <= state + out + 64
    (kernel,) = report.kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert not kernel.slow_paths
    assert kernel.registers <= (255 if dim == 256 else 168)
    # Four blocks of the Hopper kernel share a multiprocessor.
    assert 4 * kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES


@pytest.mark.parametrize("implementation", KERNELS)
def test_eight_tokens_with_every_state_spill_nothing(implementation):
    require()
    report = aot.compile_program(
        lambda *x: pk.gated_delta_rule_step(
            *x, use_qk_l2norm=True, return_states=True, implementation=implementation
        ),
        *arguments(2, 8),
        donate_argnums=5,
    )
    (kernel,) = report.kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
    assert report.aliased_bytes == 2 * 32 * 128 * 128 * 4
    assert report.temporary_bytes <= 64  # a table of the addresses of three results
