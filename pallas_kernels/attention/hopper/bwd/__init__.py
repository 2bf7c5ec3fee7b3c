"""Backward attention on Hopper (sm_90a), as Pallas Mosaic GPU kernels.

Derivation (Dao 2023, algorithm 2), with scores s = scale q k, weights p = exp(s - lse), delta = sum(dout * out) - dlse:

    dv = p^T dout        dp = dout v^T        ds = p (dp - delta)        dk = scale ds^T q        dq = scale ds k

Two ways, by `BackwardConfig.atomic`:

- two kernels without atomics. `keys` (dk, dv): a block owns 128 keys of one key/value head. `queries` (dq): a block
  owns 128 queries of one head. Together 7 matrix products where 5 are the least; in exchange every sum has one order,
  so results repeat bit for bit.
- one kernel, `atomic`: the walk of `keys`, whose blocks also add their shares of dq to float32 memory, in any order.

In both, dk and dv are summed over the query heads of a group on chip, in float32, in a fixed order, and written once.

Units: scores, statistics and sums in float32, weights by `exp2`; weights and ds rounded to the input dtype as operands.
Layout: as in the forward kernel; gradients may go straight into `d_qkv [B, T, K, R + 2, D]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import LOG2E, ROWS
from pallas_kernels.attention.hopper import mask as masks
from pallas_kernels.attention.hopper.bwd import atomic, keys, queries
from pallas_kernels.attention.hopper.bwd.blocks import Inputs, Shapes, locate
from pallas_kernels.attention.hopper.tuning import BackwardConfig


class Gradients(NamedTuple):
    """Gradients of an attention call; `sinks` is None without sinks."""

    query: Any
    key: Any
    value: Any
    sinks: Any


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    config: BackwardConfig,
    scale: float,
    d_lse: jax.Array | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    offset: int | jax.Array = 0,
    query_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> Gradients:
    """Gradients of `fwd.forward`; the options are its own.

    Args:
      out, lse: what the forward returned.
      d_out: gradient of the output `[B, T, N, D]`.
      d_lse: gradient of lse `[B, T, N]`, or None for zero.
    """
    mask = masks.Mask(
        query.shape[1],
        key.shape[1],
        is_causal,
        sliding_window,
        offset if isinstance(offset, int) else None,
        query_segment_ids is not None,
    )
    shapes = Shapes(
        query.shape[0],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        query.dtype,
        mask,
        scale,
        logits_soft_cap,
        False,
        config,
    )
    statistics, d_sinks = _statistics(shapes, out, lse, d_out, d_lse, sinks)
    q_rows, kv_rows = _mosaic_gpu.round_up(mask.q_len, 8), _mosaic_gpu.round_up(mask.kv_len, 8)
    query, d_out = (_mosaic_gpu.pad_axis(x, 1, q_rows) for x in (query, d_out))
    key, value = (_mosaic_gpu.pad_axis(x, 1, kv_rows) for x in (key, value))
    arrays = (query, key, value, d_out, *statistics)
    tables = _tables(shapes, offset, query_segment_ids, kv_segment_ids)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    q_len, kv_len = mask.q_len, mask.kv_len
    if config.atomic:
        sums = _zeros_like_query(shapes, q_rows)
        dk, dv = _run(shapes, "atomic", arrays, tables, (like(key), like(value)), sums)
        dq = (sums[...] * scale).astype(query.dtype)
    else:
        dk, dv = _run(shapes, "dk_dv", arrays, tables, (like(key), like(value)))
        (dq,) = _run(shapes, "dq", arrays, tables, (like(query),))
    return Gradients(dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len], d_sinks)


def backward_qkv(
    qkv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    config: BackwardConfig,
    scale: float,
    d_lse: jax.Array | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    offset: int | jax.Array = 0,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """As `backward`, for `fwd.forward_qkv`: `(d_qkv, d_sinks)`, every kernel writing into one buffer."""
    batch, length, num_kv_heads, width, head_dim = qkv.shape
    mask = masks.Mask(
        length,
        length,
        is_causal,
        sliding_window,
        offset if isinstance(offset, int) else None,
        segment_ids is not None,
    )
    shapes = Shapes(
        batch,
        num_kv_heads * (width - 2),
        num_kv_heads,
        head_dim,
        qkv.dtype,
        mask,
        scale,
        logits_soft_cap,
        True,
        config,
    )
    statistics, d_sinks = _statistics(shapes, out, lse, d_out, d_lse, sinks)
    rows = _mosaic_gpu.round_up(length, 8)
    qkv, d_out = (_mosaic_gpu.pad_axis(x, 1, rows) for x in (qkv, d_out))
    tables = _tables(shapes, offset, segment_ids, segment_ids)
    d_qkv = jax.new_ref(lax.empty(qkv.shape, qkv.dtype))
    arrays = (qkv, d_out, *statistics)
    if config.atomic:
        sums = _zeros_like_query(shapes, rows)
        _run(shapes, "atomic", arrays, tables, d_qkv, sums)
        dq = (sums[...] * scale).astype(qkv.dtype)
        found = d_qkv[...].at[:, :, :, : width - 2].set(dq.reshape(*qkv.shape[:3], -1, head_dim))
    else:
        for which in ("dk_dv", "dq"):
            _run(shapes, which, arrays, tables, d_qkv)
        found = d_qkv[...]
    return found[:, :length], d_sinks


def _statistics(
    shapes: Shapes, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse, sinks: jax.Array | None
):
    """Per row `[B, N, T']`: lse in log2 units and delta; and the gradient of the sinks."""
    lse, rows = jnp.swapaxes(lse, 1, 2), shapes.query_rows
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.swapaxes(product.sum(-1), 1, 2)
    if d_lse is not None:
        delta = delta - jnp.swapaxes(d_lse, 1, 2)
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        weight = jnp.where(jnp.isneginf(lse), 0.0, weight)
        d_sinks = -(weight * delta).sum((0, 2)).astype(sinks.dtype)
    # A row that sees nothing, or does not exist, gets weights exp2(s - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    lse = _mosaic_gpu.pad_axis(lse, 2, rows, jnp.inf)
    return (lse, _mosaic_gpu.pad_axis(delta, 2, rows)), d_sinks


def _tables(shapes: Shapes, offset, query_ids, key_ids) -> dict[str, dict[str, jax.Array]]:
    """For each kernel its optional inputs by name."""
    mask, config = shapes.mask, shapes.config
    shared: dict[str, jax.Array] = {}
    if mask.offset is None:
        shared["offsets"] = jnp.asarray(offset, jnp.int32)
    tables = {"dk_dv": dict(shared), "dq": dict(shared), "atomic": shared}
    if mask.segments:
        queries = masks.padded_ids(query_ids, shapes.query_rows, masks.QUERY_PADDING)
        keys = masks.padded_ids(key_ids, shapes.key_rows, masks.KEY_PADDING)
        ids = {"query_ids": queries, "key_ids": keys}
        over_queries = masks.segment_bounds(keys, shapes.block_keys, queries, config.block_q)
        over_keys = masks.segment_bounds(queries, 2 * ROWS, keys, config.block_kv)
        tables["dk_dv"] |= ids | {"bounds": over_queries}
        tables["atomic"] = tables["dk_dv"]
        tables["dq"] |= ids | {"bounds": over_keys}
    return tables


def _zeros_like_query(shapes: Shapes, rows: int) -> jax.Ref:
    """Where the blocks of `atomic` add up dq."""
    shape = (shapes.batch, rows, shapes.num_heads, shapes.head_dim)
    return jax.new_ref(jnp.zeros(shape, jnp.float32))


def _run(shapes: Shapes, which: str, arrays, tables, target: _mosaic_gpu.Ref, sums=None):
    """One of the kernels.

    Args:
      which: "dk_dv", "dq" or "atomic".
      target: the fused gradient to write into, or the types of separate ones.
      sums: for "atomic", where dq is added up.
    """
    optional, config = tables[which], shapes.config
    references = [x for x in (sums, target if shapes.fused else None) if x is not None]
    names = ("offsets", "query_ids", "key_ids", "bounds")

    def attention_backward(*refs, **scratch):
        count = len(arrays) + len(optional)
        read, written = list(refs[:count]), list(refs[count:])
        if shapes.fused:
            read = read[:1] * 3 + read[1:]
        extra = dict(zip(optional, read[6:], strict=True))
        inputs = Inputs(*read[:6], **{name: extra.get(name) for name in names})
        sums_ref = written.pop(0) if which == "atomic" else None
        outputs = written * 2 if shapes.fused else written
        s, wg = _mosaic_gpu.Scratch(scratch), lax.axis_index("warpgroup")
        if which == "dq":
            block = locate(shapes, inputs, masks.key_tiles, 2 * ROWS, config.block_kv)
            pl.when(wg < 2)(lambda: queries.compute_role(shapes, inputs, s, block, outputs[0], wg))
            pl.when(wg == 2)(lambda: queries.memory_role(shapes, inputs, s, block))
            return
        block = locate(shapes, inputs, masks.query_tiles, shapes.block_keys, config.block_q)
        if which == "atomic":
            compute = lambda: atomic.compute_role(shapes, s, block, outputs, sums_ref, wg)
        else:
            compute = lambda: keys.compute_role(shapes, s, block, outputs, wg)
        pl.when(wg < 2)(compute)
        pl.when(wg == 2)(lambda: keys.memory_role(shapes, inputs, s, block))

    if which == "dq":
        heads, blocks = shapes.num_heads, -(-shapes.mask.q_len // (2 * ROWS))
    else:
        heads, blocks = shapes.num_kv_heads, -(-shapes.mask.kv_len // shapes.block_keys)
    spec = {"dk_dv": keys, "dq": queries, "atomic": atomic}[which].scratch_spec
    run = plgpu.kernel(
        attention_backward,
        out_type=() if shapes.fused else target,
        scratch_types=spec(shapes),
        grid=(heads, shapes.batch, blocks),
        grid_names=("heads", "batch", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=f"attention_backward_{which}",
        **_mosaic_gpu.kernel_options(),
    )
    return run(*arrays, *optional.values(), *references)
