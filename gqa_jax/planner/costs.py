"""What a compiled program does per device: collectives with their overlap, operations, memory traffic."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from pallas_kernels import aot

# Instructions that launch no kernel: they rename, or are known at compile time.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier",
    "replica-id", "add-dependency",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of the compiled program.

    Attributes:
      kind: e.g. "all-reduce".
      axes: the mesh axes along which devices talk to each other.
      times: how often one step runs it (trip counts of the loops around it).
      result_bytes: of its result on one device, each time.
      sent_bytes: that one device puts on the wire each time, by the ring algorithm.
      crosses_hosts: whether some pair of its devices is on two hosts.
      asynchronous: it starts, other instructions run, it is waited for.
      overlapped_kernels: how many kernels are scheduled between start and end.
      seconds, hidden_seconds: on the wire, and how much of that those kernels take.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    result_bytes: int
    sent_bytes: int
    crosses_hosts: bool
    asynchronous: bool
    overlapped_kernels: int
    seconds: float
    hidden_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Per device and step.

    Attributes:
      collectives: in the order of the schedule.
      flops: of matrix products that XLA compiles, 2 per multiply-add.
      traffic_bytes: operands read and results written by kernels.
      kernels: target of a custom call -> how often it runs; their operations are not in `flops`.
      kernel_seconds: that kernels take at least, each at full rates.
      unknown_loops: loops whose trip count the compiler does not know; they count once.
    """

    collectives: tuple[Collective, ...] = ()
    flops: float = 0.0
    traffic_bytes: float = 0.0
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kernel_seconds: float = 0.0
    unknown_loops: int = 0

    def plus(self, other: "Costs", *, times: int = 1) -> "Costs":
        """Both, `other` so many times."""
        kernels = dict(self.kernels)
        for name, count in other.kernels.items():
            kernels[name] = kernels.get(name, 0) + times * count
        repeated = (dataclasses.replace(c, times=c.times * times) for c in other.collectives)
        return Costs(
            collectives=(*self.collectives, *repeated),
            flops=self.flops + times * other.flops,
            traffic_bytes=self.traffic_bytes + times * other.traffic_bytes,
            kernels=kernels,
            kernel_seconds=self.kernel_seconds + times * other.kernel_seconds,
            unknown_loops=self.unknown_loops + other.unknown_loops,
        )


def costs(text: str, mesh_shape: Mapping[str, int], rates: aot.Rates) -> Costs:
    """Costs of a compiled program.

    Args:
      text: scheduled HLO of one device's program (`compiled.as_text()`).
      mesh_shape: axis -> size, in the order in which the devices are numbered.
      rates: of the target.
    """
    return _Walk(aot.hlo.parse(text), dict(mesh_shape), rates).computation(None)


class _Walk:
    """Sums over computations, loops with their trip counts."""

    def __init__(self, module: aot.hlo.Module, mesh_shape: dict[str, int], rates: aot.Rates):
        self.module, self.mesh_shape, self.rates = module, mesh_shape, rates
        self.done: dict[str, Costs] = {}

    def computation(self, name: str | None) -> Costs:
        """Of a computation that is scheduled (not fused); the entry by default."""
        name = name or self.module.entry
        if name not in self.done:
            self.done[name] = self._scheduled(name)
        return self.done[name]

    def _scheduled(self, name: str) -> Costs:
        total = Costs()
        body = self.module.computations[name]
        alone = [self.instruction(name, instruction) for instruction in body]
        places = {instruction.name: i for i, instruction in enumerate(body)}
        ends = {
            places[operand]: i
            for i, instruction in enumerate(body)
            if instruction.opcode.endswith("-done")
            for operand in instruction.operands
            if operand in places
        }
        for i, (instruction, cost) in enumerate(zip(body, alone, strict=True)):
            collective = self._communication(instruction)
            if collective is None:
                total = total.plus(cost)
                continue
            between = alone[i + 1 : ends.get(i, i + 1)]
            hidden = sum(other.kernel_seconds for other in between)
            timed = dataclasses.replace(
                collective,
                overlapped_kernels=sum(other.traffic_bytes > 0 for other in between),
                hidden_seconds=min(hidden, collective.seconds),
            )
            total = total.plus(Costs(collectives=(timed,)))
        return total

    def _communication(self, instruction: aot.hlo.Instruction) -> Collective | None:
        """The collective that an instruction starts or is."""
        opcode, source = instruction.opcode, instruction
        if opcode == "async-start":
            (wrapped,) = instruction.called.get("calls", ("",))
            inside = self.module.computations.get(wrapped, ())
            source = next(
                (i for i in inside if i.opcode.removesuffix("-start") in aot.hlo.COLLECTIVES), None
            )
            if source is None:
                return None
        kind = source.opcode.removesuffix("-start")
        if kind not in aot.hlo.COLLECTIVES:
            return None
        num_devices = math.prod(self.mesh_shape.values())
        groups = aot.hlo.groups(source.attributes, num_devices)
        size = self._result_bytes(source)
        members = groups.shape[1]
        sent = {
            "all-reduce": 2 * size * (members - 1) // members,
            "all-gather": size * (members - 1) // members,
            "reduce-scatter": size * (members - 1),
            "all-to-all": size * (members - 1) // members,
            "ragged-all-to-all": size * (members - 1) // members,
        }.get(kind, size)
        hosts = groups // aot.GPUS_PER_HOST
        crosses = bool((hosts != hosts[:, :1]).any())
        rate = self.rates.network_bytes if crosses else self.rates.nvlink_bytes
        return Collective(
            kind=kind,
            axes=self._axes(groups),
            times=1,
            result_bytes=size,
            sent_bytes=sent,
            crosses_hosts=crosses,
            asynchronous=opcode.endswith("-start"),
            overlapped_kernels=0,
            seconds=sent / rate,
            hidden_seconds=0.0,
        )

    def _result_bytes(self, start: aot.hlo.Instruction) -> int:
        """Of what the collective yields; the result of a start lists its operands first (and contexts last)."""
        if not start.opcode.endswith("-start"):
            return start.bytes
        kind, count = start.opcode.removesuffix("-start"), len(start.operands)
        # An all-reduce-start may list its results only.
        arrays = start.result if len(start.result) < 2 * count else start.result[count : 2 * count]
        assert len(arrays) == count, (kind, start.result)
        return sum(aot.hlo.array_bytes(*array) for array in arrays)

    def _axes(self, groups: np.ndarray) -> tuple[str, ...]:
        coordinates = np.unravel_index(groups, tuple(self.mesh_shape.values()))
        return tuple(
            name
            for name, place in zip(self.mesh_shape, coordinates, strict=True)
            if (place != place[:, :1]).any()
        )

    def instruction(self, computation: str, instruction: aot.hlo.Instruction) -> Costs:
        """Of one scheduled instruction that does not communicate."""
        opcode, called = instruction.opcode, instruction.called
        if (
            opcode in _FREE
            or opcode.endswith("-done")
            or opcode.removesuffix("-start") in aot.hlo.COLLECTIVES
        ):
            return Costs()
        if opcode == "while":
            times = instruction.trip_count
            inside = self.computation(called["body"][0])
            total = Costs(unknown_loops=times is None)
            return total.plus(inside, times=1 if times is None else times)
        if opcode == "conditional":
            names = [n for role in sorted(called) for n in called[role]]
            return max((self.computation(n) for n in names), key=lambda cost: cost.kernel_seconds)
        if opcode in ("call", "async-start"):
            return self.computation(called.get("to_apply", called.get("calls", ("",)))[0])
        table = self.module.by_name[computation]
        if opcode.removesuffix("-start") == "fusion":
            (fused,) = called["calls"]
            return self._kernel(self._fused_flops(fused), self._fused_traffic(fused))
        operands = [table[name] for name in instruction.operands if name in table]
        traffic = sum(operand.bytes for operand in operands) + instruction.bytes
        if opcode in _SLICES:
            traffic = 2 * instruction.bytes
        if opcode == "dynamic-update-slice":
            traffic = 2 * operands[1].bytes
        if opcode == "custom-call":
            target = instruction.attributes.partition('custom_call_target="')[2].partition('"')[0]
            return dataclasses.replace(self._kernel(0.0, traffic), kernels={target: 1})
        return self._kernel(_dot_flops(instruction, table), traffic)

    def _kernel(self, flops: float, traffic: float) -> Costs:
        seconds = max(flops / self.rates.bf16_flops, traffic / self.rates.hbm_bytes)
        return Costs(flops=flops, traffic_bytes=traffic, kernel_seconds=seconds)

    def _fused_flops(self, name: str) -> float:
        table = self.module.by_name[name]
        total = 0.0
        for instruction in self.module.computations[name]:
            total += _dot_flops(instruction, table)
            if instruction.opcode == "fusion":
                total += self._fused_flops(instruction.called["calls"][0])
        return total

    def _fused_traffic(self, name: str) -> int:
        """What a fusion reads and writes; of an array that it only slices, the slices."""
        body = self.module.computations[name]
        total = 0
        updated: set[str] = set()
        for instruction in body:
            if instruction.opcode == "dynamic-update-slice":
                updated.add(instruction.operands[0])
        for instruction in body:
            if instruction.opcode != "parameter":
                continue
            users = [i for i in body if instruction.name in i.operands]
            if users and all(i.opcode in _SLICES for i in users):
                total += sum(i.bytes for i in users)
            elif instruction.name not in updated:
                total += instruction.bytes
        root = body[-1]
        if root.opcode == "dynamic-update-slice":
            return total + self.module.by_name[name][root.operands[1]].bytes
        return total + root.bytes


def _dot_flops(instruction: aot.hlo.Instruction, table: Mapping[str, aot.hlo.Instruction]) -> float:
    """2 per multiply-add of a matrix product; 0 of anything else."""
    if instruction.opcode != "dot":
        return 0.0
    (_, lhs) = table[instruction.operands[0]].result[0]
    contracted = math.prod(lhs[i] for i in instruction.dimensions("lhs_contracting_dims"))
    (_, out) = instruction.result[0]
    return 2.0 * math.prod(out) * contracted
