"""Triton kernels as machine code. XLA keeps what ptxas says to itself, so the PTX it dumps is compiled once more."""

import pathlib
import re
import subprocess
import tempfile
from typing import Any

TARGET = "__gpu$xla.gpu.triton"


def listing(lowered: Any, nvdisasm: str) -> str:
    """What ptxas and nvdisasm print for every Triton kernel of a lowered program, as `sass.parse` reads it.

    Args:
      lowered: `jax.jit(...).lower(...)`.
      nvdisasm: its path; ptxas stands beside it.
    """
    ptxas = pathlib.Path(nvdisasm).with_name("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        hlo = lowered.compile(compiler_options=options).as_text() or ""
        names = set(re.findall(r'name = "(\w+)"', hlo))
        printed = ""
        for source in sorted(pathlib.Path(folder).glob("*.ptx")):
            ptx = source.read_text()
            if not names & set(re.findall(r"\.entry (\w+)", ptx)):
                continue  # a fusion of XLA's own
            architecture = re.findall(r"^\.target (\w+)", ptx, re.M)[0]
            code = source.with_suffix(".cubin")
            for command in (
                [ptxas, "-v", "-arch", architecture, source, "-o", code],
                [nvdisasm, code],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                printed += done.stdout + done.stderr
        return printed
