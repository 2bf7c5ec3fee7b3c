"""Times the tile sizes of the attention kernels on this GPU, and keeps the fastest.

    python -m pallas_kernels.autotune tuned.json                                 # on an H100 or H200
    python -m pallas_kernels.autotune tuned.json --head-dim 128 --length 4096 --direction forward
    python -m pallas_kernels.autotune facts.json --by-machine-code --target h200  # without a GPU: no times

One entry serves a bucket of lengths (`mosaic_gpu_tuning.LENGTHS`), so a new length needs no tuning. Nothing reads the
file unless asked:

    >>> from pallas_kernels import autotune
    >>> autotune.load("tuned.json")                                              # doctest: +SKIP

which, from then on, gives calls traced in this process their configuration. A file made with `--by-machine-code` ranks
by spilled bytes and slow instructions, which decide between good and bad but not between good and better: `load`
refuses it.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _aot_cases, _dispatch, aot
from pallas_kernels.attention import mosaic_gpu_tuning as tuning

FORMAT = 1
TIMED, COMPILED = "time", "machine code"
# Query heads and their groups as models have them, and enough tokens for every SM to have work.
HEADS = {64: (32, 32), 96: (32, 8), 128: (32, 8), 256: (16, 2)}
TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry to tune: what a bucket's problems have in common, and the length at which it is measured."""

    direction: str
    head_dim: int
    length: int
    is_causal: bool

    @property
    def key(self) -> str:
        return tuning.bucket(
            self.direction, head_dim=self.head_dim, q_len=self.length, is_causal=self.is_causal
        )

    @property
    def shape(self) -> _aot_cases.AttentionShape:
        heads, kv_heads = HEADS[self.head_dim]
        return _aot_cases.AttentionShape(
            self.key,
            batch=max(1, TOKENS // self.length),
            length=self.length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            is_causal=self.is_causal,
        )

    def default(self) -> tuning.Config:
        """What runs now."""
        if self.direction == "forward":
            return self.shape.forward_config()
        return tuning.backward_config(
            head_dim=self.head_dim, atomic=self.direction == "backward_atomic"
        )

    def candidates(self) -> list[tuning.Config]:
        """What is tried, the default first."""
        default = self.default()
        found: list[tuning.Config]
        if isinstance(default, tuning.ForwardConfig):
            found = [*tuning.forward_candidates(head_dim=self.head_dim, pack=default.pack)]
        else:
            found = [*tuning.backward_candidates(head_dim=self.head_dim, atomic=default.atomic)]
        return [default, *(c for c in found if c != default)]

    def case(self, config: tuning.Config) -> _aot_cases.Case:
        return _aot_cases.DIRECTIONS[self.direction](self.shape, config)


@dataclasses.dataclass(frozen=True)
class Result:
    """A candidate of a cell; `seconds` is None by machine code, `facts` is empty by time."""

    config: tuning.Config
    seconds: float | None = None
    facts: tuple[dict[str, Any], ...] = ()


def cells(
    directions: Iterable[str], head_dims: Iterable[int], lengths: Iterable[int], causal: Iterable[bool]
) -> list[Cell]:  # fmt: skip
    """The product, without what the atomic kernel cannot do."""
    return [
        Cell(direction, head_dim, length, is_causal)
        for direction in directions
        for head_dim in head_dims
        for length in lengths
        for is_causal in causal
        if direction != "backward_atomic" or head_dim in tuning.ATOMIC_HEAD_DIMS
    ]


def time_cell(cell: Cell, *, rounds: int = 10, limit: int | None = None) -> list[Result]:
    """Candidates by median seconds, fastest first; each must give the default's numbers.

    Args:
      rounds: counted calls of each; the candidates take turns.
      limit: how many candidates at most.
    """
    calls: dict[tuning.Config, Callable[[], Any]] = {}
    expected = None
    arrays = _random(cell.case(cell.default()).build()[1])
    for config in cell.candidates()[:limit]:
        function, _ = cell.case(config).build()
        run = jax.jit(function)
        out = jax.block_until_ready(run(*arrays))
        if expected is None:
            expected = out
        _require_equal(cell, config, out, expected)
        calls[config] = lambda run=run: jax.block_until_ready(run(*arrays))
    seconds: dict[tuning.Config, list[float]] = {config: [] for config in calls}
    for _ in range(rounds):
        for config, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[config].append(time.perf_counter() - start)
    found = [Result(config, statistics.median(times)) for config, times in seconds.items()]
    return sorted(found, key=lambda result: result.seconds or 0.0)


def _random(structs: Iterable[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=x.shape), x.dtype) for x in structs]


def _require_equal(cell: Cell, config: tuning.Config, out: Any, expected: Any) -> None:
    """A fast wrong kernel must not win."""
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        gap, most = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        if not gap <= 2**-6 * (1.0 + most):
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

    Functions compiled before keep what they were compiled with.

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
    table = {key: _config(path, key, entry) for key, entry in entries.items()}
    tuning.use_tuned(table)
    return len(table)


def _known_keys() -> dict[str, tuple[type, int]]:
    """Key -> its kind of configuration and head_dim."""
    lengths = (*tuning.LENGTHS, tuning.LENGTHS[-1] + 1)
    every = cells(tuning.DIRECTIONS, tuning.HEAD_DIMS, lengths, (True, False))
    return {
        cell.key: (
            tuning.ForwardConfig if cell.direction == "forward" else tuning.BackwardConfig,
            cell.head_dim,
        )
        for cell in every
    }


def _config(path, key: str, entry: Any) -> tuning.Config:
    """The validated configuration of an entry."""
    known = _known_keys()
    if key not in known:
        raise ValueError(f"`entries` in {path} has the unknown key {key!r}")
    kind, head_dim = known[key]
    values = entry.get("best") if isinstance(entry, dict) else None
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or set(values) != set(fields):
        raise ValueError(f"{key!r} in {path} must have a `best` with exactly {', '.join(fields)}")
    for name, value in values.items():
        if type(value) is not fields[name]:
            raise ValueError(
                f"`{name}` of {key!r} in {path} must be {fields[name].__name__}, got {value!r}"
            )
        if type(value) is int and value < 1:
            raise ValueError(f"`{name}` of {key!r} in {path} must be at least 1, got {value}")
    try:
        config = kind(**values)
    except ValueError as error:
        raise ValueError(f"{key!r} in {path}: {error}") from error
    for name in ("block_q", "block_kv"):
        if getattr(config, name, 64) % 64:
            raise ValueError(f"`{name}` of {key!r} in {path} must be a multiple of 64")
    if not tuning.fits(config, head_dim):
        raise ValueError(f"{key!r} in {path} does not fit into a block: {config}")
    if isinstance(config, tuning.BackwardConfig) and config.atomic != key.startswith(
        "backward_atomic"
    ):
        raise ValueError(f"`atomic` of {key!r} in {path} contradicts the key")
    return config


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.autotune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--direction", choices=tuning.DIRECTIONS, action="append")
    parser.add_argument("--head-dim", type=int, choices=tuning.HEAD_DIMS, action="append")
    parser.add_argument("--length", type=int, action="append", help="each names its bucket")
    parser.add_argument("--mask", choices=("causal", "full"), action="append")
    parser.add_argument("--rounds", type=int, default=10, help="counted calls per candidate")
    parser.add_argument("--limit", type=int, help="candidates per entry at most")
    parser.add_argument("--by-machine-code", action="store_true", help="compile only; not a time")
    parser.add_argument("--target", default="h200", choices=aot.targets())
    arguments = parser.parse_args(argv)
    masks = arguments.mask or ("causal", "full")
    wanted = cells(
        arguments.direction or tuning.DIRECTIONS[:2],
        arguments.head_dim or (64, 128, 256),
        arguments.length or tuning.LENGTHS[1:],
        [mask == "causal" for mask in masks],
    )
    if arguments.by_machine_code:
        device, basis = arguments.target, COMPILED
        run = lambda cell: rank_cell(cell, target=arguments.target, limit=arguments.limit)
        reason = aot.unavailable_reason()
    else:
        device, basis = jax.devices()[0].device_kind, TIMED
        run = lambda cell: time_cell(cell, rounds=arguments.rounds, limit=arguments.limit)
        reason = None
        if _dispatch.compute_capability() != "9.0":
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
