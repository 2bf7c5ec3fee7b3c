"""Trees of tensors in a form that `torch.compile` can trace: nested tuples of constants.

Eager calls use JAX's pytrees, which are faster and know every registered type; while torch traces, only tuples,
lists, dicts, NamedTuples, None and dataclasses (whose fields are arrays unless marked `static`, as
`jax.tree_util.register_dataclass` has it) are understood.
"""

import dataclasses
from typing import Any

import jax
import torch

# (kind, detail, children); kind is "leaf", "none", "tuple", "list", "dict", "namedtuple" or "dataclass"
Structure = tuple
LEAF: Structure = ("leaf", None, ())
_NONE: Structure = ("none", None, ())


def flatten(tree: Any) -> tuple[list[torch.Tensor], Structure]:
    """Tensors from left to right (dicts by sorted key, as JAX does), and the structure around them.

    Raises:
      TypeError: a leaf is not a tensor, or a container is of another kind.
    """
    leaves: list[torch.Tensor] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[torch.Tensor]) -> Structure:
    if tree is None:
        return _NONE
    if isinstance(tree, torch.Tensor):
        leaves.append(tree)
        return LEAF
    if isinstance(tree, dict):
        names = tuple(sorted(tree))
        return ("dict", names, tuple(_flatten(tree[name], leaves) for name in names))
    if isinstance(tree, list):
        return ("list", None, tuple(_flatten(child, leaves) for child in tree))
    if isinstance(tree, tuple):
        children = tuple(_flatten(child, leaves) for child in tree)
        if hasattr(tree, "_fields"):
            return ("namedtuple", type(tree), children)
        return ("tuple", None, children)
    if dataclasses.is_dataclass(tree):
        names, fixed = _fields(type(tree))
        static = tuple((name, getattr(tree, name)) for name in fixed)
        children = tuple(_flatten(getattr(tree, name), leaves) for name in names)
        return ("dataclass", (type(tree), names, static), children)
    raise TypeError(
        f"arguments must be tensors in tuples, lists, dicts or dataclasses, got {type(tree).__name__}"
    )


@torch._dynamo.assume_constant_result
def _fields(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a dataclass's fields that hold arrays, and of those that are static."""
    fields = dataclasses.fields(kind)
    is_static = lambda field: bool(field.metadata.get("static"))
    names = tuple(field.name for field in fields if not is_static(field))
    return names, tuple(field.name for field in fields if is_static(field))


def rebuild(structure: Structure, leaves: Any) -> Any:
    """The tree again, around other leaves."""
    position, tree = _rebuild(structure, leaves, 0)
    assert position == len(leaves)
    return tree


def _rebuild(structure: Structure, leaves: Any, position: int) -> tuple[int, Any]:
    kind, detail, children = structure
    if kind == "leaf":
        return position + 1, leaves[position]
    if kind == "none":
        return position, None
    values = []
    for child in children:
        position, value = _rebuild(child, leaves, position)
        values.append(value)
    if kind == "list":
        return position, values
    if kind == "dict":
        return position, {name: values[i] for i, name in enumerate(detail)}
    if kind == "namedtuple":
        return position, tuple.__new__(detail, values)
    if kind == "dataclass":
        dataclass, names, static = detail
        fields = {name: values[i] for i, name in enumerate(names)}
        return position, dataclass(**fields, **dict(static))
    return position, tuple(values)


def to_treedef(structure: Structure) -> Any:
    """The pytree definition that JAX has for the structure."""
    count = _count(structure)
    return jax.tree_util.tree_structure(rebuild(structure, list(range(count))))


def from_treedef(treedef: Any) -> Structure:
    """The structure of a pytree definition.

    Raises:
      TypeError: it holds containers that torch cannot trace.
    """
    return _describe(jax.tree_util.tree_unflatten(treedef, [0] * treedef.num_leaves))


def _count(structure: Structure) -> int:
    kind, _, children = structure
    return 1 if kind == "leaf" else sum(_count(child) for child in children)


def _describe(tree: Any) -> Structure:
    if tree is None:
        return _NONE
    if isinstance(tree, dict):
        names = tuple(sorted(tree))
        return ("dict", names, tuple(_describe(tree[name]) for name in names))
    if isinstance(tree, list):
        return ("list", None, tuple(map(_describe, tree)))
    if isinstance(tree, tuple):
        children = tuple(map(_describe, tree))
        return (
            ("namedtuple", type(tree), children)
            if hasattr(tree, "_fields")
            else ("tuple", None, children)
        )
    if dataclasses.is_dataclass(tree):
        names, fixed = _fields(type(tree))
        static = tuple((name, getattr(tree, name)) for name in fixed)
        children = tuple(_describe(getattr(tree, name)) for name in names)
        return ("dataclass", (type(tree), names, static), children)
    if isinstance(tree, int):
        return LEAF
    raise TypeError(
        "under torch.compile results must be tuples, lists, dicts, NamedTuples or dataclasses, got "
        f"{type(tree).__name__}"
    )
