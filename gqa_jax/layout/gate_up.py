"""Fused gate and up projections of a SwiGLU block.

interleaved  `[g0, u0, g1, u1, ...]`: any even shard is a whole block; our parameter `[M, F, 2]` with its axes joined
concat       `[gate all | up all]`: Hugging Face's fused experts, Phi-3, vLLM
"""

from typing import Any, Literal, NamedTuple

from gqa_jax.layout.axes import (
    concat,
    flatten,
    groups_along,
    normalize_axis,
    require_alike,
    sections,
    stack,
    unflatten,
)

GateUpLayout = Literal["interleaved", "concat"]


class GateUp(NamedTuple):
    """Separate projections, F features each."""

    gate: Any
    up: Any


def split_gate_up(fused: Any, *, layout: GateUpLayout = "interleaved", axis: int = -1) -> GateUp:
    """Separates gate and up, `F` features each, from `2F` along `axis`.

    Raises:
      ValueError: an unknown layout or an odd number of features.

    Example:
      >>> split_gate_up(np.arange(6)).gate
      array([0, 2, 4])
    """
    _check(layout)
    axis = normalize_axis("fused", fused, axis)
    pairs = groups_along("fused", fused, axis, 2, "gate and up")
    if layout == "concat":
        return GateUp(*sections(fused, axis, pairs, pairs))
    by_pair = unflatten(fused, axis, pairs, 2)
    return GateUp(*(flatten(part, axis, 2) for part in sections(by_pair, axis + 1, 1, 1)))


def fuse_gate_up(
    gate: Any, up: Any, *, layout: GateUpLayout = "interleaved", axis: int = -1
) -> Any:
    """The inverse of `split_gate_up`.

    Raises:
      TypeError: `gate` and `up` differ in dtype.
      ValueError: an unknown layout or different shapes.

    Example:
      >>> fuse_gate_up(np.array([0, 2]), np.array([1, 3]))
      array([0, 1, 2, 3])
    """
    _check(layout)
    axis = normalize_axis("gate", gate, axis)
    require_alike({"gate": gate, "up": up}, axis)
    if gate.shape != up.shape:
        raise ValueError(
            f"`up` must have the shape of `gate` {tuple(gate.shape)}, got {tuple(up.shape)}"
        )
    if layout == "concat":
        return concat([gate, up], axis)
    return flatten(stack([gate, up], axis + 1), axis, 2)


def _check(layout: str) -> None:
    if layout not in ("interleaved", "concat"):
        raise ValueError(f"`layout` must be one of ('interleaved', 'concat'), got {layout!r}")
