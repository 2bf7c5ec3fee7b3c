"""Compiles a program for a GPU that this machine does not have, and reports what the machine code is like."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import _dispatch
from pallas_kernels.aot import hlo, triton_ptx
from pallas_kernels.aot.case import Case
from pallas_kernels.aot.gpus import GPUS_PER_HOST, capability, description
from pallas_kernels.aot.sass import KernelFacts, parse

_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES", "MOSAIC_GPU_DUMP_SASS")


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program.

    Attributes:
      name, target, devices: what was compiled, for what.
      seconds: wall-clock time of lowering and compilation.
      kernels: its Mosaic GPU kernels, then its Triton kernels.
      argument_bytes, output_bytes, aliased_bytes, temporary_bytes: device memory, per device.
      collectives: kind -> (how many, bytes of their results per device).
      flops, hbm_bytes: floors of a registered case, per device: operations of its matrix products, bytes it must move.
      tensor_instructions: of a registered case, the wgmma instructions each kernel must hold, derived on paper.
    """

    name: str
    target: str
    devices: int
    seconds: float
    kernels: tuple[KernelFacts, ...]
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    collectives: Mapping[str, tuple[int, int]]
    flops: float = 0.0
    hbm_bytes: float = 0.0
    tensor_instructions: tuple[int, ...] = ()


class Compiled(NamedTuple):
    """A program compiled for a GPU that is not there.

    Attributes:
      executable: cannot run; `as_text()` and `memory_analysis()` can be asked.
      kernels: its Mosaic GPU kernels.
      seconds: wall-clock time of lowering and compilation.
    """

    executable: jax.stages.Compiled
    kernels: tuple[KernelFacts, ...]
    seconds: float


def unavailable_reason() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None and (
        importlib.util.find_spec("jax_cuda12_plugin") is None
    ):
        return "JAX's CUDA plugin is not installed: pip install 'gqa-jax[aot]'"
    if not _nvdisasm():
        return "nvdisasm was not found: pip install 'gqa-jax[aot]'"
    return None


def _nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    places = [p for root in roots for p in pathlib.Path(root).glob("cu*/bin/nvdisasm")]
    return str(places[0]) if places else shutil.which("nvdisasm")


def topology(
    target: str = "h200",
    *,
    devices: int = 1,
    axis: str = "device",
    shape: Mapping[str, int] | None = None,
    explicit: bool = False,
) -> jax.sharding.Mesh:
    """A mesh of GPUs that are not there, 8 to a host.

    Args:
      target: a name from `targets()`.
      devices, axis: how many along one axis.
      shape: axis -> size in place of those two, the first axis spread widest; its last axes lie within a host.
      explicit: axes are `Explicit` instead of `Auto`.

    Raises:
      ValueError: unknown target, or a number of devices that does not fill its hosts.
      RuntimeError: the CUDA plugin or nvdisasm is missing.
    """
    proto = description(target)
    shape = {axis: devices} if shape is None else dict(shape)
    devices = math.prod(shape.values())
    if devices < 1 or (devices > GPUS_PER_HOST and devices % GPUS_PER_HOST):
        raise ValueError(f"`devices` must be 1..8 or a multiple of 8, got {devices}")
    reason = unavailable_reason()
    if reason:
        raise RuntimeError(reason)
    # Without a driver the plugin would refuse to register when it checks library versions.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    hosts = max(1, devices // GPUS_PER_HOST)
    gpus = topologies.get_topology_desc(
        f"{target}x{devices}",
        platform="cuda",
        target_config=proto,
        topology=f"1x{hosts}x{devices // hosts}",
    )
    return jax.sharding.Mesh(
        np.asarray(gpus.devices).reshape(tuple(shape.values())),
        tuple(shape),
        axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * len(shape),
    )


def compile_program(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: jax.sharding.Mesh | None = None,
    target: str = "h200",
    name: str = "",
    **jit_options: Any,
) -> Report:
    """Lowers and compiles `function(*arguments)`.

    Args:
      function: anything `jax.jit` takes.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`; those without a sharding are replicated.
      mesh: from `topology`; one device of `target` by default.
      target: only without a mesh.
      name: for the report.
      **jit_options: for `jax.jit`, for example `donate_argnums`.
    """
    if mesh is None:
        mesh = topology(target)
    replicated = NamedSharding(mesh, PartitionSpec())

    def described(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or replicated)

    compiled = compile_only(function, *jax.tree.map(described, arguments), mesh=mesh, **jit_options)
    memory: Any = compiled.executable.memory_analysis()
    return Report(
        name=name or getattr(function, "__name__", "program"),
        target=mesh.devices.flat[0].device_kind,
        devices=mesh.devices.size,
        seconds=compiled.seconds,
        kernels=compiled.kernels,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=hlo.collectives(hlo.parse(compiled.executable.as_text() or "")),
    )


def compile_only(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: jax.sharding.Mesh,
    **jit_options: Any,
) -> Compiled:
    """Lowers and compiles `function(*arguments)`, kernels chosen as on the GPUs of the mesh.

    Args:
      function: anything `jax.jit` takes.
      *arguments: pytrees of `jax.ShapeDtypeStruct` with shardings on the mesh.
      mesh: from `topology`.
      **jit_options: for `jax.jit`, for example `donate_argnums` or `compiler_options`.
    """
    start = time.perf_counter()
    kind = capability(mesh.devices.flat[0].device_kind)
    one_device = contextlib.nullcontext()
    if mesh.size == 1 and jax.sharding.get_abstract_mesh().empty:
        # Triton asks what it compiles for; without axes, nothing else changes.
        one_device = jax.sharding.use_abstract_mesh(
            AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)
        )
    gpu = _dispatch.Target("gpu", kind)
    with _printed(_DUMPS) as printed, _dispatch.targeting(gpu), one_device:
        traced = jax.jit(function, **jit_options).trace(*arguments)
        # Named, because Explicit axes would have the platform looked up among those that can run here.
        lowered = traced.lower(lowering_platforms=("cuda",))
        executable = lowered.compile()
    seconds = round(time.perf_counter() - start, 2)
    code = printed["text"]
    if triton_ptx.TARGET in (executable.as_text() or ""):
        code += triton_ptx.listing(lowered, _nvdisasm() or "nvdisasm")
    return Compiled(executable, parse(code), seconds)


@contextlib.contextmanager
def _printed(switches: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Collects what the compiler writes to file descriptors 1 and 2 while its dump switches are on."""
    saved = {name: os.environ.get(name) for name in switches}
    os.environ.update(dict.fromkeys(switches, "1"))
    box: dict[str, str] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        copies = [os.dup(1), os.dup(2)]
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield box
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), copies, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            sink.seek(0)
            box["text"] = sink.read().decode(errors="replace")


def compile_case(case: Case, *, target: str = "h200", devices: int = 1) -> Report:
    """One registered case; with several devices every device gets its own batch (`jax.shard_map`)."""
    mesh = topology(target, devices=devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = case.build()
    if devices > 1:
        (axis,) = mesh.axis_names
        batched = PartitionSpec(axis)
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (leaf.shape[0] * devices, *leaf.shape[1:]),
                leaf.dtype,
                sharding=NamedSharding(mesh, batched),
            ),
            arguments,
        )
        function = jax.shard_map(
            function, mesh=mesh, in_specs=batched, out_specs=batched, check_vma=False
        )
    report = compile_program(
        function, *arguments, mesh=mesh, name=case.name, donate_argnums=case.donated
    )
    return dataclasses.replace(
        report,
        flops=case.flops,
        hbm_bytes=case.hbm_bytes,
        tensor_instructions=case.tensor_instructions,
    )
