"""Two processes that form one JAX system on this machine, each with simulated CPU devices; gloo between them."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def join(process: int, port: int, *, devices: int) -> None:
    """Makes this process one of two; before anything else asks JAX for devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)


def run(module: str, *arguments: str, timeout: float = 480) -> None:
    """`python -m module {process} {port} *arguments` as process 0 and 1; both must end well, else shows their words."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(process), port, *arguments],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0, 0], f"ended with {codes}\n" + "\n--- process 1:\n".join(outputs)
