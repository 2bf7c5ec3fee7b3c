"""The gated delta rule through the Hopper forward kernels (interpreted, with race detection), against the float64
recurrence: values, final states, and gradients from the T that the kernels made."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch, explain, gated_delta_rule
from pallas_kernels.delta_rule import order as orders
from pallas_kernels.delta_rule.hopper import fwd, prologue, tuning
from pallas_kernels.delta_rule.hopper.tuning import ForwardConfig
from tests.support import compare, delta_cases
from tests.support.delta_properties import cast, check_truth
from tests.support.mosaic_gpu_interpreter import interpreted

KERNEL = {"implementation": "mosaic_gpu"}
NASTY = tuple(delta_cases.nasty_cases(0, 1))
# The two blocks' shapes: both halves of the channels in one block, and a block for each.
TOGETHER = tuning.forward_config(width=128, heads=128)
SPLIT = ForwardConfig(splits=2)


def check(case, dtype=jnp.bfloat16, *, config=None, lanes=1, **options):
    choose = tuning.forward_config if config is None else lambda **_: config
    if config is not None or lanes > 1:  # not part of what a program is cached by
        jax.clear_caches()
    with (
        interpreted(),
        mock.patch.object(tuning, "lanes", return_value=lanes),
        mock.patch.object(tuning, "forward_config", choose),
    ):
        check_truth(case, dtype, **KERNEL, **options)
    if config is not None or lanes > 1:
        jax.clear_caches()


@pytest.mark.parametrize("length", [1, 64, 65])
def test_lengths(length):
    check(delta_cases.random_case(length, 2, length, 1, 1, 64, 64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_many_chunks(dtype):
    """More than there are stages, so that every slot is filled again."""
    check(delta_cases.random_case(0, 1, 330, 1, 1, 64, 64), dtype, scale=0.3)


@pytest.mark.parametrize("config", [TOGETHER, SPLIT], ids=["together", "split"])
def test_blocks_of_128_channels(config):
    check(delta_cases.random_case(1, 1, 130, 1, 2, 128, 128), config=config)


@pytest.mark.parametrize("key_dim, value_dim", [(60, 100), (96, 32)])
def test_other_dims_are_filled_up(key_dim, value_dim):
    check(delta_cases.random_case(2, 1, 70, 1, 1, key_dim, value_dim))


def test_heads_in_groups_and_rows():
    check(delta_cases.random_case(3, 2, 70, 2, 4, 64, 64))


@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs(name):
    check(delta_cases.nasty_cases(4, 140, 64)[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dim, lanes", [(64, 3), (128, 1)])
def test_normalises_in_the_kernels(dim, lanes, dtype):
    """Queries and keys of any length, zero among them, in rows that a chunk does not divide."""
    case = delta_cases.random_case(14, 1, 200, 1, 2, dim, dim)
    rng = np.random.default_rng(14)
    sizes = np.exp(rng.uniform(-3, 3, case.key.shape[:3]))[..., None]
    sizes[:, 5:8] = 0.0
    arrays = (case.query * sizes, case.key * sizes[:, ::-1], case.value)
    query, key, value = (jnp.asarray(x, dtype) for x in arrays)
    g, beta, state = (jnp.asarray(x, jnp.float32) for x in (case.g, case.beta, case.initial_state))
    options = {"initial_state": state, "use_qk_l2norm": True}
    jax.clear_caches()
    with interpreted(), mock.patch.object(tuning, "lanes", return_value=lanes):
        found = gated_delta_rule(query, key, value, g, beta, **options, **KERNEL)
        found = jax.block_until_ready(found)
    jax.clear_caches()
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    exact = gated_delta_rule(*wide, g, beta, **options, implementation="reference")
    limits = compare.DELTA_RULE_TOLERANCES[jnp.dtype(dtype).name]
    for name, one, other in zip(("out", "final_state"), found, exact, strict=True):
        assert compare.relative_error(one, other) <= limits[name], name


def test_packed_in_place():
    rng = np.random.default_rng(5)
    ids = np.sort(rng.integers(0, 5, (2, 130)), axis=1)
    ids = np.where(rng.random(ids.shape) < 0.1, -1, ids)
    ids[1, :70] = -2
    check(delta_cases.random_case(5, 2, 130, 1, 1, 64, 64, segment_ids=ids))


def test_packed_sequences():
    bounds = np.array([0, 0, 5, 75, 76, 76, 140, 150, 150])  # empty ones first, last and between
    check(delta_cases.random_case(6, 1, 155, 1, 1, 64, 64, cu_seqlens=bounds))


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_a_row_side_by_side(packed):
    ids = (np.arange(300)[None] > 140).astype(np.int32) if packed else None
    case = delta_cases.random_case(7, 1, 300, 1, 1, 64, 64, segment_ids=ids, decay=0.05)
    check(case, lanes=3)


@pytest.mark.slow
def test_a_segment_starts_at_every_position_of_a_chunk():
    ids = (np.arange(130)[None] >= 64 + np.arange(0, 65, 4)[:, None]).astype(np.int32)
    check(delta_cases.random_case(8, len(ids), 130, 1, 1, 32, 32, segment_ids=ids))


def test_values_of_any_size():
    """Half precision inside neither overflows nor vanishes."""
    case = delta_cases.random_case(9, 1, 100, 1, 1, 64, 64)
    *tokens, state = cast(case, jnp.bfloat16)
    run = jax.jit(lambda *x: tuple(gated_delta_rule(*x[:5], initial_state=x[5], **KERNEL)))
    query, key, value, g, beta = tokens
    with interpreted():
        out, final = jax.block_until_ready(run(query, key, value, g, beta, state))
        for factor in (2.0**-60, 2.0**60):
            scaled = (query, key, (value * factor).astype(value.dtype), g, beta, state * factor)
            big, big_final = jax.block_until_ready(run(*scaled))
            compare.assert_bitwise_equal(big, (out * factor).astype(out.dtype))
            compare.assert_bitwise_equal(big_final, final * factor)
        louder, _ = jax.block_until_ready(run((query * 2.0**40).astype(query.dtype), *scaled[1:]))
        compare.assert_bitwise_equal(louder, (big * 2.0**40).astype(big.dtype))


@pytest.mark.parametrize("dim, state_size", [(64, 0.0), (128, 1e-5)])
def test_values_that_grow_from_chunk_to_chunk(dim, state_size):
    """Each chunk keeps its digits, whatever comes after it, in either half of the value channels."""
    case = delta_cases.random_case(15, 1, 250, 1, 2, dim, dim)
    sizes = np.repeat([1e-6, 1e-3, 3e-3, 1e5], 64)[None, :250, None, None]
    channels = np.linspace(0, 20, dim)
    value = jnp.asarray(case.value * sizes * 2.0**-channels, jnp.bfloat16)
    query, key = (jnp.asarray(x, jnp.bfloat16) for x in (case.query, case.key))
    g, beta = (jnp.asarray(x, jnp.float32) for x in (case.g, case.beta))
    options = {"initial_state": jnp.asarray(case.initial_state * state_size, jnp.float32)}
    with interpreted():
        found = gated_delta_rule(query, key, value, g, beta, **options, **KERNEL)
        found = jax.block_until_ready(found)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    exact = gated_delta_rule(*wide, g, beta, **options, implementation="reference")
    limits = compare.DELTA_RULE_TOLERANCES["bfloat16"]
    for first in range(0, 250, 64):
        one, other = (x.out[:, first : first + 64] for x in (found, exact))
        assert compare.relative_error(one, other) <= limits["out"], first
    assert compare.relative_error(found.final_state, exact.final_state) <= limits["final_state"]


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_channel(poison):
    """A value that is not finite, before any unit is known, leaves the other channels of its head alone."""
    case = delta_cases.random_case(16, 1, 70, 1, 1, 64, 64)
    query, key, value, g, beta, _ = cast(case, jnp.bfloat16)
    run = jax.jit(lambda value: tuple(gated_delta_rule(query, key, value, g, beta, **KERNEL)))
    with interpreted():
        clean = jax.block_until_ready(run(value))
        found = jax.block_until_ready(run(value.at[0, 3, 0, 5].set(poison)))
    for one, other in zip(found, clean, strict=True):
        assert not np.isfinite(np.asarray(one, np.float32)[..., 5]).all()
        one, other = (np.delete(np.asarray(x, np.float64), 5, axis=-1) for x in (one, other))
        assert (
            compare.relative_error(one, other) <= compare.DELTA_RULE_TOLERANCES["bfloat16"]["out"]
        )


def test_padding_and_later_tokens_do_not_reach_earlier_ones():
    case = delta_cases.random_case(10, 1, 150, 1, 1, 64, 64)
    *tokens, state = cast(case, jnp.bfloat16)
    ids = jnp.where(jnp.arange(150)[None] < 100, 0, -1)
    poisoned = [x.at[:, 100:].set(jnp.nan) for x in tokens]
    run = jax.jit(
        lambda ids, tokens: tuple(
            gated_delta_rule(*tokens, initial_state=state, segment_ids=ids, **KERNEL)
        )
    )
    with interpreted():
        clean = jax.block_until_ready(run(ids, tokens))
        found = jax.block_until_ready(run(ids, poisoned))
    for one, other in zip(clean, found, strict=True):
        compare.assert_bitwise_equal(one, other)
    assert not np.any(np.asarray(found[0], np.float32)[:, 100:])


def test_vmap_and_second_derivative():
    case = delta_cases.random_case(11, 2, 20, 1, 1, 64, 64)
    query, key, value, g, beta, _ = cast(case, jnp.bfloat16)

    def loss(implementation, value):
        call = lambda *x: gated_delta_rule(*(y[None] for y in x), implementation=implementation)
        out = jax.vmap(lambda *x: call(*x).out)(query, key, value, g, beta)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def curvature(implementation):
        first = jax.grad(lambda v: loss(implementation, v).astype(jnp.float32))
        return first(value), jax.vjp(first, value)[1](value)[0]

    with interpreted():
        found = jax.block_until_ready(jax.jit(lambda: curvature("mosaic_gpu"))())
    for actual, expected in zip(found, curvature("chunked"), strict=True):
        assert compare.relative_error(actual, expected) < 1e-2


def inverses(case, dtype):
    """Keys, and T of the case's only chunk for each head: the kernel's in `dtype`, and the exact one."""
    plan = orders.Plan(1, 64, 64, 1, 1, 1.0, False)
    key = jnp.asarray(case.key, jnp.float16)
    g, beta = (jnp.asarray(x, jnp.float32) for x in (case.g, case.beta))
    gates = orders.gates(plan, orders.Order(), g, beta)
    run = jax.jit(lambda *x: prologue.prologue(*x, dtype=dtype).inverse)
    with interpreted():
        found = np.asarray(jax.block_until_ready(run(key, gates)), np.float64)[0, :, 0]
    key = np.asarray(key, np.float64)[0, :, 0]
    total = np.moveaxis(np.cumsum(case.g[0], axis=0), 1, 0)
    decay = np.exp(np.minimum(total[:, :, None] - total[:, None], 0))
    lower = np.tril(case.beta[0].T[..., None] * decay * (key @ key.T), -1)
    return key, found, np.linalg.inv(np.eye(64) + lower)


@pytest.mark.parametrize("name", NASTY)
def test_inverse(name):
    """T is right long before it is rounded, also for keys that are all alike."""
    _, found, expected = inverses(delta_cases.nasty_cases(12, 64, 64)[name], jnp.float32)
    compare.assert_close(found, expected, atol=2e-5, what=name)


@pytest.mark.parametrize("name", ["equal keys", "near-identical keys"])
def test_rounded_inverse_keeps_what_cancels(name):
    """`T^T K`, small beside T, is several times closer than with entries rounded one by one."""
    key, found, exact = inverses(delta_cases.nasty_cases(12, 64, 64)[name], jnp.float16)
    compare.assert_close(found, exact, atol=5e-4, what=name)
    careless = exact.astype(np.float16).astype(np.float64)
    folded, worse, truth = (np.swapaxes(x, 1, 2) @ key for x in (found, careless, exact))
    error = compare.relative_error(folded, truth)
    assert error <= 4e-4
    assert error <= 0.25 * compare.relative_error(worse, truth)


SHAPE = jax.ShapeDtypeStruct((1, 80, 2, 64), jnp.bfloat16)
GATE = jax.ShapeDtypeStruct((1, 80, 2), jnp.float32)


def reason(query=SHAPE, key=SHAPE, value=SHAPE, g=GATE, **options):
    return explain("gated_delta_rule", query, key, value, g, GATE, **options).reasons["mosaic_gpu"]


def test_reasons():
    assert reason() == "it needs an NVIDIA GPU of compute capability 9.0 (H100, H200)"
    with _dispatch.targeting(_dispatch.Target("gpu", "10.0")):
        assert "this is 10.0" in reason()
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        assert reason() == "chunked is preferred here"
        assert "got float32" in reason(value=SHAPE.update(dtype=jnp.float32))
        other = SHAPE.update(dtype=jnp.float16)
        assert "query and key of one dtype, got bfloat16 and float16" in reason(key=other)
        assert reason(other, other) == reason(value=other) == "chunked is preferred here"
        wide = SHAPE.update(shape=(1, 80, 2, 256))
        assert reason(value=wide) == "Dv must be at most 128, got 256"
        assert reason(wide, wide) == "Dk must be at most 128, got 256"
        assert reason(g=SHAPE) == "it has no decay per key channel"
        assert "got `chunk_size=16`" in reason(chunk_size=16)
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*cannot run this call.*9\.0"):
        gated_delta_rule(x, x, x, x[..., 0], x[..., 0], **KERNEL)


def test_outputs_are_written_everywhere():
    """Every place of the outputs gets a number, whatever the memory held (the interpreter starts with NaN)."""
    case = delta_cases.random_case(13, 1, 190, 1, 1, 64, 64)
    plan = orders.Plan(1, 190, 64, 1, 3, 1.0, False)
    half = lambda x: orders.to_rows(plan, orders.Order(), jnp.asarray(x, jnp.float16))
    g, beta = (jnp.asarray(x, jnp.float32) for x in (case.g, case.beta))
    gates = orders.gates(plan, orders.Order(), g, beta)

    def run(query, key, value, start):
        inverse, tables = prologue.prologue(key, gates)
        config = tuning.forward_config(width=64, heads=1)
        options = {"config": config, "scale": 1.0, "segments": False}
        return (
            inverse,
            tables,
            *fwd.forward(query, key, value, tables, inverse, start, **options),
        )

    operands = (half(case.query), half(case.key), half(case.value))
    with interpreted():
        found = jax.jit(run)(*operands, jnp.asarray(case.initial_state, jnp.float32))
        found = jax.block_until_ready(found)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
