"""Affine maps `S -> M S + E` of the chunks of a row, combined across devices. All in float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gqa_jax.parallel.context.order import Layout


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
    run = {
        "all_gather": _by_all_gather,
        "prefix_scan": _by_prefix_scan,
        "all_to_all": _by_all_to_all,
    }[exchange]
    incoming = run(maps, initial_state, axis_name, layout)
    after = Affine(*(x[:, -1] for x in maps))(incoming[:, -1])
    holder = 0 if layout == "zigzag" else lax.axis_size(axis_name) - 1  # of the row's last chunk
    mine = lax.axis_index(axis_name) == holder
    return incoming, lax.psum(jnp.where(mine, after, jnp.zeros_like(after)), axis_name)


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


def _natural_order(x: Array, layout: Layout) -> list[Array]:
    """Chunks in the order of the row, from `[n, B, slots, ...]`."""
    chunks = [x[r, :, 0] for r in range(x.shape[0])]
    if layout == "zigzag":
        chunks += [x[r, :, 1] for r in reversed(range(x.shape[0]))]
    return chunks


def _own(chunks: list[Array], axis_name, layout: Layout) -> Array:
    """`[B, slots, ...]` of this device from one array per chunk of the row."""
    stacked, rank = jnp.stack(chunks), lax.axis_index(axis_name)
    take = lambda i: lax.dynamic_index_in_dim(stacked, i, keepdims=False)
    mine = [take(rank)]
    if layout == "zigzag":
        mine.append(take(len(chunks) - 1 - rank))
    return jnp.stack(mine, axis=1)


def _by_all_gather(maps, initial_state, axis_name, layout):
    """Every device folds the maps of the whole row.

    The derivative folds backward with the transposed matrices, which are here already: only cotangents of states
    travel, half of what came forward or less.
    """

    @jax.custom_vjp
    def run(maps, initial_state):
        return forward(maps, initial_state)[0]

    def forward(maps, initial_state):
        key_dim = maps.matrix.shape[-1]
        gathered = lax.all_gather(jnp.concatenate(maps, axis=-1), axis_name)
        state, states, matrices = initial_state, [], []
        for both in _natural_order(gathered, layout):
            states.append(state)
            matrices.append(both[..., :key_dim])
            state = _dot(matrices[-1], state) + both[..., key_dim:]
        incoming = _own(states, axis_name, layout)
        return incoming, (matrices, incoming)

    def backward(residuals, d_incoming):
        matrices, incoming = residuals
        everyone = _natural_order(lax.all_gather(d_incoming, axis_name), layout)
        d_state, d_offsets = jnp.zeros_like(everyone[0]), []
        for matrix, d_here in zip(reversed(matrices), reversed(everyone), strict=True):
            d_offsets.append(d_state)
            d_state = _dot(jnp.swapaxes(matrix, -1, -2), d_state) + d_here
        d_offset = _own(d_offsets[::-1], axis_name, layout)
        d_matrix = _dot(d_offset, jnp.swapaxes(incoming, -1, -2))
        # The initial state is one for all devices and its gradient is summed over them: one speaks for all.
        first = lax.axis_index(axis_name) == 0
        return Affine(d_matrix, d_offset), jnp.where(first, d_state, jnp.zeros_like(d_state))

    run.defvjp(forward, backward)
    return run(maps, initial_state)


def _by_all_to_all(maps, initial_state, axis_name, layout):
    """Summaries are traded for heads: every device folds the whole row for its share of the heads.

    The states before each chunk are traded back. As in `_by_all_gather` only cotangents of states travel backward.
    """
    devices = lax.axis_size(axis_name)

    def to_heads(x):
        """`[B, slots, H, ...]` of this device's chunks as one `[B, H / n, ...]` per chunk of the row."""
        x = lax.all_to_all(x, axis_name, split_axis=2, concat_axis=0, tiled=True)
        return _natural_order(x.reshape(devices, -1, *x.shape[1:]), layout)

    def to_chunks(chunks):
        """The inverse."""
        low = jnp.stack(chunks[:devices])
        slots = [low] if layout != "zigzag" else [low, jnp.stack(chunks[: devices - 1 : -1])]
        x = jnp.stack(slots, axis=2)  # [n, B, slots, H / n, ...]
        x = x.reshape(-1, *x.shape[2:])
        return lax.all_to_all(x, axis_name, split_axis=0, concat_axis=2, tiled=True)

    def own_heads(x):
        share = x.shape[1] // devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * share, share, axis=1)

    @jax.custom_vjp
    def run(maps, initial_state):
        return forward(maps, initial_state)[0]

    def forward(maps, initial_state):
        key_dim = maps.matrix.shape[-1]
        state, states, matrices = own_heads(initial_state), [], []
        for both in to_heads(jnp.concatenate(maps, axis=-1)):
            states.append(state)
            matrices.append(both[..., :key_dim])
            state = _dot(matrices[-1], state) + both[..., key_dim:]
        incoming = to_chunks(states)
        return incoming, (matrices, incoming)

    def backward(residuals, d_incoming):
        matrices, incoming = residuals
        everyone = to_heads(d_incoming)
        d_state, d_offsets = jnp.zeros_like(everyone[0]), []
        for matrix, d_here in zip(reversed(matrices), reversed(everyone), strict=True):
            d_offsets.append(d_state)
            d_state = _dot(jnp.swapaxes(matrix, -1, -2), d_state) + d_here
        d_offset = to_chunks(d_offsets[::-1])
        d_matrix = _dot(d_offset, jnp.swapaxes(incoming, -1, -2))
        # Summed over devices, of which each knows the gradient of its heads.
        d_initial = jnp.zeros_like(incoming[:, 0])
        start = lax.axis_index(axis_name) * d_state.shape[1]
        d_initial = lax.dynamic_update_slice_in_dim(d_initial, d_state, start, axis=1)
        return Affine(d_matrix, d_offset), d_initial

    run.defvjp(forward, backward)
    return run(maps, initial_state)


def _by_prefix_scan(maps, initial_state, axis_name, layout):
    """Hillis-Steele: after hop j a device knows the map of the last 2^j chunks up to its own; then one shift."""
    devices, rank = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def scan(own: Affine, towards: int) -> tuple[Affine, Affine]:
        """Maps of (all chunks before mine, those and mine); chunks run up (1) or down (-1) the ranks."""
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
