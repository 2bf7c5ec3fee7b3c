"""XLA compiles once per shape: pad lengths to a few sizes, and a growing sequence compiles O(log T) times."""

import torch


def bucket_length(length: int, *, minimum: int = 16, steps_per_octave: int = 2) -> int:
    """The smallest bucket that holds `length`.

    Buckets are `minimum` and, in every octave above it, `steps_per_octave` evenly spaced sizes, so that at most
    `1 / steps_per_octave` of a row is padding and T tokens see `steps_per_octave * log2(T / minimum)` sizes.

    Raises:
      ValueError: a value that is not positive, or steps that do not divide `minimum`.

    Example:
      >>> [bucket_length(n) for n in (3, 17, 25, 33)]
      [16, 24, 32, 48]
    """
    if length < 0:
        raise ValueError(f"`length` must not be negative, got {length}")
    if minimum < 1 or steps_per_octave < 1 or minimum % steps_per_octave:
        raise ValueError(
            f"`minimum` must be a positive multiple of `steps_per_octave`, got {minimum} and {steps_per_octave}"
        )
    octave = minimum
    while 2 * octave < length:
        octave *= 2
    if length <= octave:
        return octave
    step = octave // steps_per_octave
    return octave + step * -(-(length - octave) // step)


def pad_to(tensor: torch.Tensor, length: int, *, dim: int, value: float = 0) -> torch.Tensor:
    """The tensor with `value` appended along `dim` up to `length`; itself if it is that long.

    Raises:
      ValueError: it is longer.

    Example:
      >>> pad_to(torch.ones(2, 3), 5, dim=1).shape
      torch.Size([2, 5])
    """
    missing = length - tensor.shape[dim]
    if missing < 0:
        raise ValueError(f"`length` must be at least {tensor.shape[dim]}, got {length}")
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_full(shape, value)), dim=dim)
