"""Rows spread over devices: order of tokens, attention by exchange of keys or heads, delta rule by of states."""

from gqa_jax.parallel.context.attention import context_attention as context_attention
from gqa_jax.parallel.context.attention import (
    context_attention_with_lse as context_attention_with_lse,
)
from gqa_jax.parallel.context.delta_rule import context_causal_conv1d as context_causal_conv1d
from gqa_jax.parallel.context.delta_rule import context_gated_delta_rule as context_gated_delta_rule
from gqa_jax.parallel.context.delta_rule import redo_order as redo_order
from gqa_jax.parallel.context.delta_rule import undo_order as undo_order
from gqa_jax.parallel.context.order import ContextParallel as ContextParallel
from gqa_jax.parallel.context.order import from_layout as from_layout
from gqa_jax.parallel.context.order import to_layout as to_layout
from gqa_jax.parallel.context.row import check_permutation as check_permutation
from gqa_jax.parallel.context.row import lose_rows_with_gaps as lose_rows_with_gaps
from gqa_jax.parallel.context.row import row_marks as row_marks
