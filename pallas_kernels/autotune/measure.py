"""Times or compiles the candidates of a configuration and ranks them, whatever the operator."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pallas_kernels import aot
from pallas_kernels.aot.case import Case
from pallas_kernels.attention import autotune_cases as attention
from pallas_kernels.delta_rule import autotune_cases as delta_rule


class Cell(Protocol):
    """One entry to tune. Configurations are frozen dataclasses of plain numbers."""

    @property
    def key(self) -> str:
        """Under which it is kept."""
        ...

    def candidates(self) -> list[Any]:
        """What is tried, the default first."""
        ...

    def case(self, config: Any) -> Case:
        """The program with that configuration."""
        ...

    def inputs(self) -> tuple[Any, ...]:
        """Operands of the program, whatever the configuration."""
        ...


class Operator(Protocol):
    """What the tool asks of an operator."""

    @property
    def OPTIONS(self) -> Mapping[str, Sequence[Any] | None]:
        """Options of the command line that apply, with the values there are; None for any number from 1."""
        ...

    def asked(self, options: Mapping[str, Sequence[Any]], /, *, timed: bool) -> Sequence[Cell]:
        """The cells of the options given, to be timed or only compiled; ValueError where one does not apply."""
        ...

    def kinds(self) -> dict[str, type]:
        """Every key there is -> its kind of configuration."""
        ...

    def refusal(self, key: str, config: Any, /) -> str | None:
        """Why the kernels cannot be configured so, or None."""
        ...

    def use_tuned(self, table: Mapping[str, Any], /) -> None:
        """Replaces what is used from now on."""
        ...


OPERATORS: dict[str, Operator] = {
    "gqa_attention": attention,
    "gated_delta_rule": delta_rule,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """A candidate of a cell; `seconds` is None by machine code, `facts` is empty by time."""

    config: Any
    seconds: float | None = None
    facts: tuple[dict[str, Any], ...] = ()


def time_cell(cell: Cell, *, rounds: int = 10, limit: int | None = None) -> list[Result]:
    """Candidates by median seconds, fastest first; each must give the default's numbers.

    Args:
      rounds: counted calls of each; the candidates take turns.
      limit: how many candidates at most.
    """
    calls: dict[Any, Callable[[], Any]] = {}
    expected = None
    arrays = cell.inputs()
    for config in cell.candidates()[:limit]:
        function, _ = cell.case(config).build()
        run = jax.jit(function)
        out = jax.block_until_ready(run(*arrays))
        if expected is None:
            expected = out
        _require_equal(cell, config, out, expected)
        calls[config] = lambda run=run: jax.block_until_ready(run(*arrays))
    seconds: dict[Any, list[float]] = {config: [] for config in calls}
    for _ in range(rounds):
        for config, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[config].append(time.perf_counter() - start)
    found = [Result(config, statistics.median(times)) for config, times in seconds.items()]
    return sorted(found, key=lambda result: result.seconds or 0.0)


def _require_equal(cell: Cell, config: Any, out: Any, expected: Any) -> None:
    """A fast wrong kernel must not win: each output by its own largest number, as gradients may all be small."""
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        gap, most = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        if not gap <= 2**-6 * most:
            raise RuntimeError(f"{cell.key}: {config} differs from the default by {gap}")


def rank_cell(cell: Cell, *, target: str, limit: int | None = None) -> list[Result]:
    """Candidates by what the compiler says: fewest spilled bytes, then slow paths, then shared memory."""
    found = []
    for config in cell.candidates()[:limit]:
        kernels = aot.compile_case(cell.case(config), target=target).kernels
        facts = tuple(
            {
                "kernel": kernel.name,
                "registers": kernel.registers,
                "spilled_bytes": kernel.spill_store_bytes + kernel.spill_load_bytes,
                "shared_bytes": kernel.shared_bytes,
                "slow_paths": sorted(kernel.slow_paths),
            }
            for kernel in kernels
        )
        found.append(Result(config, facts=facts))

    def cost(result: Result):
        total = lambda name: sum(fact[name] for fact in result.facts)
        slow = sum(len(fact["slow_paths"]) for fact in result.facts)
        return total("spilled_bytes"), slow, total("shared_bytes")

    return sorted(found, key=cost)
