"""`explain`: which implementation an operator would run, and why not each other one."""

from collections.abc import Callable
from typing import Any

from pallas_kernels import _dispatch


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> _dispatch.Explanation:
    """Which implementation `operator(*args, **kwargs)` would run here, and why each other one would not.

    Args:
      operator: a public operator or its name.
      *args, **kwargs: as for the operator; `jax.ShapeDtypeStruct` will do in place of arrays.

    Raises:
      TypeError, ValueError: unknown operator, or arguments that the operator itself would refuse.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.float32)
      >>> print(explain("gqa_attention", q, q, q, is_causal=True).operator)
      gqa_attention
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", "")
    if name not in tuple(_dispatch.OPERATORS):
        known = ", ".join(_dispatch.OPERATORS)
        raise ValueError(f"`operator` must be one of {known}, got {operator!r}")
    before = _dispatch.EXPLAINING.set(True)
    try:
        _dispatch.OPERATORS[name](*args, **kwargs)
    except _dispatch.Explained as explained:
        return explained.explanation
    finally:
        _dispatch.EXPLAINING.reset(before)
    raise AssertionError(f"{name} chose no implementation")
