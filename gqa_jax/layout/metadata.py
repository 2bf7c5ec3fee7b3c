"""The layout of a fused weight, stored beside it: safetensors metadata is a flat map of strings."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from gqa_jax.layout.axes import require_positive
from gqa_jax.layout.qkv import LAYOUTS, QKVLayout

_PREFIX = "gqa_jax.qkv_layout."


class FusedLayout(NamedTuple):
    """What `split_qkv` must know of a fused tensor."""

    layout: QKVLayout
    q_per_kv: int
    head_dim: int


def layout_metadata(layouts: Mapping[str, FusedLayout]) -> dict[str, str]:
    """Metadata entries for a safetensors file: tensor name -> layout, q_per_kv and head_dim.

    Raises:
      ValueError: an unknown layout or a size that is not positive.

    Example:
      >>> layout_metadata({"qkv.weight": FusedLayout("grouped", 4, 128)})
      {'gqa_jax.qkv_layout.qkv.weight': '{"layout": "grouped", "q_per_kv": 4, "head_dim": 128}'}
    """
    return {
        _PREFIX + name: json.dumps(_checked(name, FusedLayout(*fused))._asdict())
        for name, fused in layouts.items()
    }


def read_layout_metadata(metadata: Mapping[str, str] | None) -> dict[str, FusedLayout]:
    """The inverse of `layout_metadata`; other entries (such as `format`) are left alone.

    Raises:
      ValueError: an entry of ours that does not name a layout that we know.

    Example:
      >>> read_layout_metadata(layout_metadata({"w": FusedLayout("concat", 1, 64)}))["w"].layout
      'concat'
    """
    found = {}
    for key, value in (metadata or {}).items():
        if key.startswith(_PREFIX):
            name = key.removeprefix(_PREFIX)
            try:
                fused = FusedLayout(**json.loads(value))
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"`metadata[{key!r}]` must hold layout, q_per_kv and head_dim as JSON, got {value!r}"
                ) from error
            found[name] = _checked(name, fused)
    return found


def _checked(name: str, fused: FusedLayout) -> FusedLayout:
    if fused.layout not in LAYOUTS:
        raise ValueError(f"the layout of {name!r} must be one of {LAYOUTS}, got {fused.layout!r}")
    require_positive(q_per_kv=fused.q_per_kv, head_dim=fused.head_dim)
    return fused
