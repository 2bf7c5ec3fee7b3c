"""Meshes of the eight simulated devices, and combinations that cover every pair of choices."""

import itertools

import jax
import numpy as np
from jax.sharding import AxisType

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh(kind: str = "auto", **sizes: int) -> jax.sharding.Mesh:
    """A mesh over the first devices, axes major first."""
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(KINDS[kind],) * len(sizes),
        devices=jax.devices()[:count],
    )


def pairwise(seed: int, **choices) -> list[dict]:
    """Few dicts such that any two values of any two choices meet in one of them (greedy)."""
    rng = np.random.default_rng(seed)
    names = list(choices)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(choices[a]))
        for y in range(len(choices[b]))
    }
    rows = []
    while missing:
        best, gain = None, -1
        for _ in range(40):
            row = {n: int(rng.integers(len(choices[n]))) for n in names}
            a, x, b, y = next(iter(sorted(missing)))
            row[a], row[b] = x, y
            new = sum(
                (a, row[a], b, row[b]) in missing for a, b in itertools.combinations(names, 2)
            )
            if new > gain:
                best, gain = row, new
        missing -= {(a, best[a], b, best[b]) for a, b in itertools.combinations(names, 2)}
        rows.append({n: choices[n][i] for n, i in best.items()})
    return rows
