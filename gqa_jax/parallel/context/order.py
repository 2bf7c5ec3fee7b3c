"""Which tokens a device holds: contiguous chunks, zig-zag pairs of chunks, or whatever the positions say.

Under a causal mask contiguous chunks give the last device n times the work of the first. Zig-zag cuts the row into 2n
chunks and gives device r chunks r and 2n - 1 - r: equal work. A device's chunks are its *slots*: one when contiguous,
two in zig-zag.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

Layout = Literal["contiguous", "zigzag", "positions"]
Mode = Literal["all_gather", "ring", "a2a", "a2a+ring"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """How layers work on rows whose tokens are spread over devices.

    Attributes:
      mode: attention gathers keys and values ("all_gather"), passes them round ("ring"), or trades tokens for heads
        ("a2a", DeepSpeed-Ulysses; needs key/value heads divisible by the axis). "a2a+ring" trades along the last
        axis of `MeshAxes.seq` and passes along the others. Gated DeltaNet passes states in every mode.
      layout: the order of tokens, made by `to_layout`. "positions": any order, given by the `positions` of the call.
      axis_name: the mesh axes (major first) that split the tokens; layers fill it in from `MeshAxes.seq`, callers of
        the operators inside their own `shard_map` give it.
      state_exchange: Gated DeltaNet sends summaries by "all_gather", by log2(n) hops ("prefix_scan"), trades them for
        heads ("all_to_all"; needs value heads divisible by the axis), or does what sends the fewest bytes (None).

    Raises:
      ValueError: an unknown mode, layout or exchange.
    """

    mode: Mode = "all_gather"
    layout: Layout = "zigzag"
    state_exchange: Literal["all_gather", "prefix_scan", "all_to_all"] | None = None
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for field, choices in (
            ("mode", ("all_gather", "ring", "a2a", "a2a+ring")),
            ("layout", ("contiguous", "zigzag", "positions")),
            ("state_exchange", (None, "all_gather", "prefix_scan", "all_to_all")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"`{field}` must be one of {choices}, got {getattr(self, field)!r}"
                )

    @property
    def axis(self) -> str | tuple[str, ...]:
        """`axis_name`.

        Raises:
          ValueError: it is None.
        """
        if self.axis_name is None:
            raise ValueError(
                "`context_parallel.axis_name` must name the mesh axes that split the tokens, got None"
            )
        return self.axis_name


def num_slots(layout: Layout) -> int:
    """Chunks per device."""
    return 2 if layout == "zigzag" else 1


def token_order(length: int, axis_size: int, layout: Layout) -> np.ndarray:
    """`order[i]` is the place in the row of the token stored at i; device r holds the r-th of `axis_size` equal parts.

    Raises:
      ValueError: the length is not a multiple of the number of chunks, or the layout has no order of its own.
    """
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"`layout` must be 'contiguous' or 'zigzag', got {layout!r}")
    chunks = axis_size * num_slots(layout)
    if axis_size < 1 or length % chunks:
        raise ValueError(
            f"T={length} must be a multiple of {chunks} ({num_slots(layout)} chunks on each of {axis_size} devices)"
        )
    index = np.arange(length).reshape(chunks, -1)
    if layout == "zigzag":
        low = np.arange(axis_size)
        index = index[np.stack([low, chunks - 1 - low], axis=1).reshape(-1)]
    return index.reshape(-1)


def to_layout(batch: Any, *, axis_size: int, layout: Layout = "zigzag", seq_axis: int = 1) -> Any:
    """Reorders the tokens of every array of a batch, once, where data is loaded.

    Shift labels before: the token after a chunk's last is on another device. Hand over `positions` too; layers cannot
    count tokens that they do not see.

    Args:
      batch: a pytree of NumPy or JAX arrays, `[B, T, ...]` with `seq_axis=1`.
      axis_size: number of devices along `MeshAxes.seq`.
      layout: "contiguous" changes nothing but checks.
      seq_axis: the axis of tokens.

    Raises:
      ValueError: a length that does not divide into chunks.

    Example:
      >>> import numpy as np
      >>> to_layout(np.arange(8)[None], axis_size=2).tolist()
      [[0, 1, 6, 7, 2, 3, 4, 5]]
    """

    def reorder(x):
        return _take(x, token_order(x.shape[seq_axis], axis_size, layout), seq_axis)

    return jax.tree.map(reorder, batch)


def from_layout(batch: Any, *, axis_size: int, layout: Layout = "zigzag", seq_axis: int = 1) -> Any:
    """The inverse of `to_layout`."""

    def restore(x):
        order = token_order(x.shape[seq_axis], axis_size, layout)
        return _take(x, np.argsort(order), seq_axis)

    return jax.tree.map(restore, batch)


def _take(x: Any, order: np.ndarray, axis: int) -> Any:
    if isinstance(x, np.ndarray):
        return np.take(x, order, axis=axis)
    index = (slice(None),) * axis + (order,)
    sharding = jax.typeof(x).sharding
    explicit = sharding.mesh.explicit_axes and not sharding.mesh.manual_axes
    return x.at[index].get(out_sharding=sharding if explicit else None)


def local_positions(length: int, axis_name: Any, layout: Layout) -> Int[Array, "T"]:
    """Places in the row of the `length` tokens that this device holds. Inside `shard_map`."""
    chunk = length // num_slots(layout)
    index = jnp.arange(chunk, dtype=jnp.int32)
    return jnp.concatenate([i * chunk + index for i in own_chunks(axis_name, layout)])


def own_chunks(axis_name: Any, layout: Layout) -> list[Array]:
    """For each slot of this device, which chunk of the row it holds. Inside `shard_map`."""
    last = lax.axis_size(axis_name) * num_slots(layout) - 1
    rank = lax.axis_index(axis_name)
    return [rank, last - rank][: num_slots(layout)]


def chunks_of_row(x: Array, layout: Layout) -> list[Array]:
    """The chunks `[B, ...]` of a row, first to last, from those of all devices, `[n, B, slots, ...]`."""
    chunks = [x[r, :, 0] for r in range(x.shape[0])]
    if layout == "zigzag":
        chunks += [x[r, :, 1] for r in reversed(range(x.shape[0]))]
    return chunks


def to_slots(x: Array, slots: int) -> Array:
    """`[B, T, ...]` as `[B, slots, T / slots, ...]`."""
    return x.reshape(x.shape[0], slots, -1, *x.shape[2:])


def previous_chunk(x: Array, axis_name: Any, layout: Layout, *, distance: int = 1) -> Array:
    """For each slot the chunk `distance` before it in the row, from the device that holds it; zeros if there is none.

    Args:
      x: `[B, slots, ...]`, anything per slot, in `shard_map`.

    Returns:
      the same shape.
    """
    devices = lax.axis_size(axis_name)

    def send(slot: Array, pairs: list[tuple[int, int]]) -> Array:
        if pairs and all(source == target for source, target in pairs):
            keep = lax.axis_index(axis_name) == pairs[0][0]
            return jnp.where(keep, slot, jnp.zeros_like(slot))
        return lax.ppermute(slot, axis_name, pairs)

    low = send(x[:, 0], [(r, r + distance) for r in range(devices - distance)])
    if layout != "zigzag":
        return low[:, None]
    last = 2 * devices - 1
    high = send(x[:, 1], [(r, r - distance) for r in range(distance, devices)])
    turn = [
        (chunk, last - distance - chunk)
        for chunk in range(devices)
        if max(0, devices - distance) <= last - distance - chunk < devices
    ]
    return jnp.stack([low, high + send(x[:, 0], turn)], axis=1)
