"""Paired timing: the variants take turns, so that a machine whose speed drifts still gives fair ratios."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def paired(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds per call of every variant, measured in turn.

    Args:
      variants: name -> call without arguments. JAX results are waited for; others must be done on return.
      rounds: counted calls of each variant.
      warmup: calls before, not counted (compilation).

    Returns:
      name -> {"median", "min", "max"} in seconds.
    """
    for call in variants.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in seconds.items()
    }
