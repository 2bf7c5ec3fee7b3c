"""Attention in tiles with online softmax: O(T) memory forward and backward, any XLA device.

Every array is first brought to `[B|1, K|1, R|1, length|1, ...]`, so that a tile is one slice of each of them and a
dimension of size 1 broadcasts. A tile is `rows x keys`, where the R query heads of a group are folded into the rows:
both products are then plain matrix products over the group's own keys and values, which are never repeated.

    forward, per tile:  s = scale q k^T;  m' = max(m, max s);  p = exp(s - m');  l = l e^(m - m') + sum p;
                        acc = acc e^(m - m') + p v                       out = acc / l,  lse = m + log l
    backward, per tile: p = exp(s - lse);  dp = do v^T;  ds = p (dp - delta),  delta = sum(do * out) - dlse
                        dv += p^T do;  dk += ds^T q;  dq += ds k;  dbias += ds

For each block of queries the range of key blocks that it can see is known from minima and maxima of positions and
segments, so causal attention costs half, a window of W costs O(T W), and packed sequences cost their own squares.

A token that is not finite is NaN where logits are made, which the mask then hides from whom it must not reach, and 0
in every other product: the backward knows a row that saw one by its lse.
The online softmax follows Milakov & Gimelshein (arXiv 1805.02867), the backward FlashAttention-2 (arXiv 2307.08691),
algorithm 2.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._inert import finite_part
from pallas_kernels._precision import compute_dtype
from pallas_kernels.attention import algebra
from pallas_kernels.attention.blockwise.layout import (
    At,
    block_counts,
    block_sizes,
    fold,
    join_keys,
    join_queries,
    make_problem,
    split_queries,
    take,
    take_keys,
)
from pallas_kernels.attention.blockwise.plan import key_blocks, make_plan, own_row
from pallas_kernels.attention.blockwise.tile import (
    add_at,
    add_to_bias,
    drop,
    product,
    tile_logits,
)


def forward(
    inputs: algebra.Inputs, context: algebra.Context, options: algebra.Options
) -> tuple[jax.Array, jax.Array]:
    """Returns `(out [B, T, N, Dv], lse [B, T, N])`."""
    size = block_sizes(inputs)
    problem = make_problem(inputs, context, options, size)
    plan = make_plan(problem, options, size)
    num_kv_heads, group = problem.query.shape[1:3]
    compute = compute_dtype(inputs.query.dtype)
    shape = (size.batch, size.heads, group, size.queries)
    sinks = None
    if inputs.sinks is not None:
        sinks = inputs.sinks.astype(compute).reshape(1, num_kv_heads, group, 1)

    def row_block(index):
        b, k, i = index
        query = fold(take(problem.query, (b, k, 0, i), shape))
        # Loop carries are made "like" an operand: under `shard_map` their type says over which axes they vary.
        top = jnp.full_like(query, -jnp.inf, compute, shape)
        total = jnp.zeros_like(query, compute, shape)
        if sinks is not None:
            top = total + take(sinks, (0, k), (1, size.heads))
            total = jnp.where(jnp.isneginf(top), 0.0, 1.0).astype(compute)
        acc = jnp.zeros_like(query, compute, (*query.shape[:3], problem.value.shape[-1]))

        def key_block(at, carry, masked):
            top, total, acc = carry
            key, value = (take_keys(x, size, at) for x in (problem.key, problem.value))
            logits, row_top, _ = tile_logits(problem, options, size, at, query, key, masked)
            new_top = jnp.maximum(top, row_top)
            finite_top = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
            weights = jnp.exp(logits - finite_top[..., None])
            decay = jnp.exp(top - finite_top)
            total = total * decay + weights.sum(axis=-1)
            weights = drop(problem, options, size, at, weights)
            part = product("bkts,bksd->bktd", fold(weights).astype(value.dtype), value)
            return new_top, total, acc * fold(decay)[..., None] + part

        def step(j, carry):
            at = At(b, k, i, j)
            if isinstance(plan.full, bool):
                return key_block(at, carry, not plan.full)
            return lax.cond(
                own_row(plan.full, b)[i, j],
                lambda carry: key_block(at, carry, False),
                lambda carry: key_block(at, carry, True),
                carry,
            )

        top, total, acc = lax.fori_loop(*key_blocks(plan, b, i), step, (top, total, acc))
        empty = total == 0.0
        safe = jnp.where(empty, 1.0, total)
        out = (acc / fold(safe)[..., None]).astype(inputs.query.dtype)
        return out.reshape(*shape, -1), jnp.where(empty, -jnp.inf, top + jnp.log(safe))

    batches, heads, rows, _ = block_counts(problem, size)
    index = jnp.meshgrid(jnp.arange(batches), jnp.arange(heads), jnp.arange(rows), indexing="ij")
    out, lse = lax.map(row_block, tuple(axis.reshape(-1) for axis in index))
    out = join_queries(out, problem, size, inputs.query.shape[1])
    lse = join_queries(lse[..., None], problem, size, inputs.query.shape[1])
    return out, lse[..., 0]


def backward(
    inputs: algebra.Inputs,
    context: algebra.Context,
    options: algebra.Options,
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> algebra.Inputs:
    """Returns the cotangents of `inputs`, from those of `saved = (out, lse)`."""
    size = block_sizes(inputs)
    problem = make_problem(inputs, context, options, size)
    plan = make_plan(problem, options, size)
    group, q_len, head_dim = problem.query.shape[2:]
    compute = compute_dtype(inputs.query.dtype)
    shape = (size.batch, size.heads, group, size.queries)
    (out, lse), (d_out, d_lse) = saved, cotangents

    out = jnp.where(d_out == 0.0, 0.0, out.astype(compute))
    delta = (d_out.astype(compute) * out).sum(-1) - d_lse.astype(compute)
    # A row that sees nothing, or is padding, gets p = 0, whatever its cotangents are; so does one that is NaN but that
    # nobody asks about.
    saw_finite = lse < jnp.inf
    hidden = jnp.isneginf(lse) | (~saw_finite & (delta == 0.0))
    broken = ~hidden & ~(saw_finite & jnp.isfinite(delta))
    lse, delta = jnp.where(hidden, jnp.inf, lse), jnp.where(hidden, 0.0, delta)
    d_sinks = None
    if inputs.sinks is not None:
        share = jnp.exp(inputs.sinks.astype(compute)[None, None] - lse)
        d_sinks = -(share * delta).sum((0, 1)).astype(inputs.sinks.dtype)
    tiled = lambda rows, fill=0.0: split_queries(rows, problem.key.shape[1], q_len, fill)
    # A broken row: p = exp(s + 3e38) is infinite where it sees and 0 where not.
    lse = jnp.where(broken, jnp.finfo(compute).min, lse)
    delta = jnp.where(broken, 0.0, delta)
    lse, delta = tiled(lse[..., None], jnp.inf), tiled(delta[..., None])
    d_out = tiled(finite_part(d_out)).astype(problem.value.dtype)
    # Else XLA's CPU computes all this again for each element of a tile or of a transpose.
    d_out, finite_query, lse, delta = lax.optimization_barrier(
        (d_out, finite_part(problem.query), lse, delta)
    )
    finite_key = finite_part(problem.key)
    batches, heads, num_rows, num_keys = block_counts(problem, size)

    def group_of_heads(d_bias, index):
        b, k = index

        def row_block(carry, i):
            rows = lambda array: take(array, (b, k, 0, i), shape)
            query, d_rows = fold(rows(problem.query)), fold(rows(d_out))
            query_t = jnp.swapaxes(fold(rows(finite_query)), -1, -2)
            d_rows_t = jnp.swapaxes(d_rows, -1, -2)
            row_lse, row_delta = rows(lse), rows(delta)

            def step(j, carry):
                d_query, d_key, d_value, d_bias = carry
                at = At(b, k, i, j)
                key, value = (take_keys(x, size, at) for x in (problem.key, problem.value))
                logits, _, slope = tile_logits(
                    problem, options, size, at, query, key, masked=plan.full is not True
                )
                weights = jnp.exp(jnp.where(jnp.isposinf(row_lse), -jnp.inf, logits - row_lse))
                d_weights = product("bktd,bksd->bkts", d_rows, value).reshape(weights.shape)
                d_weights = drop(problem, options, size, at, d_weights)
                d_logits = weights * (d_weights - row_delta)
                if d_bias is not None:
                    d_bias = add_to_bias(d_bias, d_logits, size, at)
                if slope is not None:
                    d_logits = d_logits * slope
                d_logits = fold(d_logits).astype(key.dtype)
                weights = fold(drop(problem, options, size, at, weights)).astype(value.dtype)
                # Transposed accumulators: XLA's CPU product is several times slower when it contracts the first
                # dimension of its large operand.
                d_key = add_at(d_key, j, product("bkdt,bkts->bkds", query_t, d_logits))
                d_value = add_at(d_value, j, product("bkdt,bkts->bkds", d_rows_t, weights))
                key = take_keys(finite_key, size, at)
                d_query = d_query + product("bkts,bksd->bktd", d_logits, key)
                return d_query, d_key, d_value, d_bias

            d_query, *carry = lax.fori_loop(
                *key_blocks(plan, b, i), step, (jnp.zeros_like(query, compute), *carry)
            )
            d_query = (options.scale * d_query).reshape(*shape, head_dim)
            return tuple(carry), d_query.astype(inputs.query.dtype)

        zeros = lambda dim: jnp.zeros_like(
            problem.key, compute, (num_keys, *size[:2], dim, size.keys)
        )
        carry = (zeros(head_dim), zeros(problem.value.shape[-1]), d_bias)
        (d_key, d_value, d_bias), d_query = lax.scan(row_block, carry, jnp.arange(num_rows))
        d_key = (options.scale * d_key).astype(inputs.key.dtype)
        return d_bias, (d_query, d_key, d_value.astype(inputs.value.dtype))

    d_bias = (
        None if problem.bias is None else jnp.zeros_like(problem.query, compute, problem.bias.shape)
    )
    index = jnp.meshgrid(jnp.arange(batches), jnp.arange(heads), indexing="ij")
    d_bias, (d_query, d_key, d_value) = lax.scan(
        group_of_heads, d_bias, tuple(axis.reshape(-1) for axis in index)
    )
    d_query = join_queries(d_query, problem, size, inputs.query.shape[1])
    d_key = join_keys(d_key, problem, size, inputs.key.shape[1])
    d_value = join_keys(d_value, problem, size, inputs.key.shape[1])
    if d_bias is not None and inputs.bias is not None:
        d_bias = d_bias.reshape(d_bias.shape[0], -1, *d_bias.shape[3:])
        d_bias = d_bias[:, :, : inputs.bias.shape[2], : inputs.bias.shape[3]]
        d_bias = d_bias.astype(inputs.bias.dtype)
    return algebra.Inputs(d_query, d_key, d_value, d_bias, d_sinks)
