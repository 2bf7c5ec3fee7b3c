"""Layers whose rows are spread over devices: what `parallel.region` puts in the place of those of one device."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from gqa_jax.config import AttentionConfig
from gqa_jax.layers import masks
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.rows import Row
from gqa_jax.parallel.context.attention import context_attention
from gqa_jax.parallel.context.delta_rule import (
    context_causal_conv1d,
    context_gated_delta_rule,
    redo_order,
    undo_order,
)
from gqa_jax.parallel.context.order import ContextParallel
from gqa_jax.parallel.context.row import RowMarks, lose_rows_with_gaps, row_marks
from pallas_kernels import GatedDeltaRuleOutput


@dataclasses.dataclass(frozen=True)
class SpreadRow(Row):
    """A device's tokens of a row.

    Attributes:
      of_device: their places in the row.
      plan: how the row is spread.
    """

    of_device: RowMarks = dataclasses.field(kw_only=True)
    plan: ContextParallel = dataclasses.field(kw_only=True)

    @property
    def marks(self) -> dict[str, Any]:
        """Arguments of `context_attention`."""
        places = self.of_device.places if self.plan.layout == "positions" else None
        return dict(context_parallel=self.plan, positions=places, segment_ids=self.segment_ids)

    def largest_logits(
        self, query: Array, key: Array, config: AttentionConfig, **marks: Array | None
    ) -> Float[Array, "K R"]:
        """As `Row`, over the keys of all devices."""
        marks = marks or self.of_device.of_logits()
        return super().largest_logits(query, self.of_device.gather(key), config, **marks)


class ContextSelfAttention(SelfAttention):
    """Self-attention over the tokens of all devices."""

    context_parallel: ContextParallel
    attend = staticmethod(context_attention)

    def arrange(
        self, x: Array, positions: Array | None, segment_ids: Array | None, mask: Array | None
    ) -> SpreadRow:
        """Positions are those of the whole row; `mask` is None."""
        assert mask is None
        plan = self.context_parallel
        marks = row_marks(x, plan, positions=positions, segment_ids=segment_ids)
        return SpreadRow(x, marks.rotary, segment_ids, of_device=marks, plan=plan)


class ContextGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet over the tokens of all devices: the convolution reads across their borders, the state travels."""

    context_parallel: ContextParallel

    @property
    def goes_by_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens come in any order, which `positions` tell."""
        return self.context_parallel.layout == "positions"

    def __call__(
        self, x: Array, *, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """As `GatedDeltaNet`; `positions` are the tokens' places, with layout "positions"."""
        if positions is None:
            return self._in_order(x, segment_ids)
        axis = self.context_parallel.axis
        (x, segment_ids), places = undo_order((x, segment_ids), positions, axis_name=axis)
        plan = self.context_parallel
        self.context_parallel = dataclasses.replace(plan, layout="contiguous")
        out = self._in_order(x, segment_ids)
        self.context_parallel = plan
        return redo_order(out, places, axis_name=axis)

    def _in_order(self, x: Array, segment_ids: Array | None) -> Array:
        out, _, _ = self._run(masks.hide_padding(x, segment_ids), None, None, segment_ids)
        if segment_ids is None:
            return out
        return lose_rows_with_gaps(out, segment_ids, self.context_parallel)

    def _mix(
        self,
        projected: Array,
        g: Array,
        beta: Array,
        conv: Array | None,
        state: Array | None,
        segment_ids: Array | None,
    ) -> tuple[GatedDeltaRuleOutput, None]:
        config, plan = self.config, self.context_parallel
        _, heads, channels = self.conv.kernel.shape
        key_dim = config.key_head_dim
        flat = lambda x: x.astype(projected.dtype).reshape(*x.shape[:-2], heads * channels)
        mixed = context_causal_conv1d(
            flat(projected[..., :channels]),
            flat(self.conv.kernel[...]),
            bias=None if self.conv.bias is None else flat(self.conv.bias[...]),
            activation="silu",
            segment_ids=segment_ids,
            context_parallel=plan,
        )
        mixed = mixed.reshape(*projected.shape[:2], heads, channels)
        query, key = mixed[..., :key_dim], mixed[..., key_dim : 2 * key_dim]
        value = mixed[..., 2 * key_dim :]
        value = value.reshape(*projected.shape[:2], config.num_value_heads, config.value_head_dim)
        result = context_gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            use_qk_l2norm=True,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=config.chunk_size,
            context_parallel=plan,
        )
        return result, None
