"""Training checkpoints: a thin layer over Orbax's `CheckpointManager`, so that a run resumes bit for bit.

What a run must keep is one pytree of arrays (`training.TrainState`, or any other that holds parameters, optimizer
state, step and random keys) and the position of its data as JSON. Orbax stores the arrays sharded, asynchronously and
atomically; added here are typed random keys, and a manifest that refuses a state that is not the saved one by name.
The manifest also holds a checksum of every array's bits, computed on the devices that hold it and independent of
how it is split; what is read is checked against it on whatever mesh it is read to.
"""

import contextlib
import json
import numbers
import os
import pathlib
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gqa_jax.train.replica_check import hash_bits

# One program per shape, dtype and layout, however many arrays have them.
_hash = jax.jit(hash_bits)


class Restored(NamedTuple):
    """What `TrainCheckpoints.restore` found.

    Attributes:
      state: arrays of the saved bits, in the structure and shardings of `like`.
      step: under which they were saved.
      data: position of the data.
    """

    state: Any
    step: int
    data: Any


class TrainCheckpoints:
    """The checkpoints of one run, in one folder.

    Example:
      >>> with TrainCheckpoints("run") as checkpoints:  # doctest: +SKIP
      ...     if checkpoints.latest_step is not None:
      ...         state, step, data = checkpoints.restore((state, key))
      ...     checkpoints.save(step, (state, key), data={"epoch": 1, "index": 4096})
    """

    def __init__(
        self, folder: str | os.PathLike, *, max_to_keep: int | None = 3, save_every: int = 1
    ):
        """Opens the folder, creating it if missing.

        Args:
          folder: of the run.
          max_to_keep: older checkpoints are deleted; None keeps all.
          save_every: `save` does nothing at steps that are not multiples of this.

        Raises:
          ValueError: counts that are not positive.
        """
        for name, count in (("max_to_keep", max_to_keep), ("save_every", save_every)):
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be positive, got {count}")
        self._save_every, self._saving = save_every, None
        self._folder, self._max_to_keep = pathlib.Path(folder).absolute(), max_to_keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._max_to_keep)
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, *, data: Any = None, force: bool = False) -> bool:
        """Starts saving; the state may be donated to the next update, and the data changed, at once.

        Args:
          step: updates done, larger than that of the last checkpoint.
          state: a pytree of jax arrays, typed random keys among them.
          data: position of the data: dicts with str keys, lists or tuples (which come back as lists), str, bool, None
            and numbers, NumPy's among them (which come back as Python's).
          force: save whatever `save_every` says.

        Returns:
          Whether it saves. That it is on disk is only certain after `wait`, `close` or the next `save`, which raise if
          it is not.

        Raises:
          TypeError: a leaf that is not a jax array, or a step that is not an integer.
          ValueError: a step that is not larger than the last, or data that JSON cannot hold.
          RuntimeError: the save before this one failed.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()  # returns at once, or raises
        if not isinstance(step, numbers.Integral) or isinstance(step, bool):
            raise TypeError(f"`step` must be an integer, got {step!r}")
        step, latest = int(step), self.latest_step
        if step < 0:
            raise ValueError(f"`step` must not be negative, got {step}")
        if latest is not None and step <= latest:
            raise ValueError(f"`step` must be larger than the last one saved, {latest}, got {step}")
        if step % self._save_every and not force:
            return False
        leaves = _named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"`state`.{name} must be a jax array, got {type(leaf).__name__}")
        about = {"manifest": _manifest(leaves), "data": _as_json(data, "data")}
        about["checksums"] = _checksums(leaves)
        about["crc32"] = _crc32(about)
        arrays = {n: jax.random.key_data(a) if _is_key(a) else a for n, a in leaves.items()}
        self.wait()
        self._saving = step
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
            ),
            force=True,  # Orbax's own rule would also save the first step that it sees
        )

    def restore(self, like: Any, *, step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
          like: a state of the same structure, such as a fresh one: arrays, or `jax.ShapeDtypeStruct` with sharding.
            Every device reads only its slice.
          step: None for the latest.

        Raises:
          FileNotFoundError: no checkpoint, or none of that step.
          ValueError: `like` has other leaves, shapes, dtypes or kinds of random keys than the saved state, all named;
            or the checkpoint is damaged: files missing or cut, bits other than those saved.
          RuntimeError: the last `save` failed.

        Warns:
          UserWarning: the checkpoint was written before there were checksums, so its bits cannot be checked.
        """
        self.wait()
        found = self.latest_step if step is None else step
        if found is None or found not in self.steps:
            wanted = "any" if step is None else step
            raise FileNotFoundError(
                f"no checkpoint of step {wanted} in {self._folder}, there are {self.steps}"
            )
        about = self._restore(found, "about", ocp.args.JsonRestore())
        if not isinstance(about, dict) or not {"manifest", "data"} <= about.keys():
            raise self._damaged(found, "about", "it lacks the manifest")
        if about.keys() == {"manifest", "data"}:
            warnings.warn(f"checkpoint of step {found} has no checksums to check", stacklevel=2)
        elif about.get("crc32") != _crc32(about):
            raise self._damaged(found, "about", "its bits are not those saved")
        leaves, treedef = _named_leaves(like), jax.tree.structure(like)
        _check_manifest(_manifest(leaves), about["manifest"])
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        arrays = self._restore(found, "state", ocp.args.StandardRestore(abstract))
        wanted = about.get("checksums", {})
        wrong = [
            name for name, value in _checksums(arrays).items() if value != wanted.get(name, value)
        ]
        if wrong:
            raise self._damaged(
                found, "state", f"the bits of {', '.join(wrong[:20])} are not those saved"
            )
        restored = [
            jax.random.wrap_key_data(arrays[name], impl=leaf.dtype)
            if _is_key(leaf)
            else arrays[name]
            for name, leaf in leaves.items()
        ]
        return Restored(jax.tree.unflatten(treedef, restored), found, about["data"])

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order; the last may still be on its way to disk."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The last of `steps`, or None."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when what `save` started is on disk.

        Raises:
          RuntimeError: it could not be written. `steps` does not list it then.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            with contextlib.suppress(Exception):  # the same failure, from another of its threads
                self._manager.close()
            self._manager = self._open()
            raise RuntimeError(
                f"checkpoint of step {self._saving} was not saved: {error}"
            ) from error

    def close(self) -> None:
        """Waits, and releases Orbax's threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _restore(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # of Orbax, TensorStore, json: KeyError, ValueError, OSError and others
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._damaged(step, item, first[:200]) from error

    def _damaged(self, step: int, item: str, why: str) -> ValueError:
        others = [other for other in self.steps if other != step]
        return ValueError(
            f"checkpoint of step {step} in {self._folder} must be whole, but its item {item!r} cannot be "
            f"read: {why}; the other steps are {others}"
        )


def _named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by path; the names are what the checkpoint stores, so it does not depend on container classes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("`state` has leaves whose paths read the same")
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _manifest(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _check_manifest(wanted: Mapping[str, str], saved: Mapping[str, str]) -> None:
    problems = [f"missing {name}" for name in sorted(wanted.keys() - saved.keys())]
    problems += [f"unexpected {name}" for name in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"{name} is {saved[name]}, not {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if problems:
        shown = ", ".join(problems[:20])
        raise ValueError(f"`like` must have the leaves of the checkpoint, which has: {shown}")


def _checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Of every array's bits, as hexadecimal digits.

    One array after the other: where programs with collectives run at once, processes may start them in another order,
    and wait for each other for ever.
    """
    read = lambda x: np.asarray(x.addressable_data(0))  # the same on all devices, of all processes
    return {
        name: "{:08x}{:08x}".format(*read(_hash(array)).tolist()) for name, array in arrays.items()
    }


def _crc32(about: Mapping[str, Any]) -> int:
    kept = {name: value for name, value in about.items() if name != "crc32"}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def _as_json(value: Any, where: str) -> Any:
    """A copy that JSON holds and that comes back equal, but for tuples.

    Raises:
      ValueError: there is none; the message says where.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"`{where}` must have str as keys, got {key!r}")
        return {key: _as_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise ValueError(
        f"`{where}` must be what JSON holds (dict, list, str, number, bool, None), got {type(value).__name__}: "
        "arrays belong into `state`"
    )
