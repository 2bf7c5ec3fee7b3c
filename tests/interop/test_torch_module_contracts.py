"""What torch layers share with the JAX ones beyond values: zeros where nothing is seen, integers, dtypes, devices."""

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

from flax import nnx  # noqa: E402

import gqa_jax  # noqa: E402
import interop  # noqa: E402
from tests.support.compare import assert_close, relative_error  # noqa: E402

pytestmark = pytest.mark.torch

SIZES = dict(model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
ATTENTION = gqa_jax.AttentionConfig(**SIZES, qkv_bias=True, out_bias=True, qk_norm="rms")
CROSS = gqa_jax.AttentionConfig(
    **SIZES, qkv_bias=True, out_bias=True, qk_norm="rms", is_causal=False, rope=None
)
DELTA = gqa_jax.GatedDeltaNetConfig(
    model_dim=32, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4
)
LAYERS = {
    "attention": (interop.SelfAttention, gqa_jax.SelfAttention, ATTENTION),
    "cross": (interop.CrossAttention, gqa_jax.CrossAttention, CROSS),
    "delta": (interop.GatedDeltaNet, gqa_jax.GatedDeltaNet, DELTA),
}


def build(name, **options):
    torch.manual_seed(0)
    kind, _, config = LAYERS[name]
    layer = kind(config, **options)
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith("bias") and "dt" not in parameter_name:
                parameter.uniform_(1, 2)
    return layer


def call(layer, x, **options):
    return (
        layer(x, x, **options) if isinstance(layer, interop.CrossAttention) else layer(x, **options)
    )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_where_nothing_is_seen_both_frameworks_give_zeros():
    x = random(3, 6, 32)
    ids = torch.tensor([[-1, -1, 0, 0, 1, 1], [0, 0, 0, 0, -1, -3], [0, 0, 0, 0, 0, 0]])
    memory_ids = torch.tensor([[0, 0, 0, 2, 2, -1], [0, -1, 0, 0, 0, 0], [-1, -2, -1, -1, -1, -1]])
    mask = torch.rand(3, 4, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1, :, 2] = False
    mask[2, :2, 1] = False  # two heads of four
    cases = (
        ("attention", dict(segment_ids=ids, mask=mask)),
        ("cross", dict(mask=mask)),
        ("cross", dict(segment_ids=ids, memory_segment_ids=memory_ids, mask=mask)),
        ("delta", dict(segment_ids=ids)),
    )
    for name, options in cases:
        layer, original = build(name), LAYERS[name][1](LAYERS[name][2], rngs=nnx.Rngs(0))
        if name != "delta":
            original.out.bias[...] = jnp.full((32,), 5.0)
        given = interop.tree_to_jax(dict(options), wide="cast")
        arrays = [interop.to_jax(x.detach())] * (2 if name == "cross" else 1)
        if "memory_segment_ids" in given:
            ids_of_memory = given.pop("memory_segment_ids")
            arrays[1] = original.project_memory(arrays[1], segment_ids=ids_of_memory)
        zeros = torch.from_dlpack(
            (original(*arrays, **given) == 0).all(-1).astype(jnp.uint8)
        ).bool()
        x = x.detach().requires_grad_(True)
        out = call(layer, x, **options)
        assert torch.equal((out == 0).all(-1), zeros), (name, options.keys())
        assert zeros.any()
        gradient = torch.autograd.grad(out[zeros].sum() + 0 * out.sum(), x)[0]
        assert not gradient.any()


def test_cross_attention_rotates_by_positions_of_its_own():
    config = gqa_jax.AttentionConfig(**SIZES, is_causal=False)
    layer = interop.CrossAttention(config, memory_dim=24)
    x, memory = random(2, 5, 32), random(2, 7, 24, seed=1)
    positions, others = torch.arange(5).expand(2, -1) * 3 + 2, torch.arange(7).flip(0).expand(2, -1)

    def rotate(heads, at):
        angle = at[:, None, :, None] * 10000.0 ** (-torch.arange(4) / 4)
        turned = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat((turned.real, turned.imag), -1)

    def expected(at, other):
        q, k, v = (
            p(y).view(2, y.shape[1], -1, 8).transpose(1, 2)
            for p, y in ((layer.q_proj, x), (layer.k_proj, memory), (layer.v_proj, memory))
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            rotate(q, at), rotate(k, other), v, enable_gqa=True
        )
        return layer.o_proj(out.transpose(1, 2).flatten(2))

    ours = layer(x, memory, positions=positions, memory_positions=others)
    assert_close(ours, expected(positions, others), atol=1e-5)
    plain = (torch.arange(n).expand(2, -1) for n in (5, 7))
    assert_close(layer(x, memory), expected(*plain), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_built_without_memory_and_without_jax(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a JAX layer was built")

    for kind in ("SelfAttention", "CrossAttention", "GatedDeltaNet"):
        monkeypatch.setattr(gqa_jax, kind, refuse)
    with torch.device("meta"):
        first = build(name)
    second = build(name, device="meta", dtype=torch.bfloat16)
    monkeypatch.undo()
    for layer, dtype in ((first, torch.float32), (second, torch.bfloat16)):
        assert all(p.is_meta and p.dtype == dtype for p in layer.parameters())
        whole = layer.to_empty(device="cpu")
        whole.load_state_dict(build(name).to(dtype).state_dict())
        x = random(1, 4, 32).to(dtype)
        assert torch.equal(call(whole, x), call(build(name).to(dtype), x))


@pytest.mark.parametrize("init", ["ones", "mamba"])
def test_the_decay_is_drawn_as_in_jax(init):
    config = gqa_jax.GatedDeltaNetConfig(
        model_dim=8, num_key_heads=1, num_value_heads=512, key_head_dim=8, value_head_dim=1,
        decay_init=init,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = interop.GatedDeltaNet(config)
    again = interop.GatedDeltaNet(config)
    theirs = gqa_jax.GatedDeltaNet(config, rngs=nnx.Rngs(0))
    assert not torch.equal(ours.A_log, again.A_log)
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for name in ("A_log", "dt_bias"):
        mine = getattr(ours, name).detach()
        its = torch.from_dlpack(getattr(theirs, name)[...].reshape(-1).copy())
        function = torch.exp if name == "A_log" else torch.nn.functional.softplus
        got, expected = (torch.quantile(function(y), quantiles) for y in (mine, its))
        assert_close(got, expected, atol=0.15 * float(expected.max()))


@pytest.mark.parametrize("name", ["attention", "delta"])
@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_double_layers_decode_in_double(name, owner):
    layer, x = build(name).double(), random(2, 7, 32).double()
    with torch.no_grad():
        whole = layer(x)
        cache, outs = layer.init_cache(2, 16, owner=owner), []
        for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
            held = cache if owner == "torch" else cache.to_torch()
            dtypes = {t.dtype for t in jax.tree.leaves(held)}
            assert dtypes == {torch.float64, torch.int32}
            out, cache = layer.step(part, cache)
            outs.append(out)
    # The gates of Gated DeltaNet are computed in float32 in any dtype.
    assert_close(torch.cat(outs, 1), whole, atol=1e-12 if name == "attention" else 1e-7)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_sixteen_bits_are_read_and_right(name, dtype):
    """Values, gradients and steps against the float32 layer of the same, rounded, weights."""
    layer = build(name).to(dtype)
    exact = build(name)
    exact.load_state_dict(layer.state_dict())
    allowed = 16 * torch.finfo(dtype).eps
    for batch, length in ((1, 5), (3, 40)):
        results = []
        for module in (layer, exact):
            module.zero_grad()
            x = random(batch, length, 32).to(next(module.parameters()).dtype).requires_grad_(True)
            out = call(module, x)
            (out.float() * random(batch, length, 32, seed=2)).sum().backward()
            results.append([out, x.grad, *(p.grad for p in module.parameters())])
        assert results[0][0].dtype == dtype
        for ours, theirs in zip(*results, strict=True):
            assert ours.isfinite().all()
            assert relative_error(ours, theirs) < allowed
    if name == "cross":
        return
    with torch.no_grad():
        cache, outs = layer.init_cache(3, 64), []
        for part in (x[:, :30].to(dtype), x[:, 30:31].to(dtype), x[:, 31:].to(dtype)):
            out, cache = layer.step(part, cache)
            outs.append(out)
        assert dtype in {t.dtype for t in jax.tree.leaves(cache)}
    assert relative_error(torch.cat(outs, 1), results[1][0]) < allowed


@pytest.mark.parametrize(
    "name, dtype",
    [("attention", torch.bfloat16), ("cross", torch.float16), ("delta", torch.bfloat16)],
)
def test_layers_under_autocast(name, dtype):
    layer, x = build(name), random(3, 6, 32)
    exact = call(layer, x)
    with torch.autocast("cpu", dtype):
        out = call(layer, x)
        assert out.dtype == dtype
        gradients = torch.autograd.grad(out.float().sin().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(exact.sin().sum(), list(layer.parameters()))
    allowed = 16 * torch.finfo(dtype).eps
    assert relative_error(out, exact) < allowed
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) < 2 * allowed


@pytest.mark.parametrize("name", ["attention", "delta"])
@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_integers_are_those_that_jax_takes(name, owner):
    layer, x = build(name), random(2, 4, 32)
    step = lambda lengths: layer.step(x, layer.init_cache(2, 32, owner=owner), lengths=lengths)
    with torch.no_grad():
        for bad in ([9, 1], [0, -2], [2**32 + 1, 1]):
            rule = r"must lie in \[0, T=4\]" if bad[0] < 99 else "must fit int32, got 4294967297"
            with pytest.raises(ValueError, match=f"`lengths` {rule}"):
                step(torch.tensor(bad))
        with pytest.raises(TypeError, match="`lengths` must be an integer array|integer tensor"):
            step(torch.tensor([1.0, 2.0]))
        with pytest.raises(TypeError, match="`lengths` must be a tensor, got list"):
            step([1, 2])
        with pytest.raises(ValueError, match=r"`lengths` must have shape \[B=2\], got \(3,\)"):
            step(torch.tensor([1, 2, 3]))
        with pytest.raises(TypeError, match="`cache` must be what this layer's `init_cache` made"):
            layer.step(x, x)
        expected, _ = step(torch.tensor([4, 2]))
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32):
            out, _ = step(torch.tensor([4, 2], dtype=dtype))
            assert torch.equal(out[0], expected[0])
            assert torch.equal(out[1, :2], expected[1, :2])
        with pytest.raises(ValueError, match="`segment_ids` must fit int32, got 8589934592"):
            layer(x, segment_ids=torch.tensor([[0, 0, 2**33, 0]] * 2))
        with pytest.raises(
            TypeError, match="`segment_ids` must be an integer tensor, got torch.bool"
        ):
            layer(x, segment_ids=torch.ones(2, 4, dtype=torch.bool))
        if name == "attention":
            with pytest.raises(ValueError, match="`positions` must fit int32, got -2147483649"):
                layer(x, positions=torch.tensor([[0, 1, 2, -(2**31) - 1]] * 2))
            wide = layer(x, positions=torch.tensor([[0, 100, 200, 255]] * 2))
            narrow = layer(x, positions=torch.tensor([[0, 100, 200, 255]] * 2, dtype=torch.uint8))
            assert torch.equal(wide, narrow)
