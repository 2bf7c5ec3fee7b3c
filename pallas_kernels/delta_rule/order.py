"""Where tokens lie: rows cut into chunks and lanes, segments and packed sequences, and the gates as tables.

What the chunked implementations share unchanged. A row of T tokens is cut into P segments ("lanes") of N chunks of C
tokens; `z` counts batch rows times lanes. Packed `cu_seqlens` rows are gathered into chunks that no sequence shares.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._inert import finite_part, spoil
from pallas_kernels._precision import compute_dtype
from pallas_kernels.delta_rule import algebra


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    batch: int
    length: int
    chunk: int
    lanes: int
    steps: int
    scale: float
    use_qk_l2norm: bool
    block: int = 1  # chunks whose state-free part is computed at once; divides `steps`
    per_channel: bool = False  # g holds a decay per key channel; one lane only


class Order(NamedTuple):
    """Where tokens, segments and sequences lie. Everything is None where a call has no such thing.

    Attributes:
      real: `[N, z, C]` bool, tokens that are not padding.
      segment: `[N, z, C]` int32, segments started in the chunk up to the token.
      source, target: `[P N C]` and `[T]` int32: the token in each chunk place (T: none), the place of each token.
      first, last: `[N, z]` bool, the chunk is the first / last of its sequence.
      sequence: `[N, z]` int32, the chunk's sequence.
    """

    real: jax.Array | None = None
    segment: jax.Array | None = None
    source: jax.Array | None = None
    target: jax.Array | None = None
    first: jax.Array | None = None
    last: jax.Array | None = None
    sequence: jax.Array | None = None


class Tokens(NamedTuple):
    """Operands, as the caller gave them or one chunk of them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    g: jax.Array
    beta: jax.Array


def bounded(g: jax.Array):
    """`g`, at least -1000: e^-1000 is 0 in every dtype, as e^-inf, but a sum of a chunk's keeps its other digits."""
    return jnp.maximum(g, jnp.asarray(-1000, g.dtype))


class Spoiled(NamedTuple):
    """What was not finite.

    Attributes:
      read: `[B, T, Hv]` bool, by the token alone: its query.
      written: `[B, T, Hv, Dv]`, and by everything after it in its segment or sequence.
      state: `[B or num_sequences, Hv, Dv]`, the initial state.
    """

    read: jax.Array
    written: jax.Array
    state: jax.Array


def spoiled_tokens(tokens: Tokens, initial_state: jax.Array, real) -> Spoiled:
    """Where a call is not finite.

    Chunks are full products, in which even a zero for "later" or "of another segment" would make NaN of a NaN: so they
    are computed with zeros instead (`load`), and `spoiled_outputs` says afterwards what became of those.
    """
    query, key, value, g, beta = tokens
    group = value.shape[2] // key.shape[2]
    rows_spoiled = lambda x: jnp.repeat((x * 0).sum(-1) != 0, group, axis=2)  # x * 0 is NaN or 0
    spoiled = rows_spoiled(key) | ~jnp.isfinite(beta)
    spoiled |= ~jnp.isfinite(g) if g.ndim == 3 else rows_spoiled(g)
    read, written = rows_spoiled(query), spoiled[..., None] | ~jnp.isfinite(value)
    if real is not None:
        read, written = read & real[..., None], written & real[..., None, None]
    return Spoiled(read, written, (initial_state * 0).sum(-2) != 0)


@jax.custom_jvp
def spoiled_outputs(outputs, tokens: Tokens, initial_state: jax.Array, boundaries, cu_seqlens):
    """`(out, final_state)` with NaN in every column that something not finite reached; derivatives are as without.

    Args:
      outputs: both, computed with zeros for what is not finite.
      tokens, initial_state: as the caller gave them.
      boundaries: `(starts, real, sequence)`, each `[B, T]` or None: tokens that begin a segment or sequence, tokens
        that are not padding, each token's packed sequence.
    """
    starts, real, sequence = boundaries
    place = jnp.arange(outputs[0].shape[1], dtype=jnp.int32)[None]

    def latest(happens):
        places = place.reshape(1, -1, *(1,) * (happens.ndim - 2))
        return jax.lax.cummax(jnp.where(happens, places, -1), axis=1)

    def mark(out, final):
        spoiled = spoiled_tokens(tokens, initial_state, real)
        begin = jnp.full_like(place, -1) if starts is None else latest(starts)
        touched = latest(spoiled.written) >= jnp.maximum(begin, 0)[..., None, None]
        if sequence is None:
            touched |= (begin < 0)[..., None, None] & spoiled.state[:, None]
            at_end = touched[:, -1]
        else:
            touched |= spoiled.state[jnp.minimum(sequence, spoiled.state.shape[0] - 1)]
            has_tokens = (cu_seqlens[1:] > cu_seqlens[:-1])[:, None, None]
            at_end = jnp.where(has_tokens, touched[0, cu_seqlens[1:] - 1], spoiled.state)
        touched |= spoiled.read[..., None]
        if real is not None:
            touched &= real[..., None, None]
        return spoil(out, touched), spoil(final, at_end[..., None, :])

    # One sum knows of any NaN or infinity; that a huge one overflows does no harm. A loop of at most one step hands the
    # outputs on in place, where a `cond` would copy them.
    sums = (jnp.sum(x, dtype=initial_state.dtype) for x in (*tokens, initial_state))
    total = functools.reduce(operator.add, sums)
    _, *marked = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), *mark(*carry[1:])),
        (~jnp.isfinite(total), *outputs),
    )
    return tuple(marked)


@spoiled_outputs.defjvp
def _spoiled_outputs_jvp(primals: tuple, tangents: tuple):
    return spoiled_outputs(*primals), tangents[0]


def chunk_count(length: int, num_sequences: int | None, chunk: int) -> int:
    """Chunks that certainly suffice: with packed sequences, each may leave its last chunk unfilled."""
    if num_sequences is None:
        return -(-length // chunk)
    return min(length, (length + num_sequences * (chunk - 1)) // chunk)


def dense_order(plan: Plan, segment_ids: jax.Array | None) -> Order:
    """Order of rows that are cut in place."""
    if segment_ids is None:
        return Order()
    starts, real = algebra.segment_starts(segment_ids)
    in_place = Order()
    return Order(
        real=in_lanes(plan, to_chunks(plan, in_place, real), axis=1),
        segment=jnp.cumsum(
            in_lanes(plan, to_chunks(plan, in_place, starts), axis=1).astype(jnp.int32), axis=-1
        ),
    )


def packed_order(plan: Plan, cu_seqlens) -> Order:
    """Order of one row of packed sequences, each of which starts a chunk of its own."""
    lengths = jnp.diff(cu_seqlens)
    ends = jnp.cumsum((lengths + plan.chunk - 1) // plan.chunk)
    begins = ends - (lengths + plan.chunk - 1) // plan.chunk
    chunks = jnp.arange(plan.lanes * plan.steps, dtype=ends.dtype)
    used = chunks < ends[-1]
    sequence = jnp.minimum(jnp.searchsorted(ends, chunks, side="right"), lengths.shape[0] - 1)
    offset = (chunks - begins[sequence])[:, None] * plan.chunk
    offset += jnp.arange(plan.chunk, dtype=ends.dtype)[None]
    filled = used[:, None] & (offset < lengths[sequence][:, None])
    source = jnp.where(filled, cu_seqlens[sequence][:, None] + offset, plan.length)

    tokens = jnp.arange(plan.length, dtype=cu_seqlens.dtype)
    owner = jnp.searchsorted(cu_seqlens[1:], tokens, side="right")
    owner_or_last = jnp.minimum(owner, lengths.shape[0] - 1)
    target = begins[owner_or_last] * plan.chunk + tokens - cu_seqlens[owner_or_last]
    places = plan.lanes * plan.steps * plan.chunk
    target = jnp.where(owner < lengths.shape[0], target, places)

    lanes = lambda x: x.reshape(plan.lanes, plan.steps).T
    return Order(
        source=source.reshape(-1),
        target=target,
        first=lanes(used & (chunks == begins[sequence])),
        last=lanes(used & (chunks + 1 == ends[sequence])),
        sequence=lanes(sequence),
    )


def to_rows(plan: Plan, order: Order, x: jax.Array):
    """`[B, T, ...]` to `[z, N C, ...]`, zeros where there is no token."""
    places = plan.lanes * plan.steps * plan.chunk
    if order.source is None:
        x = jnp.pad(x, [(0, 0), (0, places - plan.length)] + [(0, 0)] * (x.ndim - 2))
    else:
        x = jnp.take(x, order.source, axis=1, mode="fill", fill_value=0)
    return x.reshape(plan.batch * plan.lanes, plan.steps * plan.chunk, *x.shape[2:])


def real_rows(plan: Plan, order: Order, x: jax.Array):
    """As `to_rows`, with zeros on padding whatever it held."""
    x = to_rows(plan, order, x)
    if order.real is None:
        return x
    real = jnp.moveaxis(order.real, 0, 1).reshape(x.shape[0], -1)
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))


def from_rows(plan: Plan, order: Order, x: jax.Array):
    """`[z, N C, ...]` back to `[B, T, ...]`."""
    x = x.reshape(plan.batch, -1, *x.shape[2:])
    if order.target is None:
        return x[:, : plan.length]
    return jnp.take(x, order.target, axis=1, mode="fill", fill_value=0)


def to_chunks(plan: Plan, order: Order, x: jax.Array):
    """`[B, T, ...]` to `[N, z C, ...]`, zeros where there is no token.

    One axis for z and C: with z = 1 as an axis of its own, XLA would copy each operand of a scan for its layout.
    """
    x = to_rows(plan, order, x)
    x = x.reshape(x.shape[0], plan.steps, plan.chunk, *x.shape[2:])
    return jnp.swapaxes(x, 0, 1).reshape(plan.steps, -1, *x.shape[3:])


def from_chunks(plan: Plan, order: Order, x: jax.Array):
    """`[N, z C, ...]` back to `[B, T, ...]`."""
    x = jnp.swapaxes(in_lanes(plan, x, axis=1), 0, 1)
    return from_rows(plan, order, x.reshape(x.shape[0], -1, *x.shape[3:]))


def in_lanes(plan: Plan, x: jax.Array, *, axis: int = 0):
    """`[..., z C, ...]` to `[..., z, C, ...]`."""
    return x.reshape(*x.shape[:axis], -1, plan.chunk, *x.shape[axis + 1 :])


def through_lanes(plan: Plan, entry, transition, extra, *, reverse: bool = False):
    """What every lane starts from: `entry` carried through the affine maps of the lanes before (after) it."""
    split = lambda x: jnp.moveaxis(x.reshape(plan.batch, plan.lanes, *x.shape[1:]), 1, 0)

    def step(state, lane):
        m, e = lane
        return algebra.matmul("bhnij,bhnjv->bhniv", m, state) + e, state

    _, starts = jax.lax.scan(step, entry, (split(transition), split(extra)), reverse=reverse)
    return jnp.moveaxis(starts, 0, 1).reshape(extra.shape)


class States(NamedTuple):
    """Where states start: `bank` holds every packed sequence's own, `entry` a dense row's; `shape` is that of both."""

    shape: tuple[int, ...]
    entry: jax.Array
    bank: jax.Array | None


def start_states(plan: Plan, order: Order, tokens: Tokens, initial_state: jax.Array) -> States:
    """`[.., Hv, Dk, Dv]` by groups: `[.., h, n, Dk, Dv]`."""
    heads, group = tokens.key.shape[2], tokens.value.shape[2] // tokens.key.shape[2]
    states = finite_part(initial_state).reshape(-1, heads, group, *initial_state.shape[-2:])
    if order.sequence is None:
        return States(states.shape, states, None)
    return States(
        states.shape, jnp.zeros_like(states, shape=(plan.batch, *states.shape[1:])), states
    )


def places(order: Order) -> Order:
    """The part of the order that a scan over chunks walks through."""
    return order._replace(source=None, target=None)


def load(
    plan: Plan,
    place: Order,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
) -> Tokens:
    """One chunk's operands, each `[z C, ...]`, wide, heads first and by groups; 0 on padding and where not finite."""
    compute = compute_dtype(value.dtype)
    heads = key.shape[1]

    def clean(x):
        x = finite_part(in_lanes(plan, x))
        if place.real is not None:
            x = jnp.where(place.real.reshape(place.real.shape + (1,) * (x.ndim - 2)), x, 0)
        return jnp.moveaxis(x.astype(compute), 1, 2)

    q, k = clean(query), clean(key)
    if plan.use_qk_l2norm:
        q, k = algebra.l2_normalize(q), algebra.l2_normalize(k)
    g = clean(bounded(g))
    decay = g if plan.per_channel else by_group(g, heads)
    loaded = Tokens(q, k, by_group(clean(value), heads), decay, by_group(clean(beta), heads))
    # What is per channel is read so often that XLA's CPU must not compute it anew each time.
    return jax.lax.optimization_barrier(loaded) if plan.per_channel else loaded


def load_output(plan: Plan, x: jax.Array, heads, dtype):
    """One chunk of what has the output's shape, `[z C, Hv, Dv]`, to `[z, h, n, C, Dv]`."""
    return by_group(jnp.moveaxis(in_lanes(plan, x), 1, 2).astype(dtype), heads)


def by_group(x: jax.Array, heads):
    """`[z, Hv, C, ...]` to `[z, h, n, C, ...]`."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def join_groups(x: jax.Array):
    """`[z, h, n, C, Dv]` to `[z C, Hv, Dv]`."""
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)
    return x.reshape(-1, *x.shape[2:])


def enter(state: jax.Array, place: Order, bank, *, at: str = "first"):
    """Lanes whose chunk is the first (in the backward: the last) of a sequence take that sequence's own state."""
    if bank is None:
        return state
    here = getattr(place, at)
    return jnp.where(here[:, None, None, None, None], bank[place.sequence], state)


def cut(d_state: jax.Array, place: Order):
    """Nothing flows from a packed sequence to the one before it."""
    if place.first is None:
        return d_state
    return jnp.where(place.first[:, None, None, None, None], 0.0, d_state)


def put(bank: jax.Array, here, place: Order, state: jax.Array):
    """Files the states of lanes that are `here` under their sequences."""
    if bank is None or place.sequence is None:
        return None
    return bank.at[jnp.where(here, place.sequence, bank.shape[0])].set(state, mode="drop")


def lane(plan: Plan, state: jax.Array, index):
    """The state of every row's lane `index`."""
    return state.reshape(plan.batch, plan.lanes, *state.shape[1:])[:, index]


def all_chunks(plan: Plan, order: Order, tokens: Tokens) -> Tokens:
    """`[N, z C, ...]` of every operand."""
    return Tokens(*(to_chunks(plan, order, x) for x in tokens))


def spans(order: Order, num_sequences: int) -> jax.Array:
    """First chunk and number of chunks of every packed sequence, int32 `[num_sequences, 2]`; one lane."""
    assert order.sequence is not None
    sequence = order.sequence[:, 0]
    chunks = jnp.arange(sequence.shape[0], dtype=jnp.int32)

    def at(flag, values):
        place = jnp.where(flag[:, 0], sequence, num_sequences)
        return jnp.zeros_like(values, shape=(num_sequences,)).at[place].set(values, mode="drop")

    # A sequence without chunks gets 0 and 0.
    first, end = at(order.first, chunks), at(order.last, chunks + 1)
    return jnp.stack([first, end - first], axis=1)


class Gates(NamedTuple):
    """What the kernels make their tables of, chunk by chunk, float32.

    Attributes:
      g, beta: `[z, Hv, N, C]`, zero on padding.
      segment: `[z, N, C]`, segments started in the chunk up to the token; None where nothing is packed in place.
    """

    g: jax.Array
    beta: jax.Array
    segment: jax.Array | None


def gates(plan: Plan, order: Order, g: jax.Array, beta: jax.Array) -> Gates:
    """Gates of `g`, `beta` `[B, T, Hv]`, whatever they hold on padding."""

    def by_chunk(x):
        x = jnp.swapaxes(real_rows(plan, order, x).astype(jnp.float32), 1, 2)
        return x.reshape(*x.shape[:2], plan.steps, plan.chunk)

    segment = order.segment
    if segment is not None:
        segment = jnp.moveaxis(segment, 0, 1).astype(jnp.float32)
    return Gates(by_chunk(g), by_chunk(beta), segment)


# Rows of the table that the kernels have of a chunk of a value head, float32 (meanings in `algebra.Gates`): cumulative
# sum of g as two floats, beta, `until_end`, `since_start` (its last: `whole`), and where segments start inside of
# chunks, the token's.
HIGH, LOW, BETA, UNTIL, SINCE, SEGMENT = range(6)


def table_rows(*, segments: bool) -> int:
    """How many of these rows a table has."""
    return SEGMENT + segments
