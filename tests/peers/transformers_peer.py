"""transformers' own model tests with our attention for "sdpa" and "eager", and our gated delta rule.

Tests that compare with "eager" keep theirs under that name.
"""

import pytest
import torch
from transformers import Qwen3_5TextConfig, Qwen3NextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from interop.huggingface import attention_forward, patch_gated_delta

with torch.device("meta"):
    patch_gated_delta(Qwen3NextGatedDeltaNet(Qwen3NextConfig(), 0))
    patch_gated_delta(Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(), 0))


@pytest.fixture(autouse=True)
def our_attention(request, monkeypatch):
    for name in ("sdpa",) if "eager" in request.node.name else ("sdpa", "eager"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, attention_forward)
