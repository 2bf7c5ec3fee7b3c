"""What `generate` accepts as prompts, as one padded array."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

Prompts = Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray


def pad_prompts(
    prompts: Prompts, prompt_lengths: Any, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one right-padded int32 array `[B, longest]` and their lengths `[B]`.

    Args:
      prompts: lists of token ids of any lengths >= 1, or one integer array `[B, T]`.
      prompt_lengths: `[B]`, real tokens of each row of an array; None means all.
      vocab_size: V.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    if hasattr(prompts, "shape"):
        tokens = np.asarray(prompts)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"`prompts` must have shape [B, T], B and T >= 1, got {tokens.shape}")
        lengths = np.full((tokens.shape[0],), tokens.shape[1], np.int64)
        if prompt_lengths is not None:
            lengths = np.asarray(prompt_lengths)
            if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
                raise ValueError(
                    f"`prompt_lengths` must be integers of shape [B={tokens.shape[0]}], got {lengths.dtype} "
                    f"of shape {lengths.shape}"
                )
            if (lengths < 1).any() or (lengths > tokens.shape[1]).any():
                raise ValueError(
                    f"`prompt_lengths` must lie in [1, T={tokens.shape[1]}], got {lengths.tolist()}"
                )
    else:
        if prompt_lengths is not None:
            raise ValueError(
                "`prompt_lengths` must be None for prompts given as lists, which have their own"
            )
        rows = _rows(prompts)
        lengths = np.asarray([row.size for row in rows], np.int64)
        if lengths.size == 0 or (lengths < 1).any():
            raise ValueError(
                f"`prompts` must hold at least one prompt of at least one token, got lengths {lengths.tolist()}"
            )
        longest = int(lengths.max())
        tokens = np.stack([np.pad(row, (0, longest - row.size)) for row in rows])
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"`prompts` must hold integers, got {tokens.dtype}")
    tokens = tokens[:, : lengths.max()]
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(f"`prompts` must lie in [0, vocab_size={vocab_size}), got {outside[0]}")
    return tokens.astype(np.int32), lengths


def _rows(prompts: Any) -> list[np.ndarray]:
    """Prompts given one by one, each as an array of one axis."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise TypeError(f"`prompts` must hold lists of token ids, got {prompts!r:.80}")
    rows = []
    for prompt in prompts:
        if isinstance(prompt, (str, bytes)):
            raise TypeError(f"`prompts` must hold token ids, not text: encode {prompt!r:.40} first")
        try:
            row = np.asarray(prompt)
        except ValueError:  # lists of lists of different lengths
            row = None
        if row is None or row.ndim != 1:
            raise ValueError(
                f"`prompts` must hold one list of token ids per row, got {prompt!r:.80}; one prompt alone is "
                "[[1, 2, 3]]"
            )
        rows.append(row.astype(np.int64) if row.dtype.kind == "u" else row)
    return rows
