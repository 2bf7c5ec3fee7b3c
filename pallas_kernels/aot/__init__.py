"""Compiles programs for GPUs that this machine does not have. `python -m pallas_kernels.aot --help` is the command.

>>> from pallas_kernels import aot
>>> mesh = aot.topology("h200", devices=8)                        # doctest: +SKIP
>>> report = aot.compile_program(jax.jit(step), *arguments, mesh=mesh)  # doctest: +SKIP
>>> report.kernels, report.collectives, report.temporary_bytes    # doctest: +SKIP
"""

from pallas_kernels._dispatch import SHARED_MEMORY_BYTES as SHARED_MEMORY_BYTES
from pallas_kernels.aot import hlo as hlo
from pallas_kernels.aot.gpus import GPUS_PER_HOST as GPUS_PER_HOST
from pallas_kernels.aot.gpus import Rates as Rates
from pallas_kernels.aot.gpus import rates as rates
from pallas_kernels.aot.gpus import targets as targets
from pallas_kernels.aot.report import Compiled as Compiled
from pallas_kernels.aot.report import Report as Report
from pallas_kernels.aot.report import compile_case as compile_case
from pallas_kernels.aot.report import compile_only as compile_only
from pallas_kernels.aot.report import compile_program as compile_program
from pallas_kernels.aot.report import topology as topology
from pallas_kernels.aot.report import unavailable_reason as unavailable_reason
