"""Times the tile sizes of the Hopper kernels on this GPU, and keeps the fastest.

    python -m pallas_kernels.autotune tuned.json                                 # on an H100 or H200
    python -m pallas_kernels.autotune tuned.json --head-dim 128 --length 4096 --direction forward
    python -m pallas_kernels.autotune delta.json --operator gated_delta_rule --heads 32
    python -m pallas_kernels.autotune facts.json --by-machine-code --target h200  # without a GPU: no times

One entry serves a bucket of lengths (`attention.mosaic_gpu_tuning.LENGTHS`), for the delta rule of heads
(`delta_rule.mosaic_gpu_tuning.HEADS`), so a new length needs no tuning. Nothing reads the file unless asked:

    >>> from pallas_kernels import autotune
    >>> autotune.load("tuned.json")                                              # doctest: +SKIP

which, from then on, gives calls traced in this process their configuration. A file made with `--by-machine-code` ranks
by spilled bytes and slow instructions, which decide between good and bad but not between good and better: `load`
refuses it.

What is an operator's own (what is tried on which operands, under which keys, what is valid) stands in
`_autotune_attention` and `_autotune_delta`; this file times, ranks, saves and loads.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pallas_kernels import _autotune_attention, _autotune_delta, _dispatch, aot
from pallas_kernels._aot_cases import Case

FORMAT = 1
TIMED, COMPILED = "time", "machine code"


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
    "gqa_attention": _autotune_attention,
    "gated_delta_rule": _autotune_delta,
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


def save(path: pathlib.Path, found: dict[str, list[Result]], *, device: str, basis: str) -> None:
    """Writes the best of each cell, and the others behind it."""
    entries = {}
    for key, results in found.items():
        rows = [
            {"config": dataclasses.asdict(x.config), "seconds": x.seconds, "facts": list(x.facts)}
            for x in results
        ]
        entries[key] = {"best": rows[0]["config"], "candidates": rows}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record = {"format": FORMAT, "basis": basis, "device": device, "jax": _jax_series()}
    path.write_text(json.dumps(record | {"date": date, "entries": entries}, indent=1) + "\n")


def _jax_series() -> str:
    """The part of JAX's version that decides how kernels are compiled."""
    return ".".join(jax.__version__.split(".")[:2])


def load(path: str | pathlib.Path, *, device: str | None = None) -> int:
    """Uses a file of this command for calls traced from now on in this process; returns how many entries it holds.

    Functions compiled before keep what they were compiled with. What was loaded before for the operators of which the
    file has entries is replaced, other operators keep theirs.

    Args:
      path: the file.
      device: kind of the GPU that it must be of; that of `jax.devices()[0]` by default.

    Raises:
      ValueError: the file is not one of these, was made on other hardware or another JAX, was not timed, or holds a
        configuration that does not exist or does not fit.
    """
    device = device or jax.devices()[0].device_kind
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`path` must hold JSON, {path} does not: {error}") from error
    record = record if isinstance(record, dict) else {}
    rules = {"format": FORMAT, "basis": TIMED, "device": device, "jax": _jax_series()}
    for name, rule in rules.items():
        if record.get(name) != rule:
            raise ValueError(f"`{name}` in {path} must be {rule!r}, got {record.get(name)!r}")
    entries = record.get("entries")
    if not isinstance(entries, dict):
        raise ValueError(f"`entries` in {path} must be an object, got {type(entries).__name__}")
    kinds = {name: operator.kinds() for name, operator in OPERATORS.items()}
    tables: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        name = next((name for name in OPERATORS if key in kinds[name]), None)
        if name is None:
            raise ValueError(f"`entries` in {path} has the unknown key {key!r}")
        config = _config(path, key, entry, kinds[name][key])
        if error := OPERATORS[name].refusal(key, config):
            raise ValueError(f"{key!r} in {path}: {error}")
        tables.setdefault(name, {})[key] = config
    for name, table in tables.items():
        OPERATORS[name].use_tuned(table)
    return len(entries)


def _config(path, key: str, entry: Any, kind: type) -> Any:
    """The configuration of an entry, every field of its type."""
    values = entry.get("best") if isinstance(entry, dict) else None
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or set(values) != set(fields):
        raise ValueError(f"{key!r} in {path} must have a `best` with exactly {', '.join(fields)}")
    for name, value in values.items():
        if type(value) is not fields[name]:
            raise ValueError(
                f"`{name}` of {key!r} in {path} must be {fields[name].__name__}, got {value!r}"
            )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{key!r} in {path}: {error}") from error


def _asked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Sequence[Cell]:
    """The cells of a command line; an option that does not apply ends the command."""
    operator = OPERATORS[arguments.operator]
    every = sorted({name for each in OPERATORS.values() for name in each.OPTIONS})
    given = {name: getattr(arguments, name) for name in every if getattr(arguments, name)}
    for name, values in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in operator.OPTIONS:
            parser.error(f"{flag} does not apply to --operator {arguments.operator}")
        allowed = operator.OPTIONS[name]
        for value in values:
            if allowed is not None and value not in allowed:
                parser.error(f"{flag} must be one of {', '.join(map(str, allowed))}, got {value}")
            if allowed is None and value < 1:
                parser.error(f"{flag} must be at least 1, got {value}")
    try:
        cells = operator.asked(given, timed=not arguments.by_machine_code)
    except ValueError as error:
        parser.error(str(error))
    if not cells:
        parser.error("there is nothing to tune: the options name no entry")
    return cells


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.autotune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--operator", default="gqa_attention", choices=tuple(OPERATORS))
    many: dict[str, Any] = {"action": "append"}
    parser.add_argument("--direction", **many, help="forward, backward, backward_atomic; or lanes")
    parser.add_argument("--head-dim", type=int, **many)
    parser.add_argument("--length", type=int, **many, help="each names its bucket; or lanes'")
    parser.add_argument("--mask", **many, help="of attention: causal, full")
    parser.add_argument("--heads", type=int, **many, help="delta rule: batch rows x value heads")
    parser.add_argument("--rounds", type=int, help="counted calls per candidate, 10 by default")
    parser.add_argument("--limit", type=int, help="candidates per entry at most")
    parser.add_argument("--by-machine-code", action="store_true", help="compile only; not a time")
    parser.add_argument("--target", choices=aot.targets(), help="to compile for, h200 by default")
    arguments = parser.parse_args(argv)
    wanted = _asked(parser, arguments)
    for name in ("rounds", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.by_machine_code and arguments.rounds:
        parser.error("--rounds does not apply to --by-machine-code")
    if arguments.target and not arguments.by_machine_code:
        parser.error("--target applies to --by-machine-code only")
    if arguments.by_machine_code:
        device, basis = arguments.target or "h200", COMPILED
        run = lambda cell: rank_cell(cell, target=device, limit=arguments.limit)
        reason = aot.unavailable_reason()
    else:
        device, basis = jax.devices()[0].device_kind, TIMED
        run = lambda cell: time_cell(cell, rounds=arguments.rounds or 10, limit=arguments.limit)
        reason = None
        if _dispatch.target().not_hopper():
            reason = (
                f"autotune times kernels on an H100 or H200, this is {device}; "
                "--by-machine-code compiles the candidates instead, which gives no times"
            )
    if reason:
        raise SystemExit(reason)
    found = {}
    for cell in wanted:
        found[cell.key] = run(cell)
        best = found[cell.key][0]
        cost = f"{best.seconds * 1e3:.3f} ms" if best.seconds else json.dumps(best.facts)
        print(f"{cell.key}: {best.config} {cost}", flush=True)
        save(arguments.path, found, device=device, basis=basis)
    print(f"wrote {arguments.path}")


if __name__ == "__main__":
    main()
