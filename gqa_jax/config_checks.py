"""What configurations accept: NumPy scalars and lists are taken for Python's numbers and tuples, the rest by rule."""

import dataclasses
import math
import numbers
import types
from typing import Any, Literal, Union, cast, get_args, get_origin

import numpy as np


def require(condition: Any, message: str) -> None:
    """Raises `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *fields: str) -> None:
    """Raises unless these fields are positive, or None where they may be."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or value > 0, f"`{field}` must be positive, got {value}")


def normalise(config: Any) -> None:
    """Turns the fields of a frozen dataclass into what their annotations say.

    Raises:
      TypeError, ValueError: a value that is nothing of the kind, or a number that is not finite.
    """
    for field in dataclasses.fields(config):
        value = _as_annotated(field.name, field.type, getattr(config, field.name))
        object.__setattr__(config, field.name, value)


def _as_annotated(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [k for k in get_args(kind) if k is not types.NoneType]
        if value is None and len(kinds) < len(get_args(kind)):
            return None
        if len(kinds) > 1:
            return _one_of(name, kinds, value)
        (kind,) = kinds
    if get_origin(kind) is tuple:
        return _as_tuple(name, get_args(kind), value)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        require(
            isinstance(value, str) and value in choices,
            f"`{name}` must be one of {choices}, got {value!r}",
        )
        return str(value)
    rule, holds = _rule(kind, value)
    if not holds:
        raise TypeError(f"`{name}` must be {rule}, got {value!r}")
    value = cast(Any, value)
    if kind is float:
        require(math.isfinite(value), f"`{name}` must be finite, got {value}")
    return kind(value) if kind in (bool, int, float) else value


def _rule(kind: Any, value: Any) -> tuple[str, bool]:
    """What a value of the kind must be, in words, and whether this one is."""
    is_bool = isinstance(value, (bool, np.bool_))
    if kind is bool:
        return "True or False", is_bool
    if kind is int:
        return "an int", isinstance(value, numbers.Integral) and not is_bool
    if kind is float:
        return "a number", isinstance(value, numbers.Real) and not is_bool
    return f"a {kind.__name__}", isinstance(value, kind)


def _one_of(name: str, kinds: list, value: Any) -> Any:
    """A field of several types, told apart by their names; a callable has its own check."""
    classes = [k for k in kinds if isinstance(k, type)]
    if len(classes) < len(kinds) or isinstance(value, tuple(classes)):
        return value
    names = ", ".join(k.__name__ for k in classes)
    raise TypeError(f"`{name}` must be one of {names}, got {value!r}")


def _as_tuple(name: str, kinds: tuple, value: Any) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be a tuple, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    require(len(value) == len(kinds), f"`{name}` must hold {len(kinds)} values, got {tuple(value)}")
    choices = get_args(kinds[0]) if kinds and get_origin(kinds[0]) is Literal else ()
    if choices:
        rule = f"{', '.join(choices[:-1])} or {choices[-1]}"
        for item in value:
            require(item in choices, f"`{name}` must hold {rule}, got {item!r}")
    return tuple(
        _as_annotated(f"{name}[{i}]", kind, item)
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )
