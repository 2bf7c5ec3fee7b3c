"""Errors about what the caller passed, in one grammar: "`argument` must <rule>, got <value>"."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_array(name: str, array: Any, letters: str, sizes: dict[str, int]) -> None:
    """Checks `array` against a shape like ``"B T N D"`` and binds letters that are new.

    Args:
      name: the argument's name, for the message.
      array: anything with `shape` and `dtype`.
      letters: one letter (or word) per dimension; ``1`` in a shape never stands for a letter.
      sizes: sizes bound so far; letters seen for the first time are added.

    Raises:
      TypeError: `array` is not an array.
      ValueError: wrong rank, or a size that contradicts one bound before.
    """
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(array).__name__}")
    names = letters.split()
    shape = tuple(array.shape)
    if len(shape) != len(names):
        raise ValueError(f"`{name}` must have shape [{', '.join(names)}], got {shape}")
    for letter, size in zip(names, shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            expected = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in names)
            raise ValueError(f"`{name}` must have shape [{expected}], got {shape}")


def check_float(name: str, array: Any) -> None:
    """Raises `TypeError` unless `array` is floating point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating point, got {array.dtype}")


def check_integer(name: str, array: Any) -> None:
    """Raises `TypeError` unless `array` is an integer array."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be an integer array, got {array.dtype}")


def check_offsets(name: str, offsets: Any, letter: str, sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` unless values that can be read rise from 0 to at most `sizes[letter]`."""
    if isinstance(offsets, Tracer | jax.ShapeDtypeStruct):
        return
    values = np.asarray(as_int32(name, offsets) if isinstance(offsets, np.ndarray) else offsets)
    if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > sizes[letter]:
        raise ValueError(
            f"`{name}` must rise from 0 to at most {letter}={sizes[letter]}, got {values.tolist()}"
        )


def as_int32(name: str, array: Any) -> Any:
    """`array` as int32, whatever integer dtype it comes in; the one door of all lengths, positions, ids and places.

    A calculation in the dtype of the caller would wrap round: 120 + 16 in int8, 3 - 5 in uint32. NumPy arrays stay
    NumPy arrays, whose values can be read inside `jit` too. There a traced value that does not fit becomes the nearest
    one that does, which lies outside every array: the rule for a value out of range then applies to it (segment ids
    beyond int32 count as one).

    Args:
      name: the argument's name, for the message.
      array: any integer array; None passes.

    Raises:
      TypeError: not an array, or not integers (bool is none).
      ValueError: a value that does not fit int32, where it can be read.
    """
    if array is None:
        return None
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(array).__name__}")
    check_integer(name, array)
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=jnp.int32)
    low, high = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    least, most = jnp.iinfo(array.dtype).min, jnp.iinfo(array.dtype).max
    if least < low or most > high:
        if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
            array = jnp.clip(array, max(least, low), min(most, high))
        else:
            values = np.asarray(array)
            outside = values[(values < low) | (values > high)]
            if outside.size:
                raise ValueError(f"`{name}` must fit int32, got {outside[0]}")
    return array.astype(np.int32)


def check_same_dtype(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Raises `TypeError` unless all arrays share one dtype."""
    dtypes = [a.dtype for a in arrays]
    if len(set(dtypes)) > 1:
        listed = ", ".join(f"`{n}` {d}" for n, d in zip(names, dtypes, strict=True))
        raise TypeError(f"{', '.join(f'`{n}`' for n in names)} must share one dtype, got {listed}")


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises `ValueError` unless `value` is a positive multiple of `divisor`."""
    if divisor < 1 or value < 1 or value % divisor:
        raise ValueError(
            f"`{name}={value}` must be a positive multiple of `{divisor_name}={divisor}`"
        )


def check_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`, and of its type."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


# What is no array is part of the compiled program: a Python or NumPy value, never a traced one.


def check_number(name: str, value: Any, *, is_positive: bool = False) -> float:
    """`value` as a float.

    Raises:
      TypeError: it is no Python or NumPy number (bool is none).
      ValueError: it is not finite, or not positive where `is_positive`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"`{name}` must be a Python number, got {type(value).__name__}")
    if is_positive and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return number


def check_int(name: str, value: Any, *, rule: str = "positive") -> int:
    """`value` as an int.

    Raises:
      TypeError: it is no Python or NumPy integer (bool is none).
      ValueError: it is below 1, which is named by `rule`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be {rule}, got {value}")
    return int(value)


def check_window(value: Any) -> int | None:
    """`sliding_window` as an int, or None. Raises as `check_int`."""
    if value is None:
        return None
    return check_int("sliding_window", value, rule="a positive number of keys")


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool. Raises `TypeError` unless it is a Python or NumPy one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return bool(value)
