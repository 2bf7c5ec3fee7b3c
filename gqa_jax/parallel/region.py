"""A whole decoder in one `shard_map`: every device runs it, as it is on one, on its own rows, tokens and heads."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from gqa_jax.config import AttentionConfig
from gqa_jax.layers.moe import RouterStatistics
from gqa_jax.parallel import sharding
from gqa_jax.parallel.tensor.layers import check_row
from gqa_jax.parallel.tensor.on_mesh import check_rows, laid_out
from gqa_jax.train import qk_clip


def forward(
    decoder: Any,
    run: Callable[..., tuple[Array, RouterStatistics | None]],
    tokens: Array,
    *,
    positions: Array | None,
    segment_ids: Array | None,
    dropout_key: Array | None,
) -> tuple[Array, RouterStatistics | None]:
    """`run(decoder, tokens, positions, segment_ids, dropout_key)` on every device of the mesh.

    Inside a caller's own `shard_map` it runs on this device as it is.

    Args:
      decoder: with `axes`; what `nnx.capture` records in it comes back into it.
      run: the decoder's forward pass, logits and router's statistics.
      tokens, positions, segment_ids: as `Decoder.__call__` has them.
      dropout_key: or None, where nothing is dropped.

    Returns:
      the logits, laid out as `axes.logits`, and the statistics, whole on every device.

    Raises:
      ValueError: no mesh, axes that it lacks, sizes that its axes do not divide, or a row that context parallelism
        cannot work with.
    """
    axes = decoder.axes
    mesh = sharding.current_mesh(axes)
    marks = (tokens, positions, segment_ids, dropout_key)
    if sharding.is_manual(axes) or not axes.used:
        return run(decoder, *marks)
    _check(decoder, tokens, positions, segment_ids)
    copy = jax.tree.map(lambda x: x, decoder)
    copy.rngs = None  # the caller has drawn the key
    held = qk_clip.records(copy)
    qk_clip.put_records(copy, [{} for _ in held])
    leaves, treedef = jax.tree.flatten(copy)

    def on_device(leaves, *marks):
        local = jax.tree.unflatten(treedef, leaves)
        return *run(local, *marks), qk_clip.records(local)

    three = positions is not None and positions.ndim == 3
    in_specs = (
        sharding.parameter_specs(copy, axes, mesh),
        axes.tokens,
        jax.P(None, *axes.tokens) if three else axes.tokens,
        axes.tokens,
        jax.P(),
    )
    arguments = laid_out((leaves, *marks), in_specs)
    out_specs = (axes.logits, jax.P(), jax.P())
    logits, router, new = jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs)(
        *arguments
    )
    both = lambda old, new: {name: (*old.get(name, ()), *new[name]) for name in new} or old
    qk_clip.put_records(decoder, [both(*pair) for pair in zip(held, new, strict=True)])
    return logits, router


def _check(decoder: Any, tokens: Array, positions: Array | None, segment_ids: Array | None) -> None:
    """Raises `ValueError` for what can be seen before the region: sizes, and marks whose values can be read."""
    check_rows(tokens, decoder.axes, decoder)
    if decoder.context_parallel is None:
        return
    for layer in decoder.layers:
        config, marks = layer.mixer.config, (tokens, positions, segment_ids)
        windowed = isinstance(config, AttentionConfig) and config.sliding_window is not None
        any_gap = windowed or not isinstance(config, AttentionConfig)
        check_row(layer.mixer, *marks, whole_segments=windowed, any_gap=any_gap)
