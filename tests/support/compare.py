"""Tolerances: the only place where a test says how equal is equal, each derived from a dtype."""

import numpy as np


def _float64(array) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().to("cpu").double()
    return np.asarray(array).astype(np.float64)


def relative_error(actual, expected) -> float:
    """`||actual - expected|| / ||expected||` in float64 (the absolute norm where `expected` is zero)."""
    actual, expected = _float64(actual), _float64(expected)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (norm if norm > 0 else 1.0))


def assert_close(actual, expected, *, atol: float, rtol: float = 0.0, what: str = "") -> None:
    """Element-wise `|actual - expected| <= atol + rtol |expected|`; names the worst element."""
    actual, expected = _float64(actual), _float64(expected)
    assert actual.shape == expected.shape, (
        f"{what}: shapes differ: {actual.shape} and {expected.shape}"
    )
    assert np.isfinite(actual).all(), (
        f"{what}: {np.count_nonzero(~np.isfinite(actual))} values are not finite"
    )
    excess = np.abs(actual - expected) - (atol + rtol * np.abs(expected))
    if excess.size and excess.max() > 0:
        worst = np.unravel_index(int(excess.argmax()), excess.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(excess > 0)} of {excess.size} differ; worst at {tuple(map(int, worst))}: "
            f"{actual[worst]!r} against {expected[worst]!r} (atol={atol}, rtol={rtol})"
        )


def assert_bitwise_equal(actual, expected, *, what: str = "") -> None:
    """Same dtype, shape and bits; names the first element that differs."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, (
        f"{what}: dtypes differ: {actual.dtype} and {expected.dtype}"
    )
    assert actual.shape == expected.shape, (
        f"{what}: shapes differ: {actual.shape} and {expected.shape}"
    )
    left = (
        np.ascontiguousarray(actual).reshape(-1).view(np.uint8).reshape(-1, actual.dtype.itemsize)
    )
    right = (
        np.ascontiguousarray(expected).reshape(-1).view(np.uint8).reshape(-1, actual.dtype.itemsize)
    )
    differs = (left != right).any(axis=1)
    if differs.any():
        first = np.unravel_index(int(differs.argmax()), actual.shape)
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.size} differ; first at {tuple(map(int, first))}: "
            f"{actual[first]!r} against {expected[first]!r}"
        )


def rounding(dtype, *, terms: int = 64) -> float:
    """Error to expect of a float32-accumulated result of size 1 that is a sum of `terms` and is stored in `dtype`."""
    import jax.numpy as jnp

    accumulated = float(jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32).eps)
    return 2.0 * float(jnp.finfo(dtype).eps) + 4.0 * accumulated * terms**0.5


# Gated delta rule: relative L2 error against a float64 token recurrence. 16-bit inputs: half of what FLA's tests allow.
DELTA_RULE_TOLERANCES = {
    "float32": {"out": 2e-6, "final_state": 2e-6, "gradient": 1e-5, "g, strong decay": 1e-4},
    "bfloat16": {"out": 2.5e-3, "final_state": 2.5e-3, "gradient": 4e-3, "g": 1e-2, "beta": 1e-2},
    "float16": {"out": 2.5e-3, "final_state": 2.5e-3, "gradient": 4e-3, "g": 1e-2, "beta": 1e-2},
    "float64": {"out": 1e-12, "final_state": 1e-12, "gradient": 1e-11},
}
