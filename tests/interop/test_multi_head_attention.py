"""The torchtune drop-in against torchtune's definition, written out with PyTorch's attention."""

import logging

import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch
nn = torch.nn


class Rotate(nn.Module):
    """Stands for a rotary embedding: depends on the position, and takes [B, T, heads, D]."""

    def forward(self, x, *, input_pos=None):
        length = x.shape[1]
        positions = torch.arange(length)[None] if input_pos is None else input_pos
        return x * (1 + 0.1 * positions[..., None, None])


def build(**options):
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
    linear = lambda width: nn.Linear(32, width, bias=False)
    modules = dict(q_proj=linear(32), k_proj=linear(16), v_proj=linear(16), output_proj=linear(32))
    return interop.MultiHeadAttention(**{**sizes, **modules, **options})


def expected(layer, x, y, *, mask=None, is_causal=False):
    split = lambda z, heads: z.view(*z.shape[:2], heads, 8)
    rotate = layer.pos_embeddings or (lambda z, input_pos=None: z)
    norms = layer.q_norm or (lambda z: z), layer.k_norm or (lambda z: z)
    query = norms[0](rotate(split(layer.q_proj(x), 4)).transpose(1, 2))
    key = norms[1](rotate(split(layer.k_proj(y), 2)).transpose(1, 2))
    value = split(layer.v_proj(y), 2).transpose(1, 2)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=is_causal,
        enable_gqa=True,
    )
    return layer.output_proj(out.transpose(1, 2).flatten(2))


def test_self_and_cross_attention_with_everything_injected():
    layer = build(pos_embeddings=Rotate(), q_norm=nn.RMSNorm(8), k_norm=nn.RMSNorm(8))
    x, y = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 7, 32)
    assert_close(layer(x, x), expected(layer, x, x, is_causal=True), atol=1e-5)
    mask = torch.rand(2, 5, 7) > 0.3
    mask[..., 0] = True
    ours, theirs = layer(x, y, mask=mask), expected(layer, x, y, mask=mask)
    assert_close(ours, theirs, atol=1e-5)
    leaves = [x, *layer.parameters()]
    pairs = (torch.autograd.grad(z.sin().sum(), leaves) for z in (ours, theirs))
    for mine, its in zip(*pairs, strict=True):
        assert_close(mine, its, atol=1e-5)
    free = build(is_causal=False)
    assert_close(free(x, y), expected(free, x, y), atol=1e-5)


def test_decoding_through_the_cache():
    layer = build(pos_embeddings=Rotate())
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        whole = layer(x, x)
        layer.setup_cache(batch_size=3, dtype=torch.float32, max_seq_len=8)
        assert "kv_cache.k_cache" not in layer.state_dict()
        causal = torch.ones(8, 8, dtype=torch.bool).tril()
        outs = []
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            part = x[:, start:stop]
            positions = torch.arange(start, stop)[None]
            outs.append(
                layer(
                    part, part, mask=causal[None, start:stop].expand(2, -1, -1), input_pos=positions
                )
            )
        assert_close(torch.cat(outs, 1), whole, atol=1e-5)
        assert layer.kv_cache.size == 5
        last = x[:, 4:]
        reread = layer(last, None, input_pos=torch.tensor([[4]]))
        assert_close(reread, whole[:, 4:], atol=1e-5)
        layer.reset_cache()
        assert layer.kv_cache.size == 0
        assert not layer.kv_cache.k_cache.any()
        layer(x, x)
        with pytest.raises(AssertionError, match="5 tokens and 5 more exceed the cache's 8"):
            layer(x, x)
        with pytest.raises(
            ValueError, match="batch size of 3, but found new key tensors with batch size 4"
        ):
            layer.kv_cache.update(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8))


def test_dropout_only_in_training():
    layer = build(attn_dropout=0.5)
    x = torch.randn(1, 5, 32)
    assert not torch.equal(layer(x, x), layer(x, x))
    layer.eval()
    assert torch.equal(layer(x, x), layer(x, x))


def test_errors_are_torchtunes(caplog):
    for options, message in (
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"),
        ({"embed_dim": 30}, r"embed_dim \(30\) must be divisible by num_heads \(4\)"),
        ({"attn_dropout": 1.5}, r"attn_dropout \(1.5\) must be between 0.0 and 1.0"),
        ({"q_norm": nn.Identity()}, "q and k norm must be set together"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    layer = build()
    x = torch.randn(1, 2, 32)
    with pytest.raises(ValueError, match="Must provide y input or use kv_cache"):
        layer(x)
    with pytest.raises(
        ValueError, match=r"mask must be a boolean tensor \[B, T, S\], got torch.float32"
    ):
        layer(x, x, mask=torch.zeros(1, 2, 2))
    with pytest.raises(RuntimeError, match="Key value caches are not setup"):
        layer.reset_cache()
    given = build(kv_cache=interop.KVCache(1, 4, 2, 8, torch.float32))
    with caplog.at_level(logging.WARNING):
        given.setup_cache(1, torch.float32, 4)
    assert "already setup" in caplog.text
    assert not given.cache_enabled
