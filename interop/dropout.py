"""Dropout that PyTorch's generator governs: its numbers become a JAX key."""

import jax
import torch
from torch import Tensor


def draw_seed(like: Tensor, dropout_rate: float, seed: Tensor | None) -> Tensor | None:
    """Two int32 values on the tensor's device for a positive rate, drawn from PyTorch's generator unless given."""
    if dropout_rate == 0.0 or seed is not None:
        return seed
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=like.device)


def dropout_key(seed: jax.Array | None) -> jax.Array | None:
    """The JAX key of a seed."""
    if seed is None:
        return None
    return jax.random.wrap_key_data(
        jax.lax.bitcast_convert_type(seed, jax.numpy.uint32), impl="threefry2x32"
    )
