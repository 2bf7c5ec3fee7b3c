# ruff: noqa: E501 (one line per refusal)
"""`decode_attention` against `gqa_attention` in float64, and its contract."""

import inspect
import itertools
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.decode import tuning
from tests.support.compare import assert_bitwise_equal, assert_close, rounding

IMPLEMENTATIONS = ("blockwise", "reference")
CASES = [  # (T, (K, R), (D, Dv), options)
    (1, (2, 4), (16, 16), ()),
    (1, (1, 16), (64, 64), ("window",)),
    (3, (2, 3), (16, 24), ("sinks",)),
    (16, (3, 1), (17, 5), ("window", "sinks", "cap", "scale")),
    (5, (2, 2), (32, 32), ("cap",)),
]


def problem(num_new, heads, dims, options, *, seed, batch=3, capacity=37):
    draw = np.random.default_rng(seed)
    (groups, group), (dim, value_dim) = heads, dims
    arrays = dict(
        query=draw.normal(size=(batch, num_new, groups * group, dim)),
        key_cache=draw.normal(size=(batch, groups, capacity, dim)),
        value_cache=draw.normal(size=(batch, groups, capacity, value_dim)),
    )
    lengths = np.array([capacity, num_new, draw.integers(num_new, capacity + 1)], np.int32)[:batch]
    chosen = {
        "window": {"sliding_window": 6},
        "sinks": {"sinks": draw.normal(size=groups * group)},
        "cap": {"logits_soft_cap": 1.5},
        "scale": {"scale": 0.6},
    }
    return arrays, lengths, dict(itertools.chain(*(chosen[o].items() for o in options)))


def truth(arrays, lengths, options):
    """The same by `gqa_attention`, row by row over what the row really holds, in float64."""
    num_new = arrays["query"].shape[1]
    rows = []
    with jax.enable_x64(True):
        options = {n: jnp.asarray(o) if n == "sinks" else o for n, o in options.items()}
        for b, length in enumerate(lengths):
            query, key, value = (
                jnp.asarray(np.asarray(arrays[n][b : b + 1], np.float64))
                for n in ("query", "key_cache", "value_cache")
            )
            rows.append(
                pk.gqa_attention(
                    query,
                    jnp.swapaxes(key, 1, 2)[:, :length],
                    jnp.swapaxes(value, 1, 2)[:, :length],
                    is_causal=True,
                    q_offset=int(length) - num_new,
                    implementation="reference",
                    **options,
                )
            )
        return np.concatenate([np.asarray(row) for row in rows])


def run(implementation, arrays, lengths, options, dtype, cache_dtype=None):
    options = {n: jnp.asarray(o, jnp.float32) if n == "sinks" else o for n, o in options.items()}
    cache = lambda n: jnp.asarray(arrays[n], cache_dtype or dtype)
    return jax.jit(
        lambda query, key, value, lengths: pk.decode_attention(
            query, key, value, lengths, implementation=implementation, **options
        )
    )(jnp.asarray(arrays["query"], dtype), cache("key_cache"), cache("value_cache"), jnp.asarray(lengths))  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_attention_over_the_filled_cache(implementation, case, at_once, monkeypatch):
    if implementation == "reference" and at_once > 1:
        at_once = 1
    monkeypatch.setattr(tuning, "pairs_at_once", lambda pairs: min(pairs, at_once))
    arrays, lengths, options = problem(*case, seed=at_once)
    out = run(implementation, arrays, lengths, options, jnp.float32)
    assert out.dtype == jnp.float32
    assert_close(out, truth(arrays, lengths, options), atol=4 * rounding(jnp.float32), what="out")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_narrow_queries_and_caches(implementation, dtype):
    arrays, lengths, options = problem(*CASES[3], seed=4)
    rounded = {n: np.asarray(jnp.asarray(a, dtype)).astype(np.float64) for n, a in arrays.items()}
    expected = truth(rounded, lengths, options)
    out = run(implementation, rounded, lengths, options, dtype)
    assert out.dtype == dtype
    assert_close(out, expected, atol=4 * rounding(dtype), what="out")
    mixed = run(implementation, rounded, lengths, options, jnp.float32, dtype)
    assert_close(mixed, expected, atol=4 * rounding(jnp.float32), what="float32 query")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantised_caches_with_scales(implementation, cache, dtype):
    arrays, lengths, options = problem(2, (2, 4), (32, 32), ("sinks",), seed=5)
    top = {"int8": 127.0, "float8_e4m3fn": 448.0}[cache]
    narrow = np.int8 if cache == "int8" else ml_dtypes.float8_e4m3fn
    seen, stored = dict(arrays), {}
    seen["query"] = np.asarray(jnp.asarray(arrays["query"], dtype)).astype(np.float64)
    for name in ("key", "value"):
        full = arrays[f"{name}_cache"]
        scale = (np.abs(full).max(-1) / top).astype(np.float32)
        codes = full / scale[..., None]
        codes = (np.rint(codes) if cache == "int8" else codes).astype(narrow)
        stored[f"{name}_cache"], stored[f"{name}_scale"] = codes, scale
        seen[f"{name}_cache"] = codes.astype(np.float64) * scale[..., None]
    out = jax.jit(
        lambda query, stored: pk.decode_attention(
            query, lengths=jnp.asarray(lengths), implementation=implementation,
            sinks=jnp.asarray(options["sinks"], jnp.float32), **stored,
        )
    )(jnp.asarray(arrays["query"], dtype), {n: jnp.asarray(a) for n, a in stored.items()})  # fmt: skip
    assert_close(out, truth(seen, lengths, options), atol=4 * rounding(dtype), what="out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_stands_behind_the_length_changes_no_bit(implementation):
    arrays, lengths, options = problem(*CASES[2], seed=6)
    before = run(implementation, arrays, lengths, options, jnp.float32)
    for b, length in enumerate(lengths):
        arrays["key_cache"][b, :, length:] = 1e30
        arrays["value_cache"][b, :, length:] = -1e30
    assert_bitwise_equal(before, run(implementation, arrays, lengths, options, jnp.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_shorter_than_the_step_give_zeros_before_their_start(implementation):
    arrays, _, _ = problem(4, (2, 2), (8, 8), (), seed=7)
    out = run(implementation, arrays, np.array([0, 2, 4], np.int32), {}, jnp.float32)
    assert not np.asarray(out[0]).any()
    assert not np.asarray(out[1, :2]).any()
    assert np.asarray(out[1, 2:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_step_at_a_time_equals_all_at_once(implementation):
    arrays, _, _ = problem(6, (2, 2), (8, 8), (), seed=8)
    lengths = np.array([20, 9, 37], np.int32)
    whole = run(implementation, arrays, lengths, {"sliding_window": 4}, jnp.float32)
    for t in range(6):
        one = dict(arrays, query=arrays["query"][:, t : t + 1])
        out = run(implementation, one, lengths - 5 + t, {"sliding_window": 4}, jnp.float32)
        assert_close(out[:, 0], whole[:, t], atol=rounding(jnp.float32), what=f"token {t}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_and_gradients(implementation):
    arrays, lengths, _ = problem(2, (2, 2), (8, 8), (), seed=9)
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
    lengths = jnp.asarray(lengths)

    def loss(arrays, lengths, implementation=implementation):
        out = pk.decode_attention(**arrays, lengths=lengths, implementation=implementation)
        return (out**2).sum()

    stacked = {n: jnp.stack([a, -2 * a]) for n, a in arrays.items()}
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(stacked, jnp.stack([lengths, lengths]))
    for i in range(2):
        expected = jax.jit(jax.grad(lambda a: loss(a, lengths, "reference")))(
            {n: a[i] for n, a in stacked.items()}
        )
        for name in expected:
            assert_close(gradients[name][i], expected[name], atol=1e-4, what=name)


def test_cache_is_neither_copied_nor_widened_whole():
    """Compiled scratch memory of a step stays under half of one cache, whatever the number of cores."""
    pairs = 8 * max(2, os.cpu_count() or 1)
    cache = jax.ShapeDtypeStruct((pairs // 2, 2, 4096, 64), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((pairs // 2, 1, 8, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((pairs // 2,), jnp.int32)
    compiled = jax.jit(pk.decode_attention).lower(query, cache, cache, lengths).compile()
    one_cache = pairs * 4096 * 64 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < one_cache / 2


Q, C, L = jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 2, 16, 8)), jnp.ones(2, jnp.int32)
REFUSED = [
    (dict(query=Q[0]), ValueError, r"`query` must have shape \[B, T, N, D\]"),
    (dict(query=Q.astype(jnp.int32)), TypeError, "`query` must be floating point, got int32"),
    (dict(query=jnp.zeros((2, 17, 4, 8)), key_cache=jnp.zeros((2, 2, 32, 8)), value_cache=jnp.zeros((2, 2, 32, 8))), ValueError, "`query` must hold 1 to 16 tokens, got T=17"),
    (dict(query=jnp.zeros((2, 0, 4, 8))), ValueError, "`query` must hold 1 to 16 tokens, got T=0"),
    (dict(query=jnp.zeros((2, 3, 4, 8)), key_cache=C[:, :, :2], value_cache=C[:, :, :2]), ValueError, "`key_cache` must hold at least T=3 slots, got S=2"),
    (dict(query=jnp.zeros((2, 1, 3, 8))), ValueError, "`N=3` must be a positive multiple of `K=2`"),
    (dict(key_cache=C[:1]), ValueError, r"`key_cache` must have shape \[B=2, K, S, D=8\]"),
    (dict(value_cache=C[:, :, :9]), ValueError, r"`value_cache` must have shape \[B=2, K=2, S=16, Dv\]"),
    (dict(key_cache=C.astype(jnp.int32)), TypeError, "`key_cache` must be floating point, got int32"),
    (dict(key_cache=C.astype(jnp.int8)), ValueError, "`key_scale` must be given with an int8 `key_cache`, got None"),
    (dict(value_cache=C.astype(jnp.int8)), ValueError, "`value_scale` must be given with an int8 `value_cache`, got None"),
    (dict(key_scale=jnp.ones((2, 2))), ValueError, r"`key_scale` must have shape \[B, K, S\]"),
    (dict(value_scale=jnp.ones((2, 2, 16), jnp.int32)), TypeError, "`value_scale` must be floating point"),
    (dict(lengths=jnp.ones(3, jnp.int32)), ValueError, r"`lengths` must have shape \[B=2\], got \(3,\)"),
    (dict(lengths=jnp.ones(2)), TypeError, "`lengths` must be an integer array, got float32"),
    (dict(lengths=3), TypeError, "`lengths` must be an array, got int"),
    (dict(sliding_window=0), ValueError, "`sliding_window` must be a positive number of keys, got 0"),
    (dict(sliding_window=1.5), TypeError, "`sliding_window` must be an int, got 1.5"),
    (dict(sinks=jnp.ones(2)), ValueError, r"`sinks` must have shape \[N=4\]"),
    (dict(sinks=jnp.ones(4, jnp.int32)), TypeError, "`sinks` must be floating point"),
    (dict(logits_soft_cap=-1.0), ValueError, "`logits_soft_cap` must be positive, got -1.0"),
    (dict(scale="x"), TypeError, "`scale` must be a Python number, got str"),
    (dict(implementation="mosaic"), ValueError, "`implementation` must be None or one of 'blockwise', 'reference', got 'mosaic'"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[m[:50] for *_, m in REFUSED])
def test_bad_calls_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        pk.decode_attention(**(dict(query=Q, key_cache=C, value_cache=C, lengths=L) | change))


def test_defaults_can_be_passed_and_explain_agrees():
    defaults = {
        n: p.default
        for n, p in inspect.signature(pk.decode_attention).parameters.items()
        if p.default is not p.empty
    }
    assert_bitwise_equal(
        pk.decode_attention(Q, C, C, L, **defaults), pk.decode_attention(Q, C, C, L)
    )
    assert pk.explain("decode_attention", Q, C, C, L).chosen == "blockwise"
