"""A folder of safetensors as Hugging Face keeps it: one file, or shards and their index."""

import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from gqa_jax.hf.checkpoint.safetensors_file import TensorFile
from gqa_jax.hf.config.fields import read_json, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFFolder(Mapping[str, np.ndarray]):
    """The tensors of a folder (`model.safetensors`, or the shards of its index) as read-only views of its files."""

    def __init__(self, path: str | os.PathLike):
        """Reads the headers.

        Raises:
          ValueError: no safetensors in the folder, a file that is damaged, or an index that does not agree with its
            files. A tensor that is in two files is read from the one that the index names.
        """
        self.path = pathlib.Path(path)
        index = self.path / INDEX
        self._files: dict[str, TensorFile] = {}
        if (self.path / SINGLE).is_file():
            file = TensorFile(self.path / SINGLE)
            self._files = dict.fromkeys(file.tensors, file)
            return
        if not index.is_file():
            pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pth"))
            hint = " (torch's pickles are not read: save them as safetensors)" if pickled else ""
            raise ValueError(
                f"`path` must be a folder that holds {SINGLE} or {INDEX}, got {path}{hint}"
            )
        where = _weight_map(index)
        present: set[str] = set()
        for name in sorted(set(where.values())):
            if not (self.path / name).is_file():
                raise ValueError(f"{index} names {name}, which does not exist")
            file = TensorFile(self.path / name)
            present |= file.tensors.keys()
            self._files |= {tensor: file for tensor in file.tensors if where.get(tensor) == name}
        if unexpected := where.keys() ^ self._files.keys() | present - where.keys():
            raise ValueError(f"{index} and its files disagree about {listed(sorted(unexpected))}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> the file beside the index that holds it."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} must hold a `weight_map` of tensors and files")
    for name in where.values():
        # A name, no path: an index must not reach files outside its folder.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0:]+\.safetensors", name):
            raise ValueError(
                f"{index} must name files of its folder that end in .safetensors, got {short(name)}"
            )
    return where


def listed(names: Iterable[str]) -> str:
    """The first few names, for an error."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
