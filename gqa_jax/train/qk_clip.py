"""QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): after an optimizer step, shrink the query and key weights of the
groups whose attention logits have grown beyond a threshold.

Record the largest logits with the forward pass, then clip:

  >>> loss_fn = nnx.capture(loss, qk_clip.MaxLogits)
  >>> (loss, recorded), grads = nnx.value_and_grad(loss_fn, has_aux=True)(decoder, batch)
  >>> ...                                       # the optimizer's step
  >>> qk_clip.clip_decoder(decoder, recorded, threshold=100.0)

`nnx.capture` goes inside `jit` and inside the gradient, round the function that calls the model: what a transformation
traces is a copy of the model. A `Decoder` brings the records out of its own `remat` and `scan_layers`.

Everything acts on the group axis elementwise, so it is right whatever axis of the parameters is sharded; logits come
from global arrays, so their maximum already spans data and context parallel shards.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gqa_jax.layers.records import MaxLogits as MaxLogits
from gqa_jax.layers.records import max_logits as max_logits


class ClipFactors(NamedTuple):
    """What queries and keys of each group are multiplied by.

    Attributes:
      query: `[..., K]` float32, eta ** alpha.
      key: `[..., K]` float32, eta ** (1 - alpha).
    """

    query: jax.Array
    key: jax.Array


def clip_factors(
    max_logits: Float[Array, "... K R"], *, threshold: float = 100.0, alpha: float = 0.5
) -> ClipFactors:
    """Factors of each group: with eta = min(1, threshold / max over the group's R heads), eta^alpha and eta^(1-alpha).

    Args:
      max_logits: `[..., K, R]`, the largest logit of each query head.
      threshold: logits up to here are left alone.
      alpha: share of the queries in the shrinking, from 0 to 1.

    Raises:
      ValueError: no logits were recorded, or a threshold or share out of range.
    """
    if max_logits is None:
        raise ValueError("`max_logits` must be recorded in a forward pass first, got None")
    if not threshold > 0:
        raise ValueError(f"`threshold` must be positive, got {threshold}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}")
    top = max_logits.astype(jnp.float32).max(axis=-1)
    # Logits that are not positive need no shrinking; without the guard they would divide to a negative eta.
    eta = jnp.minimum(1.0, threshold / jnp.where(top > 0, top, threshold))
    return ClipFactors(eta**alpha, eta ** (1.0 - alpha))


def clip_qkv(
    fused: Float[Array, "... K W D"],
    max_logits: Float[Array, "... K R"],
    *,
    threshold: float = 100.0,
    alpha: float = 0.5,
) -> Float[Array, "... K W D"]:
    """A fused kernel `[M, K, W, D]` or bias `[K, W, D]`, its queries and key scaled by `clip_factors`.

    Values and output gates keep every bit, and so does every group under the threshold. Works on any array with these
    last axes: parameters, float32 master copies, shards of whole groups.

    Args:
      fused: W is R + 2, or 2R + 2 with an output gate. Leading axes before M stack layers, and then
        `max_logits` has them too.
      max_logits: `[K, R]`.

    Raises:
      ValueError: besides those of `clip_factors`, groups or heads that do not fit.
    """
    factors = clip_factors(max_logits, threshold=threshold, alpha=alpha)
    groups, per_group = max_logits.shape[-2:]
    width = fused.shape[-2]
    if fused.shape[-3] != groups or width not in (per_group + 2, 2 * per_group + 2):
        raise ValueError(
            f"`fused` must have shape [..., K={groups}, R + 2 or 2R + 2, D] with R={per_group}, got {fused.shape}"
        )
    slot = jnp.arange(width)
    by_slot = jnp.select(
        [(slot < per_group)[None], (slot == width - 2)[None]],
        [factors.query[..., None], factors.key[..., None]],
        1.0,
    )  # [..., K, W]
    stacked = by_slot.ndim - 2
    missing = fused.ndim - stacked - 3  # the axis M, which a bias has not
    by_slot = by_slot.reshape(by_slot.shape[:stacked] + (1,) * missing + (groups, width, 1))
    wide = fused.astype(np.promote_types(fused.dtype, np.float32))
    scaled = (wide * by_slot.astype(wide.dtype)).astype(fused.dtype)
    return jnp.where(by_slot == 1.0, fused, scaled)


def clip_layer(
    layer: Any,
    max_logits: Float[Array, "K R"],
    *,
    threshold: float = 100.0,
    alpha: float = 0.5,
    masters: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Clips the fused projection of a `SelfAttention` in place, and returns its master copies clipped alike.

    Args:
      layer: the layer.
      max_logits: `[K, R]`, as recorded.
      threshold, alpha: see `clip_factors`.
      masters: the optimizer's own copies of the parameters, "kernel" and, if there is one, "bias".

    Returns:
      `masters` clipped (empty without any): put them back into the optimizer's state.

    Raises:
      ValueError: besides those of `clip_qkv`: not a `SelfAttention`; queries and keys are normalised, so that scaling
        their weights would change nothing; it carries a LoRA adapter; or masters that are not parameters of the
        projection.
    """
    _check_clippable(layer)
    parameters = {"kernel": layer.qkv.kernel}
    if layer.qkv.bias is not None:
        parameters["bias"] = layer.qkv.bias
    unknown = set(masters or {}) - set(parameters)
    if unknown:
        raise ValueError(f"`masters` must hold only {sorted(parameters)}, got {sorted(unknown)}")
    options = dict(threshold=threshold, alpha=alpha)
    clipped = {
        name: clip_qkv(array, max_logits, **options) for name, array in (masters or {}).items()
    }
    for parameter in parameters.values():
        parameter[...] = clip_qkv(parameter[...], max_logits, **options)
    return clipped


def _check_clippable(layer: Any) -> None:
    if not hasattr(layer, "qkv"):
        raise ValueError(
            f"`layer` must be a SelfAttention, which has queries and keys in one projection, got {type(layer).__name__}"
        )
    if layer.q_norm is not None:
        raise ValueError(
            "`layer` must not normalise queries and keys, got qk_norm="
            f"{layer.config.qk_norm!r}: a norm undoes any scaling of the projection"
        )
    if hasattr(layer.qkv, "lora_b"):
        raise ValueError("`layer.qkv` must not carry a LoRA adapter: merge it first")
    if not hasattr(layer.qkv, "kernel"):
        raise ValueError(
            f"`layer.qkv` must be a projection with a `kernel`, got {type(layer.qkv).__name__}"
        )


def decoder_logits(decoder: Any, recorded: Mapping) -> dict[int, Float[Array, "K R"]]:
    """The largest logits of each attention layer by its index in `decoder.config.layers`.

    Args:
      decoder: the `Decoder`, with or without `scan_layers`.
      recorded: what `nnx.capture(..., MaxLogits)` returned for calls of it. With `scan_layers` the record of
        `decoder.layers[i]` is `[repeats, K, R]`, and its row r belongs to layer r * pattern + i.

    Returns:
      `[K, R]` float32 each, the largest over all calls.

    Raises:
      ValueError: no record for a layer.
    """
    found: dict[int, Array] = {}
    for i, _, top in _recorded(decoder, recorded):
        rows = top if decoder.config.scan_layers else top[None]
        found |= {r * decoder.pattern + i: row for r, row in enumerate(rows)}
    return dict(sorted(found.items()))


def clip_decoder(
    decoder: Any, recorded: Mapping, *, threshold: float = 100.0, alpha: float = 0.5
) -> None:
    """`clip_layer` for every attention layer of a `Decoder`, in place.

    An optimizer's master copies have the structure of the parameters: `nnx.merge` them into a decoder, clip that too.

    Args:
      decoder: with or without `scan_layers`.
      recorded: what `nnx.capture(..., MaxLogits)` returned for its calls. Of several calls the largest logit counts.
      threshold, alpha: see `clip_factors`.

    Raises:
      ValueError: as `clip_layer`, or no record for a layer; the decoder is then unchanged.
    """
    found = list(_recorded(decoder, recorded))
    for _, layer, _ in found:
        _check_clippable(layer)
    for _, layer, top in found:
        clip_layer(layer, top, threshold=threshold, alpha=alpha)


def _recorded(decoder: Any, recorded: Mapping) -> Iterator[tuple[int, Any, Array]]:
    """(i, mixer, its largest logits) of every `decoder.layers[i]` with attention."""
    for i, layer in enumerate(decoder.layers):
        if not hasattr(layer.mixer, "sinks"):  # Gated DeltaNet
            continue
        try:
            calls = recorded["layers"][i]["mixer"]["max_logits"]
        except KeyError:
            raise ValueError(
                "`recorded` must come from `nnx.capture(..., qk_clip.MaxLogits)` round a call of `decoder`, got "
                f"nothing for layers[{i}]"
            ) from None
        yield i, layer.mixer, functools.reduce(jnp.maximum, calls)
