"""Meshes of the eight simulated devices, and combinations that cover every pair of choices, a few of them always."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest
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


def mostly_slow(
    cases: list[dict], name: Callable[[dict], str], *, every: tuple[str, ...] = ()
) -> list:
    """The cases as parameters of a test, `slow` but for a few that always run.

    Those few hold every value of every choice, and every pair of values of the choices in `every`.
    """
    groups = [(choice,) for choice in cases[0]] + list(itertools.combinations(every, 2))
    held = lambda case: {(group, *(case[choice] for choice in group)) for group in groups}
    missing, always = set().union(*map(held, cases)), []
    while missing:
        always.append(max(cases, key=lambda case: len(held(case) & missing)))
        missing -= held(always[-1])
    return [
        pytest.param(case, id=name(case), marks=() if case in always else pytest.mark.slow)
        for case in cases
    ]
