"""The four fused query-key-value layouts.

With K groups (key/value heads), R = `q_per_kv` query heads per group and D = `head_dim`, the features along `axis` are:

  grouped        per group `[Q_g (R*D) | K_g (D) | V_g (D)]`                 Megatron, NeMo Automodel, our kernels
  grouped_gated  per group `[Q_g (R*D) | gate_g (R*D) | K_g (D) | V_g (D)]`  Megatron with an attention output gate
  concat         `[Q all | K all | V all]`                                   Phi-3, vLLM, litgpt
  hf_gated_q     separate q, k and v, where q holds `[q (D) | gate (D)]` per head   Qwen3-Next and Qwen3.5

The number of groups follows from the width, so all functions also work on a tensor-parallel shard. Our parameters
`[M, K, R+2, D]` are the first two layouts with their axes apart: `to_group_axes`, `from_group_axes`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from gqa_jax.layout.axes import (
    concat,
    flatten,
    groups_along,
    normalize_axis,
    require_alike,
    require_positive,
    sections,
    take,
    unflatten,
)

QKVLayout = Literal["grouped", "grouped_gated", "concat", "hf_gated_q"]
LAYOUTS = ("grouped", "grouped_gated", "concat", "hf_gated_q")
GATED = ("grouped_gated", "hf_gated_q")


class QKV(NamedTuple):
    """Separate projections, heads flattened along the feature axis: `N*D`, `K*D`, `K*D` and, if gated, `N*D`."""

    query: Any
    key: Any
    value: Any
    gate: Any | None = None


class HFGatedQ(NamedTuple):
    """The layout `hf_gated_q`: `q_proj` holds `[q (D) | gate (D)]` per query head."""

    q_proj: Any
    k_proj: Any
    v_proj: Any


def split_qkv(
    fused: Any, *, layout: QKVLayout, q_per_kv: int, head_dim: int, axis: int = -1
) -> QKV:
    """Separates query, key, value and, in a gated layout, the gate; bit for bit.

    Args:
      fused: the fused array, or for `hf_gated_q` an `HFGatedQ` (any triple).
      layout: its layout.
      q_per_kv: R, query heads per key/value head.
      head_dim: D.
      axis: of the features: -1 for JAX `[in, out]`, 0 for torch `[out, in]`.

    Raises:
      ValueError: the features are not whole groups (also of a shard).

    Example:
      >>> kernel = np.arange(4 * 24).reshape(4, 24)  # [M=4, K=2 groups of (R=1 + 2) * D=4]
      >>> split_qkv(kernel, layout="grouped", q_per_kv=1, head_dim=4).key.shape
      (4, 8)
    """
    _check(layout, q_per_kv, head_dim)
    if layout == "hf_gated_q":
        return _split_hf_gated_q(HFGatedQ(*fused), q_per_kv, head_dim, axis)
    axis = normalize_axis("fused", fused, axis)
    groups = _count_groups("fused", fused, layout, q_per_kv, head_dim, axis)
    if layout == "concat":
        return QKV(*sections(fused, axis, groups * q_per_kv * head_dim, *[groups * head_dim] * 2))
    by_group = unflatten(fused, axis, groups, _slots(layout, q_per_kv), head_dim)
    counts = [q_per_kv, q_per_kv, 1, 1] if layout == "grouped_gated" else [q_per_kv, 1, 1]
    parts = [flatten(part, axis, 3) for part in sections(by_group, axis + 1, *counts)]
    if layout == "grouped_gated":
        query, gate, key, value = parts
        return QKV(query, key, value, gate)
    return QKV(*parts)


def fuse_qkv(
    query: Any,
    key: Any,
    value: Any,
    *,
    layout: QKVLayout,
    q_per_kv: int,
    head_dim: int,
    gate: Any | None = None,
    axis: int = -1,
) -> Any:
    """The inverse of `split_qkv`: one array, or an `HFGatedQ` for `hf_gated_q`.

    Args:
      query, key, value: heads flattened along `axis`: `N*D`, `K*D`, `K*D` features.
      layout: the layout to fuse into.
      q_per_kv: R.
      head_dim: D.
      gate: `N*D` features; needed by a gated layout, refused by the others.
      axis: of the features.

    Raises:
      TypeError: the parts differ in dtype (a fused array has one).
      ValueError: sizes that do not fit, a gate that is missing or cannot be kept.

    Example:
      >>> q, kv = np.ones((4, 8)), np.zeros((4, 4))  # N=2, K=1, D=4
      >>> fuse_qkv(q, kv, kv, layout="concat", q_per_kv=2, head_dim=4).shape
      (4, 16)
    """
    _check(layout, q_per_kv, head_dim)
    if (gate is not None) != (layout in GATED):
        rule = "be given for" if gate is None else "be None for"
        raise ValueError(f"`gate` must {rule} layout {layout!r}")
    axis = normalize_axis("query", query, axis)
    parts = {"query": query, "key": key, "value": value}
    if gate is not None:
        parts["gate"] = gate
    require_alike(parts, axis)
    groups = groups_along("query", query, axis, q_per_kv * head_dim, "q_per_kv * head_dim")
    for name, part in parts.items():
        heads = groups * (q_per_kv if name in ("query", "gate") else 1)
        if part.shape[axis] != heads * head_dim:
            raise ValueError(
                f"`{name}` must have {heads} heads of {head_dim} features along axis {axis} to match "
                f"`query`, got {part.shape[axis]}"
            )
    if layout == "concat":
        return concat([query, key, value], axis)
    if layout == "hf_gated_q":
        heads = [unflatten(part, axis, groups * q_per_kv, head_dim) for part in (query, gate)]
        return HFGatedQ(flatten(concat(heads, axis + 1), axis, 2), key, value)
    slots = {"query": q_per_kv, "gate": q_per_kv, "key": 1, "value": 1}
    by_group = [
        unflatten(parts[name], axis, groups, count, head_dim)
        for name, count in slots.items()
        if name in parts
    ]
    return flatten(concat(by_group, axis + 1), axis, 3)


def convert(
    fused: Any,
    *,
    source: QKVLayout,
    target: QKVLayout,
    q_per_kv: int,
    head_dim: int,
    axis: int = -1,
) -> Any:
    """Rewrites a fused weight, bias, LoRA B or magnitude from one layout to another.

    Args:
      fused: as `split_qkv` takes it.
      source, target: layouts; both gated (grouped_gated, hf_gated_q) or both not (grouped, concat).
      q_per_kv, head_dim, axis: as in `split_qkv`.

    Raises:
      ValueError: one layout has a gate and the other has not, or the features are not whole groups.

    Example:
      >>> weight = np.arange(12.0).reshape(12, 1)  # torch [out, in]
      >>> convert(weight, source="concat", target="grouped", q_per_kv=1, head_dim=2, axis=0)[:6, 0]
      array([ 0.,  1.,  4.,  5.,  8.,  9.])
    """
    for name, layout in (("source", source), ("target", target)):
        _check(layout, q_per_kv, head_dim, name)
    if (source in GATED) != (target in GATED):
        raise ValueError(
            f"`target` must {'' if source in GATED else 'not '}be a gated layout because `source` {source!r} "
            f"{'has a' if source in GATED else 'has no'} gate, got {target!r}"
        )
    parts = split_qkv(fused, layout=source, q_per_kv=q_per_kv, head_dim=head_dim, axis=axis)
    if source == target:
        return fused
    return fuse_qkv(
        *parts[:3], gate=parts.gate, layout=target, q_per_kv=q_per_kv, head_dim=head_dim, axis=axis
    )


def to_group_axes(
    fused: Any, *, layout: QKVLayout, q_per_kv: int, head_dim: int, axis: int = -1
) -> Any:
    """Our parameter form: `axis` becomes `[K, R+2, D]`, or `[K, 2R+2, D]` for a gated layout.

    From `grouped` and `grouped_gated` this is a reshape, without a copy where the library can view.

    Raises:
      ValueError: the features are not whole groups.

    Example:
      >>> to_group_axes(np.zeros((4, 24)), layout="grouped", q_per_kv=1, head_dim=4).shape
      (4, 2, 3, 4)
    """
    _check(layout, q_per_kv, head_dim)
    target = "grouped_gated" if layout in GATED else "grouped"
    sizes = {"q_per_kv": q_per_kv, "head_dim": head_dim}
    grouped = convert(fused, source=layout, target=target, axis=axis, **sizes)
    axis = normalize_axis("fused", grouped, axis)
    return unflatten(grouped, axis, -1, _slots(target, q_per_kv), head_dim)


def from_group_axes(array: Any, *, layout: QKVLayout, q_per_kv: int, axis: int = -1) -> Any:
    """The inverse of `to_group_axes`; `axis` counts as there, with the three axes joined.

    Raises:
      ValueError: the slots after the group axis are not R + 2 (2R + 2 for a gated layout).

    Example:
      >>> from_group_axes(np.zeros((4, 2, 3, 4)), layout="concat", q_per_kv=1).shape
      (4, 24)
    """
    _check(layout, q_per_kv, 1)
    axis = normalize_axis("array", array, axis, joined=2)
    source = "grouped_gated" if layout in GATED else "grouped"
    slots = _slots(source, q_per_kv)
    if array.shape[axis + 1] != slots:
        raise ValueError(
            f"`array` must have shape [..., K, {slots}, D, ...] with K on axis {axis}, got {tuple(array.shape)}"
        )
    return convert(
        flatten(array, axis, 3),
        source=source,
        target=layout,
        q_per_kv=q_per_kv,
        head_dim=array.shape[axis + 2],
        axis=axis,
    )


def split_shards(
    fused: Any, count: int, *, layout: QKVLayout, q_per_kv: int, head_dim: int, axis: int = -1
) -> list[Any]:
    """`count` tensor-parallel shards of whole groups, each in `layout`.

    Raises:
      ValueError: `count` does not divide the number of groups.

    Example:
      >>> split_shards(np.zeros(24), 2, layout="concat", q_per_kv=1, head_dim=4)[0].shape
      (12,)
    """
    require_positive(count=count)
    sizes = {"q_per_kv": q_per_kv, "head_dim": head_dim, "axis": axis}
    parts = split_qkv(fused, layout=layout, **sizes)
    axis = normalize_axis("fused", parts.key, axis)
    groups = parts.key.shape[axis] // head_dim
    if groups % count:
        raise ValueError(f"`count` must divide the {groups} groups of `fused`, got {count}")

    def shard(part: Any, index: int) -> Any:
        width = part.shape[axis] // count
        return take(part, axis, index * width, (index + 1) * width)

    shards = [QKV(*(p if p is None else shard(p, i) for p in parts)) for i in range(count)]
    return [fuse_qkv(*s[:3], gate=s.gate, layout=layout, **sizes) for s in shards]


def merge_shards(
    shards: Sequence[Any], *, layout: QKVLayout, q_per_kv: int, head_dim: int, axis: int = -1
) -> Any:
    """Joins tensor-parallel shards, in rank order, into the fused weight of all groups.

    Raises:
      ValueError: no shards, or a shard that does not hold whole groups.

    Example:
      >>> merge_shards([np.zeros(12)] * 2, layout="grouped", q_per_kv=1, head_dim=4).shape
      (24,)
    """
    if not shards:
        raise ValueError("`shards` must hold at least one shard, got none")
    sizes = {"q_per_kv": q_per_kv, "head_dim": head_dim, "axis": axis}
    split = []
    for rank, shard in enumerate(shards):
        try:
            split.append(split_qkv(shard, layout=layout, **sizes))
        except ValueError as error:
            raise ValueError(f"`shards[{rank}]`: {error}") from error
    axis = normalize_axis("shards[0]", split[0].key, axis)
    for name in ("query", "key", "value"):
        named = {f"shards[{rank}]": getattr(s, name) for rank, s in enumerate(split)}
        require_alike(named, axis)
    merged = [None if p[0] is None else concat(p, axis) for p in zip(*split, strict=True)]
    return fuse_qkv(*merged[:3], gate=merged[3], layout=layout, **sizes)


def _check(layout: str, q_per_kv: int, head_dim: int, name: str = "layout") -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"`{name}` must be one of {LAYOUTS}, got {layout!r}")
    require_positive(q_per_kv=q_per_kv, head_dim=head_dim)


def _slots(layout: str, q_per_kv: int) -> int:
    return 2 * q_per_kv + 2 if layout == "grouped_gated" else q_per_kv + 2


def _count_groups(
    name: str, array: Any, layout: str, q_per_kv: int, head_dim: int, axis: int
) -> int:
    rule = (
        "(2 * q_per_kv + 2) * head_dim"
        if layout == "grouped_gated"
        else "(q_per_kv + 2) * head_dim"
    )
    return groups_along(name, array, axis, _slots(layout, q_per_kv) * head_dim, rule)


def _split_hf_gated_q(fused: HFGatedQ, q_per_kv: int, head_dim: int, axis: int) -> QKV:
    axis = normalize_axis("fused.q_proj", fused.q_proj, axis)
    require_alike(fused._asdict(), axis)
    width = 2 * q_per_kv * head_dim
    groups = groups_along("fused.q_proj", fused.q_proj, axis, width, "2 * q_per_kv * head_dim")
    for name in ("k_proj", "v_proj"):
        if (size := getattr(fused, name).shape[axis]) != groups * head_dim:
            raise ValueError(
                f"`fused.{name}` must have {groups} heads of {head_dim} features along axis {axis} to match "
                f"`q_proj`, got {size}"
            )
    heads = unflatten(fused.q_proj, axis, groups * q_per_kv, 2 * head_dim)
    query, gate = (flatten(part, axis, 2) for part in sections(heads, axis + 1, head_dim, head_dim))
    return QKV(query, fused.k_proj, fused.v_proj, gate)
