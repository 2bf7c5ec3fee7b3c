"""A 16-bit call against the same call in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tests.support import meshes
from tests.support.compare import assert_close


def sweep(**choices) -> list:
    """Cases (dicts) with every pair of choices and dtypes in one of them; those that add no new value are `slow`."""
    cases = meshes.pairwise(1, dtype=[jnp.bfloat16, jnp.float16], **choices)
    name = lambda case: "-".join(str(getattr(x, "__name__", x)) for x in case.values())
    return meshes.mostly_slow(cases, name)


def check(
    function, operands: tuple[Any, ...], dtype, *, gradients: bool = True, truth: Any = None
) -> None:
    """Outputs and gradients of `function(*operands)` under `jit` in `dtype` against float32, element by element.

    Both see the same numbers. A few roundings on the way, and those that a sum of several rounded terms collects: 16
    units in the last place of the largest element.

    Args:
      function: to a pytree, the output in `dtype` first.
      operands: arrays and pytrees of them (a layer). NumPy's are rounded to `dtype`, JAX's stay what they are.
      dtype: float16 or bfloat16.
      gradients: False for what serves only.
      truth: the function to run in float32; None means the same.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, operands):
        call = lambda *given: jax.tree.leaves(function(*given))
        if not gradients:
            return call(*operands), ()
        outputs, pull = jax.vjp(call, *operands)
        integers = lambda o: (jnp.arange(o.size) % 7 - 3).astype(o.dtype).reshape(o.shape)  # exact
        return outputs, pull([integers(output) for output in outputs])

    narrow = jax.tree.map(
        lambda x: jnp.asarray(x).astype(dtype) if isinstance(x, np.ndarray) else x, operands
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    actual, expected = run(function, narrow), run(truth or function, wide)
    assert actual[0][0].dtype == dtype
    paths = jax.tree_util.tree_leaves_with_path(actual)
    for (path, got), wanted in zip(paths, jax.tree.leaves(expected), strict=True):
        size = float(np.abs(np.asarray(wanted)).max(initial=0.0))
        atol = 16 * float(jnp.finfo(dtype).eps) * max(size, 1e-3)
        assert_close(got, wanted, atol=atol, what=jax.tree_util.keystr(path))


def over_rows(function, *, shared: tuple[int, ...] = ()):
    """The function in `shard_map` over eight devices, which split the first axis of all operands but the `shared`."""
    mesh, rows = meshes.mesh(batch=8), P("batch")

    def call(*operands):
        specs = tuple(P() if place in shared else rows for place in range(len(operands)))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows)(*operands)

    return call
