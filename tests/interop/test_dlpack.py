"""The conversion policy of `interop.dlpack`, line by line."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import dlpack  # noqa: E402
from tests.support.fresh_process import run_python  # noqa: E402

pytestmark = pytest.mark.torch

WIDE = (torch.int64, torch.float64, torch.complex128, torch.uint64)
DTYPES = sorted(dlpack._TO_JAX, key=str)


@pytest.fixture(params=["direct", "public"])
def entry(request, monkeypatch):
    """Both ways into JAX: its private entry, and the public one that remains if that is gone."""
    if request.param == "public":
        monkeypatch.setattr(dlpack, "_direct", None)
    return request.param


def unaligned(*shape):
    """A contiguous tensor that starts 4 bytes behind a multiple of 64."""
    tensor = torch.empty(int(np.prod(shape)) + 1)[1:].reshape(shape).normal_()
    assert tensor.data_ptr() % 64
    return tensor


def test_the_private_entry_exists_here():
    interop.to_jax(torch.ones(2))
    assert dlpack._direct is not None, "JAX changed: the fast path is gone, the public one works"


def test_memory_is_shared_both_ways(entry):
    tensor = torch.randn(8, 16)
    array = interop.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert interop.to_torch(array).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_makes_the_round_trip_bit_by_bit(entry, dtype):
    bits = torch.randint(0, 2, (16, 16), dtype=torch.uint8)
    tensor = bits.bool() if dtype == torch.bool else bits.repeat(1, 8).view(dtype)
    with jax.enable_x64(dtype in WIDE):
        array = interop.to_jax(tensor)
        assert array.dtype == interop.dtype_to_jax(dtype)
        back = interop.to_torch(array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert interop.dtype_to_torch(interop.dtype_to_jax(dtype)) == dtype


def test_unaligned_memory_is_copied_before_anybody_can_change_it(entry):
    for _ in range(20):
        tensor = unaligned(64, 64)
        expected = tensor.clone()
        array = interop.to_jax(tensor)
        tensor.fill_(-1.0)
        np.testing.assert_array_equal(np.asarray(array), expected.numpy())


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(4, 6)[:, :2],
        lambda: torch.randn(4, 1).expand(4, 6),
        lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 1, 4).transpose(0, 1).transpose(0, 1),
        lambda: torch.randn(4, 6, 2)[:, :, 1],
        lambda: torch.randn(0, 3),
        lambda: torch.tensor(3.0),
        lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        lambda: torch.nn.Parameter(torch.randn(3, 4)),
    ],
)  # fmt: skip
def test_views_arrive_whole(entry, view):
    tensor = view()
    array = interop.to_jax(tensor)
    expected = tensor.detach().resolve_conj().resolve_neg().numpy()
    np.testing.assert_array_equal(np.asarray(array), expected)


def test_strides_cause_no_second_compile(entry):
    traces = []

    @jax.jit
    def double(x):
        traces.append(x.shape)
        return x * 2

    odd = torch.randn(2, 4).as_strided((2, 1, 4), (4, 8, 1))
    for tensor in (torch.randn(2, 1, 4), torch.randn(2, 4, 1).transpose(1, 2), odd):
        np.testing.assert_allclose(double(interop.to_jax(tensor)), 2 * tensor.numpy())
        assert double._cache_size() == 1
    assert len(traces) == 1


def test_64_bits_are_refused_or_cast_with_a_check(entry):
    for dtype in WIDE:
        with pytest.raises(TypeError, match=rf"`tensor` must not be {dtype} while jax_enable_x64"):
            interop.to_jax(torch.ones(2).to(dtype))
        cast = interop.to_jax(torch.ones(2).to(dtype), wide="cast")
        assert cast.dtype.itemsize * 2 == torch.empty(0, dtype=dtype).element_size()
    with pytest.raises(ValueError, match=r"`tensor` must hold values that fit torch\.int32"):
        interop.to_jax(torch.tensor([2**31]), wide="cast")
    with pytest.raises(ValueError, match=r"`tensor` must hold values that fit torch\.uint32"):
        interop.to_jax(torch.tensor([2**32], dtype=torch.uint64), wide="cast")
    assert interop.to_jax(torch.empty(0, dtype=torch.int64), wide="cast").shape == (0,)
    with pytest.raises(ValueError, match="`wide` must be 'error' or 'cast', got 'drop'"):
        interop.to_jax(torch.ones(2), wide="drop")


def test_copy_is_stated():
    tensor = torch.randn(4, 4)
    assert interop.to_jax(tensor, copy=False).unsafe_buffer_pointer() == tensor.data_ptr()
    assert interop.to_jax(tensor, copy=True).unsafe_buffer_pointer() != tensor.data_ptr()
    for needs_copy in (tensor.T, unaligned(4, 4)):
        with pytest.raises(ValueError, match="`copy` must not be False"):
            interop.to_jax(needs_copy, copy=False)
    array = jnp.arange(32.0)
    shared, own = interop.to_torch(array, copy=False), interop.to_torch(array, copy=True)
    assert shared.data_ptr() == array.unsafe_buffer_pointer() != own.data_ptr()


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning"
)  # deprecated by torch 2.15
def test_tensors_without_dense_memory_are_named():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.randn(2)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with warnings.catch_warnings(action="ignore"):  # torch says that it is a prototype
        pair = [torch.ones(2), torch.ones(3)]
        strided_nested = torch.nested.nested_tensor(pair, layout=torch.strided)
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for tensor, message in (
        (fake, "FakeTensor"),
        (torch.ones(2, device="meta"), "got meta"),
        (torch.eye(2).to_sparse(), "use to_dense"),
        (nested, "nested|NestedTensor"),
        (strided_nested, "nested"),
        (quantised, "quantised"),
        (np.ones(2), "must be a torch.Tensor, got ndarray"),
    ):
        with pytest.raises(TypeError, match=message):
            interop.to_jax(tensor)
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.vmap(lambda x: interop.to_jax(x))(torch.ones(2, 3))
    with pytest.raises(TypeError, match="must have a JAX counterpart"):
        interop.dtype_to_jax(torch.qint8)


def test_arrays_that_torch_cannot_hold_are_named():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharded = jax.device_put(
        jnp.zeros(8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    deleted = jnp.zeros(8) + 1
    deleted.delete()
    for array, error, message in (
        (jax.random.key(0), TypeError, "key_data"),
        (jnp.zeros(2, jnp.int4), TypeError, "int4"),
        (sharded, ValueError, "one addressable device"),
        (deleted, RuntimeError, "donated or deleted"),
        (np.ones(2), TypeError, "must be a jax.Array, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            interop.to_torch(array)
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(lambda x: interop.to_torch(x))(jnp.ones(2))
    for dtype in (jax.random.key(0).dtype, jnp.int4):
        with pytest.raises(TypeError, match="must have a torch counterpart"):
            interop.dtype_to_torch(dtype)


def test_trees_keep_their_structure():
    tree = {"a": [torch.ones(2), None], "b": (torch.zeros(3, dtype=torch.int32),)}
    arrays = interop.tree_to_jax(tree)
    assert jax.tree.structure(arrays) == jax.tree.structure(tree)
    back = interop.tree_to_torch(arrays)
    assert torch.equal(back["b"][0], tree["b"][0])
    assert back["a"][1] is None
    copied = interop.tree_to_torch(arrays, copy=True)
    assert copied["a"][0].data_ptr() != tree["a"][0].data_ptr()
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got float"):
        interop.tree_to_jax({"a": 1.0})


def test_donating_an_array_spares_the_tensor_that_shares_it():
    tensor = torch.arange(64, dtype=torch.float32)
    expected = tensor.clone()
    with warnings.catch_warnings(action="ignore"):  # JAX may say that it copied
        jax.jit(lambda x: x * 2, donate_argnums=0)(interop.to_jax(tensor)).block_until_ready()
    assert torch.equal(tensor, expected)
    array = jnp.arange(64.0) + 0
    view = interop.to_torch(array)
    jax.jit(lambda x: x * 2, donate_argnums=0)(array).block_until_ready()
    assert torch.equal(view, expected)


def _sum_in_jax(size: int) -> float:
    return float(interop.to_jax(torch.ones(size)).sum())


def test_a_forked_child_gets_an_error_and_a_spawned_one_works():
    run_python("""
        import os, warnings, torch, interop
        warnings.simplefilter("ignore")
        interop.to_jax(torch.ones(3))
        child = os.fork()
        if child == 0:
            try:
                interop.to_jax(torch.ones(3))
            except RuntimeError as error:
                os._exit(7 if "'spawn'" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """)
    spawned = torch.multiprocessing.get_context("spawn").Pool(1)
    with spawned:
        assert spawned.apply(_sum_in_jax, (3,)) == 3.0


def test_a_fork_before_jax_is_used_is_harmless():
    run_python("""
        import os, torch, interop
        child = os.fork()
        if child == 0:
            os._exit(7 if interop.to_jax(torch.ones(3)).sum() == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """)


@pytest.mark.gpu
def test_cuda_memory_is_shared_and_ordered_on_a_side_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(1 << 20, device="cuda")
        for _ in range(50):
            torch.cuda._sleep(1_000_000)
            tensor += 1
        doubled = interop.to_torch(jax.jit(lambda x: x * 2)(interop.to_jax(tensor)))
        tensor.fill_(-1.0)  # ordered behind the read
        result = doubled.sum().item()
    assert interop.to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    assert result == 100.0 * (1 << 20)


@pytest.mark.gpu
def test_cuda_graph_capture_is_refused():
    tensor = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        interop.to_jax(tensor)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_cuda_second_device():
    tensor = torch.ones(4, device="cuda:1")
    array = interop.to_jax(tensor)
    assert array.devices() == {jax.devices()[1]}
    assert interop.to_torch(array).device == tensor.device
