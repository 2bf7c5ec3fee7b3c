"""`python -m gqa_jax plan`: its options, and a plan as text."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import jax

from gqa_jax.config import DecoderConfig
from gqa_jax.hf.config import PRESETS
from gqa_jax.planner.mesh import ROLES, parse_mesh
from gqa_jax.planner.plan import Plan, plan
from pallas_kernels import aot

DESCRIPTION = """Compiles one training or decode step for GPUs that this machine need not have,
and prints what it costs per device.

Memory, collectives and their schedule come from the compiled program. The bound on the time is what no schedule can
beat: operations of the model, bytes read and written at least once, bytes sent, each at the full rate that the target
file states (or that you give). Needs `pip install 'gqa-jax[aot]'`, no GPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    roles = "; ".join(f"{name}: {role}" for name, role in ROLES.items())
    parser.add_argument(
        "--config", required=True, help=f"{', '.join(PRESETS)}, or a config.json or its folder"
    )
    parser.add_argument(
        "--ignore", metavar="a,b", help="fields of config.json to read as if they were absent"
    )
    parser.add_argument("--mesh", required=True, metavar="dp=8,cp=8,tp=8", help=roles)
    parser.add_argument("--target", default="h200", choices=aot.targets())
    parser.add_argument("--seq", type=int, required=True, metavar="T", help="tokens per row")
    parser.add_argument("--batch", type=int, metavar="B", help="rows; one per dp and fsdp device")
    parser.add_argument(
        "--decode", action="store_true", help="one token per row from a cache of --seq tokens"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="only the first N layers of the model"
    )
    parser.add_argument(
        "--mode", default="all_gather", choices=("all_gather", "ring", "a2a", "a2a+ring")
    )
    parser.add_argument("--layout", default="zigzag", choices=("contiguous", "zigzag"))
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="tp splits the residual stream's tokens"
    )
    parser.add_argument("--no-remat", action="store_true", help="keep activations of every layer")
    parser.add_argument(
        "--full", action="store_true", help="compile every layer on its own instead of a scan"
    )
    parser.add_argument("--explicit", action="store_true", help="Explicit mesh axes, not Auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--param-dtype",
        choices=("bfloat16", "float32"),
        help="float32 for training, --dtype for decoding",
    )
    for name in ("bf16-flops", "hbm-bytes", "nvlink-bytes", "network-bytes"):
        parser.add_argument(
            f"--{name}", type=float, metavar="RATE", help="per second, for the target's own"
        )
    parser.add_argument(
        "--compiler-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for XLA; may be repeated",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write everything")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`plan`; 2 for what cannot be planned, 1 where nothing can be compiled."""
    # The compiler warns of what only a GPU could tell it; that is not news here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    reason = aot.unavailable_reason()
    if reason is not None:
        print(f"python -m gqa_jax plan: {reason}", file=sys.stderr)
        return 1
    try:
        result = plan(_config(options), **_arguments(options))
    except (ValueError, NotImplementedError) as error:
        print(f"python -m gqa_jax plan: error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not options.compiler_option:
            raise
        print(f"python -m gqa_jax plan: error: --compiler-option: {error}", file=sys.stderr)
        return 2
    print(as_text(result, title=options.config))
    if options.json:
        options.json.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    return 0


def _config(options: argparse.Namespace) -> DecoderConfig:
    ignore = options.ignore.split(",") if options.ignore else ()
    source = PRESETS.get(options.config, options.config)
    config, layers = DecoderConfig.from_hf(source, ignore=ignore), options.layers
    if layers is None:
        return config
    if not 1 <= layers <= len(config.layers):
        raise ValueError(f"`layers` must lie in [1, {len(config.layers)}], got {layers}")
    moe_layers = None if config.moe_layers is None else config.moe_layers[:layers]
    return dataclasses.replace(config, layers=config.layers[:layers], moe_layers=moe_layers)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    rates = aot.rates(options.target)
    overrides = {name: getattr(options, name, None) for name in rates._fields}
    for name, rate in overrides.items():
        if rate is not None and not 0.0 < rate < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {rate}")
    compiler_options: dict[str, Any] = {}
    for option in options.compiler_option:
        name, _, value = option.partition("=")
        compiler_options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return dict(
        mesh=parse_mesh(options.mesh),
        length=options.seq,
        batch=options.batch,
        target=options.target,
        decode=options.decode,
        mode=options.mode,
        layout=options.layout,
        sequence_parallel=options.sequence_parallel,
        remat=not options.no_remat,
        unroll=options.full,
        explicit=options.explicit,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        rates=rates._replace(
            **{name: rate for name, rate in overrides.items() if rate is not None}
        ),
        compiler_options=compiler_options,
    )


def as_text(result: Plan, *, title: str) -> str:
    """A plan as a page of text."""
    mesh = " ".join(f"{name}={size}" for name, size in result.mesh.items())
    lines = [
        f"{title}, one step of {result.step} on {result.devices} x {result.target}: "
        f"mesh {mesh} ({result.axis_type} axes), batch {result.batch} x {result.length} tokens",
        f"compiled in {result.compile_seconds:.0f} s by jax {result.jax_version}",
        *(f"  {note}" for note in result.notes),
        "",
        "memory per device",
        f"  arguments   {_size(result.argument_bytes)}   "
        + ", ".join(f"{name} {_size(size).strip()}" for name, size in result.parts.items()),
        f"  outputs     {_size(result.output_bytes)}   of which {_size(result.aliased_bytes).strip()} in place",
        f"  temporary   {_size(result.temporary_bytes)}",
        f"  peak        {_size(result.peak_bytes)}   of {_size(result.memory_bytes).strip()}: "
        + ("fits" if result.fits else "DOES NOT FIT"),
        "",
        *_traffic_lines(result),
        "",
        "operations per device",
        f"  compiled matrix products {result.flops / 1e12:.4g} TFLOP, kernels' operands and results "
        f"{_size(result.hbm_traffic_bytes).strip()}",
    ]
    if result.kernels:
        calls = ", ".join(f"{count} x {name}" for name, count in result.kernels.items())
        lines.append(f"  besides, operations not counted: {calls}")
    if result.unknown_loops:
        lines.append(f"  {result.unknown_loops} loops end when the data says so; each counts once")
    lines += ["", "milliseconds per step at full rates, at least"]
    for name, seconds in result.floors.items():
        mark = "  <- bound" if name == result.bound[0] else ""
        lines.append(f"  {name:12} {seconds * 1e3:12.4f}{mark}")
    lines.append(
        f"as scheduled: kernels {result.kernel_seconds * 1e3:.4f}, communication behind nothing "
        f"{result.exposed_seconds * 1e3:.4f}"
    )
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a digit before the point."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if count >= 1024:
            count, unit = count / 1024, larger
    return f"{count:8.0f} B  " if unit == "B" else f"{count:8.2f} {unit}"


def _traffic_lines(result: Plan) -> list[str]:
    if not result.traffic:
        return ["no collectives"]
    lines = [
        "collectives per device and step",
        f"  {'kind':20} {'along':22} {'count':>6} {'result':>12} {'sent':>12}  {'link':8} {'schedule':22} "
        f"{'ms':>9} {'hidden':>9}",
    ]
    for row in result.traffic:
        schedule = "synchronous"
        if row.asynchronous:
            schedule = "async, overlapped" if row.overlapped else "async, nothing behind"
        lines.append(
            f"  {row.kind:20} {'*'.join(row.axes):22} {row.count:6d} {_size(row.result_bytes)} "
            f"{_size(row.sent_bytes)}  {'network' if row.crosses_hosts else 'NVLink':8} {schedule:22} "
            f"{row.seconds * 1e3:9.3f} {row.hidden_seconds * 1e3:9.3f}"
        )
    return lines
