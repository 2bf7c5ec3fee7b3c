"""What a checkpointed layer keeps for its backward pass: ready policies over the names that our layers set.

  qkv             the fused input projection, before norms and rotary embedding
  norm_out        normalised queries and keys; in Gated DeltaNet the gated output norm
  core_attention  the output of attention or of the delta rule, before gate and output projection

  >>> config = dataclasses.replace(config, remat=recompute.policy(save=("core_attention",)))    # of a decoder
  >>> layer = jax.checkpoint(layer_fn, policy=recompute.policy(save=("core_attention",)))

A policy decides for values that carry a name and drops all others; `save=()` therefore recomputes everything.
"""

import functools
from collections.abc import Callable, Sequence

import jax

NAMES = ("qkv", "norm_out", "core_attention")


def policy(*, save: Sequence[str] = (), offload: Sequence[str] = ()) -> Callable:
    """A policy for `jax.checkpoint` (`nnx.remat` takes it too).

    Args:
      save: names kept on the device.
      offload: names kept in host memory and fetched for the backward pass.

    Raises:
      ValueError: an unknown name, or one in both.
      NotImplementedError: `offload` on a backend without pinned host memory.

    Example:
      >>> policy(save=("qkv",), offload=("core_attention",))  # doctest: +SKIP
    """
    for argument, names in (("save", save), ("offload", offload)):
        unknown = [name for name in names if name not in NAMES]
        if isinstance(names, str) or unknown:
            raise ValueError(f"`{argument}` must hold names out of {NAMES}, got {names!r}")
    both = sorted(set(save) & set(offload))
    if both:
        raise ValueError(f"`save` and `offload` must not share names, got {both} in both")
    return _policy(tuple(save), tuple(offload))


@functools.cache  # configs that hold equal policies are equal
def _policy(save: tuple[str, ...], offload: tuple[str, ...]) -> Callable:
    if not offload:
        return jax.checkpoint_policies.save_only_these_names(*save)
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise NotImplementedError(
            f"`offload` cannot run on {device.platform}: it has the memories {kinds}, not 'pinned_host'"
        )
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(save),
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )
