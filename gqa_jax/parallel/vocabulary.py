"""Loss over a vocabulary that may be split over devices: nothing of size V is ever gathered."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from gqa_jax.parallel import sharding
from gqa_jax.parallel.sharding import MeshAxes, names


def cross_entropy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], axes: MeshAxes | None
) -> Float[Array, "B T"]:
    """Loss of each token; where the vocabulary of the logits is split, nothing of size V is ever gathered.

    Args:
      logits: `[B, T, V]`, laid out as `axes.logits` (as a decoder with these axes returns them).
      labels: `[B, T]` integer of any width; a negative one, such as -100, is ignored.
      axes: names of mesh axes, or None where every device has the whole vocabulary.

    Returns:
      `[B, T]` float32, `-log softmax(logits)[label]` in nats; 0 where the label is negative, whatever the logits there
      are (their gradient is 0 too); NaN, with a gradient of NaN, where the label is V or more inside `jit`.

    Raises:
      TypeError: labels that are not integers.
      ValueError: shapes that do not fit, or a label of V or more outside `jit`.
    """
    labels = as_labels("labels", labels, vocab_size=logits.shape[-1])
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` must have shape [B, T] of `logits` {logits.shape}, got {labels.shape}"
        )
    heads = names(axes.heads) if axes is not None else ()

    def run(logits, labels):
        counted = labels >= 0
        # Before the exponential, not after it: the gradient of what is left out would be 0 * NaN.
        logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0.0)
        top = lax.stop_gradient(logits.max(axis=-1))
        part, vocab_size = 0, logits.shape[-1]
        if heads:
            top, part = lax.pmax(top, heads), lax.axis_index(heads)
            vocab_size *= lax.axis_size(heads)
        total = jnp.exp(logits - top[..., None]).sum(axis=-1)
        column = labels - part * logits.shape[-1]
        held = (column >= 0) & (column < logits.shape[-1])
        place = jnp.where(held, column, 0)[..., None]
        chosen = jnp.take_along_axis(logits, place, axis=-1, mode="clip")[..., 0]
        chosen = jnp.where(held, chosen, 0.0)
        if heads:
            total, chosen = lax.psum((total, chosen), heads)
        losses = jnp.where(counted, top + jnp.log(total) - chosen, 0.0)
        return losses * jnp.where(labels < vocab_size, 1.0, jnp.nan)  # a factor: the gradient too

    if axes is None or sharding.is_manual(axes):
        return run(logits, labels)
    in_specs = (axes.logits, axes.tokens)
    arguments = sharding.laid_out((logits, labels), in_specs)
    return jax.shard_map(run, in_specs=in_specs, out_specs=axes.tokens)(*arguments)


def as_labels(name: str, labels: Any, *, vocab_size: int, real: Any = None) -> Int[Array, "B T"]:
    """The one rule for labels: those below 0 are ignored, those of `vocab_size` or more are an error.

    Args:
      name: the argument's name, for the message.
      labels: integers of any width.
      vocab_size: V.
      real: False where a label is ignored whatever it is; None for nowhere.

    Returns:
      int32, -1 where not `real`. What does not fit becomes the largest or smallest value: still too large, or negative.

    Raises:
      TypeError: labels that are not an integer array.
      ValueError: a label of V or more whose value can be read: not inside `jit`, nor on another process' devices.
    """
    if not hasattr(labels, "dtype") or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"`{name}` must be an integer array, got {got}")
    hidden = lambda x: isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True)
    if not hidden(labels) and not hidden(real):
        counted = np.asarray(labels)[... if real is None else np.asarray(real)]
        if counted.size and counted.max() >= vocab_size:
            raise ValueError(
                f"`{name}` must be negative (ignored) or less than the vocabulary's size {vocab_size}, "
                f"got {counted.max()}"
            )
    module = np if isinstance(labels, np.ndarray) else jnp  # JAX would cut NumPy's 64 bits to 32
    own, ours = jnp.iinfo(labels.dtype), jnp.iinfo(jnp.int32)
    limits = max(own.min, ours.min), min(own.max, ours.max)
    narrow = jnp.asarray(module.clip(labels, *limits).astype(jnp.int32))
    return narrow if real is None else jnp.where(real, narrow, -1)
