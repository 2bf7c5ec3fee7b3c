"""The training recipe: a loss, a state that is one pytree, and a jitted step that updates it in place."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.decoder import Decoder
from gqa_jax.moe import load_balancing_loss


def next_token_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    *,
    real: Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats over the targets where `real` is True (None: all), computed in float32.

    Args:
      logits: `[B, T, V]`; `logits[:, t]` predicts `targets[:, t]`.
      targets: `[B, T]` integer.
      real: `[B, T]`; False leaves a target out. With none left the loss is 0.

    Raises:
      ValueError: shapes that do not fit.
    """
    if targets.shape != logits.shape[:2]:
        raise ValueError(f"`targets` must have shape {logits.shape[:2]}, got {targets.shape}")
    if real is not None and real.shape != targets.shape:
        raise ValueError(f"`real` must have shape {targets.shape}, got {real.shape}")
    wide = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1, mode="clip")[..., 0]
    losses = jax.nn.logsumexp(wide, axis=-1) - chosen
    if real is None:
        return losses.mean()
    kept = jnp.where(real, losses, 0.0).sum()  # `where`, so that a NaN on padding cannot spread
    return kept / jnp.maximum(real.sum().astype(jnp.float32), 1.0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "rest", "opt_state", "step"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a training run must keep; a pytree, so it can be donated, sharded and saved.

    Attributes:
      graphdef: structure of the decoder.
      params: its trainable parameters.
      rest: its other variables.
      opt_state: of the optimizer.
      step: `[]` int32, updates done.
    """

    graphdef: Any
    params: Any
    rest: Any
    opt_state: Any
    step: Int[Array, ""]

    @classmethod
    def create(cls, decoder: Decoder, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first update. It shares the decoder's arrays, which `train_step` will donate."""
        graphdef, params, rest = nnx.split(decoder, nnx.Param, ...)
        return cls(
            graphdef=graphdef,
            params=params,
            rest=rest,
            opt_state=optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
        )

    @property
    def decoder(self) -> Decoder:
        """The decoder with the current parameters."""
        return nnx.merge(self.graphdef, self.params, self.rest)


class TrainOutput(NamedTuple):
    """Result of `train_step`.

    Attributes:
      state: after the update.
      loss: `[]` float32, cross-entropy in nats, without the balancing term.
      gradient_norm: `[]` float32, over all parameters.
    """

    state: TrainState
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


@functools.partial(
    jax.jit, static_argnames=("optimizer", "load_balancing"), donate_argnames=("state",)
)
def train_step(
    state: TrainState,
    tokens: Int[Array, "B T"],
    *,
    optimizer: optax.GradientTransformation,
    segment_ids: Int[Array, "B T"] | None = None,
    update_scale: Float[Array, ""] | None = None,
    load_balancing: float = 0.0,
    dropout_key: Array | None = None,
) -> TrainOutput:
    """One update on the prediction of `tokens[:, 1:]` from `tokens[:, :-1]`.

    Args:
      state: donated; use the one that is returned.
      tokens: `[B, T]` integer, T >= 2.
      optimizer: the one that made the state.
      segment_ids: `[B, T]`; the first token of a segment is not predicted from the one before it, padding (negative)
        not at all.
      update_scale: `[]`, multiplies the update: a schedule that is driven from outside.
      load_balancing: weight of `moe.load_balancing_loss`.
      dropout_key: None for none; folded with the step.

    Returns:
      `TrainOutput(state, loss, gradient_norm)`.

    Raises:
      TypeError, ValueError: as `Decoder`, and for `load_balancing` without a mixture.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"`tokens` must have shape [B, T] with T >= 2, got {tokens.shape}")
    options: dict[str, Any] = dict(deterministic=dropout_key is None)
    if dropout_key is not None:
        options["dropout_key"] = jax.random.fold_in(dropout_key, state.step)
    real = None
    if segment_ids is not None:
        options["segment_ids"] = segment_ids[:, :-1]
        real = (segment_ids[:, 1:] >= 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])

    def objective(params):
        decoder = nnx.merge(state.graphdef, params, state.rest)
        if load_balancing == 0.0:
            loss = next_token_loss(decoder(tokens[:, :-1], **options), tokens[:, 1:], real=real)
            return loss, loss
        logits, router = decoder.with_router_statistics(tokens[:, :-1], **options)
        loss = next_token_loss(logits, tokens[:, 1:], real=real)
        return loss + load_balancing * load_balancing_loss(router), loss

    gradients, loss = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    if update_scale is not None:
        updates = jax.tree.map(lambda update: update * update_scale.astype(update.dtype), updates)
    advanced = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        step=state.step + 1,
    )
    return TrainOutput(advanced, loss, optax.global_norm(gradients))
