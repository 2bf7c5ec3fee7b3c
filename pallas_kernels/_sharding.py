"""Operators inside `shard_map`, whose types say over which mesh axes a value differs."""

from typing import Any

import jax
from jax import lax

UNTYPED = "its results have no type over mesh axes: use it under `jax.shard_map(check_vma=False)`"


def vary_alike(tree: Any) -> Any:
    """The arrays of a tree, each typed as varying over every axis that one of them varies over.

    A weight that is the same on all devices beside inputs that are not would otherwise reach a loop or a custom
    derivative with a type of its own. Outside `shard_map` nothing changes.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)]
    union = frozenset().union(*varying)

    def cast(x):
        missing = union - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, tree) if union else tree


def is_varying(tree: Any) -> bool:
    """Whether an array of a tree is typed as varying over mesh axes (inside `shard_map` that checks it)."""
    return any(
        isinstance(x, jax.Array) and jax.typeof(x).manual_axis_type.varying
        for x in jax.tree.leaves(tree)
    )
