"""Runs a script in a Python of its own: for what happens once per process (imports, forks, settings)."""

import os
import subprocess
import sys
import textwrap


def run_python(script: str, *arguments: str, timeout: float = 480) -> None:
    """Fails with the script's standard error unless it ends well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
