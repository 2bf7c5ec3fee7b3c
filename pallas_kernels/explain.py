"""`explain`: which implementation an operator would run, and why not each other one."""

from collections.abc import Callable
from typing import Any

from pallas_kernels import _dispatch
from pallas_kernels.attention import api as attention
from pallas_kernels.causal_conv import api as causal_conv
from pallas_kernels.decode import api as decode
from pallas_kernels.delta_rule import api as delta_rule
from pallas_kernels.deltanet import api as deltanet

_OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        attention.gqa_attention,
        attention.gqa_attention_qkv,
        attention.gqa_attention_with_lse,
        delta_rule.gated_delta_rule,
        delta_rule.gated_delta_rule_step,
        deltanet.gated_deltanet_step,
        causal_conv.causal_conv1d,
        causal_conv.causal_conv1d_qkv,
        decode.decode_attention,
    )
}


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
    if name not in tuple(_OPERATORS):
        raise ValueError(f"`operator` must be one of {', '.join(_OPERATORS)}, got {operator!r}")
    before = _dispatch.EXPLAINING.set(True)
    try:
        _OPERATORS[name](*args, **kwargs)
    except _dispatch.Explained as explained:
        return explained.explanation
    finally:
        _dispatch.EXPLAINING.reset(before)
    raise AssertionError(f"{name} chose no implementation")
