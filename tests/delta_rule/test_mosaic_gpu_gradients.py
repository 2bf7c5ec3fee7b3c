"""One chunk through `gradients` on the CPU, by the interpreter with race detection: operands as a caller gives them, of
all sizes, against the float64 recurrence behind an l2 norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper.chains import Shapes
from pallas_kernels.delta_rule.hopper.gradients import D_BETA, run_gradients
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, BackwardConfig
from tests.support import compare, delta_cases
from tests.support.mosaic_gpu_interpreter import interpreted

EPSILON = 1e-6


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(dtype)).astype(np.float64)


def power_of_two(size):
    """Above `size`."""
    return np.ldexp(1.0, np.frexp(size)[1])


def length(x):
    """What the norm divides a token by."""
    return np.sqrt((x * x).sum(-1, keepdims=True) + EPSILON)


def pulled_back(x, gradient):
    """The gradient of `x` given that of `x / length(x)`, zero where `x` is."""
    unit = x / length(x)
    along = (unit * gradient).sum(-1, keepdims=True)
    return np.where(x.any(-1, keepdims=True), (gradient - unit * along) / length(x), 0.0)


def sized_case(seed, heads, dims, given, value_dtype, use_qk_l2norm):
    """A chunk of tokens of all lengths, some zero, whose key heads hold values and cotangents of different sizes."""
    case = delta_cases.random_case(seed, 1, CHUNK, *heads, *dims)
    rng = np.random.default_rng(seed + 1)
    lengths = lambda most: 10.0 ** rng.uniform(-most, most, (1, CHUNK, heads[0], 1))
    query = case.query * lengths(3 if use_qk_l2norm else 1)
    key = case.key * (lengths(3) if use_qk_l2norm else 1.0)
    query[:, [5, 40]] = 0.0
    key[:, [5, 20]] = 0.0
    ratio = 10.0 ** np.arange(heads[0])
    values, cotangents = (np.repeat(x, heads[1] // heads[0]) for x in (30.0 / ratio, 1e-2 * ratio))
    of_token, of_state = (lambda x: x[:, None]), (lambda x: x[:, None, None])
    return dataclasses.replace(
        case,
        query=rounded(query, given),
        key=rounded(key, given),
        value=rounded(case.value * of_token(values), value_dtype),
        initial_state=case.initial_state * of_state(values),
        d_out=rounded(case.d_out * of_token(cotangents), value_dtype),
        d_final=case.d_final * of_state(cotangents),
    )


def largest(group, *arrays):
    """A power of two above what each key head holds, for each of its value heads `[1, Hv]`."""
    sizes = [np.abs(x).max(axis=axes) for x, axes in zip(arrays, ((1, 3), (2, 3)), strict=True)]
    sizes = np.maximum(*sizes).reshape(-1, group).max(axis=1)
    return np.repeat(power_of_two(sizes), group)[None]


def operands(case, given, value_dtype, use_qk_l2norm):
    """The arrays of `run_gradients`; gates and T in float64 by their definitions."""
    group = case.value.shape[2] // case.key.shape[2]
    g, beta = (np.swapaxes(x, 1, 2) for x in (case.g, case.beta))
    total = np.cumsum(g, axis=-1)
    decay = np.tril(np.exp(np.tril(total[..., :, None] - total[..., None, :])))
    key = case.key / length(case.key) if use_qk_l2norm else case.key
    key = np.repeat(np.swapaxes(key, 1, 2), group, axis=1)
    lower = np.tril(beta[..., None] * decay * (key @ np.swapaxes(key, 2, 3)), -1)
    high = total.astype(np.float32)
    rows = {
        order.HIGH: high, order.LOW: total - high, order.BETA: beta, order.UNTIL: np.exp(total[..., -1:] - total),
        order.SINCE: np.exp(total),
    }  # fmt: skip
    table = [rows[row] for row in range(order.table_rows(segments=False))]
    asked = np.repeat(power_of_two(np.abs(case.query).max(axis=(1, 3))), group, axis=1)
    read = case.d_out if use_qk_l2norm else case.d_out * asked[:, None, :, None]
    held = largest(group, case.value, case.initial_state)
    pulled = largest(group, read, case.d_final)
    state = lambda x, unit: np.swapaxes(x / unit[..., None, None], 2, 3)[:, :, None]
    half, single = jnp.float16, jnp.float32
    arrays = {
        "query": (case.query, given), "key": (case.key, given), "value": (case.value, value_dtype),
        "d_out": (case.d_out, value_dtype), "inverse": (np.linalg.inv(np.eye(CHUNK) + lower)[:, :, None], half),
        "tables": (np.stack(table, axis=2)[:, :, None], single), "units": (np.stack([held, pulled, asked]), single),
        "states": (state(case.initial_state, held), half), "d_states": (state(case.d_final, pulled), half),
    }  # fmt: skip
    return {name: jnp.asarray(x, jnp.float32).astype(dtype) for name, (x, dtype) in arrays.items()}


def truth_of(case, use_qk_l2norm):
    if not use_qk_l2norm:
        return delta_cases.recurrence(case)[2]
    unit = {name: getattr(case, name) / length(getattr(case, name)) for name in ("query", "key")}
    _, _, truth = delta_cases.recurrence(dataclasses.replace(case, **unit))
    back = {name: pulled_back(getattr(case, name), truth[name]) for name in unit}
    return truth | back


@pytest.mark.parametrize(
    "heads, dims, given, value_dtype, use_qk_l2norm",
    [
        ((2, 4), (128, 128), jnp.bfloat16, jnp.bfloat16, True),
        ((1, 3), (64, 64), jnp.float16, jnp.bfloat16, True),
        ((2, 2), (64, 128), jnp.bfloat16, jnp.float16, False),
        ((1, 2), (128, 64), jnp.float16, jnp.float16, False),
    ],
)
def test_operands_as_given(heads, dims, given, value_dtype, use_qk_l2norm):
    case = sized_case(sum(dims), heads, dims, given, value_dtype, use_qk_l2norm)
    arrays = operands(case, given, value_dtype, use_qk_l2norm)
    shapes = Shapes(
        rows=1, chunks=1, key_heads=heads[0], value_heads=heads[1], key_dim=dims[0], value_dim=dims[1], given=given,
        value_dtype=value_dtype, use_qk_l2norm=use_qk_l2norm, scale=dims[0] ** -0.5, segments=False,
        config=BackwardConfig(),
    )  # fmt: skip
    with interpreted():
        *gradients, sums = jax.block_until_ready(run_gradients(shapes, arrays))
    truth = truth_of(case, use_qk_l2norm)
    # Every token counts, however short it is, every head, however small what it holds.
    per_token = lambda x: length(x) if use_qk_l2norm else 1.0
    weights = {"query": per_token(case.query), "key": per_token(case.key), "value": 1.0}
    both = np.asarray(arrays["units"], np.float64)[:2].prod(axis=0)[..., None]
    d_beta = np.asarray(sums, np.float64).sum(axis=3)[:, :, 0, D_BETA] * both
    found = dict(zip(weights, gradients, strict=True))
    for name, weight in weights.items():
        assert found[name].dtype == arrays[name].dtype, name
        limit = compare.DELTA_RULE_TOLERANCES[jnp.dtype(arrays[name].dtype).name]["gradient"]
        actual, expected = (weight * np.asarray(x, np.float64) for x in (found[name], truth[name]))
        for head in range(expected.shape[2]):
            error = compare.relative_error(actual[:, :, head], expected[:, :, head])
            print(name, head, f"{error:.1e}")
            assert error <= limit, (name, head)
    for head in range(heads[1]):
        error = compare.relative_error(d_beta[:, head], truth["beta"][..., head])
        print("beta", head, f"{error:.1e}")
        assert error <= compare.DELTA_RULE_TOLERANCES["float16"]["beta"], head
    if use_qk_l2norm:
        assert not np.asarray(found["query"], np.float64)[:, [5, 40]].any()
        assert not np.asarray(found["key"], np.float64)[:, [5, 20]].any()
