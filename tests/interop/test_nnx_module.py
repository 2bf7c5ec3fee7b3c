"""`NNXModule`: its random numbers are PyTorch's to repeat, and every variable has a name that torch can hold."""

import functools

import pytest

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import interop  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def dropout():
    return interop.NNXModule(lambda rngs: nnx.Dropout(0.5, rngs=rngs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recomputation_of_checkpoint_drops_what_the_forward_dropped(dropout, reentrant):
    attend = lambda x: interop.attention(x, x, x, dropout_rate=0.5)
    for function, shape in ((dropout.train(), (64,)), (attend, (1, 8, 2, 4))):
        x, gradients = torch.rand(shape).add_(1), []
        recomputed = functools.partial(checkpoint, function, use_reentrant=reentrant)
        for call in (recomputed, function):
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            torch.rand(3)  # what runs between must not matter
            y.square().sum().backward()
            gradients.append(leaf.grad)
        assert_close(*gradients, atol=1e-5)
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(dropout, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # both are the mask over the rate kept


def test_random_numbers_are_those_of_torchs_generator(dropout):
    x = torch.ones(64)
    dropout.train()
    state = {name: value.clone() for name, value in dropout.state_dict().items()}
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        assert torch.equal(dropout(x), first)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout(x), second)
    assert dropout.state_dict().keys() == state.keys()
    assert all(torch.equal(dropout.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(0)
    other = interop.NNXModule(lambda rngs: nnx.Dropout(0.5, rngs=rngs), rngs=1).train()
    assert not torch.equal(other(x), first)


class Named(nnx.Module):
    """Variables whose names torch's modules use themselves, or cannot have."""

    def __init__(self, rngs):
        self.type = nnx.Linear(3, 3, rngs=rngs)
        self.training = nnx.Param(jnp.full(3, 2.0))
        self.method = nnx.BatchStat(jnp.zeros(3))
        self.table = nnx.Dict({"a.b": nnx.Param(jnp.ones(3)), "forward": nnx.Param(jnp.ones(3))})

    def __call__(self, x):
        self.method[...] = self.method[...] + x
        return (
            self.type(x) * self.training[...] + self.table["a.b"][...] - self.table["forward"][...]
        )


def test_names_that_torch_uses_itself():
    module = interop.NNXModule(Named)
    names = {"type_.kernel", "type_.bias", "training_", "method_", "table.a_b", "table.forward_"}
    assert set(module.state_dict()) == names
    x = torch.randn(3)
    expected = Named(nnx.Rngs(0))(interop.to_jax(x))
    out = module.train()(x)
    assert_close(out, expected, atol=1e-6)
    assert_close(module.get_buffer("method_"), x, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.eval().training is False
    twin = interop.NNXModule(Named, rngs=1)
    twin.load_state_dict(module.state_dict())
    assert_close(twin(x), expected, atol=1e-6)


def test_names_that_would_be_one_are_refused():
    class Colliding(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Dict({"a.b": nnx.Param(jnp.ones(1)), "a_b": nnx.Param(jnp.zeros(1))})

    with pytest.raises(
        ValueError, match=r"must give variables names that differ, got 'table\.a_b'"
    ):
        interop.NNXModule(Colliding)
