"""Every device gathers all keys and values, and attends from its own queries."""

from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gqa_jax.parallel.context.marks import Attend, Marks
from pallas_kernels import AttentionOutput

_GATHERED = "gathered_key_value"


def gather_marks(marks: Marks, axis_name: Any) -> Marks:
    """The marks of the tokens of all devices, in the order of devices."""
    tokens = marks._replace(dropout=None)
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, axis=1, tiled=True), tokens)


def attention(
    query, key, value, marks: Marks, *, axis_name: Any, attend: Attend
) -> AttentionOutput:
    """Attention of local queries over the keys of all devices.

    The backward gathers again instead of keeping the gathered keys and values, and reduce-scatters their gradients.
    `jax.checkpoint` puts the barrier that keeps the compiler from undoing this.
    """
    all_marks = gather_marks(marks, axis_name)

    def gathered(x):
        return checkpoint_name(lax.all_gather(x, axis_name, axis=1, tiled=True), _GATHERED)

    def run(query, key, value):
        return attend(query, gathered(key), gathered(value), marks, all_marks)

    keep = jax.checkpoint_policies.save_any_names_but_these(_GATHERED)
    return jax.checkpoint(run, policy=keep)(query, key, value)
