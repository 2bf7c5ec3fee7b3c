"""`interop.wrap`: PyTorch's autograd, function transforms, compiler and threads over JAX functions."""

import concurrent.futures
import gc
import resource
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import dlpack, programs, torch_function  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch


def attend(query, key, value):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def torch_attend(*tensors):
    query, key, value = (x.transpose(1, 2) for x in tensors)
    probabilities = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
    return (probabilities @ value).transpose(1, 2)


wrapped = interop.wrap(attend)


def inputs(*shape, dtype=torch.float32, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (2, 6, 2, 4)
    make = lambda: torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(grad)
    return [make() for _ in range(3)]


def assert_same_gradients(ours, theirs, tensors, *, atol=1e-5, what=""):
    for mine, its in zip(
        torch.autograd.grad(ours, tensors), torch.autograd.grad(theirs, tensors), strict=True
    ):
        assert_close(mine, its, atol=atol, what=what)


@pytest.mark.parametrize("residuals", ["save", "recompute"])
@pytest.mark.parametrize("direct", [True, False])
def test_value_and_gradients_are_torchs(residuals, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(dlpack, "_direct", None)
    tensors = inputs()
    ours, theirs = interop.wrap(attend, residuals=residuals)(*tensors), torch_attend(*tensors)
    assert_close(ours, theirs, atol=1e-5)
    weight = torch.randn_like(ours)
    assert_same_gradients((ours * weight).sum(), (theirs * weight).sum(), tensors)


def test_gradcheck_and_gradgradcheck():
    assert torch.autograd.gradcheck(wrapped, inputs(1, 3, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(wrapped, inputs(1, 2, 1, 2, dtype=torch.float64))
    assert not jax.config.jax_enable_x64


def test_complex_gradients_follow_torchs_convention():
    function = interop.wrap(lambda x, y: x * y * y + jnp.sin(x))
    tensors = [torch.randn(3, dtype=torch.complex128, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_bfloat16_and_autocast_keep_the_dtype_of_the_inputs():
    assert wrapped(*inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapped(*inputs())
        assert out.dtype == torch.float32
        out.sum().backward()


class Pair(NamedTuple):
    first: object
    second: object


def test_trees_static_values_and_integers():
    def function(tree, *, shift=None, order, label="a"):
        x, ids = tree["x"], tree["ids"][0]
        out = x**order if shift is None else x**order + shift
        return Pair({"out": out, "ids": ids + 1}, [out.sum(), label == "b"])

    ours = interop.wrap(function, static_argnames=("order", "label"))
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    ids = torch.tensor([1, 2], dtype=torch.int32)
    tree = {"x": x, "ids": (ids, None)}
    result = ours(tree, order=2, label="b")
    assert isinstance(result, Pair)
    assert result.first["ids"].tolist() == [2, 3]
    assert not result.first["ids"].requires_grad
    assert result.second[1].item() is True
    (gradient,) = torch.autograd.grad(result.first["out"].sum() + result.second[0], x)
    assert_close(gradient, 4 * x, atol=1e-6)
    shift = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(tree, order=3, shift=shift).second[0], shift)
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    assert torch_function.compiled_shapes(ours) == 2

    compiled = torch.compile(
        lambda t, s: ours(t, order=2, shift=s), backend="aot_eager", fullgraph=True
    )
    again = compiled(tree, shift)
    assert isinstance(again, Pair)
    assert torch.equal(again.first["out"], ours(tree, order=2, shift=shift).first["out"])


def test_only_the_gradients_asked_for_are_computed():
    query, key, value = inputs()
    key = key.detach()
    wrapped(query, key, value).sum().backward()
    assert key.grad is None
    assert query.grad is not None
    unused = torch.ones(3, requires_grad=True)
    interop.wrap(lambda a, b: a * 2)(unused.detach().requires_grad_(), unused).sum().backward()
    assert unused.grad.tolist() == [0.0, 0.0, 0.0]


def test_function_transforms():
    stacked = [torch.randn(3, 2, 4, 2, 4) for _ in range(3)]
    per_example = lambda f: torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).sin().sum()))
    assert_close(per_example(wrapped)(*stacked), per_example(torch_attend)(*stacked), atol=1e-5)
    small = [torch.randn(1, 3, 1, 2) for _ in range(3)]
    assert_close(
        torch.func.jacrev(wrapped)(*small), torch.func.jacrev(torch_attend)(*small), atol=1e-5
    )
    mixed = (stacked[0], stacked[1][0], stacked[2].movedim(0, 1))
    batched = lambda f: torch.vmap(f, in_dims=(0, None, 1))(*mixed)
    assert_close(batched(wrapped), batched(torch_attend), atol=1e-5)
    with torch.no_grad():
        assert_close(batched(wrapped), batched(torch_attend), atol=1e-5)
    second = lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda y: f(y, y, y).sin().sum())(x).sum()
    )
    assert_close(second(wrapped)(small[0]), second(torch_attend)(small[0]), atol=1e-5)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(wrapped, tuple(small), tuple(small))


def test_a_penalty_on_gradients_trains():
    tensors = inputs()
    losses = []
    for function in (wrapped, torch_attend):
        grads = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
        losses.append(sum((g**2).sum() for g in grads))
    assert_same_gradients(*losses, tensors)


def test_changing_an_input_before_backward_raises():
    tensors = inputs()
    query = tensors[0] * 1
    out = wrapped(query, *tensors[1:])
    with torch.no_grad():
        query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_a_result_raises_only_if_backward_reads_it():
    x = torch.randn(4, requires_grad=True)
    for function, reads_result in ((jnp.exp, True), (jnp.sin, False)):
        out = interop.wrap(function)(x)
        out.mul_(2)
        if reads_result:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        else:
            out.sum().backward()


def test_inputs_and_results_are_not_saved_twice():
    ours = interop.wrap(lambda x, w: jnp.exp(x @ w), name="exp_of_product")
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    ours(x, w)
    (program,) = [p for p in programs._programs.values() if p.name == "exp_of_product"]
    arrays = [jax.ShapeDtypeStruct((4, 4), jnp.float32)] * 2
    outs, residuals = jax.eval_shape(program.saving("11"), *arrays)
    assert (len(outs), len(residuals)) == (1, 0)
    assert program.saved_outs("11") == (0,)


def test_small_residuals_travel_as_one_buffer_per_dtype():
    ours = interop.wrap(lambda a: jnp.tanh(jnp.sin(a) * jnp.cos(a)).astype(jnp.bfloat16) ** 3)
    x = torch.randn(5, 1, requires_grad=True)
    ours(x).float().sum().backward()
    program = programs.find(ours(x).grad_fn.key)
    for size, few in ((5, True), (1 << 15, False)):
        array = jax.ShapeDtypeStruct((size, 1), jnp.float32)
        _, residuals = jax.eval_shape(program.saving("1"), array)
        dtypes = {r.dtype for r in residuals}
        assert len(dtypes) == 2
        assert (len(residuals) == len(dtypes)) is few
    expected = torch.tanh(x.sin() * x.cos()).to(torch.bfloat16) ** 3
    (gradient,) = torch.autograd.grad(expected.float().sum(), x)
    assert_close(x.grad, gradient, atol=1e-2)


def test_results_do_not_share_memory_with_inputs_or_each_other():
    x = torch.ones(64)
    out = interop.wrap(lambda a: a)(x)
    assert out.data_ptr() != x.data_ptr()
    first, second = interop.wrap(lambda a: (a * 2,) * 2)(x)
    first.add_(1)
    assert second.unique().tolist() == [2.0]


@pytest.mark.parametrize("function", [
    lambda a: jax.random.bernoulli(jax.random.key(0), 0.5, a.shape).astype(a.dtype) * a,
    lambda a: a.astype(jnp.int4).astype(a.dtype) * a,
    lambda a: a.astype(jnp.float8_e4m3fn).astype(a.dtype) * a,
    lambda a: jnp.where(a > 0, a * a, 0.0) + jnp.sort(a),
    lambda a: jax.lax.scan(lambda c, x: (c * 0.5 + x * c, c), jnp.float32(1.0), a)[1],
    lambda a: a * jnp.arange(6, dtype=jnp.float32),
], ids=["key", "int4", "fp8", "indices", "scan", "constant"])  # fmt: skip
def test_residuals_of_every_kind(function):
    a = torch.randn(6, requires_grad=True)
    (saved,) = torch.autograd.grad(interop.wrap(function)(a).sum(), a)
    (again,) = torch.autograd.grad(interop.wrap(function, residuals="recompute")(a).sum(), a)
    expected = jax.grad(lambda x: function(x).sum())(interop.to_jax(a))
    assert_close(saved, expected, atol=1e-6)
    assert_close(again, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("residuals", ["save", "recompute"])
def test_compiled_whole(backend, residuals):
    torch._dynamo.reset()
    ours = interop.wrap(attend, residuals=residuals)
    tensors = inputs()
    function = lambda f: lambda q, k, v: f(q * 2, k, v).sin().sum()
    compiled = torch.compile(function(ours), backend=backend, fullgraph=True)
    assert_same_gradients(compiled(*tensors), function(torch_attend)(*tensors), tensors)
    with torch.no_grad():
        assert_close(compiled(*tensors), function(torch_attend)(*tensors), atol=1e-4)


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (3, 5):
        tensors = inputs(1, length, 2, 4, grad=False)
        assert_close(compiled(*tensors), torch_attend(*tensors), atol=1e-5)


def test_compiled_by_inductor():
    torch._dynamo.reset()
    tensors = inputs()
    function = lambda f: lambda q, k, v: f(q * 2, k, v).sin().sum()
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(function(wrapped), fullgraph=True)
        assert_same_gradients(compiled(*tensors), function(torch_attend)(*tensors), tensors)


def test_exported_program_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return wrapped(q, k, v) + 1

    tensors = tuple(inputs(grad=False))
    exported = torch.export.export(Model(), tensors, strict=False)
    assert_close(exported.module()(*tensors), torch_attend(*tensors) + 1, atol=1e-5)


def test_opcheck():
    tensors = [x.detach() for x in inputs()]
    ours = interop.wrap(attend, name="opchecked")
    ours(*inputs())
    (key,) = [p.key for p in programs._programs.values() if p.name == "opchecked"]
    torch.library.opcheck(torch.ops.gqa_jax.call, (tensors, key, ""))
    torch.library.opcheck(torch.ops.gqa_jax.call, (tensors, key, "111"))
    outs, residuals = torch.ops.gqa_jax.call(tensors, key, "111")
    saved = [outs[i] for i in programs.find(key).saved_outs("111")]
    arguments = (tensors, saved, residuals, [torch.ones_like(outs[0])], key, "111")
    torch.library.opcheck(torch.ops.gqa_jax.vjp, arguments)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    tensors = inputs()
    out = torch.utils.checkpoint.checkpoint(wrapped, *tensors, use_reentrant=reentrant)
    out.sin().sum().backward()
    expected = torch.autograd.grad(torch_attend(*tensors).sin().sum(), tensors)
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert_close(tensor.grad, gradient, atol=1e-5)


def test_eight_threads():
    ours = interop.wrap(attend)

    def work(seed):
        for round in range(10):
            dtype = torch.float64 if seed % 2 else torch.float32
            tensors = inputs(1, 2 + round % 3, 2, 4, dtype=dtype, seed=seed)
            assert_same_gradients(
                ours(*tensors).sin().sum(), torch_attend(*tensors).sin().sum(), tensors
            )
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_64_bits_follow_the_inputs_not_the_flag():
    single = inputs()
    out = wrapped(*single)
    with jax.enable_x64(True):  # another library flips the flag between forward and backward
        assert wrapped(*single).dtype == torch.float32
        out.sum().backward()
    assert wrapped(*inputs(dtype=torch.float64)).dtype == torch.float64
    assert not jax.config.jax_enable_x64
    take = lambda table, ids: table[ids]
    table, ids = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2])
    with pytest.raises(TypeError, match=r"must not be torch\.int64"):
        interop.wrap(take)(table, ids)
    cast = interop.wrap(take, wide="cast")
    (gradient,) = torch.autograd.grad(cast(table, ids).sum(), table)
    assert gradient[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    compiled = torch.compile(cast, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(table, ids), table[ids])
    with jax.enable_x64(True):
        assert torch.equal(interop.wrap(take)(table, ids), table[ids])


def test_the_wrapper_may_die_before_backward():
    x = torch.ones(3, requires_grad=True)
    out = interop.wrap(lambda a: a * 3)(x)
    gc.collect()
    out.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(RuntimeError, match=r"is gone: keep what interop\.wrap returned alive"):
        programs.find("nothing#0")


def test_memory_does_not_grow():
    tensors = inputs(2, 64, 4, 32)

    def step():
        wrapped(*tensors).sum().backward()

    for _ in range(50):
        step()
    gc.collect()
    count, used = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        step()
    gc.collect()
    grown = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    )  # KiB; one leaked result is 128
    assert grown < 20_000, f"{grown} KiB over 1000 calls"
    assert len(gc.get_objects()) < count + 500


def test_many_shapes_are_reported_once_by_name():
    ours = interop.wrap(lambda a: a * 2, name="double", warn_after=2)
    for length in (1, 2):
        ours(torch.ones(length))
    with pytest.warns(interop.RecompilationWarning, match="double was compiled for more than 2"):
        ours(torch.ones(3))
    ours(torch.ones(4))
    assert torch_function.compiled_shapes(ours) == 4


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="`residuals` must be 'save' or 'recompute', got 'drop'"):
        interop.wrap(attend, residuals="drop")
    with pytest.raises(ValueError, match=r"`static_argnames` must name arguments .* \['scale'\]"):
        interop.wrap(attend, static_argnames=("scale",))
    ours = interop.wrap(lambda a, *, b=None, c=None: a, name="f", static_argnames=("c",))
    with pytest.raises(TypeError, match=r"f: `args\[0\]` must be a tensor .* got float"):
        ours(1.0)
    with pytest.raises(TypeError, match=r"f: `kwargs\['b'\]` must be a tensor .* got int"):
        ours(torch.ones(1), b=2)
    with pytest.raises(TypeError, match="static arguments of f must be hashable"):
        ours(torch.ones(1), c=[1])
    with pytest.raises(ValueError, match="f must be called with at least one tensor"):
        ours(None)
    with pytest.raises(TypeError, match="must return arrays, got str"):
        interop.wrap(lambda a: "text")(torch.ones(1))
    varying = interop.wrap(lambda a: (a,) * len(a))
    varying(torch.ones(1))
    with pytest.raises(TypeError, match="must return one structure for all shapes"):
        varying(torch.ones(2))
    with pytest.raises(TypeError, match="got meta"):
        wrapped(*[torch.ones(1, 1, 1, 1, device="meta")] * 3)


@pytest.mark.parametrize(
    "length, bucket", [(0, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (100, 128)]
)
def test_buckets(length, bucket):
    assert interop.bucket_length(length, minimum=16, steps_per_octave=2) == bucket


def test_buckets_are_few_and_padding_is_bounded():
    sizes = {interop.bucket_length(n) for n in range(1, 4097)}
    assert len(sizes) <= 1 + 2 * 8
    assert all(interop.bucket_length(n) < 1.5 * n + 16 for n in range(1, 4097))
    padded = interop.pad_to(torch.ones(2, 3), 5, dim=1, value=7)
    assert padded.tolist() == [[1, 1, 1, 7, 7]] * 2
    assert interop.pad_to(padded, 5, dim=1) is padded
    with pytest.raises(ValueError, match="`length` must be at least 5, got 4"):
        interop.pad_to(padded, 4, dim=1)
    for arguments in ({"minimum": 0}, {"minimum": 3, "steps_per_octave": 2}):
        with pytest.raises(ValueError, match="`minimum` must be a positive multiple"):
            interop.bucket_length(5, **arguments)
    with pytest.raises(ValueError, match="`length` must not be negative"):
        interop.bucket_length(-1)


@pytest.mark.gpu
def test_cuda_results_are_ordered_and_memory_is_reused_safely():
    function = interop.wrap(lambda a: (a * 2).sum())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for round in range(20):
            x = torch.full((1 << 22,), float(round), device="cuda")
            torch.cuda._sleep(5_000_000)
            out = function(x)
            del x
            overwrite = torch.full((1 << 22,), -1.0, device="cuda")
            assert out.item() == 2.0 * round * (1 << 22)
            del overwrite


@pytest.mark.gpu
def test_cuda_value_and_gradients():
    tensors = [x.detach().cuda().requires_grad_() for x in inputs()]
    assert_same_gradients(
        wrapped(*tensors).sin().sum(), torch_attend(*tensors).sin().sum(), tensors, atol=5e-3
    )
    with pytest.raises(ValueError, match="tensors must be on one device"):
        wrapped(tensors[0], tensors[1].cpu(), tensors[2])
