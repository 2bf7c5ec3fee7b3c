"""The functional operators against PyTorch's own attention and a token-by-token recurrence."""

import concurrent.futures
import inspect
import itertools

import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import programs  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402
from tests.support.fresh_process import run_python  # noqa: E402

pytestmark = pytest.mark.torch


def leaves(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def compare(ours, theirs, tensors, *, atol=1e-5):
    assert_close(ours, theirs, atol=atol)
    weight = torch.randn_like(theirs)
    pairs = (torch.autograd.grad((y * weight).sum(), tensors) for y in (ours, theirs))
    for mine, its in zip(*pairs, strict=True):
        assert_close(mine, its, atol=atol)


@pytest.mark.parametrize("kind", ["full", "causal", "mask", "bias", "gqa"])
def test_attention_is_torchs(kind):
    heads = 2 if kind == "gqa" else 4
    tensors = leaves((2, 5, 4, 8), (2, 7, heads, 8), (2, 7, heads, 8))
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    bias = torch.randn(2, 4, 5, 7)
    ours = {"causal": {"is_causal": True}, "mask": {"mask": mask}, "bias": {"bias": bias}}.get(
        kind, {}
    )
    theirs = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": mask},
        "bias": {"attn_mask": bias},
    }
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), enable_gqa=True, **theirs.get(kind, {})
    )
    compare(interop.attention(*tensors, **ours), expected.transpose(1, 2), tensors)


def test_attention_options_reach_the_operator():
    query, key, value = leaves((1, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    defaults = dict(
        scale=None, is_causal=False, causal_alignment="upper_left", q_offset=None, sliding_window=None, mask=None,
        bias=None, query_segment_ids=None, kv_segment_ids=None, query_positions=None, kv_positions=None, sinks=None,
        query_cu_seqlens=None, kv_cu_seqlens=None,
        logits_soft_cap=None, dropout_rate=0.0, dropout_seed=None, implementation=None,
    )  # fmt: skip
    plain = interop.attention(query, key, value)
    assert torch.equal(interop.attention(query, key, value, **defaults), plain)
    ids = torch.tensor([[0, 0, 1, 1]])  # int64, as torch makes them
    changed = {
        "scale": {"scale": 0.1},
        "window": {"is_causal": True, "sliding_window": 2},
        "segments": {"query_segment_ids": ids, "kv_segment_ids": ids},
        "positions": {"is_causal": True, "query_positions": ids, "kv_positions": ids},
        "offset": {"is_causal": True, "q_offset": -1},
        "offsets": {"is_causal": True, "q_offset": torch.tensor([1])},
        "sinks": {"sinks": torch.zeros(4)},
        "cap": {"logits_soft_cap": 0.5},
        "dropout": {"dropout_rate": 0.5},
        "packed": {
            "query_cu_seqlens": torch.tensor([0, 2, 4]),
            "kv_cu_seqlens": torch.tensor([0, 1, 4]),
        },
    }
    for name, options in changed.items():
        out = interop.attention(query, key, value, **options)
        assert out.shape == plain.shape, name
        assert not torch.equal(out, plain), name
    with pytest.raises(ValueError, match="`is_causal` must be True with `sliding_window=2`"):
        interop.attention(query, key, value, sliding_window=2)
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        interop.attention(query, key, value, implementation="cuda")


def test_dropout_follows_torchs_generator_and_its_seed():
    tensors = leaves((1, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    draw = lambda **seed: interop.attention(*tensors, dropout_rate=0.5, **seed)
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    seed = torch.tensor([1, -2], dtype=torch.int32)
    assert torch.equal(draw(dropout_seed=seed), draw(dropout_seed=seed))
    checkpointed = torch.utils.checkpoint.checkpoint(draw, use_reentrant=False)
    checkpointed.sum().backward()


def recurrence(query, key, value, g, beta):
    """The definition, token by token."""
    per_key = value.shape[2] // key.shape[2]
    norm = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    query, key = (norm(x).repeat_interleave(per_key, 2) for x in (query, key))
    state, outs = (
        value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1]),
        [],
    )
    for t in range(value.shape[1]):
        q, k, v = query[:, t], key[:, t], value[:, t]
        state = state * g[:, t].exp()[..., None, None]
        update = (v - torch.einsum("bhkv,bhk->bhv", state, k)) * beta[:, t][..., None]
        state = state + k[..., None] * update[..., None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q) * q.shape[-1] ** -0.5)
    return torch.stack(outs, 1), state


def delta_inputs(length=6, seed=0):
    q, k, v, g, beta = leaves(
        (2, length, 2, 4),
        (2, length, 2, 4),
        (2, length, 4, 3),
        (2, length, 4),
        (2, length, 4),
        seed=seed,
    )
    leaf = lambda x: x.detach().requires_grad_()
    return [q, k, v, leaf(-torch.nn.functional.softplus(g)), leaf(beta.sigmoid())]


def test_gated_delta_rule_is_the_recurrence():
    tensors = delta_inputs()
    ours = interop.gated_delta_rule(*tensors, use_qk_l2norm=True)
    out, state = recurrence(*tensors)
    assert_close(ours.final_state, state, atol=1e-5)
    compare(ours.out, out, tensors)


def test_gated_delta_rule_continues_from_a_state():
    tensors = delta_inputs(7)
    whole = interop.gated_delta_rule(*tensors, use_qk_l2norm=True)
    first = interop.gated_delta_rule(*(x[:, :6] for x in tensors), use_qk_l2norm=True)
    rest = [x[:, 6:] for x in tensors]
    for last in (
        interop.gated_delta_rule(*rest, initial_state=first.final_state, use_qk_l2norm=True),
        interop.gated_delta_rule_step(*rest, first.final_state, use_qk_l2norm=True),
    ):
        assert_close(last.out, whole.out[:, 6:], atol=1e-5)
        assert_close(last.final_state, whole.final_state, atol=1e-5)
    ids = torch.tensor([[0] * 6 + [1]] * 2)
    alone = interop.gated_delta_rule(*rest, use_qk_l2norm=True)
    packed = interop.gated_delta_rule(*tensors, segment_ids=ids, use_qk_l2norm=True)
    assert_close(packed.final_state, alone.final_state, atol=1e-5)


def test_packed_rows_by_offsets_and_chunk_sizes():
    tensors = [x.detach()[:1].requires_grad_() for x in delta_inputs(9)]
    offsets = torch.tensor([0, 4, 9])  # int64, as torch makes them
    plain = interop.gated_delta_rule(*tensors, use_qk_l2norm=True)
    packed = interop.gated_delta_rule(*tensors, cu_seqlens=offsets, use_qk_l2norm=True)
    parts = [
        recurrence(*(x[:, a:b] for x in tensors)) for a, b in itertools.pairwise(offsets.tolist())
    ]
    compare(packed.out, torch.cat([out for out, _ in parts], 1), tensors)
    assert_close(packed.final_state, torch.cat([state for _, state in parts]), atol=1e-5)
    assert not torch.equal(packed.out, plain.out)
    for size in (16, 64):
        out, state = interop.gated_delta_rule(
            *tensors, chunk_size=size, implementation="chunked", use_qk_l2norm=True
        )
        assert_close(out, plain.out, atol=1e-5)
        assert_close(state, plain.final_state, atol=1e-5)
    with pytest.raises(ValueError, match="`chunk_size` must"):
        interop.gated_delta_rule(*tensors, chunk_size=-1, use_qk_l2norm=True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        interop.gated_delta_rule(*delta_inputs(9), cu_seqlens=offsets, use_qk_l2norm=True)


def operators(dtype=torch.float32):
    """Name -> (function of tensors, tensors that need gradients), tiny."""
    leaf = lambda x: x.detach().to(dtype).requires_grad_()
    attention = [leaf(x) for x in leaves((1, 3, 2, 2), (1, 3, 1, 2), (1, 3, 1, 2))]
    delta = [leaf(x[:1, :3]) for x in delta_inputs(3)]
    step = [leaf(x[:1, :1]) for x in delta_inputs(3)]
    (state,) = leaves((1, 4, 4, 3))
    return {
        "attention": (lambda *a: interop.attention(*a, is_causal=True), attention),
        "gated_delta_rule": (lambda *a: tuple(interop.gated_delta_rule(*a, use_qk_l2norm=True)), delta),
        "gated_delta_rule_step": (
            lambda *a: tuple(interop.gated_delta_rule_step(*a, use_qk_l2norm=True)), [*step, leaf(state)],
        ),
    }  # fmt: skip


OPERATORS = ("attention", "gated_delta_rule", "gated_delta_rule_step")


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck_of_the_operators(name):
    function, tensors = operators(torch.float64)[name]
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradgradcheck_of_the_operators(name):
    function, tensors = operators(torch.float64)[name]
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_the_operators(name):
    function, tensors = operators()[name]
    out = function(*tensors)
    key = (out[0] if isinstance(out, tuple) else out).grad_fn.key
    wanted, flat = "1" * len(tensors), [x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.gqa_jax.call, (flat, key, ""))
    torch.library.opcheck(torch.ops.gqa_jax.call, (flat, key, wanted))
    outs, residuals = torch.ops.gqa_jax.call(flat, key, wanted)
    saved = [outs[i] for i in programs.find(key).saved_outs(wanted)]
    cotangents = [torch.ones_like(o) for o in outs]
    torch.library.opcheck(torch.ops.gqa_jax.vjp, (flat, saved, residuals, cotangents, key, wanted))


@pytest.mark.parametrize("name", OPERATORS)
def test_changing_an_input_of_an_operator_before_backward_raises(name):
    function, tensors = operators()[name]
    for changed in range(3):
        given = [x * 1 for x in tensors]
        out = function(*given)
        with torch.no_grad():
            given[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (out[0] if isinstance(out, tuple) else out).sum().backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_in_eight_threads(name):
    function, tensors = operators()[name]
    total = lambda out: sum(x.sin().sum() for x in (out if isinstance(out, tuple) else (out,)))
    expected = torch.autograd.grad(total(function(*tensors)), tensors)

    def work(_):
        for _ in range(5):
            given = [x.detach().requires_grad_() for x in tensors]
            found = torch.autograd.grad(total(function(*given)), given)
            assert all(map(torch.equal, found, expected))
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_operators_in_a_forked_child_raise():
    run_python("""
        import os, warnings, torch, interop
        warnings.simplefilter("ignore")
        q = torch.randn(1, 3, 2, 4, requires_grad=True)
        out = interop.attention(q, q, q).sum()
        calls = (lambda: interop.attention(q, q, q), out.backward)  # compiled already, and a graph of the parent's
        for call in calls:
            child = os.fork()
            if child == 0:
                try:
                    call()
                except RuntimeError as error:
                    os._exit(7 if "'spawn'" in str(error) else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """)


def test_operators_compile_whole():
    torch._dynamo.reset()
    tensors = delta_inputs()

    def model(q, k, v, g, beta):
        mixed = interop.gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=True).out
        out, lse = interop.attention_with_lse(mixed, mixed, mixed, is_causal=True, scale=0.3)
        ends = torch.tensor([0, 2, 6])
        packed = dict(query_cu_seqlens=ends, kv_cu_seqlens=ends)
        mixed = interop.causal_conv1d(mixed.flatten(2)[:1], torch.ones(2, 12)).out.view(1, 6, 4, 3)
        return out.sin().sum() + lse.sum() + interop.attention(mixed, mixed, mixed, **packed).sum()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pairs = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, model))
    for mine, its in zip(*pairs, strict=True):
        assert_close(mine, its, atol=1e-5)


def test_packed_rows_of_attention_are_rows_alone_and_give_their_lse():
    tensors = leaves((1, 9, 4, 8), (1, 11, 2, 8), (1, 11, 2, 8))
    rows, keys = torch.tensor([0, 4, 9]), torch.tensor([0, 3, 11], dtype=torch.uint8)
    packed = interop.attention_with_lse(
        *tensors,
        query_cu_seqlens=rows,
        kv_cu_seqlens=keys,
        is_causal=True,
        causal_alignment="bottom_right",
    )
    pairs = [itertools.pairwise(x.tolist()) for x in (rows, keys)]
    outs, sums = [], []
    for (a, b), (c, d) in zip(*pairs, strict=True):
        q, k, v = tensors[0][0, a:b], *(x[0, c:d].repeat_interleave(2, 1) for x in tensors[1:])
        logits = torch.einsum("tnd,snd->nts", q, k) * 8**-0.5
        hidden = torch.ones(b - a, d - c).tril(d - c - (b - a)) == 0
        logits = logits.masked_fill(hidden, -torch.inf)
        sums.append(logits.logsumexp(-1).T)
        outs.append(torch.einsum("nts,snd->tnd", logits.softmax(-1).nan_to_num(0.0), v))
    assert_close(packed.out[0], torch.cat(outs), atol=1e-5)
    assert_close(packed.lse[0][1:], torch.cat(sums)[1:], atol=1e-5)  # the first row sees nothing
    compare(packed.lse[0, 4:], sums[1], tensors[:2])


def test_attention_with_lse_takes_what_attention_takes():
    query, key, value = leaves((1, 3, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    names = [
        inspect.signature(f).parameters for f in (interop.attention, interop.attention_with_lse)
    ]
    assert names[0] == names[1]
    options = dict(
        is_causal=True, logits_soft_cap=0.5, dropout_rate=0.5, q_offset=torch.tensor([1])
    )
    options["dropout_seed"] = torch.tensor([1, 2], dtype=torch.int32)
    with_lse = interop.attention_with_lse(query, key, value, **options)
    assert torch.equal(with_lse.out, interop.attention(query, key, value, **options))
    with pytest.raises(TypeError, match=r"must be given options of `attention`, got \['causal'\]"):
        interop.attention_with_lse(query, key, value, causal=True)


def test_decode_attention_is_torchs_over_what_the_cache_holds():
    (query,) = leaves((2, 2, 4, 8))
    key, value = leaves((2, 2, 16, 8), (2, 2, 16, 8), seed=1)
    lengths = torch.tensor([7, 16])  # int64
    out = interop.decode_attention(query, key, value, lengths, sinks=torch.full((4,), -1e4))
    expected = []
    for row, length in enumerate(lengths.tolist()):
        mask = torch.ones(2, length).tril(length - 2) == 1
        q, k, v = query[row].transpose(0, 1), key[row, :, :length], value[row, :, :length]
        expected.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )[0].transpose(0, 1)
        )
    compare(out, torch.stack(expected), [query, key, value])
    with pytest.raises(ValueError, match="`lengths` must be at most S=16 for some query, got 18"):
        interop.decode_attention(query, key, value, torch.tensor([7, 18]))
    small = (127 * key.detach() / key.detach().abs().amax(-1, keepdim=True)).round().to(torch.int8)
    scale = key.detach().abs().amax(-1) / 127
    quantised = interop.decode_attention(query, small, value, lengths, key_scale=scale)
    assert 0 < (quantised - out).abs().max() < 0.1
    with pytest.raises(ValueError, match="`key_scale` must be given with an int8 `key_cache`"):
        interop.decode_attention(query, small, value, lengths)


def test_causal_conv1d_is_torchs_and_continues():
    x, weight, bias = leaves((2, 7, 6), (4, 6), (6,))
    out = interop.causal_conv1d(x, weight, bias=bias, activation="silu").out
    rows = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(rows, weight.T[:, None], bias, groups=6)
    compare(out, torch.nn.functional.silu(expected).transpose(1, 2), [x, weight, bias])
    first = interop.causal_conv1d(x[:, :5], weight, bias=bias)
    rest = interop.causal_conv1d(x[:, 5:], weight, bias=bias, initial_state=first.final_state)
    whole = interop.causal_conv1d(x, weight, bias=bias)
    assert_close(torch.cat((first.out, rest.out), 1), whole.out, atol=1e-6)
    assert_close(rest.final_state, whole.final_state, atol=1e-6)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    packed = interop.causal_conv1d(x, weight, bias=bias, segment_ids=ids)
    assert_close(
        packed.out[:, 3:], interop.causal_conv1d(x[:, 3:], weight, bias=bias).out, atol=1e-6
    )
    with pytest.raises(ValueError, match="`activation` must"):
        interop.causal_conv1d(x, weight, activation="relu")


@pytest.mark.parametrize("values", [[0, 8, 3, 10], [0, 4, 99], [3, 10], [0, -1, 10]])
def test_offsets_that_jax_refuses_are_refused(values):
    tokens = [torch.randn(1, 10, 2, 8)] * 2 + [torch.randn(1, 10, 4, 4)]
    gates = [-torch.rand(1, 10, 4), torch.rand(1, 10, 4)]
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(
            ValueError, match=r"`cu_seqlens` must rise from 0 to at most T=10, got \["
        ):
            interop.gated_delta_rule(*tokens, *gates, cu_seqlens=torch.tensor(values, dtype=dtype))
        places, right = (
            torch.tensor(values, dtype=dtype),
            torch.tensor([0] * (len(values) - 1) + [10]),
        )
        for names in itertools.permutations(("query_cu_seqlens", "kv_cu_seqlens")):
            letter = "T" if names[0][0] == "q" else "S"
            with pytest.raises(
                ValueError, match=rf"`{names[0]}` must rise from 0 to at most {letter}=10, got \["
            ):
                interop.attention(
                    *tokens[:2], tokens[1], **dict(zip(names, (places, right), strict=True))
                )


def test_integers_that_do_not_fit_are_refused_by_name():
    x, ids = torch.randn(1, 2, 2, 8), torch.tensor([[0, 2**32]])  # the second would become 0
    with pytest.raises(ValueError, match=r"`query_segment_ids` must fit int32, got 4294967296"):
        interop.attention(x, x, x, query_segment_ids=ids, kv_segment_ids=ids)
    offsets = torch.tensor([0, 2**32 + 2])
    with pytest.raises(ValueError, match=r"`cu_seqlens` must fit int32, got 4294967298"):
        interop.gated_delta_rule(x, x, x, -x[..., 0].abs(), x[..., 0].sigmoid(), cu_seqlens=offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 37), (3, 130)])
def test_half_precision_forward_and_gradient(batch, length, dtype):
    """Jitted, as every call from torch is, with the results read; the truth is torch's in float64."""
    generator = torch.Generator().manual_seed(length)
    make = lambda heads: (0.5 * torch.randn(batch, length, heads, 8, generator=generator)).to(dtype)
    tensors = [make(heads).requires_grad_() for heads in (4, 2, 2)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    rows = [x.transpose(1, 2) for x in wide]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *rows, is_causal=True, enable_gqa=True
    )
    ours = interop.attention(*tensors, is_causal=True)
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(ours.double(), expected.transpose(1, 2), atol=4 * eps)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64).to(dtype)
    mine = torch.autograd.grad((ours * weight).float().sum(), tensors)
    its = torch.autograd.grad((expected.transpose(1, 2) * weight.double()).sum(), wide)
    for one, other in zip(mine, its, strict=True):
        assert one.dtype == dtype
        assert_close(one.double(), other, atol=8 * eps * max(1.0, float(other.abs().max())))

    value, beta = make(4).requires_grad_(), make(4)[..., 0].sigmoid()
    g = -make(4)[..., 0].float().abs()
    query, key = (
        torch.nn.functional.normalize(x.detach().float(), dim=-1).to(dtype) for x in tensors[1:]
    )
    out = interop.gated_delta_rule(query, key, value, g, beta).out
    double = [x.detach().double() for x in (query, key, value, g, beta)]
    double[2].requires_grad_()
    reference = interop.gated_delta_rule(*double, implementation="reference").out
    assert_close(out.double(), reference, atol=8 * eps)
    (one,), (other,) = (
        torch.autograd.grad(out.float().sum(), value),
        torch.autograd.grad(reference.sum(), double[2]),
    )
    assert_close(one.double(), other, atol=8 * eps * max(1.0, float(other.abs().max())))


def test_fake_tensors_have_no_values_to_look_at():
    with torch._subclasses.FakeTensorMode():
        x = torch.randn(1, 10, 2, 8)
        gate, offsets = x[..., 0].sigmoid(), torch.tensor([0, 4, 10])
        out = interop.gated_delta_rule(x, x, x, -gate, gate, cu_seqlens=offsets)
        assert out.final_state.shape == (2, 2, 8, 8)
