"""Artefacts with symbolic sizes, in 64 bits, under torch's transforms and in forked processes."""

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flatbuffers")

import pallas_kernels  # noqa: E402
from interop import artefact_loader, export  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402
from tests.support.fresh_process import run_python  # noqa: E402

pytestmark = pytest.mark.torch

attend = lambda q, k, v: pallas_kernels.gqa_attention(q, k, v, is_causal=True)
delta = lambda *tokens: tuple(pallas_kernels.gated_delta_rule(*tokens))


def attention_shapes(b, t):
    return [(b, t, 4, 8), (b, t, 2, 8), (b, t, 2, 8)]


def delta_shapes(b, t):
    return [(b, t, 2, 8), (b, t, 2, 8), (b, t, 4, 4), (b, t, 4), (b, t, 4)]


def torch_attend(q, k, v):
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    logits = torch.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.einsum("bnts,bsnd->btnd", weights, v)


def torch_delta(query, key, value, g, beta):
    """The recurrence, token by token."""
    query, key = (x.repeat_interleave(2, dim=2) for x in (query, key))
    state, outs = value.new_zeros(*value.shape[::2], query.shape[-1], value.shape[-1]), []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        write = beta[:, t, :, None] * (value[:, t] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], write)
        outs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) * query.shape[-1] ** -0.5)
    return torch.stack(outs, dim=1)


def tensors(shapes, dtype=torch.float32):
    made = [0.4 * torch.randn(shape, dtype=dtype) for shape in shapes]
    if len(made) == 5:
        made[3:] = -made[3].abs(), made[4].sigmoid()
    return [x.requires_grad_() for x in made]


def specs(shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@pytest.mark.parametrize("what", ["b", "b, t"])
@pytest.mark.parametrize("name", ["attention", "delta_rule"])
def test_operators_of_any_batch_and_length(name, what, tmp_path):
    function, shapes, truth = {
        "attention": (attend, attention_shapes, torch_attend),
        "delta_rule": (delta, delta_shapes, torch_delta),
    }[name]
    b, *rest = jax.export.symbolic_shape(what)
    loaded = export.load(
        export.export_operator(function, specs(shapes(b, *(rest or [20]))), tmp_path)
    )
    for batch, length in ((3, 20), (1, 5 if rest else 20)):
        inputs = tensors(shapes(batch, length))
        ours, expected = loaded(*inputs), truth(*inputs)
        ours = ours if name == "attention" else ours[0]
        assert_close(ours, expected, atol=1e-5)
        for mine, its in zip(
            *(torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, expected)), strict=True
        ):
            assert_close(mine, its, atol=1e-4)


def test_decoding_of_any_batch(tmp_path):
    (b,) = jax.export.symbolic_shape("b")
    shapes = lambda b: [(b, 1, 4, 8), (b, 2, 16, 8), (b, 2, 16, 8)]
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    folder = export.export_operator(
        pallas_kernels.decode_attention, [*specs(shapes(b)), lengths], tmp_path, vjp_order=0
    )
    q, k, v = (x.detach() for x in tensors(shapes(3)))
    held = torch.tensor([1, 7, 16], dtype=torch.int32)
    seen = torch.arange(16) < held[:, None, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=seen, enable_gqa=True
    )
    assert_close(export.load(folder)(q, k, v, held), expected.transpose(1, 2), atol=1e-5)


def test_symbolic_lengths_leave_the_reference_and_say_why():
    b, t = jax.export.symbolic_shape("b, t")
    for operator, shapes, other in (
        ("gqa_attention", attention_shapes, "blockwise"),
        ("gated_delta_rule", delta_shapes, "chunked"),
    ):
        found = pallas_kernels.explain(operator, *specs(shapes(b, t)))
        assert found.chosen == "reference"
        assert "numbers, not symbols" in found.reasons[other]
    blockwise = jax.jit(lambda *x: pallas_kernels.gqa_attention(*x, implementation="blockwise"))
    with pytest.raises(NotImplementedError, match="numbers, not symbols"):
        jax.export.export(blockwise)(*specs(attention_shapes(b, t)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "artefact"
    return export.export_operator(attend, specs(attention_shapes(1, 3), jnp.float64), folder)


@pytest.mark.parametrize("load", [export.load, artefact_loader.load])
def test_float64(wide, load):
    inputs = tensors(attention_shapes(1, 3), torch.float64)
    ours, expected = load(wide)(*inputs), torch_attend(*inputs)
    assert ours.dtype == torch.float64
    assert_close(ours, expected, atol=1e-12)
    for mine, its in zip(
        *(torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, expected)), strict=True
    ):
        assert_close(mine, its, atol=1e-12)
    assert not jax.config.jax_enable_x64


def test_vmap_and_grad_of_an_artefact(wide):
    loaded = export.load(wide)
    stacked = tensors([(2, *shape) for shape in attention_shapes(1, 3)], torch.float64)
    stacked = [x.detach() for x in stacked]
    for transform in (
        torch.vmap,
        lambda f: torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).sin().sum())),
        lambda f: torch.func.grad(lambda q, k, v: torch.vmap(f)(q, k, v).sin().sum()),
    ):
        assert_close(transform(loaded)(*stacked), transform(torch_attend)(*stacked), atol=1e-11)
    with pytest.raises(NotImplementedError, match=r"not torch\.func and torch\.vmap"):
        torch.vmap(artefact_loader.load(wide))(*stacked)


def test_64_bit_integers_are_refused_where_they_would_become_32(tmp_path):
    with pytest.raises(TypeError, match=r"`specs\[1\]` must have 32 bits .* got int64"):
        export.export_operator(
            lambda table, ids: table[ids], [torch.ones(3, 2), torch.tensor([0])], tmp_path
        )


def test_a_forked_child_of_who_loaded_raises(wide):
    """Both loaders; without the check the child waits for ever."""
    run_python(
        """
        import os, sys, torch
        from interop import artefact_loader, export
        functions = [export.load(sys.argv[1]), artefact_loader.load(sys.argv[1])]
        inputs = [torch.ones(1, 3, n, 8, dtype=torch.float64) for n in (4, 2, 2)]
        for function in functions:
            child = os.fork()
            if child == 0:
                try:
                    function(*inputs)
                except RuntimeError as error:
                    os._exit(7 if "before this process was forked" in str(error) else 8)
                os._exit(9)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        """,
        str(wide),
    )
