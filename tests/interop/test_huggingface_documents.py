"""Rows of several documents and rows with padding anywhere: each document's logits are those of it alone."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from interop import huggingface  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402
from tests.support.tiny_transformers import HYBRIDS, NAME, Ours, build  # noqa: E402

pytestmark = pytest.mark.torch

LENGTHS = (1, 9, 2, 5)


@pytest.fixture(scope="module", autouse=True)
def registered():
    huggingface.register_attention(NAME)


@pytest.fixture(scope="module", params=("llama", "mistral", *HYBRIDS))
def model(request):
    model = build(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def documents(lengths=LENGTHS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (1, n), generator=generator) for n in lengths]


def how_told(how, lengths=LENGTHS):
    """Arguments that tell where documents begin: positions, offsets or ids."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if how == "positions":
        return dict(position_ids=positions)
    if how == "ids":
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return dict(position_ids=positions, seq_idx=ids.to(torch.int32)[None])
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest = max(lengths)
    return dict(
        position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets.clone(), max_length_q=longest,
        max_length_k=longest,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["positions", "offsets", "ids"])
def test_documents_do_not_see_each_other(model, how):
    parts = documents()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
        with Ours(model):
            packed = model(torch.cat(parts, 1), use_cache=False, **how_told(how)).logits
    assert_close(packed, alone, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_documents(model, checkpointing):
    parts, told = documents(), how_told("positions")

    def gradients(call):
        model.zero_grad()
        call().sin().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.set_attn_implementation("eager")
    alone = gradients(lambda: torch.cat([model(p, use_cache=False).logits for p in parts], 1))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    try:
        with Ours(model):
            packed = gradients(lambda: model(torch.cat(parts, 1), use_cache=False, **told).logits)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert packed.keys() == alone.keys()
    for name, gradient in alone.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert_close(packed[name], gradient, atol=3e-5 * scale, what=name)


def test_rows_of_different_documents_and_compiled_calls():
    model = build("qwen3_5")
    rows = [documents((3, 6), 1), documents((7, 2), 2)]
    ids = torch.cat([torch.cat(parts, 1) for parts in rows])
    positions = torch.cat([how_told("positions", n)["position_ids"] for n in ((3, 6), (7, 2))])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        alone = torch.cat(
            [torch.cat([model(p, use_cache=False).logits for p in parts], 1) for parts in rows]
        )
        with Ours(model):
            for call in (model, compiled):
                logits = call(ids, position_ids=positions, use_cache=False).logits
                assert_close(logits, alone, atol=1e-5)


def test_what_cannot_be_packed_is_refused_by_name():
    model = build("qwen3_5")
    ids = torch.cat(documents((3, 6)), 1)
    offsets = dict(cu_seq_lens_q=torch.tensor([0, 3, 9]))
    with Ours(model), torch.no_grad():
        for told in (how_told("positions", (3, 6)), how_told("ids", (3, 6)), offsets):
            with pytest.raises(NotImplementedError, match="no states of packed sequences"):
                model(ids, use_cache=True, **told)
        with pytest.raises(ValueError, match="`cu_seq_lens_k` must equal `cu_seq_lens_q`"):
            model(ids, use_cache=False, **offsets, cu_seq_lens_k=torch.tensor([0, 4, 9]))
        with pytest.raises(ValueError, match="one row when `cu_seq_lens_q` is given, got 2"):
            model(ids.expand(2, -1), use_cache=False, **offsets)
        with pytest.raises(ValueError, match=r"`seq_idx` must have shape \(1, 9\), got \(1, 8\)"):
            model(ids, use_cache=False, seq_idx=torch.zeros(1, 8, dtype=torch.int32))
        with pytest.raises(NotImplementedError, match="does not support `a_name_of_tomorrow`"):
            model(ids, use_cache=False, a_name_of_tomorrow=1)
    query, kv = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="cannot pack documents with a cache"):
        huggingface.attention_forward(
            torch.nn.Module(), query, kv, kv, None, seq_idx=torch.zeros(1, 2, dtype=torch.int32)
        )


PADDED = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1],  # a padded prompt, then the answer
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0],
    ]
)


def padded_rows():
    ids = torch.randint(0, 64, PADDED.shape, generator=torch.Generator().manual_seed(3))
    positions = (PADDED.cumsum(1) - 1).clamp(min=0)
    return ids, dict(attention_mask=PADDED, position_ids=positions)


@pytest.mark.parametrize(
    "family", ["llama", *HYBRIDS]
)  # a window counts slots, in transformers too
def test_padding_anywhere_is_as_if_it_were_not_there(family):
    model = build(family)
    ids, told = padded_rows()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        alone = [
            model(row[real.bool()][None]).logits[0] for row, real in zip(ids, PADDED, strict=True)
        ]
        with Ours(model):
            rows = model(ids, **told, use_cache=False).logits
            cached = model(ids, **told, use_cache=True).logits
    for got in (rows, cached):
        for row, real, expected in zip(got, PADDED, alone, strict=True):
            assert_close(row[real.bool()], expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_state_is_that_of_the_real_tokens(family):
    model = build(family)
    ids, told = padded_rows()
    new = torch.randint(0, 64, (4, 1), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        alone = [
            model(torch.cat((row[real.bool()], token))[None]).logits[0, -1]
            for row, real, token in zip(ids, PADDED, new, strict=True)
        ]
        with Ours(model):
            cache = model(ids, **told, use_cache=True).past_key_values
            after = dict(
                attention_mask=torch.cat((PADDED, torch.ones(4, 1, dtype=torch.int64)), 1),
                position_ids=PADDED.sum(1, keepdim=True),
            )
            logits = model(new, past_key_values=cache, **after).logits[:, -1]
            assert_close(logits, torch.stack(alone), atol=1e-5)
            two = torch.cat((after["attention_mask"], torch.tensor([[1, 1], [1, 0]] * 2)), 1)
            with pytest.raises(NotImplementedError, match="among tokens that continue a cache"):
                model(ids[:, :2], past_key_values=cache, attention_mask=two)


def test_padding_among_packed_documents():
    parts = documents((4, 3))
    hole = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 0, 1]])
    ids = torch.zeros(1, 10, dtype=torch.int64)
    ids[hole.bool()] = torch.cat(parts, 1)[0]
    of = torch.tensor([[0] * 6 + [1] * 4])
    positions = torch.tensor([[0, 1, 0, 0, 2, 3, 0, 1, 0, 2]])
    model = build("qwen3_next")
    with torch.no_grad():
        alone = torch.cat([model(p, use_cache=False).logits for p in parts], 1)
        with Ours(model):
            logits = model(
                ids, attention_mask=hole, position_ids=positions, seq_idx=of, use_cache=False
            ).logits
    assert_close(logits[hole.bool()], alone[0], atol=1e-5)


def test_a_convolution_with_another_activation_and_a_bias():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 12, generator=generator)
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    offsets = torch.tensor([0, 5, 12])
    for activation, function in ((None, lambda y: y), ("gelu", torch.nn.functional.gelu)):
        out = huggingface.causal_conv1d(x, weight, bias, activation, cu_seq_lens_q=offsets)
        for part in (slice(0, 5), slice(5, 12)):
            padded = torch.nn.functional.pad(x[..., part], (3, 0))
            alone = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6)
            assert_close(out[..., part], function(alone), atol=1e-5)
