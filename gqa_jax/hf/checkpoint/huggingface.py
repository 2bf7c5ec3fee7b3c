"""Folders of safetensors as Hugging Face keeps them, to and from our parameters, one parameter at a time."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gqa_jax.config import DecoderConfig
from gqa_jax.hf.checkpoint.companions import copy_companions, inherited_fields
from gqa_jax.hf.checkpoint.folder import INDEX, SINGLE, HFFolder, listed
from gqa_jax.hf.checkpoint.rules import Dialect, Path, Rule, rules
from gqa_jax.hf.checkpoint.safetensors_file import TensorSpec, write_tensors
from gqa_jax.hf.config import to_hf_config

_LANGUAGE_MODEL = "model.language_model."
_FUSED_EXPERTS = "mlp.experts.gate_up_proj"
# What transformers ignores as well: multi-token-prediction heads, vision towers, RoPE tables of early Llamas.
_IGNORED = re.compile(r"^mtp\.|^model\.visual\.|\.rotary_emb\.inv_freq$")


def hf_names(config: DecoderConfig) -> dict[str, tuple[Path, ...]]:
    """The Hugging Face tensors of a decoder, each with the parameters of ours that it goes into.

    Raises:
      ValueError: `config.scan_layers` and layers that do not repeat.
    """
    return {name: rule.paths for rule in rules(config) for name in rule.names}


def import_hf(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, dtype: Any = None
) -> Iterator[tuple[Path, np.ndarray]]:
    """Our parameters, one at a time, from Hugging Face tensors (an `HFFolder`, or a state dict of numpy arrays).

    Names and shapes are compared on the call, tensors are read as the parameters are taken.

    Args:
      config: of the decoder.
      tensors: by Hugging Face name; looked up only when their parameter is next.
      dtype: cast to it; None keeps that of the tensors. Decay parameters of Gated DeltaNet become float32 in any case.

    Raises:
      ValueError: missing or unexpected names, the first of them; wrong shapes and dtypes; tensors of one parameter
        that differ in dtype.

    Example:
      >>> tree = dict(import_hf(config, HFFolder("Qwen3-0.6B")))  # doctest: +SKIP
    """
    return _imported(_checked_rules(config, tensors), tensors, dtype)


def _imported(
    table: list[Rule], tensors: Mapping[str, np.ndarray], dtype: Any
) -> Iterator[tuple[Path, np.ndarray]]:
    for rule in table:
        parts = [tensors[name] for name in rule.names]
        target_dtype = np.dtype(np.float32) if rule.float32 else dtype
        dtypes = {part.dtype for part in parts}
        if target_dtype is None and len(dtypes) > 1:
            raise ValueError(
                f"{listed(rule.names)} make one parameter and must share one dtype, or `dtype` must be given, "
                f"got {listed(sorted(map(str, dtypes)))}"
            )
        if target_dtype is not None:
            parts = [part.astype(target_dtype, copy=False) for part in parts]
        yield from zip(rule.paths, rule.fuse(parts), strict=True)


def _checked_rules(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> list[Rule]:
    """The rules of a decoder, once names, shapes and dtypes of `tensors` fit them."""
    dialect = _dialect(tensors)
    _check_counts(config, tensors, dialect)
    table = rules(config, dialect)
    _check_names(config, table, tensors)
    for rule in table:
        for name, expected in zip(rule.names, rule.hf_shapes, strict=True):
            shape = tensors.shape(name) if isinstance(tensors, HFFolder) else tensors[name].shape
            if tuple(shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(shape)}")
            if isinstance(tensors, HFFolder):
                tensors.dtype(name)  # must be one that we read
    return table


def _check_counts(
    config: DecoderConfig, tensors: Mapping[str, np.ndarray], dialect: Dialect
) -> None:
    """Refuses a config of far more layers or experts than there are, whose very list of names would take minutes."""
    prefix = f"{dialect.prefix}layers."
    held = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    if held != {str(i) for i in range(len(config.layers))}:
        layers = listed(sorted(held, key=lambda i: (len(i), i))) or "none"
        raise ValueError(
            f"`config` has {len(config.layers)} layers, the checkpoint holds tensors of {len(held)}: {layers}"
        )
    if config.moe is not None and not dialect.fused_experts:
        experts = config.moe.num_experts * sum(map(config.is_moe, range(len(config.layers))))
        if experts > len(tensors):
            raise ValueError(
                f"`config` has {config.moe.num_experts} experts per layer, the checkpoint only {len(tensors)} tensors"
            )


def export_hf(
    config: DecoderConfig, parameters: Mapping[Path, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face tensors, one at a time, from our parameters: for saving, or for streaming weights to a server.

    Args:
      config: of the decoder.
      parameters: by path, as `import_hf` yields them; numpy or jax arrays, sharded ones too. Where these span
        processes, all processes iterate together.

    Raises:
      ValueError: paths that are missing or unexpected, the first of them, or shapes that do not fit.

    Example:
      >>> names = [name for name, _ in export_hf(config, tree)]  # doctest: +SKIP
    """
    table = rules(config)
    _check_parameters(table, parameters)
    for rule in table:
        tensors = rule.split([_whole(parameters[path]) for path in rule.paths])
        yield from zip(rule.names, tensors, strict=True)


def read_hf(
    path: str | os.PathLike,
    config: DecoderConfig | None = None,
    *,
    dtype: Any = None,
    shardings: Callable[[Path], jax.sharding.Sharding | None] | None = None,
) -> dict[Path, jax.Array]:
    """The parameters of a Hugging Face folder on device, each placed before the next is read.

    Args:
      path: the folder.
      config: None reads its `config.json`.
      dtype: of the parameters; None keeps that of the file.
      shardings: path -> sharding of that parameter; every device gets only its slice. None for the default device.

    Raises:
      ValueError: as `DecoderConfig.from_hf` and `import_hf`; float64 tensors while 64-bit types are disabled.

    Example:
      >>> read_hf("Qwen3-0.6B")[("embed", "embedding")].shape  # doctest: +SKIP
      (151936, 1024)
    """
    config = DecoderConfig.from_hf(path) if config is None else config
    return placed(import_hf(config, HFFolder(path), dtype=dtype), shardings)


def placed(
    parameters: Iterator[tuple[Path, np.ndarray]],
    shardings: Callable[[Path], jax.sharding.Sharding | None] | None = None,
) -> dict[Path, jax.Array]:
    """Parameters on device, each placed before the next is read.

    Raises:
      ValueError: float64 while 64-bit types are disabled.
    """
    tree = {}
    for leaf, array in parameters:
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(
                f"`dtype` must be given: {leaf} is {array.dtype} and 64-bit types are disabled"
            )
        tree[leaf] = _place(array, None if shardings is None else shardings(leaf))
    return tree


def write_hf(
    config: DecoderConfig,
    parameters: Mapping[Path, Any],
    path: str | os.PathLike,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
    source: str | os.PathLike | None = None,
) -> None:
    """Writes a folder that transformers loads: `config.json` and safetensors, sharded with an index if large.

    Files appear under their names when all are complete. Where parameters span processes, all processes call this,
    process 0 writes, and the call returns in none before that is done.

    Args:
      config: of the decoder; its `family` names the `model_type`.
      parameters: by path, as `read_hf` returns them; saved in their dtype.
      path: the folder; created if missing.
      max_shard_bytes: start another file rather than exceed this (a larger tensor gets a file of its own).
      extra_config: fields for `config.json` that do not concern the decoder, such as token ids.
      source: a Hugging Face folder from which to take what does not concern the decoder: tokenizer, chat template,
        `generation_config.json` and fields of `config.json`; those of `extra_config` win. None takes nothing.

    Raises:
      ValueError: a config that its family cannot express, parameters that do not fit it, safetensors files in the
        folder that would mix with the new ones, or a `source` without `config.json`.

    Example:
      >>> write_hf(config, tree, "out")  # doctest: +SKIP
    """
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be positive, got {max_shard_bytes}")
    table = rules(config)
    _check_parameters(table, parameters)
    stored = np.dtype(parameters[("embed", "embedding")].dtype).name
    inherited = {} if source is None else inherited_fields(source, config)
    extra = {"dtype": stored} | inherited | dict(extra_config or {})
    described = to_hf_config(config, extra=extra)
    shards = _shards(_specs(table, parameters), max_shard_bytes)
    if not all(map(_is_here, parameters.values())):
        if jax.process_index() == 0:
            _write(config, parameters, pathlib.Path(path), shards, described, source)
        else:
            for _ in export_hf(config, parameters):  # gathers along with process 0
                pass
        multihost_utils.sync_global_devices("gqa_jax.hf.checkpoint.write_hf")
    else:
        _write(config, parameters, pathlib.Path(path), shards, described, source)


def _write(
    config: DecoderConfig,
    parameters: Mapping[Path, Any],
    folder: pathlib.Path,
    shards: list[list[TensorSpec]],
    described: Mapping[str, Any],
    source: str | os.PathLike | None,
) -> None:
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    unexpected = {p.name for p in folder.glob("*.safetensors")} - set(files)
    if unexpected:
        raise ValueError(
            f"`path` must not hold other safetensors files, got {listed(sorted(unexpected))}"
        )
    tensors = (array for _, array in export_hf(config, parameters))
    for name, specs in zip(files, shards, strict=True):
        with open(folder / f"{name}.partial", "wb") as file:
            arrays = (next(tensors) for _ in specs)
            write_tensors(file, specs, arrays, metadata={"format": "pt"})
    for name in files:
        os.replace(folder / f"{name}.partial", folder / name)
    if len(files) > 1:
        where = {s.name: name for name, specs in zip(files, shards, strict=True) for s in specs}
        total = sum(spec.num_bytes for specs in shards for spec in specs)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    elif (folder / INDEX).exists():
        (folder / INDEX).unlink()
    _write_json(folder / "config.json", described)
    if source is not None:
        copy_companions(source, folder)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _dialect(names: Mapping[str, Any]) -> Dialect:
    nested = any(name.startswith(_LANGUAGE_MODEL) for name in names)
    fused = any(name.endswith(_FUSED_EXPERTS) for name in names)
    return Dialect(_LANGUAGE_MODEL if nested else "model.", fused)


def _check_names(
    config: DecoderConfig, table: list[Rule], tensors: Mapping[str, np.ndarray]
) -> None:
    expected = {name for rule in table for name in rule.names}
    present = {name for name in tensors if not _IGNORED.search(name)}
    head, embedding = "lm_head.weight", table[0].names[0]
    if config.tie_embeddings and head in present and embedding in present:
        if not np.array_equal(_bits(tensors[head]), _bits(tensors[embedding])):
            raise ValueError(
                f"{head} must equal {embedding} because `config.tie_word_embeddings` is true"
            )
        present.remove(head)
    if missing := sorted(expected - present):
        raise ValueError(f"the checkpoint misses {len(missing)} tensors: {listed(missing)}")
    if unexpected := sorted(present - expected):
        raise ValueError(
            f"the checkpoint holds {len(unexpected)} unexpected tensors: {listed(unexpected)}"
        )


def _check_parameters(table: list[Rule], parameters: Mapping[Path, Any]) -> None:
    shapes = {
        path: shape for rule in table for path, shape in zip(rule.paths, rule.shapes, strict=True)
    }
    if missing := sorted(".".join(map(str, path)) for path in shapes.keys() - parameters.keys()):
        raise ValueError(f"`parameters` misses {len(missing)} paths: {listed(missing)}")
    if unexpected := sorted(".".join(map(str, p)) for p in parameters.keys() - shapes.keys()):
        raise ValueError(
            f"`parameters` holds {len(unexpected)} unexpected paths: {listed(unexpected)}"
        )
    for path, shape in shapes.items():
        if tuple(parameters[path].shape) != shape:
            raise ValueError(
                f"{'.'.join(map(str, path))} must have shape {shape}, got {tuple(parameters[path].shape)}"
            )
    for rule in table:
        dtypes = {str(parameters[path].dtype) for path in rule.paths}
        if len(dtypes) > 1:
            named = listed([".".join(map(str, path)) for path in rule.paths])
            raise ValueError(f"{named} must share one dtype, got {listed(sorted(dtypes))}")


def _specs(table: list[Rule], parameters: Mapping[Path, Any]) -> Iterator[TensorSpec]:
    for rule in table:
        dtype = np.dtype(parameters[rule.paths[0]].dtype)
        for name, shape in zip(rule.names, rule.hf_shapes, strict=True):
            yield TensorSpec(name, shape, dtype)


def _shards(specs: Iterator[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    return shards


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    # Copies: on CPU jax adopts numpy's memory, and an array must not depend on a file that may be written again.
    if sharding is None:
        return jnp.asarray(np.array(array, order="C"))
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index], order="C")
    )


def _is_here(array: Any) -> bool:
    """Whether this process can read all of it."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable or array.is_fully_replicated


def _whole(array: Any) -> np.ndarray:
    return np.asarray(
        array if _is_here(array) else multihost_utils.process_allgather(array, tiled=True)
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
