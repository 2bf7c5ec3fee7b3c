"""Embedding, output projection and loss over a vocabulary that is split: nothing of size V is ever gathered."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from gqa_jax.parallel import sharding
from gqa_jax.parallel.sharding import MeshAxes, names
from gqa_jax.parallel.tensor.on_mesh import gather_tokens, laid_out, sum_over_heads


def embed(layer: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Rows of a table whose vocabulary is split: each device looks up what it holds, the rest adds zeros."""
    axes = layer.axes
    mesh = sharding.current_mesh(axes)
    table = layer.embedding[...]
    spec = sharding.parameter_spec("embedding", table.shape, axes, mesh)

    def run(table, tokens):
        table = _gather_width(table, axes, dim=1)
        part = lax.axis_index(names(axes.heads)) if names(axes.heads) else 0
        row = tokens - part * table.shape[0]
        held = (row >= 0) & (row < table.shape[0])
        found = table.at[jnp.where(held, row, 0)].get(mode="clip")
        found = jnp.where(held[..., None], found, jnp.zeros_like(found))
        out = sum_over_heads(found.astype(layer.dtype or table.dtype), axes)
        known = (tokens >= 0) & (tokens < table.shape[0] * sharding.size(axes.heads, mesh))
        if axes.seq_residual is not None:
            length = out.shape[1]
            known = lax.dynamic_slice_in_dim(known, part * length, length, axis=1)
        return jnp.where(known[..., None], out, jnp.asarray(jnp.nan, out.dtype))

    if sharding.is_manual(axes):
        return run(table, tokens)
    in_specs = (spec, axes.tokens)
    arguments = laid_out((table, tokens), in_specs)
    return jax.shard_map(run, in_specs=in_specs, out_specs=axes.residual)(*arguments)


def logits(
    x: Float[Array, "B T M"], kernel: Array, axes: MeshAxes, *, tied: bool, dtype: Any = None
) -> Float[Array, "B T V"]:
    """Output projection; each device returns its part of the vocabulary.

    Args:
      x: `[B, T, M]`, laid out as the residual stream.
      kernel: `[M, V]`, or the embedding `[V, M]` if `tied`.
      axes: names of mesh axes.
      tied: which of the two.
      dtype: of accumulation and result; None means that of x.
    """
    mesh = sharding.current_mesh(axes)
    name = "embedding" if tied else "lm_head.kernel"
    spec = sharding.parameter_spec(name, kernel.shape, axes, mesh)

    def run(x, kernel):
        x = gather_tokens(x, axes)
        kernel = _gather_width(kernel, axes, dim=1 if tied else 0).astype(x.dtype)
        formula = "btm,vm->btv" if tied else "btm,mv->btv"
        return jnp.einsum(formula, x, kernel, preferred_element_type=dtype or x.dtype)

    if sharding.is_manual(axes):
        return run(x, kernel)
    in_specs = (axes.residual, spec)
    arguments = laid_out((x, kernel), in_specs)
    return jax.shard_map(run, in_specs=in_specs, out_specs=axes.logits)(*arguments)


def _gather_width(kernel: Array, axes: MeshAxes, *, dim: int) -> Array:
    return lax.all_gather(kernel, names(axes.embed), axis=dim, tiled=True) if axes.embed else kernel


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
    arguments = laid_out((logits, labels), in_specs)
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
