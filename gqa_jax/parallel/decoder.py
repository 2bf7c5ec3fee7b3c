"""A whole decoder in one region of a mesh: training calls, and steps with caches that are split."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from gqa_jax.layers.moe import RouterStatistics
from gqa_jax.parallel import region, sharding
from gqa_jax.parallel.caches import (
    cache_specs_of,
    check_capacity,
    part_of,
    spread_over_tokens,
)
from gqa_jax.parallel.context.order import ContextParallel, num_slots
from gqa_jax.parallel.context.row import (
    can_be_read,
    check_gaps,
    check_permutation,
    place_of_token,
)
from gqa_jax.parallel.sharding import MeshAxes, names


def check_axes(axes: MeshAxes | None, context_parallel: ContextParallel | None) -> None:
    """Raises `ValueError` where `axes` and `context_parallel` do not belong together."""
    has_seq = axes is not None and axes.seq is not None
    if has_seq != (context_parallel is not None):
        raise ValueError(
            "`context_parallel` and `axes.seq` must be given together, got "
            f"context_parallel={context_parallel}, axes={axes}"
        )


def forward(
    decoder: Any,
    tokens: Array,
    *,
    positions: Array | None,
    segment_ids: Array | None,
    deterministic: bool | None,
    dropout_key: Array | None,
) -> tuple[Array, RouterStatistics | None]:
    """`Decoder.forward` on the devices of a mesh; logits are laid out as `axes.logits`.

    Raises:
      ValueError: sizes that the mesh does not divide; marks that context parallelism cannot work with.
      NotImplementedError: as `region.dropout_offset`.
    """
    axes, plan, config = decoder.axes, decoder.context_parallel, decoder.config
    if plan is not None:
        if segment_ids is not None and positions is None:
            raise ValueError(
                "`positions` must be given with `segment_ids` under context parallelism, got None"
            )
        has_delta = "linear_attention" in config.layers
        windows = config.sliding_window is not None or (
            config.attention is not None and config.attention.sliding_window is not None
        )
        check_row(
            tokens, axes, plan, positions, segment_ids, gaps=has_delta or windows, whole=windows
        )
    if not sharding.is_manual(axes):
        check_rows(tokens, axes, plan, name="tokens")

    def body(local, tokens, positions, segment_ids, dropout_key):
        offset = None
        if dropout_key is not None and config.attention is not None:
            offset = region.dropout_offset(config.attention, tokens.shape[0], axes)
        return local.forward(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
            dropout_key=dropout_key,
            dropout_offset=offset,
        )

    return region.run(
        decoder,
        body,
        (tokens, positions, segment_ids, dropout_key),
        axes=axes,
        in_specs=(axes.tokens, positions_spec(positions, axes), axes.tokens, jax.P()),
        out_specs=(axes.logits, None if config.moe is None else jax.P()),
        context_parallel=plan,
    )


def advance(
    decoder: Any, tokens: Array, cache: Any, *, lengths: Array | None, last_only: bool, left: bool
) -> Any:
    """`Decoder.advance` on a mesh: heads split as in training, tokens of the step on every device of `axes.seq`.

    A `KVCache` is split over `axes.seq` by slots: the owner of a slot writes it, partial softmaxes merge.

    Raises:
      ValueError: a batch, or a capacity, that the mesh does not divide.
      NotImplementedError: as `cache_specs`.
    """
    axes, plain = decoder.axes, decoder.axes.without_seq
    if not sharding.is_manual(axes):
        check_rows(tokens, plain, None, name="tokens")
    for entry in cache:
        check_capacity(entry, axes)
    specs = cache_specs_of(cache, decoder)

    def body(local, tokens, cache, lengths):
        cache = tuple(spread_over_tokens(entry, axes) for entry in cache)
        logits, cache = local.advance(
            tokens, cache, lengths=lengths, last_only=last_only, left=left
        )
        return logits, tuple(part_of(entry) for entry in cache)

    rows = jax.P(plain.tokens[0])
    out = region.run(
        decoder,
        body,
        (tokens, cache, lengths),
        axes=plain,
        in_specs=(rows, specs, rows),
        out_specs=(plain.logits, specs),
    )
    return out


def positions_spec(positions: Array | None, axes: MeshAxes) -> jax.P:
    """Of `[B, T]` or `[3, B, T]`."""
    return axes.tokens if positions is None or positions.ndim == 2 else jax.P(None, *axes.tokens)


def check_rows(
    x: Array | np.ndarray, axes: MeshAxes, plan: ContextParallel | None, *, name: str
) -> None:
    """Raises `ValueError` for a batch or length that the mesh does not divide."""
    mesh = sharding.current_mesh(axes)
    rows = sharding.size(axes.batch, mesh)
    if x.shape[0] % rows:
        raise ValueError(
            f"`{name}` must have a batch that is a multiple of {rows} (mesh axes {names(axes.batch)}), got "
            f"B={x.shape[0]}"
        )
    devices = sharding.size(axes.seq, mesh)
    chunks = devices * (1 if plan is None or axes.seq is None else num_slots(plan.layout))
    parts = devices * sharding.size(axes.seq_residual, mesh)
    for multiple in (chunks, parts):
        if x.shape[1] % multiple:
            raise ValueError(
                f"`{name}` must have a length that is a multiple of {multiple} (mesh axes "
                f"{names(axes.seq) + names(axes.seq_residual)}), got T={x.shape[1]}"
            )


def check_row(
    x: Array,
    axes: MeshAxes,
    plan: ContextParallel,
    positions: Array | None,
    segment_ids: Array | None,
    *,
    gaps: bool,
    whole: bool,
) -> None:
    """Raises `ValueError` for marks that context parallelism cannot work with, as far as they can be read.

    Args:
      x: `[B, T, ...]`, of all devices.
      axes, plan, positions, segment_ids: of the call.
      gaps, whole: whether a layer needs the tokens of a segment next to each other, see `check_gaps`.
    """
    if plan.layout == "positions":
        if positions is None:
            raise ValueError("`positions` must be given with layout 'positions', got None")
        if positions.ndim != 2:
            raise ValueError(
                f"`positions` must have shape [B, T] with layout 'positions', got {positions.shape}"
            )
    if sharding.is_manual(axes):
        return
    if plan.layout == "positions" and positions is not None and can_be_read(positions):
        check_permutation(positions)
    if gaps and segment_ids is not None:
        check_rows(x, axes, plan, name="x")
        devices = sharding.size(axes.seq, sharding.current_mesh(axes))
        places = place_of_token(x.shape[1], devices, plan.layout, positions)
        check_gaps(segment_ids, places, whole_segments=whole)
