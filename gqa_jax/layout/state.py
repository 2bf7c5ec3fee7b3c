"""Whole state dicts, one tensor at a time: `qkv_proj` and `gate_up_proj` to and from separate projections.

Names follow Hugging Face and PEFT: any prefix, then `qkv_proj` or `gate_up_proj`, then `.weight`, `.bias`,
`.lora_A.weight`, `.lora_B.default.weight`, `.lora_magnitude_vector`, ... A LoRA A acts on the input that the
projections share: splitting repeats it, fusing demands that the copies are equal.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gqa_jax.layout.gate_up import GateUpLayout, fuse_gate_up, split_gate_up
from gqa_jax.layout.qkv import QKVLayout, fuse_qkv, split_qkv

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_OF = {part: fused for fused, parts in _PARTS.items() for part in parts}


def split_state(
    items: Iterable[tuple[str, Any]],
    *,
    q_per_kv: int,
    head_dim: int,
    layout: QKVLayout = "grouped",
    gate_up_layout: GateUpLayout = "interleaved",
    axis: int = 0,
) -> Iterator[tuple[str, Any]]:
    """Splits every fused tensor of a state dict as it passes; `dict(split_state(state.items(), ...))` for a whole one.

    Args:
      items: name and tensor; tensors may be tensor-parallel shards.
      q_per_kv, head_dim: R and D.
      layout: of `qkv_proj`; `grouped_gated` yields a `q_proj` in Hugging Face's `[q | gate]` order.
      gate_up_layout: of `gate_up_proj`.
      axis: of the features; 0 for torch, -1 for JAX.

    Raises:
      ValueError: a fused tensor that is not whole groups, named.

    Example:
      >>> state = {"layers.0.self_attn.qkv_proj.lora_B.weight": np.zeros((24, 2))}
      >>> [name for name, _ in split_state(state.items(), q_per_kv=1, head_dim=4)]
      ['layers.0.self_attn.q_proj.lora_B.weight', 'layers.0.self_attn.k_proj.lora_B.weight',
       'layers.0.self_attn.v_proj.lora_B.weight']
    """
    target = "hf_gated_q" if layout == "grouped_gated" else layout
    for name, tensor in items:
        segments = name.split(".")
        at, fused = _find(segments, _PARTS)
        if fused is None:
            yield name, tensor
            continue
        if "lora_A" in segments or "lora_embedding_A" in segments:
            parts = [tensor] * len(_PARTS[fused])
        elif fused == "gate_up_proj":
            parts = _named(name, split_gate_up, tensor, layout=gate_up_layout, axis=axis)
        else:
            sizes = {"q_per_kv": q_per_kv, "head_dim": head_dim, "axis": axis}
            parts = _named(name, split_qkv, tensor, layout=layout, **sizes)
            if target == "hf_gated_q":
                parts = fuse_qkv(*parts[:3], gate=parts[3], layout=target, **sizes)
            parts = parts[:3]
        for part, piece in zip(_PARTS[fused], parts, strict=True):
            yield ".".join([*segments[:at], part, *segments[at + 1 :]]), piece


def fuse_state(
    items: Iterable[tuple[str, Any]],
    *,
    q_per_kv: int,
    head_dim: int,
    layout: QKVLayout = "grouped",
    gate_up_layout: GateUpLayout = "interleaved",
    axis: int = 0,
) -> Iterator[tuple[str, Any]]:
    """The inverse of `split_state`: holds a tensor back only until its siblings have passed.

    Args:
      items, q_per_kv, head_dim, gate_up_layout, axis: as in `split_state`.
      layout: of the fused `qkv_proj`; `grouped_gated` reads `q_proj` in Hugging Face's `[q | gate]` order.

    Raises:
      ValueError: siblings are missing at the end, or the LoRA A's of siblings differ (no single adapter is their sum).

    Example:
      >>> state = {f"mlp.{part}_proj.bias": np.zeros(3) for part in ("gate", "up")}
      >>> [name for name, _ in fuse_state(state.items(), q_per_kv=1, head_dim=4)]
      ['mlp.gate_up_proj.bias']
    """
    waiting: dict[str, dict[str, Any]] = {}
    sizes = {"q_per_kv": q_per_kv, "head_dim": head_dim, "axis": axis}
    for name, tensor in items:
        segments = name.split(".")
        at, part = _find(segments, _FUSED_OF)
        if part is None:
            yield name, tensor
            continue
        fused = _FUSED_OF[part]
        fused_name = ".".join([*segments[:at], fused, *segments[at + 1 :]])
        siblings = waiting.setdefault(fused_name, {})
        siblings[part] = tensor
        if len(siblings) < len(_PARTS[fused]):
            continue
        del waiting[fused_name]
        parts = [siblings[sibling] for sibling in _PARTS[fused]]
        if "lora_A" in segments or "lora_embedding_A" in segments:
            yield fused_name, _shared(fused_name, parts)
        elif fused == "gate_up_proj":
            yield (
                fused_name,
                _named(fused_name, fuse_gate_up, *parts, layout=gate_up_layout, axis=axis),
            )
        else:
            gate = None
            if layout == "grouped_gated":
                *parts, gate = _named(fused_name, split_qkv, parts, layout="hf_gated_q", **sizes)
            yield (
                fused_name,
                _named(fused_name, fuse_qkv, *parts, gate=gate, layout=layout, **sizes),
            )
    missing = []
    for name, siblings in waiting.items():
        fused = next(segment for segment in name.split(".") if segment in _PARTS)
        missing += [name.replace(fused, part) for part in _PARTS[fused] if part not in siblings]
    if missing:
        raise ValueError(f"`items` must hold all projections that are fused, missing {missing}")


def _find(segments: list[str], names: Any) -> tuple[int, str | None]:
    for at, segment in enumerate(segments):
        if segment in names:
            return at, segment
    return -1, None


def _named(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _shared(name: str, copies: list[Any]) -> Any:
    first, *others = (np.asarray(copy) for copy in copies)
    if not all(first.shape == other.shape and (first == other).all() for other in others):
        raise ValueError(
            f"{name}: the LoRA A's of projections that are fused must be equal, got different ones: "
            "adapters that were trained apart have no fused form of the same rank"
        )
    return copies[0]
