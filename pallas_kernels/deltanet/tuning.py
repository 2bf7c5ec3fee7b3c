"""What the fused decode kernels cannot do. Their tiles are those of `delta_rule/step/tuning.py`."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.typing import DTypeLike

from pallas_kernels.delta_rule.step import tuning as delta_rule

# Taps are unrolled, and each token reads all of them.
_MAX_WIDTH = 8


class Call(NamedTuple):
    """What decides which kernel can run a step.

    Attributes:
      dtypes: of everything floating point but the state.
      state_dtype: of the state after the operator's cast.
      key_dim, value_dim, width, channels: Dk, Dv, W, F.
      is_varying: whether the arrays are typed as varying over mesh axes.
    """

    dtypes: Sequence[DTypeLike]
    state_dtype: DTypeLike
    key_dim: int
    value_dim: int
    is_varying: bool
    width: int
    channels: int

    def rule(self) -> delta_rule.Call:
        """The same for the delta rule alone."""
        return delta_rule.Call(*self[:5])


def triton_reason(call: Call) -> str | None:
    """Why "triton" cannot run a step that the operator accepts, or None."""
    return delta_rule.triton_reason(call.rule()) or _width_reason(call)


def mosaic_gpu_reason(call: Call) -> str | None:
    """Why "mosaic_gpu" cannot run a step that the operator accepts, or None."""
    reason = delta_rule.mosaic_gpu_reason(call.rule()) or _width_reason(call)
    if reason is not None:
        return reason
    if call.key_dim % 64:
        # The 128 threads of a warpgroup convolve the 2 Dk channels of query and key.
        return f"Dk must be a multiple of 64, got {call.key_dim}"
    if call.channels % 4:
        # A thread loads up to four neighbouring channels at once, which needs them aligned.
        return f"`mixed` must have a multiple of 4 channels, got {call.channels}"
    return None


def _width_reason(call: Call) -> str | None:
    return f"W must be at most {_MAX_WIDTH}, got {call.width}" if call.width > _MAX_WIDTH else None
