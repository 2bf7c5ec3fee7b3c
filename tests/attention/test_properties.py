"""What every implementation of `gqa_attention` must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.support import attention_cases as cases
from tests.support.compare import assert_bitwise_equal, assert_close, rounding

IMPLEMENTATIONS = list(cases.IMPLEMENTATIONS)
COVERING = cases.covering(seed=7)
pytestmark = pytest.mark.usefixtures("tiles")


@pytest.fixture
def tiles(monkeypatch):
    cases.small_blocks(monkeypatch)


def as_jax(arrays, dtype):
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def attend(implementation, options):
    """A function of the dictionary of differentiable arrays."""

    def call(arrays):
        arrays = dict(arrays)
        return pk.gqa_attention_with_lse(
            *[arrays.pop(name) for name in ("query", "key", "value")],
            implementation=implementation,
            **options,
            **arrays,
        )

    return call


def value_and_cotangents(implementation, arrays, options, cotangents):
    """Out, lse and the cotangent of every differentiable array, jitted in one."""

    @jax.jit
    def run(arrays, cotangents):
        result, pullback = jax.vjp(attend(implementation, options), arrays)
        cotangents = jax.tree.map(lambda c, r: c.astype(r.dtype), cotangents, tuple(result))
        return result, pullback(pk.AttentionOutput(*cotangents))[0]

    return run(arrays, cotangents)


def random_cotangents(case):
    draw = np.random.default_rng(case.seed + 1000)
    shape = (case.batch, case.lengths[0], case.heads[0] * case.heads[1])
    return draw.normal(size=(*shape, case.dims[1])), draw.normal(size=shape)


@functools.cache
def expectation(case, dtype):
    """Values and cotangents by the reference in float64, its values held against the numpy truth."""
    arrays, options = case.arrays(dtype)
    with jax.enable_x64(True):
        expected, d_expected = value_and_cotangents(
            "reference",
            as_jax(arrays, jnp.float64),
            options,
            tuple(map(jnp.asarray, random_cotangents(case))),
        )
        expected, d_expected = jax.tree.map(np.asarray, (expected, d_expected))
    if not case.dropout:
        true_out, true_lse = cases.truth(arrays, options)
        assert_close(expected.out, true_out, atol=1e-12, what="reference out")
        assert_same_lse(expected.lse, true_lse, 1e-12)
    return expected, d_expected


def check(implementation, case, dtype=jnp.float32):
    arrays, options = case.arrays(dtype)
    cotangents = random_cotangents(case)
    out, d_arrays = value_and_cotangents(
        implementation, as_jax(arrays, dtype), options, tuple(map(jnp.asarray, cotangents))
    )
    expected, d_expected = expectation(case, dtype)
    assert out.out.dtype == dtype
    assert out.lse.dtype == (dtype if dtype == jnp.float64 else jnp.float32)
    near = rounding(dtype)
    assert_close(out.out, expected.out, atol=near * max(1, np.abs(expected.out).max()), what="out")
    assert_same_lse(
        out.lse, expected.lse, 10 * rounding(jnp.float32) if dtype != jnp.float64 else 1e-12
    )
    for name, gradient in d_arrays.items():
        assert gradient.dtype == dtype, name
        size = max(1.0, np.abs(d_expected[name]).max())
        assert_close(gradient, d_expected[name], atol=4 * near * size, what=f"d_{name}")


def assert_same_lse(actual, expected, atol):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    seen = np.isfinite(expected)
    assert_close(
        actual[seen],
        expected[seen],
        atol=atol * max(1, np.abs(expected[seen]).max(initial=0)),
        what="lse",
    )


@pytest.mark.parametrize("case", cases.EACH_OPTION_ALONE, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_option_alone_equals_the_float64_truth(implementation, case):
    check(implementation, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERING, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_pair_of_options_equals_the_float64_truth(implementation, case):
    check(implementation, case)


MIXED = cases.Case(
    places="documents", bias="heads", sinks=True, soft_cap=3.0, dropout=0.2, mask="keys", lengths=(40, 33)
)  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_of_values_and_gradients(implementation, dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    check(implementation, MIXED, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_equals_calls_one_by_one(implementation):
    case = cases.Case(batch=3, places="documents", sinks=True)
    arrays, options = case.arrays(np.float32)
    whole = attend(implementation, options)(as_jax(arrays, jnp.float32))
    for b in range(case.batch):
        part = {n: a if n == "sinks" else a[b : b + 1] for n, a in arrays.items()}
        own = {n: o[b : b + 1] if isinstance(o, np.ndarray) else o for n, o in options.items()}
        one = attend(implementation, own)(as_jax(part, jnp.float32))
        assert_close(whole.out[b], one.out[0], atol=rounding(jnp.float32), what=f"row {b}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_running_twice_gives_the_same_bits(implementation):
    arrays, options = MIXED.arrays(np.float32)
    run = functools.partial(
        value_and_cotangents, implementation, as_jax(arrays, jnp.float32), options,
        tuple(map(jnp.asarray, random_cotangents(MIXED))),
    )  # fmt: skip
    for first, second in zip(jax.tree.leaves(run()), jax.tree.leaves(run()), strict=True):
        assert_bitwise_equal(first, second)


@pytest.mark.parametrize("places", ["causal", "window", "documents"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_hidden_has_a_gradient_of_exactly_zero(implementation, places):
    case = cases.Case(places=places, lengths=(37, 37), batch=1)
    arrays, options = case.arrays(np.float32)
    row = 20

    def one_row(arrays):
        return attend(implementation, options)(arrays).out[:, row].sum()

    gradient = jax.jit(jax.grad(one_row))(as_jax(arrays, jnp.float32))
    for s in range(37):
        seen = cases._sees(options, 0, row, s, 37, 37)
        for name in ("key", "value"):
            assert bool((np.asarray(gradient[name][0, s]) != 0).any()) <= seen, (name, s)
    others = np.delete(np.asarray(gradient["query"]), row, axis=1)
    assert not others.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_keys_may_hold_anything_finite(implementation):
    """Changing what is hidden changes no bit."""
    case = cases.Case(places="window", lengths=(24, 24), batch=1)
    arrays, options = case.arrays(np.float32)
    arrays = {name: array.copy() for name, array in arrays.items()}
    run = jax.jit(lambda arrays: attend(implementation, options)(arrays).out[:, 12])
    before = run(as_jax(arrays, jnp.float32))
    for name in ("key", "value"):
        arrays[name][:, 13:] = 1e4
        arrays[name][:, :8] = -1e4
    assert_bitwise_equal(before, run(as_jax(arrays, jnp.float32)))


@pytest.mark.parametrize("way", ["mask", "segments", "bias", "offset"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(implementation, way):
    case = cases.Case(lengths=(20, 20), batch=1)
    arrays, _ = case.arrays(np.float32)
    hidden = slice(0, 20)
    options = {
        "mask": {"mask": np.zeros((1, 1, 1, 20), bool)},
        "segments": {
            "query_segment_ids": np.full((1, 20), -1, np.int32),
            "kv_segment_ids": np.full((1, 20), -1, np.int32),
        },
        "bias": {},
        "offset": {"is_causal": True, "q_offset": -5},
    }[way]
    if way == "bias":
        arrays["bias"] = np.full((1, 1, 20, 20), -np.inf, np.float32)
    if way == "offset":
        hidden = slice(0, 5)

    def loss(arrays):
        out, lse = attend(implementation, options)(arrays)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.where(
            jnp.isfinite(lse), lse, 0.0
        ).sum(), (out, lse)

    gradient, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(as_jax(arrays, jnp.float32))
    assert not np.asarray(out[:, hidden]).any()
    assert np.isneginf(np.asarray(lse[:, hidden])).all()
    for name, array in gradient.items():
        assert np.isfinite(np.asarray(array)).all(), name
    assert not np.asarray(gradient["query"][:, hidden]).any()
    if way != "offset":
        assert not np.asarray(gradient["value"]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sink_alone_takes_all_mass(implementation):
    arrays, _ = cases.Case(lengths=(3, 5), batch=1, sinks=True).arrays(np.float32)
    out, lse = attend(implementation, {"mask": np.zeros((1, 1, 1, 5), bool)})(
        as_jax(arrays, jnp.float32)
    )
    assert not np.asarray(out).any()
    assert_close(lse[0, 0], arrays["sinks"], atol=1e-6, what="lse is the sink")


@pytest.mark.parametrize("places", ["causal", "shuffled"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformations_compose(implementation, places):
    case = cases.Case(places=places, batch=2, lengths=(20, 20), bias="full", sinks=True)
    arrays, options = case.arrays(np.float32)
    arrays = as_jax(arrays, jnp.float32)
    stacked = {n: jnp.stack([a, 2 * a, -a]) for n, a in arrays.items()}
    ways = {
        n: jnp.stack([jnp.asarray(o)] * 3) for n, o in options.items() if isinstance(o, np.ndarray)
    }
    fixed = {n: o for n, o in options.items() if not isinstance(o, np.ndarray)}

    def loss(arrays, ways):
        return (attend(implementation, fixed | ways)(arrays).out ** 2).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(stacked, ways)
    summed = jax.jit(jax.grad(lambda arrays: jax.vmap(loss)(arrays, ways).sum()))(stacked)
    looped = jax.jit(jax.grad(lambda a: jax.lax.map(lambda x: loss(*x), (a, ways)).sum()))(stacked)
    kept = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None)))(
        stacked, {n: w[0] for n, w in ways.items()}
    )
    alone = jax.jit(jax.grad(loss))
    for i in range(3):
        expected = alone({n: a[i] for n, a in stacked.items()}, {n: w[i] for n, w in ways.items()})
        for how in (gradients, summed, looped, kept):
            for name in expected:
                size = max(1.0, float(jnp.abs(expected[name]).max()))
                assert_close(
                    how[name][i], expected[name], atol=4 * size * rounding(jnp.float32), what=name
                )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivative_equals_that_of_the_reference(implementation):
    case = cases.Case(batch=1, lengths=(9, 11), heads=(1, 2), dims=(4, 3), places="bottom_right",
                      bias="heads", sinks=True, soft_cap=2.0, dropout=0.2)  # fmt: skip
    arrays, options = case.arrays()
    arrays = as_jax(arrays, jnp.float64)
    weights = jnp.asarray(random_cotangents(case)[0])

    def second(implementation):
        def loss(arrays):
            out, lse = attend(implementation, options)(arrays)
            return (weights * out).sum() + jnp.sin(lse).sum()

        def norm(arrays):
            return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(arrays)))

        return jax.jit(jax.grad(norm))(arrays)

    expected = second("reference")
    for name, gradient in second(implementation).items():
        assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9, what=name)


@pytest.mark.usefixtures("x64")
def test_reference_gradient_equals_finite_differences():
    arrays, options = MIXED.arrays()
    arrays = as_jax(arrays, jnp.float64)
    cotangent = jnp.asarray(random_cotangents(MIXED)[0])
    run = jax.jit(lambda arrays: (attend("reference", options)(arrays).out * cotangent).sum())
    gradient = jax.jit(jax.grad(run))(arrays)
    draw = np.random.default_rng(3)
    way = {n: jnp.asarray(draw.normal(size=a.shape)) for n, a in arrays.items()}
    step = 1e-5
    moved = lambda sign: run({n: arrays[n] + sign * step * way[n] for n in arrays})
    expected = (moved(1) - moved(-1)) / (2 * step)
    actual = sum((gradient[n] * way[n]).sum() for n in arrays)
    assert_close(actual, expected, atol=1e-6, rtol=1e-7, what="directional derivative")
