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


def _hop(x, axis_name, *, first_sender: int | None = None):
    """Device i's arrays to device i + 1; those of one dtype and shape in one message.

    With `first_sender` only the devices from there on send, and the last sends nothing to device 0.
    """
    devices = lax.axis_size(axis_name)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    if first_sender is not None:
        pairs = pairs[first_sender:-1]
    if len({(leaf.shape, leaf.dtype) for leaf in x}) == 1:
        return tuple(lax.ppermute(jnp.stack(x), axis_name, pairs))
    return tuple(lax.ppermute(leaf, axis_name, pairs) for leaf in x)


def _weight(lse, total):
    """`exp(lse - total)`, 0 where nothing was visible."""
    return jnp.exp(lse - jnp.where(jnp.isneginf(total), 0.0, total))


def _merge(out, lse, new: AttentionOutput):
    """Softmax over two disjoint sets of keys, accumulated in float32: `out [B, T, N, Dv]`, `lse [B, T, N]`."""
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
    all_marks = jax.tree.map(lambda x: lax.all_gather(x, axis_name), tokens)  # [n, B, T], integers

    def of_step(all_marks, step) -> Marks:  # [B, T], of the keys that are here after so many hops
        source = lax.rem(lax.axis_index(axis_name) - step + devices, devices)
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, source, keepdims=False), all_marks
        )

    def unless_masked(query_marks, kv_marks, step, update, carry):
        if masked is None or step == 0:
            return update(carry)
        return lax.cond(masked(query_marks, kv_marks), lambda carry: carry, update, carry)

    def merge_block(query, key, value, marks, kv_marks, carry):
        out, lse = carry
        return _merge(out, lse, attend(query, key, value, marks, kv_marks))

    @jax.custom_vjp
    def run(query, key, value, marks, all_marks):
        out, lse = attend(query, key, value, marks, of_step(all_marks, 0))
        out = out.astype(wide)
        for step in range(1, devices):
            key, value = _hop((key, value), axis_name, first_sender=step - 1 if past_only else None)
            # Without this the scheduler runs all hops first, one after the other, with nothing to hide them.
            lse, key, value = lax.optimization_barrier((lse, key, value))
            kv_marks = of_step(all_marks, step)
            merge = functools.partial(merge_block, query, key, value, marks, kv_marks)
            out, lse = unless_masked(marks, kv_marks, step, merge, (out, lse))
        return out, lse

    def forward(*inputs):
        out, lse = run(*inputs)
        return (out, lse), (*inputs, out, lse)

    def backward(residuals, cotangents):
        query, key, value, marks, all_marks, out, lse = residuals
        d_out, d_lse = cotangents
        # Or the compiler keeps the blocks of the forward's hops, which is what this saves.
        key, value, d_out = lax.optimization_barrier((key, value, d_out))
        # A block's lse enters by its weight exp(block's lse - lse), of which this part is the same for all blocks.
        d_weights = d_lse - jnp.sum(d_out * out, axis=-1)  # [B, T, N]
        sums = (jnp.zeros((), wide),) * 3
        for step in range(devices):
            kv_marks = of_step(all_marks, step)

            def add(sums, key=key, value=value, kv_marks=kv_marks):
                (block, block_lse), pullback = jax.vjp(
                    lambda q, k, v: tuple(attend(q, k, v, marks, kv_marks)), query, key, value
                )
                weight = _weight(block_lse, lse)
                d_block_lse = weight * (jnp.sum(d_out * block.astype(wide), axis=-1) + d_weights)
                d_block = (weight[..., None] * d_out).astype(block.dtype)
                gradients = pullback((d_block, d_block_lse))
                return tuple(a + b.astype(wide) for a, b in zip(sums, gradients, strict=True))

            d_query, d_key, d_value = unless_masked(marks, kv_marks, step, add, sums)
            if step < devices - 1:
                key, value = _hop((key, value), axis_name, first_sender=step if past_only else None)
            d_key, d_value = _hop(
                (d_key, d_value), axis_name
            )  # after n hops back where they belong
            d_query, key, value = lax.optimization_barrier((d_query, key, value))
            sums = (d_query, d_key, d_value)
        inputs = residuals[:3]
        gradients = (d.astype(x.dtype) for d, x in zip(sums, inputs, strict=True))
        return (*gradients, None, None)

    run.defvjp(forward, backward)
    return AttentionOutput(*run(query, key, value, marks, all_marks))
