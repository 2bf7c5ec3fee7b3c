"""Compiles for a GPU that is not there, and says what the machine code is like.

    python -m pallas_kernels.aot --target h200                       # every registered case
    python -m pallas_kernels.aot --target h200 --case 'attention*causal*' --json facts.json
    python -m pallas_kernels.aot --operator gqa_attention --length 8192 --heads 32 --kv-heads 8 --head-dim 128 --causal

Needs the CUDA plugin of JAX and nvdisasm (`pip install 'gqa-jax[aot]'`), no GPU.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import pathlib

from pallas_kernels.aot import registry
from pallas_kernels.aot.gpus import targets
from pallas_kernels.aot.report import Report, compile_case, unavailable_reason
from pallas_kernels.attention import aot_cases

MARKS = ("<!-- aot table: begin -->", "<!-- aot table: end -->")


def table(reports: list[Report]) -> str:
    """A Markdown table, one row per kernel; programs without a Mosaic kernel have one row of their own."""
    header = (
        "case",
        "kernel",
        "registers",
        "spilled bytes",
        "stack",
        "shared KiB",
        "barriers",
        "HGMMA (on paper)",
        "slow paths",
        "GFLOP",
        "HBM MB",
        "temporary MiB",
        "aliased MiB",
        "collectives",
    )
    rows = [header, tuple("---" for _ in header)]
    for report in reports:
        about = (
            f"{report.flops / 1e9:.1f}" if report.flops else "",
            f"{report.hbm_bytes / 1e6:.1f}" if report.hbm_bytes else "",
            f"{report.temporary_bytes / 2**20:.1f}",
            f"{report.aliased_bytes / 2**20:.1f}",
            ", ".join(f"{n} {kind}" for kind, (n, _) in report.collectives.items()) or "none",
        )
        derived = iter(report.tensor_instructions)
        for kernel in report.kernels:
            rows.append(
                (
                    report.name,
                    kernel.name.removesuffix("_mosaic_gpu_kernel"),
                    str(kernel.registers),
                    f"{kernel.spill_store_bytes} / {kernel.spill_load_bytes}",
                    str(kernel.stack_bytes),
                    f"{kernel.shared_bytes / 1024:.1f}",
                    str(kernel.barriers),
                    f"{kernel.instructions.get('HGMMA', 0)} ({next(derived, '?')})",
                    ", ".join(kernel.slow_paths) or "none",
                    *about,
                )
            )
        if not report.kernels:
            rows.append((report.name, "(XLA only)", *("" for _ in range(7)), *about))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _replace(page: pathlib.Path, text: str) -> None:
    """Puts `text` between the two marks of a page."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if not rest or not after:
        raise SystemExit(f"{page} needs the lines {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", default="h200", choices=targets())
    parser.add_argument("--devices", type=int, default=1, help="GPUs; each gets its own batch")
    parser.add_argument("--case", default="*", help="pattern over the registered cases")
    parser.add_argument("--list", action="store_true", help="names of the registered cases")
    parser.add_argument(
        "--update", type=pathlib.Path, help="also replace the table between the marks in this page"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write everything to this file")
    shape = parser.add_argument_group("one shape of an operator instead of the registered cases")
    shape.add_argument("--operator", choices=sorted(aot_cases.OPERATORS))
    aot_cases.add_shape_arguments(shape)
    arguments = parser.parse_args(argv)
    cases = [c for c in registry.cases() if fnmatch.fnmatch(c.name, arguments.case)]
    if arguments.operator:
        cases = aot_cases.from_arguments(arguments)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return
    if not cases:
        parser.error(f"no registered case matches {arguments.case!r}")
    reason = unavailable_reason()
    if reason:
        raise SystemExit(reason)
    reports = [compile_case(c, target=arguments.target, devices=arguments.devices) for c in cases]
    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")}
    heading = f"{reports[0].target} x {arguments.devices}, jax {versions['jax']}"
    print(f"{heading}\n\n{table(reports)}")
    if arguments.update:
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        _replace(arguments.update, f"{heading}, {date}\n\n{table(reports)}")
    if arguments.json:
        record = {"versions": versions, "reports": [dataclasses.asdict(r) for r in reports]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
