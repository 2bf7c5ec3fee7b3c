"""`explain`: which implementation an operator would run, and why not each other one."""

from collections.abc import Callable
from typing import Any

from pallas_kernels._dispatch import Explanation
from pallas_kernels.attention import api as attention
from pallas_kernels.causal_conv import api as causal_conv
from pallas_kernels.decode import api as decode
from pallas_kernels.delta_rule import api as delta_rule
from pallas_kernels.deltanet import api as deltanet

_EXPLAINERS: dict[str, Callable[..., Explanation]] = {
    "gqa_attention": attention.explain_gqa_attention,
    "gated_delta_rule": delta_rule.explain_gated_delta_rule,
    "gated_delta_rule_step": delta_rule.explain_gated_delta_rule_step,
    "gated_deltanet_step": deltanet.explain_gated_deltanet_step,
    "causal_conv1d": causal_conv.explain_causal_conv1d,
    "causal_conv1d_qkv": causal_conv.explain_causal_conv1d_qkv,
    "decode_attention": decode.explain_decode_attention,
}


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation `operator(*args, **kwargs)` would run here, and why each other one would not.

    Args:
      operator: a public operator or its name.
      *args, **kwargs: as for the operator; `jax.ShapeDtypeStruct` will do in place of arrays.

    Raises:
      ValueError: unknown operator, or arguments that the operator itself would refuse.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.float32)
      >>> print(explain("gqa_attention", q, q, q, is_causal=True).operator)
      gqa_attention
    """
    name = operator if isinstance(operator, str) else operator.__name__
    if name not in _EXPLAINERS:
        raise ValueError(f"`operator` must be one of {', '.join(_EXPLAINERS)}, got {name!r}")
    return _EXPLAINERS[name](*args, **kwargs)
