"""Tensors to arrays and back through DLPack: zero copy where memory allows, a stated copy elsewhere, else an error.

What JAX cannot read safely never reaches it: see `to_jax`. Ordering on CUDA is by events on the current stream
(both libraries exchange them through DLPack); graph capture is refused because XLA's work cannot be captured.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax.core import Tracer
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from interop import lending
from interop.lending import lend
from pallas_kernels import _dispatch

Wide = Literal["error", "cast"]

_SAME_NAME = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
    "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
_TO_JAX = {getattr(torch, name): jnp.dtype(name) for name in _SAME_NAME}
_TO_TORCH = {jax_dtype: torch_dtype for torch_dtype, jax_dtype in _TO_JAX.items()}
_NARROW = {
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
}
_SIMPLE = {d for d in _TO_JAX if d not in _NARROW and not d.is_complex}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ALIGNMENT = 64  # bytes; XLA's CPU backend copies arrays that start elsewhere
_LOOKS = 100  # at whether a result is there, before waiting for it; measured: docs/MEASURED.md


def dtype_to_jax(dtype: torch.dtype) -> jnp.dtype:
    """The JAX dtype of a torch dtype.

    Raises:
      TypeError: JAX has none (quantised and 4-bit types).
    """
    if dtype not in _TO_JAX:
        raise TypeError(f"`dtype` must have a JAX counterpart, got {dtype}")
    return _TO_JAX[dtype]


def dtype_to_torch(dtype: Any) -> torch.dtype:
    """The torch dtype of a JAX dtype.

    Raises:
      TypeError: torch has none (PRNG keys, 4-bit types).
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jnp.dtype(dtype) not in _TO_TORCH:
        raise TypeError(f"`dtype` must have a torch counterpart, got {dtype}")
    return _TO_TORCH[jnp.dtype(dtype)]


@functools.cache
def device_to_jax(device: torch.device) -> Any:
    """The JAX device that computes on tensors of a torch device; None where there is none ("meta", other makers')."""
    if device.type == "cpu":
        return jax.local_devices(backend="cpu")[0]
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    devices = jax.local_devices(backend="gpu")
    return next((d for d in devices if d.local_hardware_id == index), None)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, JAX computes on the device of the tensors and chooses kernels for it, whatever its default is."""
    return _dispatch.computing_on(device_to_jax(device))


def to_jax(tensor: torch.Tensor, *, wide: Wide = "error", copy: bool | None = None) -> jax.Array:
    """A JAX array with the tensor's values, sharing its memory where possible.

    Memory is shared when the tensor is contiguous and, on the CPU, starts at a multiple of 64 bytes; otherwise torch
    makes a contiguous copy. Strides of axes of size 1 are made canonical, so that `jit` sees one layout. The gradient
    is cut: use `interop.wrap` for functions that torch differentiates. While memory is shared, an in-place change
    of the tensor changes the array, which JAX takes to be immutable.

    Args:
      tensor: dense, strided, on the CPU or a CUDA device.
      wide: 64-bit types while `jax_enable_x64` is off: "error", or "cast" to 32 bits (integers must fit, which is
        checked).
      copy: True always copies, False raises where a copy would be needed, None copies where needed.

    Raises:
      TypeError: not a tensor; a tensor without memory (FakeTensor, meta), of another kind (sparse, nested,
        quantised, DTensor, inside `torch.func`), of a dtype without counterpart, or 64-bit (see `wide`).
      ValueError: `copy=False` and a copy is needed, or an integer that does not fit.
      RuntimeError: in a forked child of a process that had used JAX, or during CUDA graph capture.

    Example:
      >>> import torch, interop
      >>> interop.to_jax(torch.ones(2, 3)).shape
      (2, 3)
    """
    if wide not in ("error", "cast"):
        raise ValueError(f"`wide` must be 'error' or 'cast', got {wide!r}")
    _refuse(tensor)
    original = tensor
    tensor = tensor.detach()
    if tensor.dtype in _NARROW and not jax.config.jax_enable_x64:
        if wide == "error":
            raise TypeError(
                f"`tensor` must not be {tensor.dtype} while jax_enable_x64 is off (JAX would truncate it): cast it to "
                f"{_NARROW[tensor.dtype]}, pass wide='cast', or enable x64"
            )
        tensor = _narrow(tensor)
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    strides = _canonical_strides(tensor.shape)
    if tensor.stride() != strides:
        tensor = tensor.as_strided(tensor.shape, strides)
    if tensor.data_ptr() % _ALIGNMENT and tensor.device.type == "cpu":
        tensor = tensor.clone()
    shared = tensor.data_ptr() == original.data_ptr() and tensor.dtype == original.dtype
    if copy is False and not shared:
        raise ValueError(
            "`copy` must not be False for this tensor: it is not contiguous, not aligned to "
            f"{_ALIGNMENT} bytes, or needs a cast (shape {tuple(original.shape)}, strides {original.stride()}, "
            f"{original.dtype})"
        )
    if copy and shared:
        tensor = tensor.clone()
    with _device_of(tensor):
        return _import(tensor)


def import_plain(tensor: torch.Tensor, wide: Wide) -> jax.Array:
    """`to_jax(tensor, wide=wide)` with one glance at what is nearly always so: dense, aligned, on the CPU."""
    if (
        isinstance(_direct, Direct)
        and type(tensor) in _PLAIN
        and tensor.dtype in _SIMPLE
        and tensor.layout is torch.strided
        and not tensor.is_cuda
        and not tensor.is_meta
        and not tensor.is_nested
        and not is_functorch_wrapped_tensor(tensor)
        and tensor.stride() == _canonical_strides(tensor.shape)
        and not tensor.data_ptr() % _ALIGNMENT
        and not lending.forked
    ):
        return _direct.to_jax(tensor)
    return to_jax(tensor, wide=wide)


def exporter(like: torch.Tensor) -> Callable[[jax.Array], torch.Tensor]:
    """`to_torch` without questions, for results of JAX on the device of `like`."""
    if isinstance(_direct, Direct) and not like.is_cuda:
        return _direct.to_torch
    return torch.from_dlpack


def to_torch(array: jax.Array, *, copy: bool | None = None) -> torch.Tensor:
    """A tensor with the array's values, sharing its memory.

    JAX arrays are immutable and may be shared or constant: do not write to the tensor unless `copy=True`.

    Args:
      array: concrete, on one device that this process can address.
      copy: True gives the tensor its own memory; None and False share.

    Raises:
      TypeError: not a concrete JAX array, or a dtype without counterpart (PRNG keys, 4-bit types).
      ValueError: the array is spread over several devices or processes.
      RuntimeError: its memory was donated or deleted, or see `to_jax` on forks and graph capture.

    Example:
      >>> import jax.numpy as jnp, interop
      >>> interop.to_torch(jnp.arange(3)).tolist()
      [0, 1, 2]
    """
    if isinstance(array, Tracer):
        raise TypeError(
            "`array` must be concrete, got a tracer: leave the traced function before calling torch"
        )
    if not isinstance(array, jax.Array):
        raise TypeError(f"`array` must be a jax.Array, got {type(array).__name__}")
    if array.dtype not in _TO_TORCH:
        hint = ""
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            hint = ": pass jax.random.key_data(key)"
        raise TypeError(f"`array` must have a dtype that torch knows, got {array.dtype}{hint}")
    if array.is_deleted():
        raise RuntimeError("`array` must be alive, but its memory was donated or deleted")
    if len(array.sharding.device_set) > 1 or not array.is_fully_addressable:
        raise ValueError(
            f"`array` must live on one addressable device, got {array.sharding}: gather it first, "
            "for example with jax.device_put(array, jax.devices()[0])"
        )
    lending.refuse_fork()
    if array.platform() == "gpu":
        _refuse_capture()
    tensor = torch.from_dlpack(array)
    return tensor.clone() if copy else tensor


def tree_to_jax(tree: Any, *, wide: Wide = "error", copy: bool | None = None) -> Any:
    """`to_jax` of every leaf of a pytree (dicts, lists, tuples, whatever JAX has registered); None stays None."""
    return jax.tree.map(lambda tensor: to_jax(tensor, wide=wide, copy=copy), tree)


def tree_to_torch(tree: Any, *, copy: bool | None = None) -> Any:
    """`to_torch` of every leaf of a pytree; None stays None."""
    return jax.tree.map(lambda array: to_torch(array, copy=copy), tree)


def _refuse(tensor: Any) -> None:
    """Raises for everything that is not a dense tensor with memory of its own."""
    if type(tensor) not in _PLAIN:
        _refuse_subclass(tensor)
    if is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            "`tensor` must be a plain tensor, got one inside a torch.func transform: wrap the function with "
            "interop.wrap"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"`tensor` must be on the CPU or a CUDA device, got {tensor.device}")
    if tensor.is_nested:
        raise TypeError("`tensor` must be dense, got a nested tensor: use to_padded_tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"`tensor` must be strided, got layout {tensor.layout}: use to_dense")
    if tensor.is_quantized:
        raise TypeError(f"`tensor` must not be quantised, got {tensor.dtype}: use dequantize")
    if tensor.dtype not in _TO_JAX:
        raise TypeError(f"`tensor` must have a dtype that JAX knows, got {tensor.dtype}")
    lending.refuse_fork()
    if tensor.is_cuda:
        _refuse_capture()


def _refuse_subclass(tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`tensor` must be a torch.Tensor, got {type(tensor).__name__}")
    if isinstance(tensor, FakeTensor):
        raise TypeError(
            "`tensor` must have memory, got a FakeTensor (torch.compile or export is tracing): wrap the function "
            "with interop.wrap"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"`tensor` must be a plain tensor, got {type(tensor).__name__}: pass its local or inner tensor"
        )


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "JAX work cannot be captured in a CUDA graph: call it outside torch.cuda.graph, and without "
            "mode='reduce-overhead' around it"
        )


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    target = _NARROW[tensor.dtype]
    if not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel():
        if tensor.dtype == torch.uint64:
            fits = bool((tensor.view(torch.int64) >> 32 == 0).all())
        else:
            limits = torch.iinfo(target)
            low, high = torch.aminmax(tensor)
            fits = bool(low >= limits.min) and bool(high <= limits.max)
        if not fits:
            raise ValueError(f"`tensor` must hold values that fit {target}, got larger ones")
    return tensor.to(target)


@functools.lru_cache(maxsize=4096)
def _canonical_strides(shape: torch.Size) -> tuple[int, ...]:
    """Torch ignores strides of size-1 axes; JAX would take them for another layout and compile again."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _import_public(tensor: torch.Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(lend(tensor))


class Direct(NamedTuple):
    """JAX's own ways in and out without their Python layers, several times faster; tensors and arrays on the CPU."""

    to_jax: Callable[[torch.Tensor], jax.Array]
    to_torch: Callable[[jax.Array], torch.Tensor]


def _nearly_ready(array: Any) -> Any:
    """Looks for some ten microseconds whether small work is done: being woken, which follows, takes longer."""
    for _ in range(_LOOKS):
        if array.is_ready():
            break
    return array


def _find_direct() -> Direct | None:
    """The direct ways are private, so they count as present only if one tensor makes the round trip."""
    try:
        from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

        device = jax.devices("cpu")[0]
        into_jax, out_of_torch = _jax.dlpack_managed_tensor_to_buffer, torch._C._to_dlpack
        into_torch, out_of_jax = torch._C._from_dlpack, _jax.buffer_to_dlpack_managed_tensor
        direct = Direct(
            lambda tensor: into_jax(out_of_torch(lend(tensor)), device, None, None),
            lambda array: into_torch(out_of_jax(_nearly_ready(array), None)),
        )
        probe = torch.arange(32, dtype=torch.float32).reshape(4, 8)
        array = direct.to_jax(probe)
        back = direct.to_torch(array)
        shared = array.unsafe_buffer_pointer() == probe.data_ptr() == back.data_ptr()
        if not (shared and isinstance(array, jax.Array) and torch.equal(back, probe)):
            return None
    except Exception:  # whatever a future JAX raises here, the public entry remains
        return None
    return direct


_UNKNOWN = object()
_direct: Any = _UNKNOWN  # looked for at first use: importing this file must not start a backend


def _import(tensor: torch.Tensor) -> jax.Array:
    global _direct
    if tensor.is_cuda:
        return _import_public(tensor)
    if _direct is _UNKNOWN:
        _direct = _find_direct()
    return _direct.to_jax(tensor) if _direct else _import_public(tensor)
