"""`python -m benchmarks.run [SUITE ...] [--quick]`: measures suites and writes JSON under `benchmarks/results`.

A suite is timed only when the tests that it names are green.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import platform
import re
import subprocess
import sys

import jax

from benchmarks import suites

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")


def machine() -> str:
    """A folder name for this machine: its accelerator, or its processor and number of cores."""
    if jax.default_backend() == "gpu":
        name = jax.devices()[0].device_kind
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        if cpuinfo.exists():
            found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
            name = found.group(1) if found else name
        name = f"{name} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, object]:
    """What a number depends on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def require_green(tests: list[str]) -> None:
    """Stops unless the tests pass."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], check=False)
    if done.returncode:
        raise SystemExit(f"not timed: {' '.join(tests)} must be green first")


def main() -> None:
    """Runs the suites named on the command line, or all."""
    known = [module.name for module in pkgutil.iter_modules(suites.__path__)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    parser.add_argument("--no-tests", action="store_true", help="the tests have just been run")
    arguments = parser.parse_args()
    for name in arguments.suite or known:
        if name not in known:
            parser.error(f"unknown suite {name!r}; known: {', '.join(known)}")
        suite = importlib.import_module(f"benchmarks.suites.{name}")
        if not (arguments.no_tests or arguments.quick):
            require_green(suite.TESTS)
        rows = suite.measure(arguments.quick)
        record = {"suite": name, "quick": arguments.quick, **environment(), "rows": rows}
        if arguments.quick:
            print(json.dumps(rows, indent=1))
            continue
        path = RESULTS / machine() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
