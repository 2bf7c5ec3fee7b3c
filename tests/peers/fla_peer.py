"""FLA's gated delta rule and KDA, chunked and recurrent, answered by `interop.gated_delta_rule`.

FLA's decay per channel belongs to a value head, ours to a key head: keys are repeated to the value heads.
"""

import warnings

import fla.ops.gated_delta_rule as gated
import fla.ops.kda as kda
import fla.utils
import torch
from fla.ops.gated_delta_rule.gate import naive_gdn_gate
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate

import interop

fla.utils.device = "cpu"


def delta_rule(
    q, k, v, g=None, beta=None, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, use_gate_in_kernel=False,
    A_log=None, dt_bias=None, lower_bound=None, state_v_first=False, transpose_state_layout=None, **hints,
):  # fmt: skip
    """FLA's arguments; `hints` choose among their kernels and change no value."""
    if transpose_state_layout is not None:
        warnings.warn(
            "`transpose_state_layout` is the old name of `state_v_first`", DeprecationWarning
        )
        if state_v_first:
            raise ValueError("`state_v_first` must not be given with its old name")
        state_v_first = transpose_state_layout
    per_channel = g is not None and g.ndim == 4
    if g is None:
        g = torch.zeros(v.shape[:3])
    if use_gate_in_kernel:
        if lower_bound is not None:
            g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
        else:
            g = (naive_kda_gate if per_channel else naive_gdn_gate)(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if per_channel:
        repeats = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    if initial_state is not None and state_v_first:
        initial_state = initial_state.transpose(-1, -2)
    out, state = interop.gated_delta_rule(
        q.to(v.dtype), k.to(v.dtype), v, g.float(), beta, scale=scale, initial_state=initial_state,
        use_qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if not output_final_state:
        return out, None
    return out, state.transpose(-1, -2) if state_v_first else state


for _module, _names in (
    (gated, ("chunk_gated_delta_rule", "chunk_gdn", "fused_recurrent_gated_delta_rule", "fused_recurrent_gdn")),
    (kda, ("chunk_kda", "fused_recurrent_kda")),
):  # fmt: skip
    for _name in _names:
        setattr(_module, _name, lambda q, k, v, *a, **kw: delta_rule(q, k, v, *a, **kw))
