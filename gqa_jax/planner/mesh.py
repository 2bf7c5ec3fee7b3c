"""What the axes of a planned mesh are called, and what each splits."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from gqa_jax.config import DecoderConfig
from gqa_jax.parallel.sharding import Axis, MeshAxes

ROLES = {
    "dp": "rows of the batch",
    "fsdp": "rows of the batch, and parameters with their moments",
    "cp": "tokens of a row",
    "tp": "heads, hidden channels and vocabulary",
}


class PlannedMesh(NamedTuple):
    """A mesh before there are devices.

    Attributes:
      shape: axis -> size, the first spread widest.
      axes: what they split.
      note: how it differs from what was requested, or "".
    """

    shape: dict[str, int]
    axes: MeshAxes
    note: str

    def size(self, axis: Axis) -> int:
        """Number of devices along an axis of `axes`."""
        names = (axis,) if isinstance(axis, str) else axis or ()
        return math.prod(self.shape[name] for name in names)


def parse_mesh(text: str) -> dict[str, int]:
    """`"dp=8,cp=8,tp=8"` as a dict.

    Raises:
      ValueError: an axis that has no role, twice, or without a positive size.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ROLES or name in shape or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"`mesh` must be like 'dp=8,cp=8,tp=8' with each of {', '.join(ROLES)} at most once, got {text!r}"
            )
        shape[name] = int(size)
    return shape


def plan_mesh(
    shape: Mapping[str, int], config: DecoderConfig, *, sequence_parallel: bool = False
) -> PlannedMesh:
    """The mesh for a model: where `tp` and the key/value heads share a factor, `tp` becomes two axes.

    Args:
      shape: axis -> size, names from `ROLES`.
      config: its key/value heads decide.
      sequence_parallel: `tp` splits the tokens of the residual stream too.
    """
    sizes, heads, note = dict(shape), ("tp",) if "tp" in shape else (), ""
    kv_heads = config.attention.num_kv_heads if config.attention is not None else None
    if heads and kv_heads is not None:
        common = math.gcd(kv_heads, shape["tp"])
        if 1 < common < shape["tp"]:
            heads = ("tp_kv", "tp_q")
            sizes = {}
            for name, size in shape.items():
                sizes |= {"tp_kv": common, "tp_q": size // common} if name == "tp" else {name: size}
            note = (
                f"{kv_heads} key/value heads on tp={shape['tp']}: the axis is tp_kv={common} (key/value heads) times "
                f"tp_q={shape['tp'] // common} (queries of a group)"
            )
    batch = tuple(name for name in ("dp", "fsdp") if name in shape)
    axes = MeshAxes(
        batch=batch or None,
        seq="cp" if "cp" in shape else None,
        heads=heads or None,
        embed="fsdp" if "fsdp" in shape else None,
        seq_residual=heads if sequence_parallel and heads else None,
    )
    return PlannedMesh(sizes, axes, note)
