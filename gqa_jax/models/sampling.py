"""The next token from logits: greedy, temperature, top-k and top-p."""

import contextlib
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a token; `make_sampling` validates. A pytree: a new temperature does not recompile.

    Attributes:
      temperature: `[]` float32, or None for greedy.
      top_p: `[]` float32, or None.
      top_k: or None.
    """

    temperature: Array | None = None
    top_p: Array | None = None
    top_k: int | None = None


def make_sampling(
    temperature: float = 0.0, *, top_k: int | None = None, top_p: float | None = None
) -> Sampling:
    """A valid `Sampling`.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens.
      top_p: keep the most likely tokens until their probability (at this temperature, among the top k) reaches p;
        at least one.

    Raises:
      ValueError: out of range, or a filter with temperature 0, which would have no effect.
    """
    temperature = as_float("temperature", temperature)
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}")
    limits = jnp.finfo(jnp.float32)
    if temperature and not limits.tiny <= temperature <= limits.max:
        raise ValueError(
            f"`temperature` must be 0 or in [{limits.tiny:.3g}, {limits.max:.3g}], got {temperature}"
        )
    if top_k is not None:
        top_k = as_int("top_k", top_k, "None or a positive int", minimum=1)
    if top_p is not None and not 0.0 < as_float("top_p", top_p) <= 1.0:
        raise ValueError(f"`top_p` must be None or in (0, 1], got {top_p}")
    if temperature == 0.0:
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be None when `temperature=0` (greedy), got {value}"
                )
        return Sampling()
    return Sampling(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
        top_k=top_k,
    )


def as_int(name: str, value: Any, rule: str, *, minimum: int = -(2**31)) -> int:
    """An int from any integer scalar, of numpy or jax too.

    Raises:
      ValueError: `name` must be `rule`.
    """
    try:
        number = operator.index(value)
    except (TypeError, jax.errors.JAXTypeError):
        number = None
    if number is None or isinstance(value, bool) or not minimum <= number < 2**31:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}")
    return number


def as_float(name: str, value: Any) -> float:
    """A float from any real scalar.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError, jax.errors.JAXTypeError):
            return float(value)
    raise ValueError(f"`{name}` must be a number, got {value!r}")


def sample(
    logits: Float[Array, "B V"], *, sampling: Sampling, key: Array | None = None
) -> Int[Array, "B"]:
    """One token per row; among equal logits the lowest id counts as more likely.

    Args:
      logits: `[B, V]`.
      sampling: see `make_sampling`.
      key: needed unless greedy.

    Returns:
      `[B]` int32.

    Raises:
      ValueError: no key, or `top_k` larger than V.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sample(jnp.asarray([[0.0, 2.0, 1.0]]), sampling=make_sampling(0.0)).tolist()
      [1]
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError("`key` must be given when `temperature` is positive, got None")
    vocab_size = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k > vocab_size:
        raise ValueError(
            f"`top_k` must be at most the vocabulary's size {vocab_size}, got {sampling.top_k}"
        )
    scaled = logits.astype(jnp.float32)
    # From the maximum, so that no temperature makes two infinities of two logits.
    scaled = (scaled - scaled.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    ranked, ids = jax.lax.top_k(scaled, sampling.top_k or vocab_size)
    if sampling.top_p is not None:
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    choice = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0].astype(jnp.int32)
