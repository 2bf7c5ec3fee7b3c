"""When a layer drops, and by which key: Flax's modes (`train`, `eval`), Flax's `rngs`, or an explicit key."""

from typing import Any

import jax
from flax import nnx


class Switched(nnx.Module):
    """A layer that `train()`, `eval()` and `nnx.view` switch.

    Attributes:
      deterministic: False drops attention weights.
    """

    deterministic: bool

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`.

        Args:
          deterministic: False drops attention weights.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def kept_stream(rngs: nnx.Rngs, rate: float, *, keep: bool = True) -> Any:
    """What a module keeps of its constructor's `rngs`, as `nnx.Dropout` does: a fork of the stream "dropout".

    The default stream stands in where no stream has that name. None where the module cannot drop, `keep` is False, or
    `rngs` has neither stream.

    A stream adds a key and a count to the module's leaves. `nnx.grad` and `jax.grad` with respect to the parameters of
    `nnx.split(module, nnx.Param, ...)` do not mind; `jax.grad` with respect to the whole module refuses both types, as
    it does for Flax's own layers: keep none there, and give each call `dropout_key` or `rngs`.
    """
    available = "dropout" in rngs or "default" in rngs
    return nnx.data(rngs.dropout.fork() if keep and rate > 0.0 and available else None)


def key_of_call(
    stream: nnx.RngStream | None,
    rate: float,
    *,
    deterministic: bool,
    dropout_key: Any,
    rngs: Any,
) -> jax.Array | None:
    """The key by which a call drops; None where it drops nothing.

    Args:
      stream: what the module keeps.
      rate: of its config.
      deterministic: of the call or, where it says nothing, of the module.
      dropout_key: of the call: used as it is.
      rngs: of the call (`nnx.Rngs`, a stream, or a key): takes the place of the module's own, and advances.

    Raises:
      ValueError: no source of randomness, or two in one call.
      TypeError: `rngs` of another type.
    """
    if dropout_key is not None and rngs is not None:
        raise ValueError("`rngs` must be None when `dropout_key` is given, got both")
    if deterministic or rate == 0.0:
        return None
    if dropout_key is not None:
        return dropout_key
    source = stream if rngs is None else rngs
    if source is None:
        raise ValueError(
            f"`dropout_key` must be given when deterministic=False and dropout_rate={rate}, or `rngs`: this module "
            "keeps no stream (made with keep_rngs=False, from `rngs` without dropout or default, or loaded from "
            "files); its attribute `rngs` can be set to one (`nnx.Rngs(0).default`)"
        )
    if isinstance(source, nnx.Rngs):
        return source.dropout()
    if isinstance(source, nnx.RngStream):
        return source()
    if isinstance(source, jax.Array):
        return source
    raise TypeError(f"`rngs` must be nnx.Rngs, nnx.RngStream or a key, got {type(source).__name__}")
