"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes.

The library checks a file (offsets that overlap, sizes, types, truncation); its tensors are then views of the mapped
file, and writing takes one tensor at a time, so that neither direction holds more than the tensor at hand, bfloat16
stays bfloat16 without torch, and fp8 tensors are named.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """A header entry; `start` and `stop` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """One mapped safetensors file.

    Attributes:
      path: of the file.
      tensors: name -> `TensorInfo`.
      metadata: the header's `__metadata__`.
    """

    def __init__(self, path: str | os.PathLike):
        """Checks the file and reads its header.

        Raises:
          ValueError: not a safetensors file, or one that is truncated or damaged.
        """
        self.path = pathlib.Path(path)
        try:
            with safe_open(self.path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is damaged, or not a safetensors file: {error}"
            ) from error
        everything = np.memmap(self.path, np.uint8, mode="r")
        end = 8 + struct.unpack("<Q", everything[:8].tobytes())[0]
        header = json.loads(everything[8:end].tobytes())
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._data = everything[end:]
        self.tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of a tensor.

        Raises:
          ValueError: a dtype that holds no model weights that we can read; fp8 among them.
        """
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            hint = (
                ": dequantize the checkpoint first" if stored.startswith(("F8", "F4", "F6")) else ""
            )
            raise ValueError(
                f"{name} in {self.path} must be one of {', '.join(_DTYPES)}, got {stored}{hint}"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        info = self.tensors[name]
        dtype = self.dtype(name)
        flat = self._data[info.start : info.stop]
        if info.start % dtype.itemsize:
            flat = np.array(flat)  # numpy views need alignment, the format does not promise it
        return np.asarray(flat.view(dtype).reshape(info.shape))


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: BinaryIO,
    specs: Iterable[TensorSpec],
    arrays: Iterable[Any],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Writes `specs` as the header, then each of `arrays`, which come in the same order, as it arrives.

    Raises:
      ValueError: a dtype that the format does not have, or an array that is not what its spec says.
    """
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        if spec.dtype not in _NAMES:
            known = ", ".join(map(str, _NAMES))
            raise ValueError(f"{spec.name} must have one of the dtypes {known}, got {spec.dtype}")
        stop = start + spec.num_bytes
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned when mapped
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for spec, array in zip(specs, arrays, strict=True):
        array = np.ascontiguousarray(array)
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise ValueError(
                f"{spec.name} must be {spec.dtype} {spec.shape}, got {array.dtype} {array.shape}"
            )
        file.write(array.reshape(-1).view(np.uint8).data)
