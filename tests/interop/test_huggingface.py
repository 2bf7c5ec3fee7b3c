"""Tiny random transformers models with our attention and gated delta rule, against transformers' eager code."""

import importlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from interop import huggingface, torch_function  # noqa: E402
from interop.huggingface.attention import _attention  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402
from tests.support.tiny_transformers import (  # noqa: E402
    FAMILIES,
    NAME,
    SIZES,
    Ours,
    both,
    build,
    is_ours,
    left_padding,
    tokens,
)

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", autouse=True)
def registered():
    huggingface.register_attention(NAME)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


def test_logits_and_padded_batches(model):
    ids = tokens()
    padded = left_padding(ids)
    with torch.no_grad():
        assert_close(*both(model, lambda: model(ids).logits), atol=1e-5)
        ours, theirs = both(model, lambda: model(ids, attention_mask=padded).logits)
    real = padded.bool()
    assert_close(ours[real], theirs[real], atol=1e-5)


def test_gradients_of_every_parameter(model):
    ids = tokens()

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), found

    (ours, our_gradients), (theirs, their_gradients) = both(model, gradients)
    assert_close(ours, theirs, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert_close(our_gradients[name], gradient, atol=1e-5, what=name)


@pytest.mark.parametrize("cache", ["dynamic", "static", "in chunks"])
def test_greedy_generation(model, cache):
    ids = tokens(5)
    options = dict(
        max_new_tokens=10, do_sample=False, pad_token_id=0, attention_mask=left_padding(ids, 2)
    )
    if cache == "static":
        options["cache_implementation"] = "static"
        options["disable_compile"] = True
    if cache == "in chunks":
        options["prefill_chunk_size"] = 3
    ours, theirs = both(model, lambda: model.generate(ids, **options))
    assert torch.equal(ours, theirs)


def test_twenty_training_steps(model):
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def train():
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses, ids = [], tokens(8)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    ours, theirs = both(model, train)
    model.load_state_dict(start)
    assert_close(ours, theirs, atol=1e-5)
    assert theirs[-1] < theirs[0]


def test_the_whole_model_compiles(model):
    torch._dynamo.reset()
    ids = tokens(8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours, theirs = both(model, lambda: (compiled if is_ours(model) else model)(ids).logits)
    assert_close(ours, theirs, atol=1e-5)


def test_a_growing_cache_compiles_few_times():
    model = build("llama")
    ids = tokens(5)
    with Ours(model), torch.no_grad():
        before = torch_function.compiled_shapes(_attention)
        model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
        compiled = torch_function.compiled_shapes(_attention) - before
    assert (
        compiled <= 8
    )  # one prefill; decoding at 16, 24, 32, 48, 64 keys, with and without a mask


def test_sliding_window_soft_cap_and_sinks():
    config = transformers.MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=3)
    mistral = transformers.MistralForCausalLM(config).eval()
    config = transformers.Gemma2Config(
        **SIZES,
        num_hidden_layers=2,
        sliding_window=3,
        attn_logit_softcapping=0.5,
        query_pre_attn_scalar=8,
    )
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    config = transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 16},
        num_hidden_layers=2,
        sliding_window=3,
        num_local_experts=4,
    )
    sinks = transformers.GptOssForCausalLM(config).eval()
    for model in (mistral, gemma, sinks):
        for length in (2, 9):
            ids = tokens(length)
            with torch.no_grad():
                assert_close(*both(model, lambda m=model, i=ids: m(i).logits), atol=1e-5)


def test_without_padding_the_masks_are_not_needed_and_with_it_they_are():
    model = build("qwen3")
    ids = tokens()
    mask = left_padding(ids)
    float_mask = torch.zeros(2, 1, 13, 13).masked_fill(~torch.ones(13, 13).tril().bool(), -1e30)
    with torch.no_grad():
        assert_close(*both(model, lambda: model(ids, attention_mask=float_mask).logits), atol=1e-5)
        packed = torch.cat((torch.arange(6), torch.arange(7)))[None].expand(2, -1)
        assert_close(
            *both(model, lambda: model(ids, position_ids=packed, use_cache=False).logits), atol=1e-5
        )
    assert mask.sum() == 22


def test_dropout_trains_and_follows_the_seed():
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, attention_dropout=0.5)
    model = transformers.LlamaForCausalLM(config).train()
    ids = tokens()
    with Ours(model):
        torch.manual_seed(0)
        first, second = model(ids).logits, model(ids).logits
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)
        assert not torch.equal(first, second)


def test_what_is_not_supported_raises():
    query, kv = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    call = lambda **options: huggingface.attention_forward(
        torch.nn.Module(), query, kv, kv, None, **options
    )
    for name in (
        "position_bias",
        "head_mask",
        "indices",
        "a_name_of_tomorrow",
    ):
        with pytest.raises(NotImplementedError, match=f"does not support `{name}`"):
            call(**{name: True})
        call(**{name: None})
    call(output_attentions=False, position_ids=torch.arange(3)[None], use_cache=True)
    with pytest.raises(ValueError, match="`name` must be free, got 'sdpa'"):
        huggingface.register_attention("sdpa")
    with pytest.raises(ValueError, match="`name` must be made of letters"):
        huggingface.register_attention("gqa jax")
    model = build("llama")
    with pytest.raises(ValueError, match="must have Gated DeltaNet layers"):
        huggingface.patch_gated_delta(model)


def test_packed_sequences_of_the_delta_rule():
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.rand(*shape, generator=generator)
    q, v, g, beta = make(1, 9, 2, 4), make(1, 9, 4, 3), -make(1, 9, 4), make(1, 9, 4)
    out, state = huggingface.chunk_gated_delta_rule(
        q, q, v, g, beta, cu_seqlens=torch.tensor([0, 4, 9]), use_qk_l2norm_in_kernel=True
    )
    assert state is None
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = huggingface.chunk_gated_delta_rule(
            *(x[:, part] for x in (q, q, v, g, beta)), use_qk_l2norm_in_kernel=True
        )
        assert_close(out[:, part], alone, atol=1e-5)
    with pytest.raises(NotImplementedError, match="states of packed sequences"):
        huggingface.chunk_gated_delta_rule(
            q, q, v, g, beta, cu_seqlens=torch.tensor([0, 9]), output_final_state=True
        )
    two = [x.expand(2, *x.shape[1:]) for x in (q, q, v, g, beta)]
    with pytest.raises(
        ValueError, match="`query` must have one row when `cu_seqlens` is given, got 2"
    ):
        huggingface.chunk_gated_delta_rule(*two, cu_seqlens=torch.tensor([0, 9]))


def test_patches_nest_and_leave_no_trace():
    model = build("qwen3_5")
    file = importlib.import_module(type(model).__module__)
    original = file.torch_chunk_gated_delta_rule
    outer = huggingface.patch_gated_delta(model)
    with huggingface.patch_gated_delta(model):
        outer.undo()
        assert file.torch_chunk_gated_delta_rule is huggingface.chunk_gated_delta_rule
    assert file.torch_chunk_gated_delta_rule is original
    outer.undo()
    assert file.torch_chunk_gated_delta_rule is original
