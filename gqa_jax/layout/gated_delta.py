"""The input projections of Gated DeltaNet, in the four forms that exist.

With Hk key heads, n = `v_per_key` value heads per key head and head dims Dk and Dv, the features are:

  key_heads   ours: `in_proj [..., Hk, q Dk | k Dk | v n*Dv | z n*Dv]` and `ba [..., Hk, b n | a n]`, axes apart
  qwen3_next  the same with `Hk` and the rest joined: `in_proj_qkvz`, `in_proj_ba`
  qwen3_5     `in_proj_qkv = [q all | k all | v all]`, `in_proj_z`, `in_proj_b`, `in_proj_a`
  megatron    one array, per tensor-parallel rank `[q | k | v | z | beta | alpha]` of that rank's heads

The convolution runs over `[q all | k all | v all]` channels (Megatron: per rank); ours is `[W, Hk, q | k | v]`.
"""

from typing import Any, Literal, NamedTuple

from gqa_jax.layout.axes import (
    concat,
    flatten,
    groups_along,
    normalize_axis,
    require_alike,
    require_positive,
    sections,
    unflatten,
)

GDNLayout = Literal["key_heads", "qwen3_next", "qwen3_5", "megatron"]
GDN_LAYOUTS = ("key_heads", "qwen3_next", "qwen3_5", "megatron")


class GDNInputs(NamedTuple):
    """Separate projections, heads flattened: `Hk*Dk`, `Hk*Dk`, `Hv*Dv`, `Hv*Dv`, `Hv`, `Hv` features."""

    query: Any
    key: Any
    value: Any
    z: Any
    b: Any
    a: Any


class KeyHeadInputs(NamedTuple):
    """Our parameters: the features of one key head together."""

    in_proj: Any
    ba: Any


class Qwen3NextInputs(NamedTuple):
    """Hugging Face's Qwen3-Next."""

    in_proj_qkvz: Any
    in_proj_ba: Any


class Qwen3_5Inputs(NamedTuple):
    """Hugging Face's Qwen3.5."""

    in_proj_qkv: Any
    in_proj_z: Any
    in_proj_b: Any
    in_proj_a: Any


def split_gdn(
    fused: Any,
    *,
    layout: GDNLayout,
    v_per_key: int,
    key_head_dim: int,
    value_head_dim: int,
    axis: int = -1,
    tp: int = 1,
) -> GDNInputs:
    """Separates the six projections, bit for bit.

    Args:
      fused: the tuple of the layout (`KeyHeadInputs`, `Qwen3NextInputs`, `Qwen3_5Inputs`), or Megatron's array.
      layout: its layout.
      v_per_key: n, value heads per key head.
      key_head_dim, value_head_dim: Dk and Dv.
      axis: of the features, counted with key heads and features joined: -1 for JAX `[in, out]`, 0 for torch.
      tp: number of ranks whose blocks a `megatron` array holds one after the other.

    Raises:
      ValueError: the features are not whole key heads of whole ranks.

    Example:
      >>> inputs = Qwen3NextInputs(np.zeros((4, 24)), np.zeros((4, 4)))  # Hk=2, n=1, Dk=2, Dv=4
      >>> split_gdn(inputs, layout="qwen3_next", v_per_key=1, key_head_dim=2, value_head_dim=4).z.shape
      (4, 8)
    """
    dk, dv, n = _check(layout, v_per_key, key_head_dim, value_head_dim, tp)
    if layout == "megatron":
        axis = normalize_axis("fused", fused, axis)
        widths = (dk, dk, n * dv, n * dv, n, n)
        rule = "tp * (2 Dk + 2 n Dv + 2 n)"
        local = groups_along("fused", fused, axis, tp * sum(widths), rule)
        by_rank = unflatten(fused, axis, tp, local * sum(widths))
        parts = sections(by_rank, axis + 1, *(local * width for width in widths))
        return GDNInputs(*(flatten(part, axis, 2) for part in parts))
    if layout == "qwen3_5":
        return _split_qwen3_5(Qwen3_5Inputs(*fused), dk, dv, n, axis)
    in_proj, ba = fused
    if layout == "qwen3_next":
        axis = normalize_axis("fused.in_proj_qkvz", in_proj, axis)
        heads = groups_along(
            "fused.in_proj_qkvz", in_proj, axis, 2 * (dk + n * dv), "2 Dk + 2 n Dv"
        )
        _require_width("fused.in_proj_ba", ba, axis, heads * 2 * n)
        in_proj, ba = unflatten(in_proj, axis, heads, -1), unflatten(ba, axis, heads, -1)
    else:
        axis = normalize_axis("fused.in_proj", in_proj, axis, joined=1)
        heads = in_proj.shape[axis]
        _require_width("fused.in_proj", in_proj, axis + 1, 2 * (dk + n * dv))
        _require_width("fused.ba", ba, axis, heads)
        _require_width("fused.ba", ba, axis + 1, 2 * n)
    parts = sections(in_proj, axis + 1, dk, dk, n * dv, n * dv) + sections(ba, axis + 1, n, n)
    return GDNInputs(*(flatten(part, axis, 2) for part in parts))


def fuse_gdn(
    inputs: GDNInputs,
    *,
    layout: GDNLayout,
    v_per_key: int,
    key_head_dim: int,
    value_head_dim: int,
    axis: int = -1,
    tp: int = 1,
) -> Any:
    """The inverse of `split_gdn`: the tuple of `layout`, or Megatron's array for `tp` ranks.

    Raises:
      TypeError: parts that are joined differ in dtype.
      ValueError: sizes that do not fit, or key heads that `tp` ranks cannot share.

    Example:
      >>> inputs = GDNInputs(*(np.zeros((4, w)) for w in (4, 4, 8, 8, 2, 2)))  # Hk=2, n=1, Dk=2, Dv=4
      >>> fuse_gdn(inputs, layout="megatron", v_per_key=1, key_head_dim=2, value_head_dim=4, tp=2).shape
      (4, 28)
    """
    dk, dv, n = _check(layout, v_per_key, key_head_dim, value_head_dim, tp)
    inputs = GDNInputs(*inputs)
    axis = normalize_axis("inputs.query", inputs.query, axis)
    heads = groups_along("inputs.query", inputs.query, axis, dk, "key_head_dim")
    widths = (dk, dk, n * dv, n * dv, n, n)
    for name, width in zip(GDNInputs._fields, widths, strict=True):
        _require_width(f"inputs.{name}", getattr(inputs, name), axis, heads * width)
    if layout == "megatron":
        if heads % tp:
            raise ValueError(f"`tp` must divide the {heads} key heads of `inputs`, got {tp}")
        require_alike({f"inputs.{k}": part for k, part in inputs._asdict().items()}, axis)
        by_rank = [unflatten(part, axis, tp, -1) for part in inputs]
        return flatten(concat(by_rank, axis + 1), axis, 2)
    require_alike({f"inputs.{k}": getattr(inputs, k) for k in ("query", "key", "value")}, axis)
    if layout == "qwen3_5":
        qkv = concat([inputs.query, inputs.key, inputs.value], axis)
        return Qwen3_5Inputs(qkv, inputs.z, inputs.b, inputs.a)
    require_alike({"inputs.query": inputs.query, "inputs.z": inputs.z}, axis)
    require_alike({"inputs.b": inputs.b, "inputs.a": inputs.a}, axis)
    by_head = [unflatten(part, axis, heads, -1) for part in inputs]
    in_proj, ba = concat(by_head[:4], axis + 1), concat(by_head[4:], axis + 1)
    if layout == "key_heads":
        return KeyHeadInputs(in_proj, ba)
    return Qwen3NextInputs(flatten(in_proj, axis, 2), flatten(ba, axis, 2))


def convert_gdn(
    fused: Any,
    *,
    source: GDNLayout,
    target: GDNLayout,
    v_per_key: int,
    key_head_dim: int,
    value_head_dim: int,
    axis: int = -1,
    source_tp: int = 1,
    target_tp: int = 1,
) -> Any:
    """Rewrites the input projections from one layout (and tensor-parallel degree) to another.

    Raises:
      ValueError: as `split_gdn` and `fuse_gdn`.

    Example:
      >>> ours = KeyHeadInputs(np.zeros((4, 2, 12)), np.zeros((4, 2, 2)))  # M=4, Hk=2, n=1, Dk=2, Dv=4
      >>> sizes = dict(v_per_key=1, key_head_dim=2, value_head_dim=4)
      >>> convert_gdn(ours, source="key_heads", target="qwen3_5", **sizes).in_proj_qkv.shape
      (4, 16)
    """
    sizes = {
        "v_per_key": v_per_key,
        "key_head_dim": key_head_dim,
        "value_head_dim": value_head_dim,
        "axis": axis,
    }
    return fuse_gdn(
        split_gdn(fused, layout=source, tp=source_tp, **sizes), layout=target, tp=target_tp, **sizes
    )


def conv_to_key_heads(
    weight: Any, *, v_per_key: int, key_head_dim: int, value_head_dim: int, tp: int = 1
) -> Any:
    """A convolution weight `[conv_dim, 1, W]` as our `[W, Hk, 2Dk + n*Dv]`; a bias `[conv_dim]` as `[Hk, 2Dk + n*Dv]`.

    Args:
      weight: channels `[q all | k all | v all]`, or for `tp > 1` Megatron's `[q | k | v]` per rank.
      v_per_key, key_head_dim, value_head_dim: n, Dk and Dv.
      tp: ranks whose blocks `weight` holds one after the other.

    Raises:
      ValueError: the channels are not whole key heads of whole ranks.

    Example:
      >>> conv_to_key_heads(np.zeros((16, 1, 4)), v_per_key=1, key_head_dim=2, value_head_dim=4).shape
      (4, 2, 8)
    """
    dk, dv, n = _check("key_heads", v_per_key, key_head_dim, value_head_dim, 1)
    require_positive(tp=tp)
    if weight.ndim not in (1, 3) or (weight.ndim == 3 and weight.shape[1] != 1):
        raise ValueError(
            f"`weight` must have shape [conv_dim, 1, W] or [conv_dim], got {tuple(weight.shape)}"
        )
    width = 2 * dk + n * dv
    heads = groups_along("weight", weight, 0, tp * width, "tp * (2 Dk + n Dv)") * tp
    channels = weight if weight.ndim == 1 else weight[:, 0, :].T
    axis = channels.ndim - 1
    by_rank = unflatten(channels, axis, tp, -1)
    local = heads // tp
    parts = sections(by_rank, axis + 1, local * dk, local * dk, local * n * dv)
    return concat([unflatten(flatten(p, axis, 2), axis, heads, -1) for p in parts], axis + 1)


def conv_from_key_heads(
    kernel: Any, *, v_per_key: int, key_head_dim: int, value_head_dim: int, tp: int = 1
) -> Any:
    """The inverse of `conv_to_key_heads`.

    Raises:
      ValueError: a shape other than `[W, Hk, 2Dk + n*Dv]` or `[Hk, 2Dk + n*Dv]`, or `tp` does not divide Hk.

    Example:
      >>> conv_from_key_heads(np.zeros((4, 2, 8)), v_per_key=1, key_head_dim=2, value_head_dim=4).shape
      (16, 1, 4)
    """
    dk, dv, n = _check("key_heads", v_per_key, key_head_dim, value_head_dim, 1)
    require_positive(tp=tp)
    if kernel.ndim not in (2, 3) or kernel.shape[-1] != 2 * dk + n * dv:
        raise ValueError(
            f"`kernel` must have shape [W, Hk, {2 * dk + n * dv}] or [Hk, {2 * dk + n * dv}], "
            f"got {tuple(kernel.shape)}"
        )
    axis = kernel.ndim - 2
    if kernel.shape[axis] % tp:
        raise ValueError(f"`tp` must divide the {kernel.shape[axis]} key heads, got {tp}")
    parts = sections(kernel, axis + 1, dk, dk, n * dv)
    by_rank = [unflatten(flatten(part, axis, 2), axis, tp, -1) for part in parts]
    channels = flatten(concat(by_rank, axis + 1), axis, 2)
    return channels if kernel.ndim == 2 else channels.T[:, None, :]


def _check(layout: str, n: int, dk: int, dv: int, tp: int) -> tuple[int, int, int]:
    if layout not in GDN_LAYOUTS:
        raise ValueError(f"`layout` must be one of {GDN_LAYOUTS}, got {layout!r}")
    require_positive(v_per_key=n, key_head_dim=dk, value_head_dim=dv, tp=tp)
    if tp > 1 and layout != "megatron":
        raise ValueError(f"`tp` must be 1 for layout {layout!r}, which has no rank order, got {tp}")
    return dk, dv, n


def _require_width(name: str, array: Any, axis: int, width: int) -> None:
    if array.shape[axis] != width:
        raise ValueError(
            f"`{name}` must have {width} features along axis {axis}, got {array.shape[axis]} in shape "
            f"{tuple(array.shape)}"
        )


def _split_qwen3_5(fused: Qwen3_5Inputs, dk: int, dv: int, n: int, axis: int) -> GDNInputs:
    axis = normalize_axis("fused.in_proj_qkv", fused.in_proj_qkv, axis)
    heads = groups_along(
        "fused.in_proj_qkv", fused.in_proj_qkv, axis, 2 * dk + n * dv, "2 Dk + n Dv"
    )
    for name, width in (("in_proj_z", n * dv), ("in_proj_b", n), ("in_proj_a", n)):
        _require_width(f"fused.{name}", getattr(fused, name), axis, heads * width)
    query, key, value = sections(fused.in_proj_qkv, axis, heads * dk, heads * dk, heads * n * dv)
    return GDNInputs(query, key, value, fused.in_proj_z, fused.in_proj_b, fused.in_proj_a)
