"""Derivatives and batches that PyTorch asks for in unusual places give its own values; what is missing says so.

Every case is the same mathematics written in torch, so that a gradient that is silently dropped shows as a wrong value.
"""

import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

import gqa_jax  # noqa: E402
import interop  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch

func = torch.func
rows = lambda x, w: x[:, None] * w  # a batch that differs along both axes
CASES = {
    "grad": lambda f: lambda x, w: func.grad(lambda y, z: f(y, z).sum(), argnums=(0, 1))(x, w),
    "vjp": lambda f: lambda x, w: func.vjp(f, x, w)[1](torch.ones(3)),
    "jacrev": lambda f: lambda x, w: func.jacrev(f)(x, w),
    "vmap": lambda f: lambda x, w: torch.vmap(f, (0, None))(rows(x, w), w),
    "vmap_of_grad": lambda f: (
        lambda x, w: torch.vmap(func.grad(lambda y: f(y, w).sum()))(rows(x, w))
    ),
    "grad_of_vmap": lambda f: (
        lambda x, w: func.grad(lambda y: torch.vmap(f, (0, None))(y, w).sum())(rows(x, w))
    ),
    "grad_of_grad": lambda f: (
        lambda x, w: func.grad(lambda y: func.grad(lambda z: f(z, w).sum())(y).sum())(x)
    ),
}


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def both():
    return interop.wrap(lambda x, w: jnp.sin(x * w) + x * x), lambda x, w: torch.sin(x * w) + x * x


def inputs():
    return torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0, 2.0])


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("name", CASES)
def test_function_transforms_inside_compile_are_torchs(name, backend):
    """The first call of the wrapped function is already under the transform."""
    torch._dynamo.reset()
    ours, theirs = both()
    ours, theirs = CASES[name](ours), CASES[name](theirs)
    if backend:
        ours = torch.compile(ours, backend=backend, fullgraph=True)
    x, w = inputs()
    for mine, its in zip(leaves(ours(x, w)), leaves(theirs(x, w)), strict=True):
        assert_close(mine, its, atol=1e-5)
    if name in ("jacrev", "vmap_of_grad"):  # and a gradient from outside, through the transform's
        grads = [
            torch.autograd.grad((f(x, v) ** 2).sum(), v)[0]
            for f in (lambda x, v: leaves(ours(x, v))[0], lambda x, v: leaves(theirs(x, v))[0])
            for v in [w.clone().requires_grad_()]
        ]
        assert_close(*grads, atol=1e-4)


def test_a_modules_parameters_have_their_gradient_inside_compile():
    torch._dynamo.reset()
    config = gqa_jax.AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)
    module, x = interop.SelfAttention(config), torch.randn(1, 5, 16)
    loss = lambda p: func.functional_call(module, p, (x,)).square().sum()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    compiled = torch.compile(lambda p: func.grad(loss)(p), backend="aot_eager", fullgraph=True)
    loss(dict(module.named_parameters())).backward()
    for name, gradient in compiled(parameters).items():
        assert_close(gradient, module.get_parameter(name).grad, atol=1e-4, what=name)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_is_refused_not_zero(compiled):
    ours, _ = both()
    tensors = inputs()
    cases = (
        lambda x, w: func.jvp(ours, (x, w), (x, w)),
        lambda x, w: func.jacfwd(ours)(x, w),
        lambda x, w: func.hessian(lambda y: ours(y, w).sum())(x),
    )
    for case in cases:
        torch._dynamo.reset()
        function = torch.compile(case, backend="eager") if compiled else case
        with pytest.raises(Exception, match="has no forward-mode derivative"):
            function(*tensors)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones(3))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            ours(dual, tensors[1])


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients_of_autograd(create_graph):
    (ours, theirs), (x, w) = both(), inputs()
    for which in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        if which is torch.autograd.functional.hessian:
            ours, theirs = (lambda x, w, f=f: f(x, w).sum() for f in (ours, theirs))
        kinds = {"create_graph": create_graph, "vectorize": True}
        for mine, its in zip(
            leaves(which(ours, (x, w), **kinds)),
            leaves(which(theirs, (x, w), **kinds)),
            strict=True,
        ):
            assert_close(mine, its, atol=1e-5)


def test_an_exported_graph_can_be_trained():
    """torch.export records the operator alone: its derivative must come with it."""
    ours, theirs = both()

    class Model(torch.nn.Module):
        def forward(self, x, w):
            return ours(x, w) * w

    x, w = inputs()
    exported = torch.export.export(Model(), (x, w), strict=False).module()
    tensors = [x.requires_grad_(), w.requires_grad_()]
    mine = torch.autograd.grad(exported(*tensors).sum(), tensors)
    its = torch.autograd.grad((theirs(*tensors) * tensors[1]).sum(), tensors)
    for one, other in zip(mine, its, strict=True):
        assert_close(one, other, atol=1e-5)


def test_second_order_through_a_compiled_graph_is_right():
    """Backend "eager" differentiates the compiled graph again, so its backward pass needs a derivative too."""
    torch._dynamo.reset()
    (ours, theirs), (x, w) = both(), inputs()
    x.requires_grad_()
    compiled = torch.compile(lambda x, w: ours(x, w).sum(), backend="eager", fullgraph=True)
    second = []
    for f in (compiled, lambda x, w: theirs(x, w).sum()):
        (first,) = torch.autograd.grad(f(x, w), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close(*second, atol=1e-4)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_static_numbers_may_change_between_compiled_calls(fullgraph):
    """Dynamo makes a symbol of a number that changed; past its limit of recompilations the call is eager."""
    torch._dynamo.reset()
    ours = interop.wrap(
        lambda x, *, n, scale, pair: x**n * scale + sum(pair),
        static_argnames=("n", "scale", "pair"),
    )
    compiled = torch.compile(
        lambda x, n, s: ours(x, n=n, scale=s, pair=(n, s)), backend="eager", fullgraph=fullgraph
    )
    x = torch.tensor([1.0, 2.0])
    calls = [(2, 1.0), (3, 1.0), (4, 2.5), (4, 3.5), (2, 1.0)]
    if not fullgraph:
        calls += [(n, n / 2) for n in range(1, 11)]
    for n, scale in calls:
        assert_close(compiled(x, n, scale), x**n * scale + n + scale, atol=1e-4)


def test_compiled_autograd_tells_functions_apart():
    torch._dynamo.reset()
    x, w = inputs()
    functions = (
        (lambda x, w: jnp.sin(x * w), lambda x, w: torch.sin(x * w)),
        (lambda x, w: x * x * w, lambda x, w: x * x * w),
    )
    for function, theirs in functions:
        ours, mine, its = interop.wrap(function), *(x.clone().requires_grad_() for _ in range(2))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            ours(mine, w).sum().backward()
        theirs(its, w).sum().backward()
        assert_close(mine.grad, its.grad, atol=1e-5)
