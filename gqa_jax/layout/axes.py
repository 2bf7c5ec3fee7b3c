"""Reshape, slice and join along one axis of any array, whatever library it comes from."""

import sys
from collections.abc import Sequence
from typing import Any


def normalize_axis(name: str, array: Any, axis: int, *, joined: int = 0) -> int:
    """`axis` as a non-negative index into `array.shape`, counted as if `joined` axes less were there."""
    if not hasattr(array, "shape") or not hasattr(array, "ndim"):
        raise TypeError(f"`{name}` must be an array, got {type(array).__name__}")
    ndim = array.ndim - joined
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"`axis` must index the {ndim} dimensions of `{name}` {tuple(array.shape)}, got {axis}"
        )
    return axis % ndim


def require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"`{name}` must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"`{name}` must be positive, got {size}")


def groups_along(name: str, array: Any, axis: int, width: int, rule: str) -> int:
    """How many whole groups of `width` features `array` holds along `axis`.

    Raises:
      ValueError: the features are not whole groups; `rule` spells out the width.
    """
    size = array.shape[axis]
    if size == 0 or size % width:
        raise ValueError(
            f"`{name}` must hold whole groups of {rule} = {width} features along axis {axis}, got {size} "
            f"in shape {tuple(array.shape)}"
        )
    return size // width


def unflatten(array: Any, axis: int, *sizes: int) -> Any:
    """Splits `axis` into `sizes`."""
    shape = tuple(array.shape)
    return array.reshape(shape[:axis] + sizes + shape[axis + 1 :])


def flatten(array: Any, axis: int, count: int) -> Any:
    """Joins `count` axes from `axis` on."""
    shape = tuple(array.shape)
    width = 1
    for size in shape[axis : axis + count]:
        width *= size
    return array.reshape((*shape[:axis], width, *shape[axis + count :]))


def take(array: Any, axis: int, start: int, stop: int) -> Any:
    """`array[..., start:stop, ...]` on `axis`."""
    return array[(slice(None),) * axis + (slice(start, stop),)]


def sections(array: Any, axis: int, *sizes: int) -> list[Any]:
    """Consecutive slices of `sizes` along `axis`."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [take(array, axis, at, at + size) for at, size in zip(starts, sizes, strict=True)]


def _namespace(array: Any) -> Any:
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    # torch tensors do not name their namespace; the module that made them is loaded already.
    return sys.modules[type(array).__module__.partition(".")[0]]


def concat(arrays: Sequence[Any], axis: int) -> Any:
    return _namespace(arrays[0]).concat(list(arrays), axis=axis)


def stack(arrays: Sequence[Any], axis: int) -> Any:
    return _namespace(arrays[0]).stack(list(arrays), axis=axis)


def require_alike(arrays: dict[str, Any], axis: int) -> None:
    """Raises unless all arrays share a dtype and every size but that of `axis`: joining must not convert."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if array.dtype != reference.dtype:
            raise TypeError(
                f"`{name}` must have the dtype of `{first}`, {reference.dtype}, got {array.dtype}"
            )
        expected = [size for i, size in enumerate(reference.shape) if i != axis]
        got = [size for i, size in enumerate(array.shape) if i != axis]
        if expected != got:
            raise ValueError(
                f"`{name}` must have the sizes of `{first}` {tuple(reference.shape)} outside axis {axis}, "
                f"got {tuple(array.shape)}"
            )
