"""What a compiled program says about communication."""

import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")


def collectives(text: str) -> list[tuple[str, int]]:
    """`(kind, bytes of its result on one device)` of every collective in an HLO text, in order."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match:
            sizes = 0
            for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1]):
                count = 1
                for n in filter(None, dims.split(",")):
                    count *= int(n)
                sizes += count * _BYTES[dtype]
            found.append((match[2], sizes))
    return found


def count(text: str) -> dict[str, int]:
    """Number of collectives of each kind that occurs."""
    kinds = [kind for kind, _ in collectives(text)]
    return {kind: kinds.count(kind) for kind in _KINDS if kind in kinds}
