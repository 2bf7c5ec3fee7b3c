"""Are replicated parameters still equal on all their replicas? Hashes them on the devices that hold them.

A parameter that is replicated over some mesh axes exists many times, and nothing but determinism keeps the copies
equal. Each device hashes its own piece inside one jitted `shard_map`; only eight bytes per array and device travel.
"""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class Mismatch(NamedTuple):
    """A replica that differs from most others.

    Attributes:
      path: of the parameter.
      device: the `jax.Device` that holds it.
      index: which piece of the array it is, a slice per axis.
      agreeing, differing: how many replicas of that piece have the majority's bits, and how many have not.
    """

    path: str
    device: Any
    index: tuple[slice, ...]  # pyright: ignore[reportIncompatibleMethodOverride]
    agreeing: int
    differing: int

    def __str__(self) -> str:
        return f"{self.path} on {self.device}: differs from {self.agreeing} other replicas"


def find_mismatches(tree: Any) -> tuple[Mismatch, ...]:
    """The replicas of arrays that do not have the bits of the others; all processes must call this together.

    Args:
      tree: an NNX module or any pytree of arrays; arrays on one device only have nothing to compare.

    Returns:
      one entry per deviating replica, in the order of the tree. With no majority, the first replica in mesh order
      counts as right.
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    by_mesh: dict[Mesh, dict[str, Array]] = defaultdict(dict)
    order: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array) or leaf.size == 0:
            continue
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        by_mesh[sharding.mesh][name] = leaf
        order.append(name)
    found = []
    for mesh, arrays in by_mesh.items():
        for name, hashes in _hashes(mesh, arrays).items():
            found += _deviating(name, arrays[name], mesh, hashes)
    return tuple(sorted(found, key=lambda mismatch: order.index(mismatch.path)))


def check_replicas(tree: Any) -> None:
    """Raises `RuntimeError` naming every parameter and device found by `find_mismatches`."""
    found = find_mismatches(tree)
    if found:
        listed = "\n".join(f"  {mismatch}" for mismatch in found)
        raise RuntimeError(f"{len(found)} replicas differ from their copies:\n{listed}")


def _hashes(mesh: Mesh, arrays: dict[str, Array]) -> dict[str, np.ndarray]:
    """`[devices, 2]` uint32 per array, devices in mesh order."""
    axes = mesh.axis_names
    specs = {name: getattr(array.sharding, "spec") for name, array in arrays.items()}  # noqa: B009

    def local(pieces: dict[str, Array]) -> dict[str, Array]:
        return {
            name: jax.lax.all_gather(hash_bits(piece), axes, tiled=False).reshape(-1, 2)
            for name, piece in pieces.items()
        }

    # vma checking off: it rightly sees no way in which equal replicas could hash differently.
    everywhere = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=jax.P(), check_vma=False
    )
    return {name: np.asarray(value) for name, value in jax.jit(everywhere)(arrays).items()}


def hash_bits(x: Array) -> Array:
    """`[2]` uint32 from every bit of an array, the same however it is split over devices.

    Each word of up to 32 bits is multiplied by an odd weight made of its place in the whole array, so that a change of
    one word always changes both sums, and the products are added modulo 2^32, in whatever order they come.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    elif jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4:  # also those of 2 and 4 bits
        words = x.astype(jnp.int32).astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    lanes = []
    for factor in (2654435761, 2246822519):
        weight = index * jnp.uint32(factor) + jnp.uint32(factor >> 7)
        weight = (weight ^ (weight >> jnp.uint32(15))) | jnp.uint32(1)
        lanes.append(jnp.sum(words * weight, dtype=jnp.uint32))
    return jnp.stack(lanes)


def _deviating(name: str, array: Array, mesh: Mesh, hashes: np.ndarray) -> list[Mismatch]:
    pieces: dict[tuple, list[tuple[Any, tuple]]] = defaultdict(list)
    where = array.sharding.devices_indices_map(array.shape)
    for device, value in zip(mesh.devices.flat, hashes, strict=True):
        index = where[device]
        key = tuple((part.start, part.stop) for part in index)
        pieces[key].append((device, tuple(map(int, value))))
    found = []
    for replicas in pieces.values():
        counts = Counter(value for _, value in replicas)
        right, agreeing = counts.most_common(1)[0]
        for device, value in replicas:
            if value != right:
                differing = len(replicas) - agreeing
                found.append(Mismatch(name, device, where[device], agreeing, differing))
    return found
