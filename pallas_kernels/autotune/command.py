"""Times the tile sizes of the Hopper kernels on this GPU, and keeps the fastest.

    python -m pallas_kernels.autotune tuned.json                                 # on an H100 or H200
    python -m pallas_kernels.autotune tuned.json --head-dim 128 --length 4096 --direction forward
    python -m pallas_kernels.autotune delta.json --operator gated_delta_rule --heads 32
    python -m pallas_kernels.autotune facts.json --by-machine-code --target h200  # without a GPU: no times

One entry serves a bucket of lengths (`attention.hopper.tuning.LENGTHS`), for the delta rule of heads
(`delta_rule.hopper.tuning.HEADS`), so a new length needs no tuning. Nothing reads the file unless asked:

    >>> from pallas_kernels import autotune
    >>> autotune.load("tuned.json")                                              # doctest: +SKIP

which, from then on, gives calls traced in this process their configuration. A file made with `--by-machine-code` ranks
by spilled bytes and slow instructions, which decide between good and bad but not between good and better: `load`
refuses it.

What is an operator's own (what is tried on which operands, under which keys, what is valid) stands in
`attention.autotune_cases` and `delta_rule.autotune_cases`; this file times, ranks, saves and loads.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import _dispatch, aot
from pallas_kernels.autotune.measure import OPERATORS, Cell, rank_cell, time_cell
from pallas_kernels.autotune.tuned_file import COMPILED, TIMED, save


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
