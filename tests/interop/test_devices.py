"""JAX computes where the tensors are, and chooses for that device, whatever its own default is."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")

import gqa_jax  # noqa: E402
import interop  # noqa: E402
from interop import dlpack  # noqa: E402
from interop.torch_modules import self_attention  # noqa: E402
from pallas_kernels import _dispatch  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.torch

CONFIG = gqa_jax.AttentionConfig(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8)
DELTA = gqa_jax.GatedDeltaNetConfig(
    model_dim=16, num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=4
)


@pytest.fixture
def gpu_host():
    """A process whose JAX takes an H100 by default, while its tensors are on the CPU."""
    cpu, hopper = jax.local_devices(backend="cpu"), mock.Mock(compute_capability="9.0")
    devices = lambda backend=None: [hopper] if backend is None else cpu
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(jax, "local_devices", devices),
    ):
        assert _dispatch.target() == _dispatch.Target("gpu", "9.0")
        yield


def test_tensors_of_the_cpu_run_there_on_a_host_with_a_gpu(gpu_host):
    """Half precision, for which a GPU would get a kernel that no CPU can run."""
    make = lambda heads: torch.randn(1, 64, heads, 64).bfloat16().requires_grad_()
    tensors, targets = [make(4), make(2), make(2)], []
    out = interop.attention(*tensors, is_causal=True)
    gradients = torch.autograd.grad(out.float().sum(), tensors)
    rows = [x.detach().double().transpose(1, 2).requires_grad_() for x in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *rows, is_causal=True, enable_gqa=True
    )
    eps = torch.finfo(torch.bfloat16).eps
    assert_close(out.double(), expected.transpose(1, 2), atol=4 * eps)
    truth = torch.autograd.grad(expected.sum(), rows)
    for gradient, true in zip(gradients, truth, strict=True):
        scale = max(1.0, float(true.abs().max()))
        assert_close(gradient.double(), true.transpose(1, 2), atol=8 * eps * scale)

    def seen(x):
        targets.append(_dispatch.target())
        return x * 2

    wrapped = interop.wrap(seen)
    wrapped(torch.ones(2, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    torch.compile(wrapped, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert set(targets) == {_dispatch.Target("cpu")}


@pytest.mark.parametrize("owner", ["torch", "jax"])
def test_caches_are_made_and_stepped_on_the_modules_device(owner, monkeypatch):
    """The second of the CPU devices stands for the module's."""
    second = jax.devices("cpu")[1]
    asked, seen = [], []
    monkeypatch.setattr(dlpack, "device_to_jax", lambda device: asked.append(device) or second)
    layers = [interop.SelfAttention(CONFIG), interop.GatedDeltaNet(DELTA)]
    real = jnp.zeros

    def zeros(*args, **kwargs):
        array = real(*args, **kwargs)
        seen.append(None if isinstance(array, jax.core.Tracer) else array.devices())
        return array

    monkeypatch.setattr(jnp, "zeros", zeros)
    for layer in layers:
        cache = layer.init_cache(1, 8, owner=owner)
        if owner == "jax":
            assert {d for a in jax.tree.leaves(cache.arrays) for d in a.devices()} == {second}
    assert {d for devices in seen if devices for d in devices} == {second}
    assert set(asked) == {torch.device("cpu")}


def test_a_step_of_a_jax_cache_is_for_the_modules_device(monkeypatch):
    second, targets = jax.devices("cpu")[1], []
    layer = interop.SelfAttention(CONFIG)
    cache = layer.init_cache(1, 8, owner="jax")
    monkeypatch.setattr(dlpack, "device_to_jax", lambda device: second)
    step = self_attention._stepping(CONFIG)

    def watched(inputs, cache, options):
        targets.append(jnp.ones(()) is not None and jax.config.jax_default_device)
        return step(inputs, cache, **options)

    object.__setattr__(layer, "_step_jit", jax.jit(watched))
    with torch.no_grad():
        layer.step(torch.randn(1, 2, 16), cache)
    assert targets == [second]


def test_a_backward_pass_finds_what_its_own_machine_kept():
    """Two machines, one shape: what the second forward pass leaves must not replace the first one's."""

    @jax.custom_vjp
    def square(x):
        return x * x

    def forward(x):
        on_gpu = _dispatch.target().platform == "gpu"
        return x * x, ((x, x + 1.0, x - 1.0) if on_gpu else (jnp.sin(x), x * 2.0))

    def backward(kept, g):
        return (g * (kept[1] + kept[2] if len(kept) == 3 else kept[1]),)

    square.defvjp(forward, backward)
    wrapped, x = interop.wrap(square), torch.tensor([3.0], requires_grad=True)
    here = wrapped(x)
    with _dispatch.targeting(_dispatch.Target("gpu")):
        there = wrapped(x)
        (second,) = torch.autograd.grad(there.sum(), x)
    (first,) = torch.autograd.grad(here.sum(), x)
    assert first.item() == second.item() == 6.0


def test_devices_map_by_their_number():
    gpus = [mock.Mock(local_hardware_id=n) for n in (1, 0)]
    dlpack.device_to_jax.cache_clear()
    with mock.patch.object(jax, "local_devices", return_value=gpus):
        assert dlpack.device_to_jax(torch.device("cuda:1")) is gpus[0]
        assert dlpack.device_to_jax(torch.device("cuda:0")) is gpus[1]
    dlpack.device_to_jax.cache_clear()
    assert dlpack.device_to_jax(torch.device("meta")) is None
    assert dlpack.device_to_jax(torch.device("cpu")) == jax.local_devices(backend="cpu")[0]
