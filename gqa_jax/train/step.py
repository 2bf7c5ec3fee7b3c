"""The training recipe: a loss, a state that is one pytree, and a jitted step that updates it in place."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.layers.moe import load_balancing_loss
from gqa_jax.models.decoder import Decoder
from gqa_jax.parallel import sharding, vocabulary
from gqa_jax.parallel.sharding import MeshAxes
from pallas_kernels import as_int32


def next_token_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    *,
    real: Bool[Array, "B T"] | None = None,
    axes: MeshAxes | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats over the targets that count, computed in float32.

    Args:
      logits: `[B, T, V]`; `logits[:, t]` predicts `targets[:, t]`.
      targets: `[B, T]` integer; a negative one, such as -100, does not count.
      real: `[B, T]`; False leaves a target out too. With none left the loss is 0.
      axes: of the decoder that made the logits; None for logits whose vocabulary is not split.

    Returns:
      `[]` float32; a target of V or more makes it, and its gradient, NaN inside `jit`.

    Raises:
      TypeError: targets that are not integers, `real` that is not boolean.
      ValueError: shapes that do not fit, or a target of V or more outside `jit`.
    """
    if targets.shape != logits.shape[:2]:
        raise ValueError(f"`targets` must have shape {logits.shape[:2]}, got {targets.shape}")
    if real is not None and real.shape != targets.shape:
        raise ValueError(f"`real` must have shape {targets.shape}, got {real.shape}")
    if real is not None and real.dtype != bool:
        raise TypeError(f"`real` must be boolean, got {real.dtype}")
    labels = vocabulary.as_labels("targets", targets, vocab_size=logits.shape[-1], real=real)
    losses = vocabulary.cross_entropy(logits, labels, axes)
    return losses.sum() / jnp.maximum((labels >= 0).sum().astype(jnp.float32), 1.0)


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
        taken = {id(leaf) for leaf in jax.tree.leaves((params, rest))}

        def own(leaf):
            """A copy of what is in the state already: an optimizer may keep the parameters, donated once each."""
            if id(leaf) in taken and isinstance(leaf, jax.Array):
                return leaf.copy()
            taken.add(id(leaf))
            return leaf

        return cls(
            graphdef=graphdef,
            params=params,
            rest=rest,
            opt_state=jax.tree.map(own, optimizer.init(params)),
            step=jnp.zeros((), jnp.int32),
        )

    @classmethod
    def create_on_mesh(
        cls,
        build: Callable[[], Decoder],
        optimizer: optax.GradientTransformation,
        mesh: Any,
        *,
        overrides: Mapping[str, jax.P] | None = None,
    ) -> "TrainState":
        """The same, created in shards: a device, or a process of many, never holds more than its own.

        Args:
          build: makes the decoder, with `axes`.
          optimizer: of the state.
          mesh: concrete, with those axes; it may span processes, which then all call this.
          overrides: end of a path -> its spec, before the rules of `sharding.parameter_specs`.

        Raises:
          ValueError: a decoder without `axes`, or as `sharding.parameter_spec`.
        """

        def make() -> TrainState:
            return cls.create(build(), optimizer)

        abstract = jax.eval_shape(make)
        axes = abstract.decoder.axes
        if axes is None:
            raise ValueError("`build` must make a decoder with `axes`, got axes=None")
        shardings = sharding.parameter_shardings(abstract, mesh, axes, overrides=overrides)
        return jax.jit(make, out_shardings=shardings)()

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


def train_step(
    state: TrainState,
    tokens: Int[Array, "B T"],
    *,
    optimizer: optax.GradientTransformation,
    targets: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    update_scale: Float[Array, ""] | None = None,
    load_balancing: float = 0.0,
    dropout_key: Array | None = None,
) -> TrainOutput:
    """One update on the prediction of `tokens[:, 1:]` from `tokens[:, :-1]`, or of `targets` from `tokens`; jitted.

    On a mesh the decoder's `axes` split, gradients are summed and parameters stay where they are.

    Args:
      state: donated; use the one that is returned.
      tokens: `[B, T]` integer, T >= 2.
      optimizer: the one that made the state.
      targets: `[B, T]` integer, what each token predicts; negative, such as -100, predicts nothing. None shifts
        `tokens`. Needed under context parallelism, where the next token may be on another device: shift, then
        `to_layout`.
      positions: `[B, T]`, as for `Decoder`, with `targets` only.
      segment_ids: `[B, T]`; padding (negative) predicts nothing and, without `targets`, is not predicted, nor is the
        first token of a segment from the one before it.
      update_scale: `[]`, multiplies the update: a schedule that is driven from outside.
      load_balancing: weight of `moe.load_balancing_loss`.
      dropout_key: folded with the step. None follows the decoder: one switched by `train()` drops by its own stream,
        whose count the new state has.

    Returns:
      `TrainOutput(state, loss, gradient_norm)`.

    Raises:
      TypeError, ValueError: as `Decoder`, for `load_balancing` without a mixture, `positions` without `targets`,
        context parallelism without `targets`, or a target of V or more in a NumPy array (in a device's array it makes
        loss and gradient NaN: values there are not waited for).
    """
    tokens, positions = as_int32("tokens", tokens), as_int32("positions", positions)
    segment_ids = as_int32("segment_ids", segment_ids)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"`tokens` must have shape [B, T] with T >= 2, got {tokens.shape}")
    for name, array in (("targets", targets), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"`{name}` must have shape {tokens.shape}, got {array.shape}")
    if isinstance(targets, np.ndarray) and not isinstance(segment_ids, jax.Array):
        vocab_size = state.params["embed"]["embedding"].shape[0]
        real = None if segment_ids is None else segment_ids >= 0
        targets = vocabulary.as_labels("targets", targets, vocab_size=vocab_size, real=real)
    output = _train_step(
        state,
        tokens,
        optimizer=optimizer,
        targets=targets,
        positions=positions,
        segment_ids=segment_ids,
        update_scale=update_scale,
        load_balancing=load_balancing,
        dropout_key=dropout_key,
    )
    # The program may have been compiled for an equal decoder from another folder (`DecoderConfig.source`).
    return output._replace(state=dataclasses.replace(output.state, graphdef=state.graphdef))


@functools.partial(
    jax.jit, static_argnames=("optimizer", "load_balancing"), donate_argnames=("state",)
)
def _train_step(
    state: TrainState,
    tokens: Array,
    *,
    optimizer: optax.GradientTransformation,
    targets: Array | None,
    positions: Array | None,
    segment_ids: Array | None,
    update_scale: Array | None,
    load_balancing: float,
    dropout_key: Array | None,
) -> TrainOutput:
    options: dict[str, Any] = {}
    if dropout_key is not None:
        key = jax.random.fold_in(dropout_key, state.step)
        options |= dict(deterministic=False, dropout_key=key)
    real = None
    if targets is not None:
        real = None if segment_ids is None else segment_ids >= 0
        options |= dict(positions=positions, segment_ids=segment_ids)
    else:
        if positions is not None:
            raise ValueError("`positions` must be None without `targets`")
        if state.decoder.context_parallel is not None:
            raise ValueError(
                "`targets` must be given under context parallelism, got None: the next token may be on another device"
            )
        if segment_ids is not None:
            options["segment_ids"] = segment_ids[:, :-1]
            real = (segment_ids[:, 1:] >= 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
        tokens, targets = tokens[:, :-1], tokens[:, 1:]

    def objective(params):
        decoder = nnx.merge(state.graphdef, params, state.rest, copy=True)
        loss_of = functools.partial(next_token_loss, targets=targets, real=real, axes=decoder.axes)
        if load_balancing == 0.0:
            loss = total = loss_of(decoder(tokens, **options))
        else:
            logits, router = decoder.with_router_statistics(tokens, **options)
            loss = loss_of(logits)
            total = loss + load_balancing * load_balancing_loss(router)
        return total, (loss, nnx.split(decoder, nnx.Param, ...)[2])

    gradients, (loss, rest) = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    if update_scale is not None:
        updates = jax.tree.map(lambda update: update * update_scale.astype(update.dtype), updates)
    advanced = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        rest=rest,
        opt_state=opt_state,
        step=state.step + 1,
    )
    return TrainOutput(advanced, loss, optax.global_norm(gradients))
