"""A 16-bit call against the same call in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.compare import assert_close


def check(function, operands, dtype) -> None:
    """Outputs and gradients of `function(*operands)` under `jit` in `dtype` against float32, element by element.

    Both see the same numbers, rounded to `dtype`. A few roundings on the way, and those that a sum of several rounded
    terms collects: 16 units in the last place of the largest element.
    """

    @jax.jit
    def run(operands):
        outputs, pull = jax.vjp(lambda *given: jax.tree.leaves(function(*given)), *operands)
        cotangents = [
            jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape) for o in outputs
        ]
        return outputs, pull([c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])

    narrow = tuple(jnp.asarray(array).astype(dtype) for array in operands)
    actual, expected = run(narrow), run(tuple(array.astype(jnp.float32) for array in narrow))
    assert [x.dtype for x in actual[1]] == [dtype] * len(operands)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for place, (got, wanted) in enumerate(pairs):
        size = float(np.abs(np.asarray(wanted)).max(initial=0.0))
        atol = 16 * float(jnp.finfo(dtype).eps) * max(size, 1e-3)
        assert_close(got, wanted, atol=atol, what=f"result {place}")
