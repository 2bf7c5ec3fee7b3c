"""Operators on arrays: grouped-query attention, the gated delta rule and their companions.

Layout is `[B, T, heads, dim]` everywhere. Letters: `B` batch, `T` query or token length, `S` key length, `N` query
heads, `K` key/value heads, `R = N // K`, `D` head dim, `Dv` head dim of values; for the delta rule `Hk` / `Hv`
key / value heads with dims `Dk` / `Dv`; `W` convolution width, `F` features.
"""

from pallas_kernels._checks import as_int32 as as_int32
from pallas_kernels._dispatch import Explanation as Explanation
from pallas_kernels._explain import explain as explain
from pallas_kernels.attention.api import AttentionOutput as AttentionOutput
from pallas_kernels.attention.api import gqa_attention as gqa_attention
from pallas_kernels.attention.api import gqa_attention_qkv as gqa_attention_qkv
from pallas_kernels.attention.api import gqa_attention_with_lse as gqa_attention_with_lse
from pallas_kernels.causal_conv.api import CausalConvOutput as CausalConvOutput
from pallas_kernels.causal_conv.api import QKVConvOutput as QKVConvOutput
from pallas_kernels.causal_conv.api import causal_conv1d as causal_conv1d
from pallas_kernels.causal_conv.api import causal_conv1d_qkv as causal_conv1d_qkv
from pallas_kernels.decode.api import MAX_NEW_TOKENS as MAX_NEW_TOKENS
from pallas_kernels.decode.api import decode_attention as decode_attention
from pallas_kernels.delta_rule.api import GatedDeltaRuleOutput as GatedDeltaRuleOutput
from pallas_kernels.delta_rule.api import GatedDeltaRuleStepOutput as GatedDeltaRuleStepOutput
from pallas_kernels.delta_rule.api import gated_delta_rule as gated_delta_rule
from pallas_kernels.delta_rule.api import gated_delta_rule_step as gated_delta_rule_step
from pallas_kernels.delta_rule.step.tuning import MAX_STEP_TOKENS as MAX_STEP_TOKENS
from pallas_kernels.deltanet.algebra import gated_deltanet_gates as gated_deltanet_gates
from pallas_kernels.deltanet.api import GatedDeltaNetStepOutput as GatedDeltaNetStepOutput
from pallas_kernels.deltanet.api import gated_deltanet_step as gated_deltanet_step
