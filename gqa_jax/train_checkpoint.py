"""Training checkpoints: a thin layer over Orbax's `CheckpointManager`, so that a run resumes bit for bit.

What a run must keep is one pytree of arrays (`training.TrainState`, or any other that holds parameters, optimizer
state, step and random keys) and the position of its data as JSON. Orbax stores the arrays sharded, asynchronously and
atomically; added here are typed random keys, and a manifest that refuses a state that is not the saved one by name.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


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
        self._save_every = save_every
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options)

    def save(self, step: int, state: Any, *, data: Any = None, force: bool = False) -> bool:
        """Starts saving; the state may be donated to the next update at once.

        Args:
          step: updates done, larger than that of the last checkpoint.
          state: a pytree of jax arrays, typed random keys among them.
          data: position of the data, anything that JSON holds.
          force: save whatever `save_every` says.

        Returns:
          Whether it saves.

        Raises:
          TypeError: a leaf that is not a jax array.
          ValueError: a step that is not larger than the last.
        """
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise ValueError(f"`step` must be larger than the last one saved, {latest}, got {step}")
        if step % self._save_every and not force:
            return False
        leaves = _named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"`state`.{name} must be a jax array, got {type(leaf).__name__}")
        arrays = {n: jax.random.key_data(a) if _is_key(a) else a for n, a in leaves.items()}
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays),
                about=ocp.args.JsonSave({"manifest": _manifest(leaves), "data": data}),
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
          ValueError: `like` has other leaves, shapes, dtypes or kinds of random keys than the saved state, all named.
        """
        self.wait()
        found = self.latest_step if step is None else step
        if found is None or found not in self.steps:
            wanted = "any" if step is None else step
            raise FileNotFoundError(
                f"no checkpoint of step {wanted} in {self._manager.directory}, there are {self.steps}"
            )
        about = self._restore(found, about=ocp.args.JsonRestore())["about"]
        leaves, treedef = _named_leaves(like), jax.tree.structure(like)
        _check_manifest(_manifest(leaves), about["manifest"])
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        arrays = self._restore(found, state=ocp.args.StandardRestore(abstract))["state"]
        restored = [
            jax.random.wrap_key_data(arrays[name], impl=leaf.dtype)
            if _is_key(leaf)
            else arrays[name]
            for name, leaf in leaves.items()
        ]
        return Restored(jax.tree.unflatten(treedef, restored), found, about["data"])

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The last step saved, or None."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when what `save` started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases Orbax's threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))


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
