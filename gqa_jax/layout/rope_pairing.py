"""The two pairings of rotary channels, exchanged by a permutation of the projection's features.

half      channel i turns with i + rotary_dim / 2   Hugging Face, Megatron's default
adjacent  channel 2i turns with 2i + 1              the RoFormer paper, torchtune, Meta's Llama
"""

from typing import Any, Literal

from gqa_jax.layout.axes import (
    concat,
    flatten,
    groups_along,
    normalize_axis,
    require_positive,
    take,
    unflatten,
)

RopePairing = Literal["half", "adjacent"]


def convert_rope_pairing(
    weight: Any,
    *,
    source: RopePairing,
    target: RopePairing,
    head_dim: int,
    rotary_dim: int | None = None,
    axis: int = -1,
) -> Any:
    """Permutes the features of a query or key projection (or bias, or norm scale) for the other pairing.

    Attention logits are unchanged when queries and keys are both converted and RoPE uses `target`.

    Args:
      weight: heads of `head_dim` features flattened along `axis`; a `[D]` norm scale is one head.
      source, target: the pairing of the features, and the one to convert to.
      head_dim: D.
      rotary_dim: the first so many channels of each head turn; None for all. The others stay in place.
      axis: of the features.

    Raises:
      ValueError: an unknown pairing, partial heads, or a `rotary_dim` that is odd or above `head_dim`.

    Example:
      >>> convert_rope_pairing(np.arange(6), source="adjacent", target="half", head_dim=6, rotary_dim=4)
      array([0, 2, 1, 3, 4, 5])
    """
    for name, pairing in (("source", source), ("target", target)):
        if pairing not in ("half", "adjacent"):
            raise ValueError(f"`{name}` must be one of ('half', 'adjacent'), got {pairing!r}")
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    require_positive(head_dim=head_dim, rotary_dim=rotary_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"`rotary_dim` must be even and at most `head_dim={head_dim}`, got {rotary_dim}"
        )
    axis = normalize_axis("weight", weight, axis)
    heads = groups_along("weight", weight, axis, head_dim, "head_dim")
    if source == target:
        return weight
    by_head = unflatten(weight, axis, heads, head_dim)
    channel = axis + 1
    turning = take(by_head, channel, 0, rotary_dim)
    pairs = (2, rotary_dim // 2) if source == "half" else (rotary_dim // 2, 2)
    swapped = unflatten(turning, channel, *pairs).swapaxes(channel, channel + 1)
    turned = flatten(swapped, channel, 2)
    kept = take(by_head, channel, rotary_dim, head_dim)
    return flatten(concat([turned, kept], channel), axis, 2)
