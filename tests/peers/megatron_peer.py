"""Megatron-LM's QK-clip tests: their `SelfAttention.clip_qk` scales the weight with `qk_clip.clip_qkv`.

They ask for a GPU and Transformer Engine; clipping needs neither. The weight is compared with that of their own code.
"""

import types
from unittest import mock

import jax.numpy as jnp
import megatron.core.models.gpt.gpt_layer_specs as specs
import megatron.core.transformer.attention as attention
import megatron.core.utils
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from gqa_jax import layout, qk_clip


class SelfAttention(attention.SelfAttention):
    def __init__(self, config, submodules, layer_number):
        torch.nn.Module.__init__(self)
        self.config, self.head_dim = config, config.kv_channels
        self.num_attention_heads_per_partition = heads = config.num_attention_heads
        self.num_query_groups_per_partition = groups = config.num_query_groups
        self.query_projection_size = heads * self.head_dim
        self.kv_projection_size = groups * self.head_dim
        rows = self.query_projection_size + 2 * self.kv_projection_size
        self.linear_qkv = torch.nn.Linear(config.hidden_size, rows)
        self.core_attention = types.SimpleNamespace(current_max_attn_logits=None)

    def cuda(self):
        return self

    def _clip_linear_qkv(self, weight):
        groups = self.num_query_groups_per_partition
        logits = self.core_attention.current_max_attn_logits.reshape(groups, -1)
        sizes = dict(layout="grouped", q_per_kv=logits.shape[1])
        ours = layout.to_group_axes(jnp.asarray(weight.numpy().T), head_dim=self.head_dim, **sizes)
        ours = qk_clip.clip_qkv(
            ours,
            jnp.asarray(logits.numpy()),
            threshold=self.config.qk_clip_threshold,
            alpha=self.config.qk_clip_alpha,
        )
        ours = torch.from_numpy(np.array(layout.from_group_axes(ours, **sizes)).T)
        torch.testing.assert_close(ours, super()._clip_linear_qkv(weight.clone()))
        return ours


attention.SelfAttention = SelfAttention
specs.get_gpt_layer_with_transformer_engine_submodules = mock.MagicMock()
megatron.core.utils.is_te_min_version = lambda *_, **__: True


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def one_process_without_gpu(request, monkeypatch):
    for name in ("Utils", "model_parallel_cuda_manual_seed"):
        monkeypatch.setattr(request.module, name, mock.MagicMock())
    with OnCpu():
        yield
