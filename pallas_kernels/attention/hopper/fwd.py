"""Forward attention on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2). A block has three warpgroups. Two compute 64
rows each; the third feeds them keys and values by TMA through a ring of `stages` tiles. Inside a compute warpgroup the
scores of the next key tile are issued to the tensor cores before the weighted sum of this one, so that the softmax runs
while the tensor cores work; between the two compute warpgroups a pair of barriers takes turns, so that the softmax of
one meets the matrix products of the other.

Rows: a tile of 64 rows holds `pack` query heads of one group times `64 / pack` tokens, head-major. Key/value heads are
never repeated. Units: scores in float32, times `scale * log2(e)`, so that weights are `exp2`; running maximum `m` and
sum `l` in float32; weights rounded to the input dtype for `P V`; lse returned as a natural logarithm.

Layout: query `[B, T, N, D]`, key and value `[B, S, K, D]`, or all three as boxes of the fused `[B, T, K, R + 2, D]`.
Rows past T or S are filled with zeros by TMA, masked, and never written.

Shared memory: `2 D (128 + 2 stages block_kv)` bytes of tiles, of which the queries' is reused for the output, and
under 2 KiB of ids, sums and barriers.

Three constructions keep the overlap (without them the code is right and slow; the tests of the machine code notice):
both accumulators live in one scope and scores are read with one product still in flight; the sum of weights is stored
to shared memory before that product is waited for, which keeps the exponentials above the wait; and the weights are
rounded after it, since registers that feed a product in flight may not be written.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import LOG2E, ROWS
from pallas_kernels.attention.hopper import mask as masks
from pallas_kernels.attention.hopper.tuning import ForwardConfig

MATRIX, PER_ROW, PER_KEY = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)
# Smaller than any score, and finite: the difference of two of them is 0, not NaN.
NOTHING_SEEN = -1e30


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about one kernel."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike
    mask: masks.Mask
    scale: float
    soft_cap: float | None
    sinks: bool
    fused: bool
    config: ForwardConfig

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tokens(self) -> int:
        """Query tokens in one warpgroup's tile."""
        return ROWS // self.config.pack

    @property
    def q_tiles(self) -> int:
        return -(-self.mask.q_len // (2 * self.tokens))

    @property
    def kv_tiles(self) -> int:
        return -(-self.mask.kv_len // self.config.block_kv)

    @property
    def grid(self) -> tuple[tuple[str, int], ...]:
        heads, batch = (
            ("heads", self.num_heads // self.config.pack),
            ("batch", self.batch),
        )
        tiles = ("tile", self.q_tiles)
        return (heads, batch, tiles) if self.config.heads_then_batch else (heads, tiles, batch)


class Inputs(NamedTuple):
    """References to device memory; None where the call has no such input."""

    query: Any
    key: Any
    value: Any
    offsets: Any
    query_ids: Any
    key_ids: Any
    bounds: Any
    sinks: Any


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of one block."""
    config, dtype, dim = shapes.config, shapes.dtype, shapes.head_dim
    ring: dict[str, Any] = {"num_barriers": config.stages}
    segments = 1 if shapes.mask.segments else 0
    spec = {
        "queries": _mosaic_gpu.tile((2, ROWS, dim), dtype),
        "keys": _mosaic_gpu.tile((config.stages, config.block_kv, dim), dtype),
        "values": _mosaic_gpu.tile((config.stages, config.block_kv, dim), dtype),
        "sums": plgpu.SMEM((2, ROWS), jnp.float32),
        "query_ready": plgpu.Barrier(num_arrivals=config.pack * (1 + segments), num_barriers=2),
        "key_ready": plgpu.Barrier(num_arrivals=1 + segments, **ring),
        "value_ready": plgpu.Barrier(**ring),
        "key_free": plgpu.Barrier(num_arrivals=2, **ring),
        "value_free": plgpu.Barrier(num_arrivals=2, **ring),
        # Barrier w lets warpgroup w issue its products.
        "turn": plgpu.Barrier(num_barriers=2),
    }
    if shapes.mask.segments:
        spec["query_ids"] = plgpu.SMEM((2, ROWS), jnp.int32)
        spec["key_ids"] = plgpu.SMEM((config.stages, config.block_kv), jnp.int32)
    return spec


class Block(NamedTuple):
    """Where one block stands: scalars that all its warpgroups compute alike."""

    batch: Any
    head: Any  # first query head
    kv_head: Any
    first: Any  # first query token
    offset: Any
    tiles: masks.Tiles


def locate(shapes: Shapes, inputs: Inputs) -> Block:
    batch, pack = lax.axis_index("batch"), lax.axis_index("heads")
    # Longest tiles first: with a causal mask the last queries see most keys.
    tile = (shapes.q_tiles - 1) - lax.axis_index("tile")
    head, first = pack * shapes.config.pack, tile * (2 * shapes.tokens)
    offset = inputs.offsets[batch] if shapes.mask.offset is None else shapes.mask.offset
    bounds = None
    if shapes.mask.segments:
        bounds = tuple(inputs.bounds[batch, tile, i] for i in range(4))
    tiles = masks.key_tiles(
        shapes.mask, first, 2 * shapes.tokens, offset, shapes.config.block_kv, bounds
    )
    return Block(batch, head, lax.div(head, shapes.group), first, offset, tiles)


def at_step(shapes: Shapes, block: Block, step: jax.Array):
    """The key tile of a step; both compute warpgroups and the memory warpgroup walk the same order."""
    both_ends = shapes.mask.sliding_window is not None or shapes.mask.segments
    return masks.walk(block.tiles, step, both_ends=both_ends)


def head_box(shapes: Shapes, query: _mosaic_gpu.Ref, block: Block, rows, index: int):
    """The query rows of head `block.head + index`."""
    head = block.head + index
    if shapes.fused:
        return query.at[block.batch, rows, block.kv_head, lax.rem(head, shapes.group)]
    return query.at[block.batch, rows, head]


# --- memory role -----------------------------------------------------------------------------------------------------


def memory_role(shapes: Shapes, inputs: Inputs, s: _mosaic_gpu.Scratch, block: Block) -> None:
    """Feeds keys and values, `stages` tiles ahead."""
    config = shapes.config
    steps = block.tiles.high - block.tiles.low
    plgpu.set_max_registers(config.memory_registers, action="decrease")
    plgpu.barrier_arrive(s.turn.at[0])

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, config.stages)
        rows = pl.ds(at_step(shapes, block, step) * config.block_kv, config.block_kv)
        place = (block.batch, rows, block.kv_head)
        key = (*place, shapes.group) if shapes.fused else place
        value = (*place, shapes.group + 1) if shapes.fused else place

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.key_free.at[slot])

        plgpu.copy_gmem_to_smem(inputs.key.at[key], s.keys.at[slot], s.key_ready.at[slot])
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(
                inputs.key_ids.at[block.batch, rows], s.key_ids.at[slot], s.key_ready.at[slot]
            )

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(s.value_free.at[slot])

        plgpu.copy_gmem_to_smem(inputs.value.at[value], s.values.at[slot], s.value_ready.at[slot])

    if _mosaic_gpu.interpreting():
        # The interpreter insists that every completed phase of a barrier is observed; the hardware does not care.
        @pl.loop(lax.max(0, steps - config.stages), steps)
        def _(step):
            plgpu.barrier_wait(s.key_free.at[lax.rem(step, config.stages)])
            plgpu.barrier_wait(s.value_free.at[lax.rem(step, config.stages)])


# --- compute role ----------------------------------------------------------------------------------------------------


def across(row, columns: int):
    """A value per row, repeated over the columns of a tile."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [0])


def load_queries(
    shapes: Shapes,
    inputs: Inputs,
    s: _mosaic_gpu.Scratch,
    block: Block,
    wg,
    first: jax.Array,
) -> None:
    ready, tokens = s.query_ready.at[wg], shapes.tokens
    rows = pl.ds(first, tokens)
    for index in range(shapes.config.pack):
        part = pl.ds(index * tokens, tokens)
        plgpu.copy_gmem_to_smem(
            head_box(shapes, inputs.query, block, rows, index), s.queries.at[wg, part], ready
        )
        if shapes.mask.segments:
            plgpu.copy_gmem_to_smem(
                inputs.query_ids.at[block.batch, rows], s.query_ids.at[wg, part], ready
            )
    plgpu.barrier_wait(ready)


def hide(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    scores: _mosaic_gpu.Ref,
    tile: _mosaic_gpu.Ref,
    slot,
    first,
    offset,
    wg,
):
    """Scores with -inf where a query must not see a key."""
    shape = scores.shape
    queries = masks.indices(shape, 0, 0)
    if shapes.config.pack > 1:
        queries = lax.rem(queries, jnp.int32(shapes.tokens))
    keys = masks.indices(shape, 1, tile * shape[1])
    query_ids = key_ids = None
    if shapes.mask.segments:
        query_ids = lax.broadcast_in_dim(plgpu.load(s.query_ids.at[wg], layout=PER_ROW), shape, [0])
        key_ids = lax.broadcast_in_dim(plgpu.load(s.key_ids.at[slot], layout=PER_KEY), shape, [1])
    shown = masks.visible(shapes.mask, queries + first, keys, offset, query_ids, key_ids)
    return jnp.where(shown, scores, -jnp.inf)


def capped(shapes: Shapes, scores: jax.Array):
    """Scores after the soft cap, and the factor that takes them to log2 units."""
    if shapes.soft_cap is None:
        return scores, shapes.scale * LOG2E
    return jnp.tanh(scores * (shapes.scale / shapes.soft_cap)), shapes.soft_cap * LOG2E


def weigh(scores: jax.Array, factor: float, m: jax.Array, l: jax.Array):
    """Online softmax: weights in float32, new maximum and sum, and what the old accumulator shrinks by."""
    columns = scores.shape[1]
    new = jnp.maximum(m, scores.max(axis=1) * factor)
    shrink = jnp.exp2(m - new)
    weights = jnp.exp2(scores * factor - across(new, columns))
    return weights, new, l * shrink + weights.sum(axis=1), shrink


def compute_role(
    shapes: Shapes,
    inputs: Inputs,
    out: jax.Array,
    lse: jax.Array,
    s: _mosaic_gpu.Scratch,
    block: Block,
    wg: jax.Array,
) -> None:
    config, dim = shapes.config, shapes.head_dim
    plgpu.set_max_registers(config.compute_registers, action="increase")
    first = block.first + wg * shapes.tokens
    load_queries(shapes, inputs, s, block, wg, first)
    steps = block.tiles.high - block.tiles.low
    masked_steps = masks.masked_steps(block.tiles)
    masking = shapes.mask.needed(config.block_kv)

    def prepare(scores, step, masked: bool):
        """Frees the slot of the keys and masks what the products left in registers."""
        tile, slot = at_step(shapes, block, step), lax.rem(step, config.stages)
        if not shapes.mask.segments:
            plgpu.barrier_arrive(s.key_free.at[slot])
        scores, factor = capped(shapes, scores)
        if masked:
            scores = hide(shapes, s, scores, tile, slot, first, block.offset, wg)
        if shapes.mask.segments:  # the ids of the keys stand in the slot as well
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.key_free.at[slot])
        return scores, factor

    def first_scores(accumulator):
        plgpu.barrier_wait(s.key_ready.at[0])
        plgpu.wgmma(accumulator, s.queries.at[wg], s.keys.at[0].T)
        return accumulator[...]

    m = plgpu.layout_cast(jnp.full((ROWS,), NOTHING_SEEN, jnp.float32), PER_ROW)
    l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), MATRIX)
    scores = pl.run_scoped(first_scores, _mosaic_gpu.accumulator(ROWS, config.block_kv))
    scores, factor = prepare(scores, 0, masking)
    weights, m, l, _ = weigh(scores, factor, m, l)

    step_of = overlapped_step if config.overlap else alternating_step
    body = functools.partial(step_of, shapes, s, wg, prepare)
    carry = (acc, weights.astype(shapes.dtype), m, l)
    edge = lax.max(masked_steps, 1) if masking else 1
    if masking:
        carry = lax.fori_loop(1, edge, functools.partial(body, masked=True), carry)
    carry = lax.fori_loop(edge, steps, functools.partial(body, masked=False), carry)
    acc, weights, m, l = carry

    last = lax.rem(steps - 1, config.stages)
    plgpu.barrier_wait(s.value_ready.at[last])
    acc = _mosaic_gpu.added(lambda a: plgpu.wgmma(a, weights, s.values.at[last]), acc)
    plgpu.barrier_arrive(s.value_free.at[last])
    if _mosaic_gpu.interpreting():
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(s.turn.at[0]))
    finish(shapes, inputs, out, lse, s, block, wg, first, acc, m, l)


def overlapped_step(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    wg: jax.Array,
    prepare,
    step: jax.Array,
    carry,
    *,
    masked: bool,
):
    """Scores of this step and the weighted sum of the one before, in flight together."""
    acc, weights, m, l = carry
    config, dim = shapes.config, shapes.head_dim
    slot, before = lax.rem(step, config.stages), lax.rem(step - 1, config.stages)
    (me,) = _mosaic_gpu.opaque(wg)
    plgpu.barrier_wait(s.value_ready.at[before])
    plgpu.barrier_wait(s.key_ready.at[slot])
    plgpu.barrier_wait(s.turn.at[wg])

    def products(scores_ref, acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(scores_ref, s.queries.at[me], s.keys.at[slot].T)
        plgpu.wgmma(acc_ref, weights, s.values.at[before])
        plgpu.barrier_arrive(s.turn.at[1 - wg])
        scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
        scores, factor = prepare(scores, step, masked)
        fresh, new, total, shrink = weigh(scores, factor, m, l)
        # Needs every exponential: keeps the compiler from moving them below the wait for the second product.
        s.sums.at[wg][...] = total
        return lax.optimization_barrier((acc_ref[...], fresh, shrink, new, total))

    acc, fresh, shrink, m, l = pl.run_scoped(
        products,
        _mosaic_gpu.accumulator(ROWS, config.block_kv),
        _mosaic_gpu.accumulator(ROWS, dim),
    )
    plgpu.barrier_arrive(s.value_free.at[before])
    # Rounded only now: a register that feeds a product in flight may not be written.
    return acc * across(shrink, dim), fresh.astype(shapes.dtype), m, l


def alternating_step(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    wg: jax.Array,
    prepare,
    step: jax.Array,
    carry,
    *,
    masked: bool,
):
    """The weighted sum of the step before, then scores and softmax; only the other warpgroup overlaps them."""
    acc, weights, m, l = carry
    config, dim = shapes.config, shapes.head_dim
    slot, before = lax.rem(step, config.stages), lax.rem(step - 1, config.stages)
    (me,) = _mosaic_gpu.opaque(wg)
    plgpu.barrier_wait(s.value_ready.at[before])
    plgpu.barrier_wait(s.key_ready.at[slot])
    plgpu.barrier_wait(s.turn.at[wg])
    acc = _mosaic_gpu.added(lambda a: plgpu.wgmma(a, weights, s.values.at[before]), acc)
    plgpu.barrier_arrive(s.value_free.at[before])

    def product(scores_ref):
        plgpu.wgmma(scores_ref, s.queries.at[me], s.keys.at[slot].T)
        return scores_ref[...]

    scores = pl.run_scoped(product, _mosaic_gpu.accumulator(ROWS, config.block_kv))
    plgpu.barrier_arrive(s.turn.at[1 - wg])
    scores, factor = prepare(scores, step, masked)
    fresh, m, l, shrink = weigh(scores, factor, m, l)
    return acc * across(shrink, dim), fresh.astype(shapes.dtype), m, l


def finish(
    shapes: Shapes,
    inputs: Inputs,
    out: _mosaic_gpu.Ref,
    lse: _mosaic_gpu.Ref,
    s: _mosaic_gpu.Scratch,
    block: Block,
    wg,
    first: jax.Array,
    acc,
    m: jax.Array,
    l: jax.Array,
) -> None:
    """Counts the sink, divides by the sum and writes the rows that exist."""
    tokens, pack = shapes.tokens, shapes.config.pack
    if shapes.sinks:
        sink = plgpu.layout_cast(jnp.full((ROWS,), inputs.sinks[block.head], jnp.float32), PER_ROW)
        for index in range(1, pack):
            later = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW) >= index * tokens
            sink = jnp.where(later, inputs.sinks[block.head + index], sink)
        new = jnp.maximum(m, sink)
        shrink = jnp.exp2(m - new)
        acc, m, l = acc * across(shrink, shapes.head_dim), new, l * shrink + jnp.exp2(sink - new)
    seen = l > 0.0
    inverse = jnp.where(seen, 1.0 / l, 0.0)
    s.queries.at[wg][...] = (acc * across(inverse, shapes.head_dim)).astype(shapes.dtype)
    s.sums.at[wg][...] = jnp.where(seen, (m + jnp.log2(l)) * (1.0 / LOG2E), -jnp.inf)
    plgpu.commit_smem()
    rows = pl.ds(first, tokens)
    for index in range(pack):
        part = pl.ds(index * tokens, tokens)
        head = block.head + index
        plgpu.copy_smem_to_gmem(s.queries.at[wg, part], out.at[block.batch, rows, head])
        plgpu.copy_smem_to_gmem(s.sums.at[wg, part], lse.at[block.batch, head, rows])
    plgpu.wait_smem_to_gmem(0)


# --- the kernel ------------------------------------------------------------------------------------------------------


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    config: ForwardConfig,
    scale: float,
    is_causal: bool = False,
    sliding_window: int | None = None,
    offset: int | jax.Array = 0,
    query_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention output `[B, T, N, D]` and lse `[B, T, N]` (float32, natural logarithm).

    Args:
      query, key, value: `[B, T, N, D]`, `[B, S, K, D]`, `[B, S, K, D]`, bfloat16 or float16.
      config: from `tuning`.
      offset: position of the first query: an integer, or int32 `[B]`.
      query_segment_ids, kv_segment_ids: int32 `[B, T]`, `[B, S]`; negative ids are padding.
      sinks: `[N]`, one logit per head that takes part in the softmax and carries no value.
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
        sinks is not None,
        False,
        config,
    )
    # TMA boxes are made of groups of 8 rows.
    q_rows, kv_rows = _mosaic_gpu.round_up(mask.q_len, 8), _mosaic_gpu.round_up(mask.kv_len, 8)
    query = _mosaic_gpu.pad_axis(query, 1, q_rows)
    key, value = (_mosaic_gpu.pad_axis(x, 1, kv_rows) for x in (key, value))
    return _call(shapes, (query, key, value), offset, query_segment_ids, kv_segment_ids, sinks)


def forward_qkv(
    qkv: jax.Array,
    *,
    config: ForwardConfig,
    scale: float,
    is_causal: bool = False,
    sliding_window: int | None = None,
    offset: int | jax.Array = 0,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `forward`, reading queries, keys and values as strided boxes of `qkv [B, T, K, R + 2, D]`."""
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
        sinks is not None,
        True,
        config,
    )
    qkv = _mosaic_gpu.pad_axis(qkv, 1, _mosaic_gpu.round_up(length, 8))
    return _call(shapes, (qkv,), offset, segment_ids, segment_ids, sinks)


def _call(
    shapes: Shapes,
    arrays,
    offset,
    query_ids,
    key_ids,
    sinks: jax.Array | None,
) -> tuple[Any, Any]:
    mask, config = shapes.mask, shapes.config
    q_rows = _mosaic_gpu.round_up(mask.q_len, 8)
    tile_rows = 2 * shapes.tokens
    optional: dict[str, jax.Array] = {}
    if mask.offset is None:
        optional["offsets"] = jnp.asarray(offset, jnp.int32)
    if mask.segments:
        query_ids = masks.padded_ids(query_ids, shapes.q_tiles * tile_rows, masks.QUERY_PADDING)
        key_ids = masks.padded_ids(key_ids, shapes.kv_tiles * config.block_kv, masks.KEY_PADDING)
        bounds = masks.segment_bounds(query_ids, tile_rows, key_ids, config.block_kv)
        optional |= {"query_ids": query_ids, "key_ids": key_ids, "bounds": bounds}
    if sinks is not None:
        optional["sinks"] = sinks.astype(jnp.float32) * LOG2E

    def kernel(*refs, **scratch):
        refs, (out, lse) = refs[:-2], refs[-2:]
        matrices = refs[:1] * 3 if shapes.fused else refs[:3]
        extra = dict(zip(optional, refs[len(arrays) :], strict=True))
        names = ("offsets", "query_ids", "key_ids", "bounds", "sinks")
        inputs = Inputs(*matrices, **{name: extra.get(name) for name in names})
        s = _mosaic_gpu.Scratch(scratch)
        block, wg = locate(shapes, inputs), lax.axis_index("warpgroup")
        pl.when(wg < 2)(lambda: compute_role(shapes, inputs, out, lse, s, block, wg))
        pl.when(wg == 2)(lambda: memory_role(shapes, inputs, s, block))

    names, sizes = zip(*shapes.grid, strict=True)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(
                (shapes.batch, q_rows, shapes.num_heads, shapes.head_dim), shapes.dtype
            ),
            # A multiple of the tile: rows of a vector are copied in bulk, which knows no bounds.
            jax.ShapeDtypeStruct(
                (shapes.batch, shapes.num_heads, shapes.q_tiles * tile_rows), jnp.float32
            ),
        ),
        scratch_types=scratch_spec(shapes),
        grid=sizes,
        grid_names=names,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_forward",
        **_mosaic_gpu.kernel_options(),
    )(*arrays, *optional.values())
    return out[:, : mask.q_len], jnp.swapaxes(lse[:, :, : mask.q_len], 1, 2)
