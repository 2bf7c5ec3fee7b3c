"""Keys and values go round: n - 1 hops, each overlapped with the attention over the block that is already here.

The backward sends them round again with their gradients, which accumulate in float32 whatever travels, and runs each
block's forward once more instead of keeping n blocks. (Ring attention, arXiv 2310.01889.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from gqa_jax.parallel.context.marks import Attend, Marks
from pallas_kernels import AttentionOutput


def _hop(x, axis_name, *, first: int | None = None):
    """Device i's arrays to device i + 1; those of one dtype and shape in one message.

    With `first` only from devices `first` up to the last but one, and nothing goes from the last to device 0.
    """
    devices = lax.axis_size(axis_name)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    if first is not None:
        pairs = pairs[first:-1]
    if len({(leaf.shape, leaf.dtype) for leaf in x}) == 1:
        return tuple(lax.ppermute(jnp.stack(x), axis_name, pairs))
    return tuple(lax.ppermute(leaf, axis_name, pairs) for leaf in x)


def _weight(lse, total):
    """`exp(lse - total)`, 0 where nothing was visible."""
    return jnp.exp(lse - jnp.where(jnp.isneginf(total), 0.0, total))


def _merge(out, lse, new: AttentionOutput):
    """Softmax over two disjoint sets of keys, accumulated in float32."""
    total = jnp.logaddexp(lse, new.lse)
    old = out * _weight(lse, total)[..., None]
    return old + new.out.astype(out.dtype) * _weight(new.lse, total)[..., None], total


def attention(
    query,
    key,
    value,
    marks: Marks,
    *,
    axis_name: Any,
    attend: Attend,
    past_only: bool = False,
    masked: Callable[[Marks, Marks], Array] | None = None,
) -> AttentionOutput:
    """Attention of local queries over the keys of all devices; `out` in float32, not yet rounded.

    Args:
      query, key, value, marks: this device's.
      axis_name: the axis (or axes) that splits the tokens.
      attend: attention on one device.
      past_only: no query sees a key of a later device (contiguous chunks under a causal mask): keys do not go there.
      masked: `masked(query_marks, kv_marks)`, whether a block has nothing to see; it is then not computed. None
        computes all.
    """
    devices = lax.axis_size(axis_name)
    wide = np.promote_types(query.dtype, jnp.float32)
    tokens = marks._replace(dropout=None)
    everyone = jax.tree.map(lambda x: lax.all_gather(x, axis_name), tokens)  # [n, B, T], small

    def of_step(everyone, step) -> Marks:
        source = lax.rem(lax.axis_index(axis_name) - step + devices, devices)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, source, keepdims=False), everyone)

    def unless_masked(mine, theirs, step, update, carry):
        if masked is None or step == 0:
            return update(carry)
        return lax.cond(masked(mine, theirs), lambda carry: carry, update, carry)

    def joined(query, key, value, marks, theirs, carry):
        out, lse = carry
        return _merge(out, lse, attend(query, key, value, marks, theirs))

    @jax.custom_vjp
    def run(query, key, value, marks, everyone):
        out, lse = attend(query, key, value, marks, of_step(everyone, 0))
        out = out.astype(wide)
        for step in range(1, devices):
            key, value = _hop((key, value), axis_name, first=step - 1 if past_only else None)
            # Without this the scheduler runs all hops first, one after the other, with nothing to hide them.
            lse, key, value = lax.optimization_barrier((lse, key, value))
            theirs = of_step(everyone, step)
            join = functools.partial(joined, query, key, value, marks, theirs)
            out, lse = unless_masked(marks, theirs, step, join, (out, lse))
        return out, lse

    def forward(*inputs):
        out, lse = run(*inputs)
        return (out, lse), (*inputs, out, lse)

    def backward(residuals, cotangents):
        query, key, value, marks, everyone, out, lse = residuals
        d_out, d_lse = cotangents
        # Or the compiler keeps the blocks of the forward's hops, which is what this saves.
        key, value, d_out = lax.optimization_barrier((key, value, d_out))
        # What every block's lse receives, times its weight.
        along = d_lse - jnp.sum(d_out * out, axis=-1)
        sums = (jnp.zeros((), wide),) * 3
        for step in range(devices):
            theirs = of_step(everyone, step)

            def add(sums, key=key, value=value, theirs=theirs):
                (part, part_lse), pullback = jax.vjp(
                    lambda q, k, v: tuple(attend(q, k, v, marks, theirs)), query, key, value
                )
                weight = _weight(part_lse, lse)
                d_part_lse = weight * (jnp.sum(d_out * part.astype(wide), axis=-1) + along)
                d_part = (weight[..., None] * d_out).astype(part.dtype)
                own = pullback((d_part, d_part_lse))
                return tuple(a + b.astype(wide) for a, b in zip(sums, own, strict=True))

            d_query, d_key, d_value = unless_masked(marks, theirs, step, add, sums)
            if step < devices - 1:
                key, value = _hop((key, value), axis_name, first=step if past_only else None)
            d_key, d_value = _hop((d_key, d_value), axis_name)  # after n hops they are home
            d_query, key, value = lax.optimization_barrier((d_query, key, value))
            sums = (d_query, d_key, d_value)
        inputs = residuals[:3]
        gradients = (d.astype(x.dtype) for d, x in zip(sums, inputs, strict=True))
        return (*gradients, None, None)

    run.defvjp(forward, backward)
    return AttentionOutput(*run(query, key, value, marks, everyone))
