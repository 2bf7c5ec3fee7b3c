"""Models under `torch.autocast`, as `Trainer(bf16=True)` runs them, and the attention weights asked for."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from interop import huggingface  # noqa: E402
from tests.support.compare import assert_close, relative_error  # noqa: E402
from tests.support.tiny_transformers import (  # noqa: E402
    NAME,
    Ours,
    both,
    build,
    left_padding,
    tokens,
)

pytestmark = pytest.mark.torch
LOSS_SCALE = 4096  # as GradScaler: gradients of float16 would vanish without


@pytest.fixture(scope="module", autouse=True)
def registered():
    huggingface.register_attention(NAME)


def loss_and_gradients(model, ids, mask):
    model.zero_grad()
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]  # what padding predicts has no meaning
    labels = ids.masked_fill(before * mask == 0, -100)
    result = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    (LOSS_SCALE * result.loss).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.logits.detach()[mask.bool()], gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5"])
def test_autocast_trains_as_well_as_transformers_own(family, dtype):
    model = build(family)
    for batch, length in ((1, 7), (3, 33)):
        ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(ids)
        mask[-1, : batch - 1] = 0
        exact, exact_gradients = loss_and_gradients(model, ids, mask)
        with torch.autocast("cpu", dtype):
            theirs, their_gradients = loss_and_gradients(model, ids, mask)
            with Ours(model):
                ours, our_gradients = loss_and_gradients(model, ids, mask)
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        error = relative_error(ours, exact)
        assert error <= 2 * relative_error(theirs, exact) + torch.finfo(dtype).eps, error
        assert our_gradients.keys() == exact_gradients.keys()
        for name, gradient in exact_gradients.items():
            error = relative_error(our_gradients[name], gradient)
            allowed = 2 * relative_error(their_gradients[name], gradient)
            assert error <= allowed + 8 * torch.finfo(dtype).eps, (name, error, allowed)


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_generation_under_autocast(family):
    model = build(family)
    ids = tokens(6)
    with torch.no_grad():
        exact = model(ids).logits[:, -1]
        with Ours(model), torch.autocast("cpu", torch.bfloat16):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            ours = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert_close(ours, exact, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_next"])
def test_attention_weights(family):
    model = build(family)
    ids = tokens(9)
    mask = left_padding(ids, 2)
    real = mask.bool()[:, None, :, None]
    with torch.no_grad():
        call = lambda **options: model(ids, output_attentions=True, **options)
        ours, theirs = both(model, lambda: call(attention_mask=mask))
        assert len(ours.attentions) == len(theirs.attentions) > 0
        for mine, its in zip(ours.attentions, theirs.attentions, strict=True):
            assert_close(torch.where(real, mine, 0), torch.where(real, its, 0), atol=1e-5)
        assert_close(ours.logits[mask.bool()], theirs.logits[mask.bool()], atol=1e-5)
        ours, theirs = both(model, lambda: call(use_cache=False))
        for mine, its in zip(ours.attentions, theirs.attentions, strict=True):
            assert_close(mine, its, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attention_weights_while_generating(cache):
    model, ids = build("gpt_oss"), tokens(5)
    options = dict(
        max_new_tokens=4, do_sample=False, pad_token_id=0, output_attentions=True, return_dict_in_generate=True,
        cache_implementation=None if cache == "dynamic" else cache, disable_compile=True,
    )  # fmt: skip
    ours, theirs = both(model, lambda: model.generate(ids, **options))
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (mine, its) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        for a, b in zip(mine, its, strict=True):
            assert_close(a, b, atol=1e-5, what=f"step {step}")


def test_weights_are_those_that_made_the_output_also_with_dropout():
    module = torch.nn.Module()
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out, weights = huggingface.attention_forward(
        module, query, key, value, None, dropout=0.4, output_attentions=True
    )
    assert (weights[..., -1, :] == 0).any()
    expected = weights @ value.repeat_interleave(2, 1)
    assert_close(out, expected.transpose(1, 2), atol=1e-5)
    gradients = [
        torch.autograd.grad(y.sin().sum(), query, retain_graph=True)[0] for y in (out, expected)
    ]
    assert_close(*gradients, atol=1e-5)
