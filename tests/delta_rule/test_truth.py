"""The chunk form and the recurrence against a float64 recurrence in NumPy: values, final states, every gradient."""

import dataclasses
import datetime

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import delta_cases
from tests.support.delta_properties import check_truth

NASTY = tuple(delta_cases.nasty_cases(0, 1))
TODAY = datetime.date.today().toordinal()


@pytest.mark.parametrize("length", [1, 65, 200])
@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs(name, length):
    case = delta_cases.nasty_cases(length, length)[name]
    strong = name in ("strong decay", "steps of -60")
    check_truth(case, implementation="chunked", strong_decay=strong)


@pytest.mark.slow
@pytest.mark.parametrize("name", [NASTY[(TODAY + i) % len(NASTY)] for i in range(2)])
def test_nasty_inputs_over_many_chunks(name):
    strong = name in ("strong decay", "steps of -60")
    check_truth(delta_cases.nasty_cases(TODAY, 2049)[name], strong_decay=strong)


@pytest.mark.parametrize("name", ["equal keys", "steps of -60", "no decay"])
def test_nasty_inputs_in_lanes(name):
    """Segments of a row side by side, each entered through its affine map."""
    case = delta_cases.nasty_cases(5, 150)[name]
    strong = name == "steps of -60"
    check_truth(case, implementation="chunked", chunk_size=16, lanes=4, strong_decay=strong)


@pytest.mark.slow
@pytest.mark.parametrize("length", np.random.default_rng(TODAY).integers(2, 300, 2).tolist())
def test_random_lengths(length):
    check_truth(delta_cases.random_case(TODAY, 2, length, 1, 2, 16, 24))


@pytest.mark.parametrize(
    "key_heads, value_heads, key_dim, value_dim",
    [(1, 1, 60, 100), (2, 6, 96, 64), (1, 2, 128, 256)],
)
def test_head_counts_and_dims(key_heads, value_heads, key_dim, value_dim):
    case = delta_cases.random_case(1, 1, 70, key_heads, value_heads, key_dim, value_dim)
    check_truth(case, scale=0.3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_half_precision_inputs(dtype, implementation):
    check_truth(
        delta_cases.random_case(2, 2, 90, 2, 2, 32, 32), dtype, implementation=implementation
    )


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("packing", ["rows", "segment_ids", "cu_seqlens"])
def test_float64_stays_float64(x64, implementation, packing):
    case = packed_case(packing)
    check_truth(case, jnp.float64, implementation=implementation)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("packing", ["segment_ids", "cu_seqlens"])
def test_packed(packing, lanes):
    check_truth(packed_case(packing), implementation="chunked", chunk_size=16, lanes=lanes)


def test_a_segment_starts_at_every_position_of_a_chunk():
    ids = (np.arange(140)[None] >= 64 + np.arange(65)[:, None]).astype(np.int32)
    check_truth(delta_cases.random_case(3, 65, 140, 1, 1, 8, 8, segment_ids=ids), chunk_size=64)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("packing", ["rows", "segment_ids", "cu_seqlens"])
def test_a_decay_per_key_channel(packing, implementation):
    """Moderate decays, and channels that lose everything in one step."""
    case = packed_case(packing)
    rng = np.random.default_rng(8)
    g = -0.3 * rng.exponential(size=case.key.shape).astype(np.float32)
    g = np.where(rng.random(g.shape) < 0.02, -60, g).astype(np.float64)
    check_truth(dataclasses.replace(case, g=g), implementation=implementation)


def packed_case(packing: str) -> delta_cases.Case:
    rng = np.random.default_rng(7)
    if packing == "rows":
        return delta_cases.random_case(4, 2, 70, 2, 4, 12, 10)
    if packing == "cu_seqlens":
        bounds = np.array([0, 0, 5, 37, 38, 38, 70, 86, 86])  # empty ones first, last and between
        return delta_cases.random_case(4, 1, 90, 2, 4, 12, 10, cu_seqlens=bounds)
    ids = np.sort(rng.integers(0, 5, (3, 90)), axis=1)
    ids = np.where(rng.random(ids.shape) < 0.1, -1, ids)
    ids[0, :20] = -3  # padding on the left,
    ids[1, 50:] = -1  # on the right,
    ids[2] = -1  # and everywhere
    return delta_cases.random_case(4, 3, 90, 2, 4, 12, 10, segment_ids=ids)
