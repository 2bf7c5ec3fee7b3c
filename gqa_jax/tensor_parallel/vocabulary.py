"""Embedding, output projection and loss over a vocabulary that is split: nothing of size V is ever gathered."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gqa_jax import sharding
from gqa_jax.sharding import MeshAxes, names
from gqa_jax.tensor_parallel.on_mesh import gather_tokens, laid_out, sum_over_heads


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
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], axes: MeshAxes
) -> Float[Array, "B T"]:
    """Loss of each token from logits whose vocabulary is split: nothing of size V is ever gathered.

    Args:
      logits: `[B, T, V]`, laid out as `axes.logits` (as a decoder with these axes returns them).
      labels: `[B, T]`; negative labels have no loss.
      axes: names of mesh axes.

    Returns:
      `[B, T]` float32, `-log softmax(logits)[label]`; 0 where the label is negative.

    Raises:
      TypeError: labels that are not integers.
      ValueError: shapes that do not fit.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be an integer array, got {labels.dtype}")
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` must have shape [B, T] of `logits` {logits.shape}, got {labels.shape}"
        )
    heads = names(axes.heads)

    def run(logits, labels):
        logits = logits.astype(jnp.float32)
        top = lax.stop_gradient(logits.max(axis=-1))
        part = 0
        if heads:
            top, part = lax.pmax(top, heads), lax.axis_index(heads)
        total = jnp.exp(logits - top[..., None]).sum(axis=-1)
        column = labels - part * logits.shape[-1]
        held = (column >= 0) & (column < logits.shape[-1])
        place = jnp.where(held, column, 0)[..., None]
        chosen = jnp.take_along_axis(logits, place, axis=-1, mode="clip")[..., 0]
        chosen = jnp.where(held, chosen, 0.0)
        if heads:
            total, chosen = lax.psum((total, chosen), heads)
        return jnp.where(labels >= 0, top + jnp.log(total) - chosen, 0.0)

    if sharding.is_manual(axes):
        return run(logits, labels)
    in_specs = (axes.logits, axes.tokens)
    arguments = laid_out((logits, labels), in_specs)
    return jax.shard_map(run, in_specs=in_specs, out_specs=axes.tokens)(*arguments)
