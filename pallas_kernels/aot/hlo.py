"""Compiled HLO as data: computations of instructions in the order in which they are scheduled."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {"pred": 8, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name, opcode: e.g. "all-gather-start.1" and "all-gather-start".
      result: `(dtype, dimensions)` of each array of the result; a start's result holds its operands too.
      operands: names of instructions of the same computation.
      attributes: what follows the operands, as text.
    """

    name: str
    opcode: str
    result: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array_bytes(*array) for array in self.result)

    @functools.cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Role ("calls", "body", "condition", ...) -> names of computations."""
        found: dict[str, tuple[str, ...]] = {}
        for role, names in _CALLED.findall(self.attributes):
            found[role] = tuple(n.strip().lstrip("%") for n in names.strip("{}").split(","))
        return found

    @property
    def trip_count(self) -> int | None:
        """Of a while loop, where the compiler knows it."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None

    def dimensions(self, attribute: str) -> tuple[int, ...]:
        """The integers of `attribute={...}`."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclasses.dataclass(frozen=True)
class Module:
    """A scheduled module.

    Attributes:
      entry: name of the computation that runs.
      computations: name -> instructions, in the order of the schedule.
    """

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Mapping[str, Instruction]]:
        """Computation -> name -> instruction."""
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}


def array_bytes(dtype: str, dims: tuple[int, ...]) -> int:
    """Bytes of an array; 0 for tokens."""
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return math.prod(dims) * bits // 8


def collectives(module: Module) -> dict[str, tuple[int, int]]:
    """Kind -> (how many, bytes of their results), a pair of start and done counted once, at its result."""
    found: dict[str, tuple[int, int]] = {}
    for body in module.computations.values():
        for instruction in body:
            kind = instruction.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                count, size = found.get(kind, (0, 0))
                found[kind] = count + 1, size + instruction.bytes
    return found


def parse(text: str) -> Module:
    """`compiled.as_text()` as a module.

    Raises:
      ValueError: no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = None, None, []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, body = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(body)
            name = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                body.append(instruction)
    if entry is None:
        raise ValueError(f"`text` must be HLO with an entry computation, got {text[:80]!r}")
    return Module(entry, computations)


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    shape = line[start:stop]
    opening = line.index("(", stop)
    closing = _closing(line, opening)
    return Instruction(
        name=head[2],
        opcode=line[stop:opening].strip(),
        result=tuple(
            (dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in _ARRAY.findall(shape)
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", line[opening:closing])),
        attributes=line[closing:],
    )


def _closing(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


def groups(attributes: str, num_devices: int) -> np.ndarray:
    """`[number of groups, size]`: the devices that communicate with each other; `[pairs, 2]` of a permute."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes)
    if pairs:
        return np.asarray(re.findall(r"(\d+),(\d+)", pairs[1]), dtype=np.int64)
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", attributes)
    if named:
        return _named_groups(named[1], named[2], num_devices)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, order = _integers(iota[1]), _integers(iota[3]) if iota[3] else None
        ids = np.arange(num_devices).reshape(_integers(iota[2]))
        return (ids if order is None else ids.transpose(order)).reshape(shape)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return np.asarray([_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(num_devices).reshape(1, -1)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _named_groups(mesh: str, axes: str, num_devices: int) -> np.ndarray:
    """Groups written as `mesh['dp'=2,'tp'=4] {'tp'}`; `'tp':(1)2` is a part of an axis."""
    names, sizes = [], []
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    parts = {name: (int(before), int(size)) for name, before, size in wanted if size}
    together = []
    for name, text in re.findall(r"'(\w+)'=(\d+)", mesh):
        size = int(text)
        before, part = parts.get(name, (1, size))
        names += [(name, "before"), (name, "part"), (name, "after")]
        sizes += [before, part, size // (before * part)]
        if any(name == w[0] for w in wanted):
            together.append(len(names) - 2)
    ids = np.arange(num_devices).reshape(sizes)
    apart = [i for i in range(len(sizes)) if i not in together]
    size = math.prod(sizes[i] for i in together)
    return ids.transpose([*apart, *together]).reshape(-1, size)
