"""Real text that every machine with Python has: the source of its standard library, as bytes."""

import codecs
import math
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa_jax.models.decoder import Decoder
from gqa_jax.train.step import next_token_loss

VOCAB_SIZE = 256
# Generated tables, vendored packages and tests are either no prose of code or not installed everywhere.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"}
HELD_OUT_SHARE = 16  # one file in so many


class ByteText(NamedTuple):
    """Source files joined by a zero byte, split by file.

    Attributes:
      train, held_out: `[n]` uint8.
      num_train_files, num_held_out_files: how many files each holds.
    """

    train: np.ndarray
    held_out: np.ndarray
    num_train_files: int
    num_held_out_files: int


def standard_library() -> ByteText:
    """The interpreter's own library. A file's path alone decides on which side of the split it falls.

    Raises:
      FileNotFoundError: this Python comes without source files.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not SKIPPED & set(name.split("/"))]
    held_out = [name for name in names if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0]
    train = sorted(set(names) - set(held_out))
    if not train or not held_out:
        raise FileNotFoundError(f"no Python sources under {root}")

    def join(names: list[str]) -> np.ndarray:
        return np.frombuffer(b"\0".join((root / name).read_bytes() for name in names), np.uint8)

    return ByteText(join(train), join(held_out), len(train), len(held_out))


def random_windows(
    data: np.ndarray, rng: np.random.Generator, *, batch_size: int, length: int
) -> np.ndarray:
    """`[batch_size, length]` int32 windows of `data` at random places.

    Raises:
      ValueError: `data` is shorter than a window.
    """
    if len(data) < length:
        raise ValueError(f"`data` must hold at least length={length} bytes, got {len(data)}")
    starts = rng.integers(0, len(data) - length + 1, batch_size)
    return data[starts[:, None] + np.arange(length)].astype(np.int32)


def as_text(tokens: Iterable[int]) -> Iterator[str]:
    """UTF-8 text as its bytes arrive; what is no UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(bytes([token]))
    yield decoder.decode(b"", final=True)


def zlib_bits_per_byte(data: np.ndarray) -> float:
    """Size of `data` after zlib at level 9, in bits per byte of `data`."""
    return 8.0 * len(zlib.compress(data.tobytes(), 9)) / len(data)


def model_bits_per_byte(
    decoder: Decoder, data: np.ndarray, *, length: int = 256, batch_size: int = 32
) -> float:
    """Mean code length of `data[1:]` under the model, in bits per byte.

    Every byte is predicted once, from at least one and at most `length` bytes before it: windows do not share
    context, which favours no one but the competitor.

    Args:
      decoder: with a vocabulary of bytes.
      data: `[n]` uint8, n >= 2.
      length: of a window.
      batch_size: windows at a time.

    Raises:
      ValueError: too little data.
    """
    if len(data) < 2:
        raise ValueError(f"`data` must hold at least 2 bytes, got {len(data)}")
    graphdef, params = nnx.split(decoder)

    @jax.jit
    def total_nats(params, window, targets, real):
        logits = nnx.merge(graphdef, params)(window)
        return next_token_loss(logits, targets, real=real) * real.sum().astype(jnp.float32)

    predicted = len(data) - 1
    num_rows = math.ceil(predicted / (length * batch_size)) * batch_size
    padded = np.zeros(num_rows * length + 1, np.int32)
    padded[: len(data)] = data
    window = padded[:-1].reshape(-1, batch_size, length)
    targets = padded[1:].reshape(-1, batch_size, length)
    real = (np.arange(num_rows * length) < predicted).reshape(-1, batch_size, length)
    nats = sum(float(total_nats(params, *rows)) for rows in zip(window, targets, real, strict=True))
    return nats / predicted / math.log(2.0)
