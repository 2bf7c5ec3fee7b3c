"""The gated delta rule from chunk to chunk on Hopper (sm_90a), as a Pallas Mosaic GPU kernel.

Algorithm: the chunk form with T = (I + L)^-1 folded into the operands around it, which leaves two dependent products
from one state to the next instead of three:

    X = (until_end T)^T K           F = Gamma (Q K^T) T                        beside the chain
    W = beta (V - since_start K S)  S <- whole S + X^T W                       the chain
    out = read (since_start Q S + F W)

A block walks the chunks of one value head (or of half its value channels). One warpgroup runs one chunk ahead: it
brings tiles by TMA, makes queries and keys float16 of length 1 where they lie, and then X and F. One or two warpgroups
hold 64 value channels each of the transposed state, in float32 registers from the first chunk to the last; rounded,
those registers are the left operand of `S^T K^T` and `S^T Q^T`, so that neither state nor W passes through shared
memory.

Layout: query, key `[z, N 64, Hk, Dk]`, value and out `[z, N 64, Hv, Dv]`, T `[z, Hv, N, 64, 64]`, gates
`[z, Hv, N, 5 or 6, 64]` (`order.HIGH` to `order.SEGMENT`), states transposed, `[rows, Hv, Dv, Dk]`. `spans` gives each
state its chunks, so that packed sequences, each of which begins a chunk, take a row each. Beta stays outside of T, in
float32.

Units: states and W are divided by a power of two, so that float16 operands, eight times finer than bfloat16, hold
values of any size. It is larger than the first state and every value so far: the warpgroup ahead raises it where a
chunk holds a larger one, in factors of the gates' table with which the chain multiplies in any case. Shared memory at
Dk = Dv = 128: 144 KiB of tiles in three stages, 16 of T, 8 of scaled T, 32 of X, 16 of F, 6 of gates.

Source: Yang et al., Gated Delta Networks (arXiv 2412.06464), section 3.3; docs/gated_delta_rule.md.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_gpu
from pallas_kernels._mosaic_gpu import ROWS, Ref
from pallas_kernels.delta_rule import order
from pallas_kernels.delta_rule.hopper.chunk import (
    HALF,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    SQUARE,
    TRANSPOSED,
    across,
    as_half,
    down,
    gated,
    half_keys,
    halved,
    inverse_length,
    inverse_power,
    inverse_size,
    largest,
    power_of_two,
    product,
)
from pallas_kernels.delta_rule.hopper.tuning import CHUNK, ForwardConfig

# Rows of `positions`, both 0, 1, ..., 63: of one array the compiler would ask for one layout.
ROW, COLUMN = range(2)
# Rows of a chunk's table that `prepare` makes of it, factors per token: of its value in what is written; of what the
# state says about its query (the last one: of the state itself); of what it says about its key; of the output.
WRITE, CARRY, FADE, READ = order.BETA, order.SINCE, order.SEGMENT + 1, order.SEGMENT + 2


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything static about the kernel.

    Attributes:
      rows: states, each with a span of chunks.
      width: value channels of a state.
      given: dtype of queries and keys in device memory; in shared memory they become float16.
      use_qk_l2norm: each of them is divided by its length then.
      scale: multiplies what a token reads.
      values: False where every value is zero (the map of a segment).
      output: False where only the final state is wanted.
    """

    rows: int
    value_heads: int
    group: int
    key_dim: int
    width: int
    given: Any
    use_qk_l2norm: bool
    scale: float
    value_dtype: Any  # of no meaning without values
    segments: bool
    values: bool
    output: bool
    config: ForwardConfig

    @property
    def owners(self) -> int:
        """Warpgroups of a block that hold 64 value channels each."""
        return self.width // ROWS // self.config.splits


class Inputs(NamedTuple):
    """References to device memory; None where the kernel has no such input."""

    query: Ref
    key: Ref
    value: Ref
    inverse: Ref
    tables: Ref
    start: Ref  # divided by `unit`
    unit: Ref  # [rows, Hv]
    spans: Ref  # [rows, 3]: row of the tokens, first chunk, chunks


class Outputs(NamedTuple):
    """References to device memory."""

    out: Ref
    final: Ref  # divided by `unit`
    unit: Ref  # [rows, Hv, splits, 64], each of the 64 the same


def scratch_spec(shapes: Shapes) -> dict[str, Any]:
    """Shared memory and barriers of one block."""
    stages, dtype, dim = shapes.config.stages, HALF, shapes.key_dim
    copies = 3 + (1 if shapes.output else 0) + (shapes.owners if shapes.values else 0)
    spec = {
        "keys": _mosaic_gpu.tile((stages, CHUNK, dim), dtype),
        "tables": plgpu.SMEM((stages, READ + 1, CHUNK), jnp.float32),
        "sizes": plgpu.SMEM((CHUNK,), jnp.float32),
        "unit": plgpu.SMEM((CHUNK,), jnp.float32),
        "inverse": _mosaic_gpu.tile((2, *SQUARE), dtype),
        "scaled": _mosaic_gpu.tile(SQUARE, dtype),
        "writes": _mosaic_gpu.tile((2, CHUNK, dim), dtype),
        "positions": plgpu.SMEM((2, CHUNK), jnp.int32),
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=shapes.owners, num_barriers=stages),
        "folded": plgpu.Barrier(num_barriers=2),
        "used": plgpu.Barrier(num_arrivals=shapes.owners, num_barriers=2),
    }
    if shapes.values:  # where the chunk's output is made afterwards
        spec["values"] = _mosaic_gpu.tile((stages, shapes.owners, *SQUARE), shapes.value_dtype)
    if shapes.output:
        spec["queries"] = _mosaic_gpu.tile((stages, CHUNK, dim), dtype)
        spec["reads"] = _mosaic_gpu.tile((2, *SQUARE), dtype)
    return spec


class Block(NamedTuple):
    """Where one block stands."""

    row: jax.Array  # of the states
    source: jax.Array  # row of the tokens
    head: jax.Array
    key_head: jax.Array
    channel: jax.Array  # first value channel
    first: jax.Array  # first chunk
    chunks: jax.Array


def locate(shapes: Shapes, inputs: Inputs) -> Block:
    """Where this block stands. Each role asks: known to both, it would be spilled before they have their registers."""
    row, head, part = (lax.axis_index(name) for name in ("row", "heads", "part"))
    source, first, chunks = (inputs.spans[row, i] for i in range(3))
    channel = part * (shapes.owners * ROWS)
    return Block(row, source, head, lax.div(head, shapes.group), channel, first, chunks)


# --- one chunk ahead -------------------------------------------------------------------------------------------------


def fetch(shapes: Shapes, inputs: Inputs, s: _mosaic_gpu.Scratch, block: Block, step) -> None:
    """Asks for the tiles of a chunk."""
    chunk = block.first + step
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    slot = lax.rem(step, shapes.config.stages)
    ready = s.ready.at[slot]
    place, head = (block.source, tokens), (block.source, block.head, chunk)
    plgpu.copy_gmem_to_smem(inputs.key.at[*place, block.key_head], s.keys.at[slot], ready)
    plgpu.copy_gmem_to_smem(inputs.inverse.at[head], s.inverse.at[lax.rem(step, 2)], ready)
    rows = pl.ds(0, order.table_rows(segments=shapes.segments))
    plgpu.copy_gmem_to_smem(inputs.tables.at[*head, rows], s.tables.at[slot, rows], ready)
    if shapes.output:
        plgpu.copy_gmem_to_smem(inputs.query.at[*place, block.key_head], s.queries.at[slot], ready)
    for owner in range(shapes.owners if shapes.values else 0):
        channels = pl.ds(block.channel + owner * ROWS, ROWS)
        box = inputs.value.at[*place, block.head, channels]
        plgpu.copy_gmem_to_smem(box, s.values.at[slot, owner], ready)


def raised(shapes: Shapes, s: _mosaic_gpu.Scratch, slot: jax.Array) -> tuple[Any, Any]:
    """The unit before the chunk and the one that its values ask for, per token (all the same)."""
    before = plgpu.load(s.unit, layout=PER_ROW)
    if not shapes.values:
        return before, before
    tiles = (s.values.at[slot, owner] for owner in range(shapes.owners))
    wide = (plgpu.load(tile, layout=MATRIX).astype(jnp.float32) for tile in tiles)
    s.sizes[...] = largest(wide)
    plgpu.commit_smem()
    size = jnp.max(down(plgpu.load(s.sizes, layout=PER_COLUMN)), axis=1)
    unit = jnp.maximum(before, power_of_two(size))
    s.unit[...] = unit
    return before, unit


def prepare(shapes: Shapes, s: _mosaic_gpu.Scratch, slot: jax.Array) -> None:
    """Keys and queries of a chunk as float16, where they lie, and its factors."""
    half_keys(s.keys.at[slot], shapes.given, shapes.use_qk_l2norm)
    table = s.tables.at[slot]
    beta, since = (plgpu.load(table.at[row], layout=PER_ROW) for row in (order.BETA, order.SINCE))
    before, unit = raised(shapes, s, slot)
    inverse = inverse_power(unit)
    carry = since * (before * inverse)
    table.at[WRITE][...] = beta * inverse
    table.at[FADE][...] = beta * carry
    table.at[CARRY][...] = carry
    if shapes.output:
        size = inverse_length if shapes.use_qk_l2norm else inverse_size
        length = halved(s.queries.at[slot], shapes.given, size)
        read = shapes.scale * unit
        table.at[READ][...] = read if length is None else read * length
    plgpu.commit_smem()


def fold(shapes: Shapes, s: _mosaic_gpu.Scratch, step: jax.Array) -> None:
    """Makes X and F of a chunk."""
    slot, two = lax.rem(step, shapes.config.stages), lax.rem(step, 2)
    table, inverse = s.tables.at[slot], s.inverse.at[two]
    plgpu.barrier_wait(s.ready.at[slot])
    prepare(shapes, s, slot)

    @pl.when(step >= 2)
    def _():
        plgpu.barrier_wait(s.used.at[two])

    if shapes.output:
        scores = product(s.queries.at[slot], s.keys.at[slot].T)
        row = across(plgpu.load(s.positions.at[ROW], layout=PER_ROW))
        column = down(plgpu.load(s.positions.at[COLUMN], layout=PER_COLUMN))
        scores = scores * gated(table, row >= column, shapes.segments)
        s.reads.at[two][...] = product(scores.astype(HALF), inverse).astype(HALF)
    until = across(plgpu.load(table.at[order.UNTIL], layout=PER_ROW))
    scaled = plgpu.load(inverse, layout=MATRIX).astype(jnp.float32) * until
    s.scaled[...] = scaled.astype(HALF)
    plgpu.commit_smem()
    for part in range(shapes.key_dim // CHUNK):  # by 64 columns, to leave registers to the chain
        columns = pl.ds(part * CHUNK, CHUNK)
        writes = product(s.scaled.T, s.keys.at[slot, :, columns])
        s.writes.at[two, :, columns][...] = writes.astype(HALF)
    plgpu.commit_smem()
    plgpu.barrier_arrive(s.folded.at[two])


def ahead_role(shapes: Shapes, inputs: Inputs, outputs: Outputs, s: _mosaic_gpu.Scratch) -> None:
    config = shapes.config
    if config.ahead_registers:
        plgpu.set_max_registers(config.ahead_registers, action="decrease")
    block = locate(shapes, inputs)
    chunks = block.chunks
    # Read where they are needed: made there, they would live in registers throughout, and others be spilled.
    for axis in (ROW, COLUMN):
        place = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=PER_ROW)
        s.positions.at[axis][...] = place
    unit = inputs.unit[block.row, block.head]
    s.unit[...] = plgpu.layout_cast(lax.broadcast(unit, (CHUNK,)), PER_ROW)
    plgpu.commit_smem()
    pl.when(chunks > 0)(lambda: fetch(shapes, inputs, s, block, 0))

    @pl.loop(0, chunks)
    def _(step):
        following = step + 1

        @pl.when((following < chunks) & (following >= config.stages))
        def _():
            plgpu.barrier_wait(s.free.at[lax.rem(following, config.stages)])

        pl.when(following < chunks)(lambda: fetch(shapes, inputs, s, block, following))
        fold(shapes, s, step)

    # Behind the barrier of the last chunk, or of the first unit.
    part = lax.axis_index("part")
    plgpu.copy_smem_to_gmem(s.unit, outputs.unit.at[block.row, block.head, part])
    plgpu.wait_smem_to_gmem(0)

    if _mosaic_gpu.interpreting():
        # The interpreter insists that every completed phase of a barrier is observed; the hardware does not care.
        @pl.loop(lax.max(0, chunks - config.stages), chunks)
        def _(step):
            plgpu.barrier_wait(s.free.at[lax.rem(step, config.stages)])

        @pl.loop(lax.max(0, chunks - 2), chunks)
        def _(step):
            plgpu.barrier_wait(s.used.at[lax.rem(step, 2)])


# --- the chain -------------------------------------------------------------------------------------------------------


def ask_state(
    shapes: Shapes, s: _mosaic_gpu.Scratch, slot: jax.Array, wg: jax.Array, state: jax.Array
) -> tuple[Any, Any]:
    """What the state says about the keys, less than what is to be written (W^T); and about the queries."""
    half, table = state.astype(HALF), s.tables.at[slot]
    by_token = lambda row: down(plgpu.load(table.at[row], layout=PER_COLUMN))

    def write(recalled):
        wanted = -by_token(FADE) * recalled
        if shapes.values:
            value = plgpu.load(s.values.at[slot, wg].T, layout=TRANSPOSED)
            value = plgpu.layout_cast(value, MATRIX).astype(jnp.float32)
            wanted = wanted + by_token(WRITE) * value
        return wanted

    def both(recalled_ref, carried_ref):
        plgpu.wgmma(recalled_ref, half, s.keys.at[slot].T)
        plgpu.wgmma(carried_ref, half, s.queries.at[slot].T)
        wanted = write(plgpu.wgmma_accumulator_load(recalled_ref, wait_n=1))
        return wanted, carried_ref[...]

    square = _mosaic_gpu.accumulator(*SQUARE)
    if shapes.output and shapes.config.overlap:
        wanted, carried = pl.run_scoped(both, square, square)
        # Rounded only now: a register that feeds a product in flight may not be written.
        return wanted.astype(HALF), carried * by_token(CARRY)
    written = write(product(half, s.keys.at[slot].T)).astype(HALF)
    if not shapes.output:
        return written, None
    return written, product(half, s.queries.at[slot].T) * by_token(CARRY)


def advance(
    shapes: Shapes,
    s: _mosaic_gpu.Scratch,
    slot: jax.Array,
    two,
    state: jax.Array,
    written: jax.Array,
    carried,
) -> tuple[Any, Any]:
    """The state after the chunk, and the chunk's output, transposed."""
    state = state * s.tables[slot, CARRY, CHUNK - 1]
    if not shapes.output:
        return _mosaic_gpu.added(lambda a: plgpu.wgmma(a, written, s.writes.at[two]), state), None

    def both(state_ref, out_ref):
        state_ref[...] = state
        out_ref[...] = carried
        plgpu.wgmma(state_ref, written, s.writes.at[two])
        plgpu.wgmma(out_ref, written, s.reads.at[two].T)
        return plgpu.wgmma_accumulator_load(state_ref, wait_n=1), out_ref[...]

    state, out = pl.run_scoped(
        both, _mosaic_gpu.accumulator(ROWS, shapes.key_dim), _mosaic_gpu.accumulator(*SQUARE)
    )
    read = down(plgpu.load(s.tables.at[slot, READ], layout=PER_COLUMN))
    return state, out * read


def chain_role(
    shapes: Shapes, inputs: Inputs, outputs: Outputs, s: _mosaic_gpu.Scratch, wg: jax.Array
) -> None:
    config = shapes.config
    if config.chain_registers:
        plgpu.set_max_registers(config.chain_registers, action="increase")
    block = locate(shapes, inputs)
    chunks = block.chunks
    channels = pl.ds(block.channel + wg * ROWS, ROWS)
    place = (block.row, block.head, channels)
    state = plgpu.load(inputs.start.at[place], layout=MATRIX, optimized=False)

    def release(step):
        """The tile that held the output has left: the slot of that step may be filled again."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s.free.at[lax.rem(step, config.stages)])

    def body(step, state):
        slot, two = lax.rem(step, config.stages), lax.rem(step, 2)
        plgpu.barrier_wait(s.ready.at[slot])
        plgpu.barrier_wait(s.folded.at[two])
        written, carried = ask_state(shapes, s, slot, wg, state)
        if shapes.output:
            pl.when(step > 0)(lambda: release(step - 1))
        state, out = advance(shapes, s, slot, two, state, written, carried)
        plgpu.barrier_arrive(s.used.at[two])
        if shapes.output:
            tile = s.values.at[slot, wg]
            tile.T[...] = plgpu.layout_cast(out.astype(shapes.value_dtype), TRANSPOSED)
            # Also orders the reads of values and gates before TMA fills the slot again.
            plgpu.commit_smem()
            tokens = pl.ds((block.first + step) * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(
                tile, outputs.out.at[block.source, tokens, block.head, channels]
            )
        else:
            plgpu.commit_smem()
            plgpu.barrier_arrive(s.free.at[slot])
        return state

    state = lax.fori_loop(0, chunks, body, state)
    if shapes.output:
        pl.when(chunks > 0)(lambda: release(chunks - 1))
    outputs.final.at[place][...] = state
    plgpu.wait_smem_to_gmem(0)


# --- the kernel ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a walk leaves.

    Attributes:
      out: `[z, N 64, Hv, Dv]`, the value's dtype.
      final: `[rows, Hv, Dk, Dv]` float32.
      unit: `[rows, Hv]` float32, a power of two above all values and the first state of the row and head.
    """

    out: Any
    final: jax.Array
    unit: jax.Array


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tables: jax.Array,
    inverse: jax.Array,
    start: jax.Array,
    *,
    config: ForwardConfig,
    scale: float,
    segments: bool,
    use_qk_l2norm: bool = False,
    spans: jax.Array | None = None,
) -> Result:
    """The chain with outputs.

    Args:
      query, key: `[z, N 64, Hk, Dk]`, bfloat16 or float16, zero on padding; products take them as float16.
      value: `[z, N 64, Hv, Dv]`, bfloat16 or float16. Dk, Dv: 64 or 128.
      tables, inverse: of the prologue; T in float16.
      start: `[rows, Hv, Dk, Dv]` float32.
      scale: multiplies what a token reads.
      segments: whether segments start inside of chunks.
      use_qk_l2norm: queries and keys are divided by their lengths first; else a key's is at most 1, a query's any.
      spans: int32 `[rows, 3]`, the row of tokens, first chunk and number of chunks of each state, disjoint; None where
        state z walks all of row z. Outputs of chunks that no span holds are undefined.
    """
    return _call(
        query, key, value, tables, inverse, start, config, scale, segments, use_qk_l2norm, spans
    )


def final_state(
    key: jax.Array,
    value: jax.Array | None,
    tables: jax.Array,
    inverse: jax.Array,
    start: jax.Array,
    *,
    config: ForwardConfig,
    use_qk_l2norm: bool = False,
    spans: jax.Array | None = None,
) -> jax.Array:
    """The final state of `forward` alone; without a value, that of values which are all zero."""
    return _call(
        None, key, value, tables, inverse, start, config, 1.0, False, use_qk_l2norm, spans
    ).final


def _call(
    query,
    key: jax.Array,
    value: Any,
    tables: jax.Array,
    inverse: jax.Array,
    start: jax.Array,
    config: ForwardConfig,
    scale: float,
    segments: bool,
    use_qk_l2norm: bool,
    spans,
) -> Result:
    given_dtype, key = key.dtype, as_half(key)
    query = None if query is None else as_half(query)
    rows, value_heads, key_dim, width = start.shape
    if spans is None:
        whole = jnp.full((rows,), tables.shape[2], jnp.int32)
        spans = jnp.stack([jnp.arange(rows, dtype=jnp.int32), jnp.zeros_like(whole), whole], axis=1)
    unit = power_of_two(jnp.max(jnp.abs(start), axis=(2, 3)))
    given = {"query": query, "key": key, "value": value, "inverse": inverse, "tables": tables}
    given |= {"start": jnp.swapaxes(start / unit[..., None, None], 2, 3)}
    given |= {"unit": unit, "spans": spans}
    given = {name: array for name, array in given.items() if array is not None}
    shapes = Shapes(
        rows,
        value_heads,
        value_heads // key.shape[2],
        key_dim,
        width,
        given_dtype,
        use_qk_l2norm,
        scale,
        None if value is None else value.dtype,
        segments,
        value is not None,
        query is not None,
        config,
    )
    out_type = [
        jax.ShapeDtypeStruct((rows, value_heads, width, key_dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, value_heads, config.splits, CHUNK), jnp.float32),
    ]
    if query is not None and value is not None:
        out_type.append(jax.ShapeDtypeStruct(value.shape, value.dtype))

    def delta_rule_forward(*references, **scratch):
        extra = dict(zip(given, references, strict=False))
        inputs = Inputs(**{name: extra.get(name) for name in Inputs._fields})
        final, unit, *out = references[len(given) :]
        outputs = Outputs(out[0] if out else None, final, unit)
        s = _mosaic_gpu.Scratch(scratch)
        wg = lax.axis_index("warpgroup")
        pl.when(wg < shapes.owners)(lambda: chain_role(shapes, inputs, outputs, s, wg))
        pl.when(wg == shapes.owners)(lambda: ahead_role(shapes, inputs, outputs, s))

    final, unit, *out = plgpu.kernel(
        delta_rule_forward,
        out_type=out_type,
        scratch_types=scratch_spec(shapes),
        grid=(value_heads, config.splits, rows),
        grid_names=("heads", "part", "row"),
        num_threads=shapes.owners + 1,
        thread_name="warpgroup",
        kernel_name="delta_rule_forward" if shapes.output else "delta_rule_final_state",
        **_mosaic_gpu.kernel_options(),
    )(*given.values())
    unit = unit[..., 0]
    by_channel = jnp.repeat(unit, width // config.splits, axis=2)[..., None]
    final = jnp.swapaxes(final * by_channel, 2, 3)
    return Result(out[0] if out else None, final, jnp.max(unit, axis=2))
