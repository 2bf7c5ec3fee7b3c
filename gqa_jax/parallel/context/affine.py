"""Affine maps `S -> M S + E` of the chunks of a row, combined across devices. All in float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gqa_jax.parallel.context.order import Layout, chunks_of_row, num_slots, own_chunks


class Affine(NamedTuple):
    """`S -> matrix @ S + offset`.

    Attributes:
      matrix: `[..., Dk, Dk]`.
      offset: `[..., Dk, Dv]`.
    """

    matrix: Float[Array, "... Dk Dk"]
    offset: Float[Array, "... Dk Dv"]

    def then(self, later: "Affine") -> "Affine":
        """The map that applies this one first."""
        return Affine(
            _dot(later.matrix, self.matrix), _dot(later.matrix, self.offset) + later.offset
        )

    def __call__(self, state: Array) -> Array:
        return _dot(self.matrix, state) + self.offset


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def incoming_states(
    maps: Affine,
    initial_state: Float[Array, "B H Dk Dv"],
    *,
    axis_name: Any,
    layout: Layout,
    exchange: str | None,
) -> tuple[Float[Array, "B slots H Dk Dv"], Float[Array, "B H Dk Dv"]]:
    """The state before each of this device's chunks, and after the whole row.

    Args:
      maps: `[B, slots, H, Dk, ...]`, of this device's chunks.
      initial_state: before the row.
      axis_name: the axis that splits the tokens.
      layout: which chunks those are.
      exchange: "all_gather", "prefix_scan", "all_to_all", or None for the one that sends the fewest bytes.

    Raises:
      ValueError: "all_to_all" with heads that the axis does not divide.
    """
    devices, (heads, key_dim, value_dim) = lax.axis_size(axis_name), maps.offset.shape[2:]
    if exchange is None:
        exchange = cheapest_exchange(devices, heads, key_dim, value_dim)
    if exchange == "all_to_all" and heads % devices:
        raise ValueError(
            f"state_exchange 'all_to_all' must have a multiple of {devices} value heads on each device (axis "
            f"{axis_name!r}), got {heads}; use 'all_gather' or 'prefix_scan'"
        )
    if exchange == "prefix_scan":
        incoming = _prefix_scan(maps, initial_state, axis_name, layout)
    else:
        together = _all_gather if exchange == "all_gather" else _all_to_all
        incoming = _fold(maps, initial_state, together(axis_name, layout))
    after = Affine(*(x[:, -1] for x in maps))(incoming[:, -1])
    is_last = own_chunks(axis_name, layout)[-1] == devices * num_slots(layout) - 1
    return incoming, lax.psum(jnp.where(is_last, after, jnp.zeros_like(after)), axis_name)


def cheapest_exchange(devices: int, heads: int, key_dim: int, value_dim: int) -> str:
    """The exchange for which a device sends the fewest numbers per head and chunk in the forward."""
    pair, state = key_dim * (key_dim + value_dim), key_dim * value_dim
    sent: dict[str, float] = {
        "all_gather": (devices - 1) * pair,
        "prefix_scan": ((devices - 1).bit_length() + 1) * pair,
    }
    if heads % devices == 0:
        sent["all_to_all"] = (pair + state) * (devices - 1) / devices
    return min(sent, key=lambda name: sent[name])


class _Exchange(NamedTuple):
    """A collective that brings the chunks of a row together on every device, for all heads or a share H' of them.

    Attributes:
      to_row: `[B, slots, H, ...]` of this device's chunks to a list of `[B, H', ...]`, one for each chunk of the row.
      to_slots: the inverse.
      share: `[B, H, ...]`, the same on all devices, to this device's `[B, H', ...]`.
      unshare: its transpose: `[B, H', ...]` to `[B, H, ...]`, whose sum over devices is the gradient.
    """

    to_row: Callable[[Array], list[Array]]
    to_slots: Callable[[list[Array]], Array]
    share: Callable[[Array], Array]
    unshare: Callable[[Array], Array]


def _all_gather(axis_name, layout: Layout) -> _Exchange:
    """Every device gets the whole row, for all heads."""

    def to_row(x):
        return chunks_of_row(lax.all_gather(x, axis_name), layout)

    def to_slots(chunks):
        row = jnp.stack(chunks)  # [chunks, B, H, ...]
        own = [
            lax.dynamic_index_in_dim(row, i, keepdims=False) for i in own_chunks(axis_name, layout)
        ]
        return jnp.stack(own, axis=1)  # [B, slots, H, ...]

    def unshare(x):  # the same on all devices: one counts
        return jnp.where(lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x))

    return _Exchange(to_row, to_slots, lambda x: x, unshare)


def _all_to_all(axis_name, layout: Layout) -> _Exchange:
    """Chunks are traded for heads: every device gets the whole row, for H' = H / n heads."""
    devices = lax.axis_size(axis_name)

    def to_row(x):
        x = lax.all_to_all(x, axis_name, split_axis=2, concat_axis=0, tiled=True)
        x = x.reshape(devices, -1, *x.shape[1:])  # [n, B, slots, H', ...]
        return chunks_of_row(x, layout)

    def to_slots(chunks):
        slots = [jnp.stack(chunks[:devices])]  # [n, B, H', ...]
        if layout == "zigzag":
            slots.append(jnp.stack(chunks[: devices - 1 : -1]))
        x = jnp.stack(slots, axis=2)  # [n, B, slots, H', ...]
        x = x.reshape(-1, *x.shape[2:])  # [n B, slots, H', ...]
        return lax.all_to_all(x, axis_name, split_axis=0, concat_axis=2, tiled=True)

    def share(x):
        heads = x.shape[1] // devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * heads, heads, axis=1)

    def unshare(x):
        batch, heads, *sizes = x.shape
        whole = jnp.zeros_like(x, shape=(batch, heads * devices, *sizes))
        return lax.dynamic_update_slice_in_dim(whole, x, lax.axis_index(axis_name) * heads, axis=1)

    return _Exchange(to_row, to_slots, share, unshare)


def _fold(maps: Affine, initial_state: Array, exchange: _Exchange) -> Array:
    """The state before each of this device's chunks: every device applies the maps of the whole row, one by one.

    The derivative goes backward with the transposed matrices, which are here already: only cotangents of states
    travel, half of what came forward or less.
    """

    @jax.custom_vjp
    def run(maps, initial_state):
        return forward(maps, initial_state)[0]

    def forward(maps, initial_state):
        key_dim = maps.matrix.shape[-1]
        state, states, matrices = exchange.share(initial_state), [], []
        for packed in exchange.to_row(jnp.concatenate(maps, axis=-1)):  # [B, H', Dk, Dk + Dv]
            states.append(state)
            matrices.append(packed[..., :key_dim])
            state = _dot(matrices[-1], state) + packed[..., key_dim:]
        incoming = exchange.to_slots(states)
        return incoming, (matrices, incoming)

    def backward(residuals, d_incoming):
        matrices, incoming = residuals
        d_states = exchange.to_row(d_incoming)  # of each chunk of the row [B, H', Dk, Dv]
        d_state, d_offsets = jnp.zeros_like(d_states[0]), []
        for matrix, d_own in zip(reversed(matrices), reversed(d_states), strict=True):
            d_offsets.append(d_state)
            d_state = _dot(jnp.swapaxes(matrix, -1, -2), d_state) + d_own
        d_offset = exchange.to_slots(d_offsets[::-1])
        d_matrix = _dot(d_offset, jnp.swapaxes(incoming, -1, -2))
        return Affine(d_matrix, d_offset), exchange.unshare(d_state)

    run.defvjp(forward, backward)
    return run(maps, initial_state)


def _prefix_scan(maps, initial_state, axis_name, layout):
    """As `_fold`, by Hillis-Steele: after hop j a device knows the map of its own and the 2^j - 1 chunks before it."""
    devices, rank = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def scan(own: Affine, towards: int) -> tuple[Affine, Affine]:
        """Maps of (all chunks before this device's, those and its own); chunks run up (1) or down (-1) the ranks."""
        total, distance = own, 1
        place = rank if towards == 1 else devices - 1 - rank
        while distance < devices:
            joined = _shift(total, axis_name, towards * distance).then(total)
            known = place >= distance
            total = jax.tree.map(lambda a, b, known=known: jnp.where(known, a, b), joined, total)
            distance *= 2
        return _shift(total, axis_name, towards), total

    low, low_total = scan(Affine(*(x[:, 0] for x in maps)), 1)
    incoming = [jnp.where(rank == 0, initial_state, low(initial_state))]
    if layout == "zigzag":
        # The last rank's second chunk follows its first: what it starts the way down with contains the way up.
        own = Affine(*(x[:, 1] for x in maps))
        turn = rank == devices - 1
        start = jax.tree.map(lambda a, b: jnp.where(turn, a, b), low_total.then(own), own)
        high, _ = scan(start, -1)
        high = jax.tree.map(lambda a, b: jnp.where(turn, a, b), low_total, high)
        incoming.append(high(initial_state))
    return jnp.stack(incoming, axis=1)


def _shift(maps: Affine, axis_name, distance: int) -> Affine:
    """Device i's map at i + distance; zeros where none arrives. One message."""
    devices = lax.axis_size(axis_name)
    pairs = [(i, i + distance) for i in range(devices) if 0 <= i + distance < devices]
    packed = lax.ppermute(jnp.concatenate(maps, axis=-1), axis_name, pairs)
    key_dim = maps.matrix.shape[-1]
    return Affine(packed[..., :key_dim], packed[..., key_dim:])
