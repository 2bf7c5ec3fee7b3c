"""Compiles one step of a model for a mesh that this machine does not have, and sums up what it costs."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax.config import DecoderConfig
from gqa_jax.models.checks import pattern_length
from gqa_jax.models.memory import tree_bytes
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.planner import programs
from gqa_jax.planner.costs import Costs, costs
from gqa_jax.planner.mesh import plan_mesh
from gqa_jax.planner.model_flops import model_flops
from pallas_kernels import aot


class Traffic(NamedTuple):
    """Collectives of one kind along the same axes, per device and step.

    Attributes:
      kind, axes: e.g. "all-reduce" and ("tp",).
      asynchronous: other instructions run between its start and its end.
      overlapped: kernels among them.
      crosses_hosts: whether some pair of devices is on two hosts.
      count: how often.
      result_bytes: of the results.
      sent_bytes: that one device puts on the wire, by the ring algorithm.
      seconds: on the wire, at the rate of the link.
      hidden_seconds: of those, behind kernels.
    """

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    overlapped: bool
    crosses_hosts: bool
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    result_bytes: int
    sent_bytes: int
    seconds: float
    hidden_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step costs on one device of a mesh.

    Attributes:
      target, mesh, axis_type: what was compiled for, e.g. "h200", {"dp": 8, "tp": 8}, "auto".
      notes: how the compiled program differs from what was requested.
      step, batch, length, num_layers: "training" or "decoding", of what size.
      parts: bytes of the arguments by purpose.
      argument_bytes, output_bytes, aliased_bytes, temporary_bytes: as the compiler allocates them.
      memory_bytes: of the device.
      traffic: collectives, the most bytes first.
      flops: of the compiled matrix products; loops of unknown length and kernels of our own leave some out.
      hbm_traffic_bytes: operands and results of the compiled kernels.
      kernels: calls of our own kernels and of libraries -> how often.
      unknown_loops: loops whose trip count the compiler does not know; counted once in `flops` and traffic.
      floors: what bounds the time of a step from below -> seconds; `bound` is the largest.
      kernel_seconds: as compiled, at full rates.
      exposed_seconds: of communication that no kernel hides.
      compile_seconds, jax_version: of this compilation.
    """

    target: str
    mesh: Mapping[str, int]
    axis_type: str
    notes: tuple[str, ...]
    step: str
    batch: int
    length: int
    num_layers: int
    parts: Mapping[str, int]
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    memory_bytes: float
    traffic: tuple[Traffic, ...]
    flops: float
    hbm_traffic_bytes: float
    kernels: Mapping[str, int]
    unknown_loops: int
    floors: Mapping[str, float]
    kernel_seconds: float
    exposed_seconds: float
    compile_seconds: float
    jax_version: str

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that are not written over them, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether that is less than the device has."""
        return self.peak_bytes <= self.memory_bytes

    @property
    def bound(self) -> tuple[str, float]:
        """The largest floor: its name and seconds."""
        return max(self.floors.items(), key=lambda item: item[1])

    def as_json(self) -> dict[str, Any]:
        """A dict for `json.dumps`, derived values included."""
        name, seconds = self.bound
        return dataclasses.asdict(self) | {
            "traffic": [row._asdict() for row in self.traffic],
            "devices": self.devices,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "bound": {"by": name, "seconds": seconds},
        }


def plan(
    config: DecoderConfig,
    *,
    mesh: Mapping[str, int],
    length: int,
    batch: int | None = None,
    target: str = "h200",
    decode: bool = False,
    mode: Literal["all_gather", "ring", "a2a", "a2a+ring"] = "all_gather",
    layout: Literal["contiguous", "zigzag"] = "zigzag",
    sequence_parallel: bool = False,
    remat: bool = True,
    unroll: bool = False,
    explicit: bool = False,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = None,
    rates: aot.Rates | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Compiles one update of training, or one token of decoding, for GPUs that this machine need not have.

    The layers of the repeating pattern are compiled once and scanned over, so that the time it takes does not grow
    with the depth and nothing is extrapolated; layers that do not repeat are compiled one by one.

    Args:
      config: of the model; `scan_layers` and `remat` are set here.
      mesh: axis -> size, the first spread widest over hosts of 8: "dp" (rows), "fsdp" (rows and parameters), "cp"
        (tokens), "tp" (heads, channels, vocabulary).
      length: tokens per row; with `decode`, the capacity of the cache.
      batch: rows on all devices together; None means one per device of dp and fsdp.
      target: a GPU of `pallas_kernels.aot.targets()`.
      decode: one token for each row instead of an update.
      mode, layout: of `ContextParallel`, where the mesh has "cp".
      sequence_parallel: "tp" splits the tokens of the residual stream too.
      remat: recompute each layer in the backward.
      unroll: compile every layer on its own instead of scanning.
      explicit: `Explicit` axes instead of `Auto`.
      dtype: of the computation and caches.
      param_dtype: None means float32 for training and `dtype` for decoding.
      rates: in place of those that the target states.
      compiler_options: for XLA, as `jax.jit` takes them.

    Raises:
      ValueError: what a mesh, a length or a model cannot do, in the words of `gqa_jax.sharding` and the layers.
      RuntimeError: the CUDA plugin or nvdisasm is missing.

    Example:
      >>> from gqa_jax.hf.config import PRESETS
      >>> config = DecoderConfig.from_hf(PRESETS["qwen3_8b"])
      >>> plan(config, mesh={"fsdp": 8}, length=8192).peak_bytes  # doctest: +SKIP
    """
    if length < 1 or (batch is not None and batch < 1):
        raise ValueError(f"`length` and `batch` must be positive, got {length} and {batch}")
    rates = aot.rates(target) if rates is None else rates
    planned = plan_mesh(mesh, config, sequence_parallel=sequence_parallel and not decode)
    notes = [planned.note] if planned.note else []
    config, note = _as_compiled(config, unroll=unroll, remat=remat and not decode)
    notes.append(note)
    context = ContextParallel(mode=mode, layout=layout) if "cp" in planned.shape else None
    rows = planned.size(planned.axes.batch)
    batch = rows if batch is None else batch
    if batch % rows:
        raise ValueError(f"`batch` must be a multiple of {rows} (mesh {dict(mesh)}), got {batch}")
    if param_dtype is None:
        param_dtype = dtype if decode else jnp.float32
    devices = aot.topology(target, shape=planned.shape, explicit=explicit)
    build = programs.decoding if decode else programs.training
    # The axes' names are all that layers look up; there are no devices to put anything on.
    with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
        program = build(
            config,
            devices,
            planned.axes,
            context,
            batch=batch,
            length=length,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        compiled = aot.compile_only(
            program.function,
            *program.arguments,
            mesh=devices,
            donate_argnums=0,
            compiler_options=dict(compiler_options or {}),
        )
    memory: Any = compiled.executable.memory_analysis()
    total = costs(compiled.executable.as_text() or "", planned.shape, rates)
    traffic = _traffic(total)
    work = model_flops(config, batch=batch, length=length, decode=decode) / devices.size
    written = memory.output_size_in_bytes - (memory.alias_size_in_bytes if decode else 0)
    return Plan(
        target=target,
        mesh=planned.shape,
        axis_type="explicit" if explicit else "auto",
        notes=tuple(notes),
        step="decoding" if decode else "training",
        batch=batch,
        length=length,
        num_layers=len(config.layers),
        parts={name: _bytes_per_device(tree) for name, tree in program.parts.items()},
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        memory_bytes=rates.memory_bytes,
        traffic=traffic,
        flops=total.flops,
        hbm_traffic_bytes=total.traffic_bytes,
        kernels=dict(total.kernels),
        unknown_loops=total.unknown_loops,
        floors={
            "tensor cores": work / rates.bf16_flops,
            "memory": (memory.argument_size_in_bytes + written) / rates.hbm_bytes,
            "NVLink": sum(row.seconds for row in traffic if not row.crosses_hosts),
            "network": sum(row.seconds for row in traffic if row.crosses_hosts),
        },
        kernel_seconds=total.kernel_seconds,
        exposed_seconds=sum(row.seconds - row.hidden_seconds for row in traffic),
        compile_seconds=compiled.seconds,
        jax_version=importlib.metadata.version("jax"),
    )


def _as_compiled(config: DecoderConfig, *, unroll: bool, remat: bool) -> tuple[DecoderConfig, str]:
    """The config that is compiled, and how."""
    layers = len(config.layers)
    try:
        pattern = layers if unroll else pattern_length(config)
    except ValueError:
        pattern = layers
    scan = pattern < layers
    note = f"{layers} layers compiled one by one"
    if scan:
        note = f"scan over {layers // pattern} repeats of {pattern} layers: nothing is extrapolated"
    return dataclasses.replace(config, scan_layers=scan, remat=remat), note


def _bytes_per_device(tree: Any) -> int:
    def shard(leaf):
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return tree_bytes(jax.tree.map(shard, tree))


def _traffic(total: Costs) -> tuple[Traffic, ...]:
    rows: dict[tuple, Traffic] = {}
    for each in total.collectives:
        overlapped = each.overlapped_kernels > 0
        key = (each.kind, each.axes, each.asynchronous, overlapped, each.crosses_hosts)
        before = rows.get(key, Traffic(*key, 0, 0, 0, 0.0, 0.0))
        rows[key] = before._replace(
            count=before.count + each.times,
            result_bytes=before.result_bytes + each.times * each.result_bytes,
            sent_bytes=before.sent_bytes + each.times * each.sent_bytes,
            seconds=before.seconds + each.times * each.seconds,
            hidden_seconds=before.hidden_seconds + each.times * each.hidden_seconds,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.sent_bytes))
