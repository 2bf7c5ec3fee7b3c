"""What the fused decode kernels cannot do. Their tiles are those of `delta_rule/step/tuning.py`."""

from pallas_kernels.delta_rule.step import tuning as delta_rule

# Taps are unrolled, and each token reads all of them.
_MAX_WIDTH = 8


def unsupported_reason(
    implementation: str, *, dtypes, state_dtype, key_dim: int, value_dim: int, width: int,
    channels: int, varying: bool,
) -> str | None:  # fmt: skip
    """Why `implementation` cannot run a step that the operator accepts, or None.

    Args:
      implementation: "reference", "mosaic_gpu" or "triton".
      dtypes: of everything floating point but the state.
      state_dtype: of the state after the operator's cast.
      key_dim, value_dim, width, channels: Dk, Dv, W, F.
      varying: whether the arrays are typed as varying over mesh axes.
    """
    if implementation == "reference":
        return None
    reason = delta_rule.unsupported_reason(
        implementation, dtypes=dtypes, state_dtype=state_dtype, key_dim=key_dim, value_dim=value_dim,
        varying=varying,
    )  # fmt: skip
    if reason is not None:
        return reason
    if width > _MAX_WIDTH:
        return f"W must be at most {_MAX_WIDTH}, got {width}"
    if implementation == "mosaic_gpu" and key_dim % 64:
        # The 128 threads of a warpgroup convolve the 2 Dk channels of query and key.
        return f"Dk must be a multiple of 64, got {key_dim}"
    if implementation == "mosaic_gpu" and channels % 4:
        # A thread loads up to four neighbouring channels at once, which needs them aligned.
        return f"`mixed` must have a multiple of 4 channels, got {channels}"
    return None
