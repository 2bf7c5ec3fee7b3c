"""What a query does not see is inert, NaN and infinity included: values, gradients, gradients of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.support import attention_cases as cases
from tests.support.attention_cases import Case
from tests.support.compare import assert_close

IMPLEMENTATIONS = list(cases.IMPLEMENTATIONS)
REQUESTS = [
    Case(places="causal", sinks=True),
    Case(places="window", soft_cap=2.0, dims=(16, 8)),
    Case(places="documents", bias="full", heads=(1, 3)),
    Case(places="shuffled"),
    Case(mask="full", bias="heads", soft_cap=1.5),
    Case(places="packed", batch=1, lengths=(37, 29), dropout=0.2),
]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    cases.small_blocks(monkeypatch)


def poison(case, arrays, options, value):
    """Keys, values and biases of a few keys, and the queries of as many rows, made `value`.

    Returns the arrays, and which rows [B, T, N] are still what they were.
    """
    draw = np.random.default_rng(case.seed + 3)
    poisoned = {name: np.array(array) for name, array in arrays.items()}
    seen = np.stack([_seen(case, options, s) for s in range(case.lengths[1])], -1)  # [B, T, N, S]
    clean = np.ones(seen.shape[:-1], bool)
    for name in ("key", "value"):
        b, s = draw.integers(case.batch), draw.integers(case.lengths[1] // 2, case.lengths[1])
        head = draw.integers(case.heads[0])
        poisoned[name][b, s, head, 0] = value
        group = slice(head * case.heads[1], (head + 1) * case.heads[1])
        clean[b, :, group] &= ~seen[b, :, group, s]
    b, t, n = draw.integers(case.batch), case.lengths[0] - 1, draw.integers(clean.shape[-1])
    poisoned["query"][b, t, n, 1] = value
    clean[b, t, n] &= ~seen[b, t, n].any()
    if "bias" in arrays:
        hidden = np.moveaxis(~seen, 2, 1)  # [B, N, T, S]
        if poisoned["bias"].shape[0] == 1:
            hidden = hidden.all(0, keepdims=True)
        poisoned["bias"] = np.where(hidden, value, poisoned["bias"])
    return poisoned, clean


def _seen(case, options, s):
    """Which rows [B, T, N] see key s: those whose output moves if only it has a value."""
    arrays, _ = case.arrays(np.float32)
    value = np.zeros_like(arrays["value"])
    value[:, s] = 1.0
    plain = {k: v for k, v in options.items() if not k.startswith("dropout")}
    out, _ = cases.truth(arrays | {"value": value}, plain)
    return out[..., 0] != 0.0


def loss(implementation, options, clean):
    """A scalar of the rows that are `clean` only."""

    def of(arrays):
        arrays = dict(arrays)
        out, lse = pk.gqa_attention_with_lse(
            *[arrays.pop(name) for name in ("query", "key", "value")],
            implementation=implementation, **options, **arrays,
        )  # fmt: skip
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        kept = jnp.where(clean[..., None], out, 0.0)
        visible = jnp.where(clean & ~jnp.isneginf(lse), lse, 0.0)
        return (kept * kept * weights).sum() + visible.sum(), (out, lse)

    return of


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", range(len(REQUESTS)), ids=lambda i: str(REQUESTS[i]))
def test_poison_stays_where_it_is_seen(index, implementation):
    case, value = REQUESTS[index], (np.nan, np.inf)[index % 2]
    arrays, options = case.arrays(np.float32)
    poisoned, clean = poison(case, arrays, options, value)
    run = jax.jit(jax.value_and_grad(loss(implementation, options, clean), has_aux=True))
    (_, (expected, _)), d_expected = run(
        {n: np.where(np.isfinite(a), a, 0) for n, a in poisoned.items()}
    )
    (_, (out, lse)), d_arrays = run(poisoned)
    assert_close(out[clean], expected[clean], atol=1e-6)
    assert clean.any()
    assert not clean.all()
    assert np.isnan(np.asarray(out[~clean])).any(-1).all()  # and who sees it knows
    assert not np.isfinite(np.asarray(lse[~clean])).any()
    for name, array in poisoned.items():
        scale = float(np.abs(d_expected[name]).max())
        assert_close(d_arrays[name], d_expected[name], atol=1e-5 * scale, what=name)
        if name != "bias":
            assert (np.asarray(d_arrays[name])[~np.isfinite(array)] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_poison_in_second_derivatives(implementation):
    case = REQUESTS[2]
    arrays, options = case.arrays(np.float32)
    poisoned, clean = poison(case, arrays, options, np.nan)

    def twice(arrays):
        grads = jax.grad(lambda arrays: loss(implementation, options, clean)(arrays)[0])(arrays)
        return sum(jnp.sum(g * jnp.cos(g)) for g in jax.tree.leaves(grads))

    run = jax.jit(jax.grad(twice))
    expected = run({n: np.where(np.isfinite(a), a, 0) for n, a in poisoned.items()})
    for name, actual in run(poisoned).items():
        scale = float(np.abs(expected[name]).max())
        assert_close(actual, expected[name], atol=1e-5 * scale, what=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_hides_poison(implementation):
    arrays, _ = Case(lengths=(9, 20)).arrays(np.float32)
    bias = np.where(np.arange(20) < 13, 0.3, -np.inf).astype(np.float32)[None, None, None]
    poisoned = {n: np.array(a) for n, a in arrays.items()}
    poisoned["key"][:, 15], poisoned["value"][:, 16] = np.inf, np.nan
    clean = np.ones((2, 9, 4), bool)
    run = jax.jit(jax.value_and_grad(loss(implementation, {"bias": bias}, clean), has_aux=True))
    (_, expected), d_expected = run(arrays)
    (_, actual), d_actual = run(poisoned)
    jax.tree.map(
        lambda a, e: assert_close(a, e, atol=1e-5), (actual, d_actual), (expected, d_expected)
    )
