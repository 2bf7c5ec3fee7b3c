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


def cached(layer, x, splits, **options):
    """The layer over parts of x, one after the other, through its cache."""
    outs, start = [], 0
    for size in splits:
        part = x[:, start : start + size]
        positions = torch.arange(start, start + size)[None]
        outs.append(layer(part, part, input_pos=positions, **options))
        start += size
    return torch.cat(outs, 1)


@pytest.mark.parametrize("splits", [(6,), (1,) * 6, (2, 3, 1)])
def test_a_cache_without_a_mask_is_causal(splits):
    layer = build(pos_embeddings=Rotate())
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        alone = expected(layer, x, x, is_causal=True)
        layer.setup_cache(batch_size=3, dtype=torch.float32, max_seq_len=9)
        assert_close(cached(layer, x, splits), alone, atol=1e-5)
        layer.reset_cache()
        later = x.clone()
        later[:, -1] += 9.0
        changed = cached(layer, later, splits)
        assert_close(changed[:, :-1], alone[:, :-1], atol=1e-5)
        layer.reset_cache()
        assert_close(cached(layer, x[:1], splits), alone[:1], atol=1e-5)


def test_queries_that_are_not_the_keys_and_a_layer_that_is_not_causal():
    free = build(is_causal=False)
    x, y = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        everything = expected(free, x, y)
        free.setup_cache(2, torch.float32, 8)
        assert_close(free(x, y), everything, atol=1e-5)
        assert_close(free(x), everything, atol=1e-5)  # from the cache alone
        layer = build()
        layer.setup_cache(2, torch.float32, 8)
        layer(y, y)
        visible = torch.ones(3, 5, dtype=torch.bool).tril(2).expand(2, -1, -1)
        assert_close(layer(x), expected(layer, x, y, mask=visible), atol=1e-5)


def test_a_disabled_cache_changes_nothing():
    x = torch.randn(2, 5, 32)
    layer = build(kv_cache=interop.KVCache(2, 9, 2, 8, torch.float32))
    with torch.no_grad():
        assert_close(layer(x, x), expected(layer, x, x, is_causal=True), atol=1e-5)
    assert layer.kv_cache.size == 0


def test_floating_masks_are_added_to_the_logits():
    layer = build()
    x, y = torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    mask = torch.randn(2, 4, 6, requires_grad=True)
    hidden = torch.rand(2, 4, 6) > 0.7
    hidden[..., 0] = False
    masks = (mask.masked_fill(hidden, -torch.inf), mask.masked_fill(hidden, -1e30))
    for given in masks:
        ours, theirs = layer(x, y, mask=given), expected(layer, x, y, mask=given)
        assert_close(ours, theirs, atol=1e-5)
        grads = [
            torch.autograd.grad(z.sin().sum(), mask, retain_graph=True)[0] for z in (ours, theirs)
        ]
        assert_close(*grads, atol=1e-5)
    with torch.no_grad():
        layer.setup_cache(2, torch.float32, 8)
        wide = nn.functional.pad(masks[0], (0, 2), value=-torch.inf)
        assert_close(layer(x, y, mask=wide), expected(layer, x, y, mask=masks[0]), atol=1e-5)


def test_decoding_compiles_whole():
    torch._dynamo.reset()
    layer = build(pos_embeddings=Rotate())
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        whole = expected(layer, x, x, is_causal=True)
        layer.setup_cache(2, torch.float32, 5)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_close(cached(compiled, x, (2, 1, 1, 1)), whole, atol=1e-5)
        assert layer.kv_cache.size == 5
        with pytest.raises(RuntimeError, match="exceed the cache's `max_seq_len`"):
            compiled(x[:, :1], x[:, :1], input_pos=torch.tensor([[5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_scaled_dot_product_attentions(dtype):
    layer = build(pos_embeddings=Rotate())
    x = torch.randn(3, 5, 32)
    results = []
    for call in (lambda: layer(x, x), lambda: expected(layer, x, x, is_causal=True)):
        with torch.autocast("cpu", dtype):
            out = call()
            layer.zero_grad()
            out.float().square().sum().backward()
        results.append((out, layer.q_proj.weight.grad.clone(), layer.v_proj.weight.grad.clone()))
    assert results[0][0].dtype == dtype
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, atol=8 * eps * float(theirs.detach().abs().max()))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([build(), build()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x)
        return x


class Decoder(Model):
    """With torchtune's `setup_caches`."""

    def setup_caches(
        self, batch_size, dtype, *, encoder_max_seq_len=None, decoder_max_seq_len=None
    ):
        self.asked = (batch_size, dtype, encoder_max_seq_len, decoder_max_seq_len)
        for layer in self.layers:
            layer.setup_cache(batch_size, dtype, decoder_max_seq_len)


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("kind", [Model, Decoder])
def test_contexts_of_caches(kind, caplog):
    model, x = kind(), torch.randn(1, 4, 32)
    options = dict(batch_size=1, device=torch.device("cpu"), dtype=torch.float32)
    sizes = lambda: [layer.kv_cache.size for layer in model.layers]
    with torch.no_grad():
        plain = model(x)
        with interop.local_kv_cache(model, **options, decoder_max_seq_len=6):
            assert_close(model(x), plain, atol=1e-5)
            assert sizes() == [4, 4]
            with pytest.raises(ValueError, match="must not have caches already, before local_kv"):
                enter(interop.local_kv_cache(model, **options, decoder_max_seq_len=6))
            with interop.disable_kv_cache(model):
                assert_close(model(x), plain, atol=1e-5)
                assert sizes() == [4, 4]
                with interop.disable_kv_cache(model):
                    pass
                assert not any(layer.cache_enabled for layer in model.layers)
            assert "disabled already" in caplog.text
            model(x[:, :2])
            assert sizes() == [6, 6]
        assert all(layer.kv_cache is None and not layer.cache_enabled for layer in model.layers)
        assert_close(model(x), plain, atol=1e-5)
    with pytest.raises(ValueError, match="set them up first, before delete_kv_caches"):
        interop.delete_kv_caches(model)
    with pytest.raises(ValueError, match="set them up first, before disable_kv_cache"):
        enter(interop.disable_kv_cache(model))
    if kind is Decoder:
        assert model.asked == (1, torch.float32, None, 6)
    else:
        with pytest.raises(ValueError, match="must be given `decoder_max_seq_len`"):
            enter(interop.local_kv_cache(model, **options, encoder_max_seq_len=6))


def test_everything_dropped_gives_the_output_of_zeros():
    layer = build(attn_dropout=1.0)
    layer.output_proj = nn.Linear(32, 32)
    x = torch.randn(1, 5, 32, requires_grad=True)
    out = layer(x, x)
    assert_close(out, layer.output_proj.bias.expand(1, 5, -1), atol=0.0)
    assert not torch.autograd.grad(out.sum(), x)[0].any()


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
        ValueError, match=r"mask must be a boolean or floating tensor \[B, T, S\], got torch.int64"
    ):
        layer(x, x, mask=torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch.bool \(2, 2\)"):
        layer(x, x, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="Key value caches are not setup"):
        layer.reset_cache()
    given = build(kv_cache=interop.KVCache(1, 4, 2, 8, torch.float32))
    with caplog.at_level(logging.WARNING):
        given.setup_cache(1, torch.float32, 4)
    assert "already setup" in caplog.text
    assert not given.cache_enabled
