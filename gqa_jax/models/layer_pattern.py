"""Attention configs of a stack whose layers differ by a pattern: layers without rotary embedding, windowed layers."""

import dataclasses
from collections.abc import Sequence

from gqa_jax.config import AttentionConfig


def no_rope_layers(num_layers: int, no_rope_freq: int | Sequence[int] | None) -> tuple[bool, ...]:
    """Which layers go without rotary embedding (Megatron's `no_rope_freq`).

    Args:
      num_layers: of the stack.
      no_rope_freq: N lets every N-th layer go without, the others have it; a list holds 1 (without) or 0 per layer;
        None means that all have it.

    Raises:
      ValueError: an N that is not positive, or a list of another length or with other entries.

    Example:
      >>> no_rope_layers(8, 4)
      (False, False, False, True, False, False, False, True)
    """
    if no_rope_freq is None:
        return (False,) * num_layers
    return _every_nth("no_rope_freq", num_layers, no_rope_freq)


def windowed_layers(
    num_layers: int, window_attn_skip_freq: int | Sequence[int] | None
) -> tuple[bool, ...]:
    """Which layers attend within the window (Megatron's `window_attn_skip_freq`).

    Args:
      num_layers: of the stack.
      window_attn_skip_freq: N makes every N-th layer attend to everything, the others within the window; a list holds 1
        (window) or 0 per layer; None means that all have the window.

    Raises:
      ValueError: as for `no_rope_layers`.

    Example:
      >>> windowed_layers(4, 2)
      (True, False, True, False)
    """
    if window_attn_skip_freq is None:
        return (True,) * num_layers
    if isinstance(window_attn_skip_freq, int):
        full = _every_nth("window_attn_skip_freq", num_layers, window_attn_skip_freq)
        return tuple(not skipped for skipped in full)
    return _every_nth("window_attn_skip_freq", num_layers, window_attn_skip_freq)


def attention_layers(
    config: AttentionConfig,
    num_layers: int,
    *,
    no_rope_freq: int | Sequence[int] | None = None,
    window_attn_skip_freq: int | Sequence[int] | None = None,
) -> tuple[AttentionConfig, ...]:
    """One config per layer: `config`, without its `rope` or its `sliding_window` where the patterns say so.

    `sliding_window` counts exactly the visible keys, self included: Megatron's `window_size=(left, 0)` is `left + 1`.

    Raises:
      ValueError: besides those of the patterns, a pattern for something that `config` does not have.
    """
    if no_rope_freq is not None and config.rope is None:
        raise ValueError(f"`no_rope_freq` must be None without `config.rope`, got {no_rope_freq}")
    if window_attn_skip_freq is not None and config.sliding_window is None:
        raise ValueError(
            f"`window_attn_skip_freq` must be None without `config.sliding_window`, got {window_attn_skip_freq}"
        )
    patterns = zip(
        no_rope_layers(num_layers, no_rope_freq),
        windowed_layers(num_layers, window_attn_skip_freq),
        strict=True,
    )
    return tuple(
        dataclasses.replace(
            config,
            rope=None if without_rope else config.rope,
            sliding_window=config.sliding_window if windowed else None,
        )
        for without_rope, windowed in patterns
    )


def _every_nth(name: str, num_layers: int, freq: int | Sequence[int]) -> tuple[bool, ...]:
    if isinstance(freq, int):
        if freq < 1:
            raise ValueError(f"`{name}` must be positive, got {freq}")
        return tuple((layer + 1) % freq == 0 for layer in range(num_layers))
    pattern = list(freq)
    if len(pattern) != num_layers or any(entry not in (0, 1) for entry in pattern):
        raise ValueError(
            f"`{name}` must hold 0 or 1 for each of {num_layers} layers, got {pattern}"
        )
    return tuple(bool(entry) for entry in pattern)
