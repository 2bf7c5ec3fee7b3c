"""What the device compiler says about a kernel: ptxas' resource lines and the instructions nvdisasm lists."""

import collections
import dataclasses
import re
from collections.abc import Mapping

# Instructions that a hot kernel should not contain, and what they mean.
SLOW_PATHS = {
    "LDL": "local memory read (a spill or an indexed register array)",
    "STL": "local memory write (a spill or an indexed register array)",
    "CALL": "subroutine (the slow path of a division, square root or large-argument function)",
    "DFMA": "float64 arithmetic",
    "DMUL": "float64 arithmetic",
    "DADD": "float64 arithmetic",
    "HMMA": "the tensor-core instruction of Ampere, slow on Hopper",
}
# ptxas messages that make a warpgroup kernel slow. C7519 (a fence put in by the compiler) is harmless.
BAD_MESSAGES = {
    "C7504": "setmaxnreg ignored",
    "C7510": "wgmma serialised",
    "C7511": "wgmma serialised",
    "C7512": "wgmma serialised",
    "C7513": "wgmma serialised",
    "C7514": "wgmma serialised",
    "C7515": "wgmma serialised",
}
_RESOURCES = re.compile(r"smem_scratch_bytes=(\d+).*?barrier_counts=Counter\((.*?)\)\s*[,)]", re.S)
_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)
_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.M)
_MESSAGE = re.compile(r"\((C75\d\d)\)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.M)
_BRANCH = re.compile(r"\bBRA\S*\s+`\((\.L_x_\d+)\)")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.A-Z0-9_a-z]*)"
)


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """One kernel as machine code.

    Attributes:
      name: entry point.
      architecture: for example "sm_90a".
      registers: per thread at launch (a warp-specialised kernel then moves them between its warpgroups).
      spill_store_bytes, spill_load_bytes, stack_bytes: per thread, as ptxas counts them.
      shared_bytes: dynamic shared memory per block.
      barriers: mbarriers per block.
      instructions: opcode without suffixes -> how many stand in the code (not how many run).
      loops: instructions of every loop of at least 64, in code order.
      sequence: tensor-core instructions ("HGMMA"), waits ("WAIT<=n") and exponentials ("EX2") in code order.
      messages: ptxas' C75xx codes.
    """

    name: str
    architecture: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    barriers: int
    instructions: Mapping[str, int]
    loops: tuple[int, ...]
    sequence: tuple[str, ...]
    messages: tuple[str, ...]

    @property
    def slow_paths(self) -> dict[str, str]:
        """Instructions and compiler messages that cost time, with their meaning."""
        found = {op: why for op, why in SLOW_PATHS.items() if self.instructions.get(op)}
        return found | {code: BAD_MESSAGES[code] for code in self.messages if code in BAD_MESSAGES}


def parse(text: str) -> tuple[KernelFacts, ...]:
    """Kernels in the order in which they were compiled, from what the compiler printed."""
    resources = [
        (int(shared), sum(_barriers(counts))) for shared, counts in _RESOURCES.findall(text)
    ]
    code, loops = _code_sections(text), _loops(text)
    facts, before = [], 0
    for index, match in enumerate(_PTXAS.finditer(text)):
        shared, barriers = resources[index] if index < len(resources) else (0, 0)
        opcodes = code.get(match["name"], [[]])
        listing = opcodes.pop(0) if opcodes else []
        lengths = loops.get(match["name"], [()])
        facts.append(
            KernelFacts(
                name=match["name"],
                architecture=match["architecture"],
                registers=int(match["registers"]),
                spill_store_bytes=int(match["stores"]),
                spill_load_bytes=int(match["loads"]),
                stack_bytes=int(match["stack"]),
                shared_bytes=shared,
                barriers=barriers,
                instructions=dict(collections.Counter(op for op, _ in listing)),
                loops=lengths.pop(0) if lengths else (),
                sequence=_sequence(listing),
                messages=tuple(sorted(set(_MESSAGE.findall(text, before, match.start())))),
            )
        )
        before = match.end()
    return tuple(facts)


def _barriers(counts: str) -> list[int]:
    """Barriers of one kernel: `{Barrier(..., num_barriers=2, ...): 3}` is 3 objects of 2."""
    found = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", counts + ")")
    return [int(width) * int(times) for width, times in found]


def _sections(text: str) -> list[tuple[str, str]]:
    """Kernel name and listing of every compilation."""
    marks = list(_SECTION.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=bool(marks))]


def _code_sections(text: str) -> dict[str, list[list[tuple[str, str]]]]:
    """Kernel name -> its listings (one per compilation), each a list of (opcode, suffixes and operands)."""
    sections: dict[str, list[list[tuple[str, str]]]] = {}
    for name, body in _sections(text):
        listing = []
        for line in body.splitlines():
            found = _INSTRUCTION.search(line)
            if found:
                listing.append((found[1], line[found.start(2) :]))
        sections.setdefault(name, []).append(listing)
    return sections


def _loops(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Kernel name -> lengths of its loops (one tuple per compilation)."""
    sections: dict[str, list[tuple[int, ...]]] = {}
    for name, body in _sections(text):
        starts: dict[str, int] = {}
        lengths: dict[str, int] = {}
        count, branched = 0, False
        for line in body.splitlines():
            if label := _LABEL.match(line):
                starts[label[1]] = count
            if not _INSTRUCTION.search(line):
                continue
            count += 1
            branch = _BRANCH.search(line)
            # Two in a row: code that waits, out of line, for a barrier, and then goes back into a loop.
            if branch and not branched and branch[1] in starts:
                lengths[branch[1]] = count - starts[branch[1]]
            branched = branch is not None
        sections.setdefault(name, []).append(tuple(n for n in lengths.values() if n >= 64))
    return sections


def _sequence(listing: list[tuple[str, str]]) -> tuple[str, ...]:
    order = []
    for opcode, rest in listing:
        if opcode in ("HGMMA", "QGMMA", "IGMMA"):
            order.append(opcode)
        elif opcode == "WARPGROUP" and rest.startswith(".DEPBAR"):
            bound = re.search(r"gsb0, 0x(\w+)", rest)
            order.append(f"WAIT<={int(bound[1], 16) if bound else 0}")
        elif opcode == "MUFU" and rest.startswith(".EX2"):
            order.append("EX2")
    return tuple(order)
