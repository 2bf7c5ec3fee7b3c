"""A `Decoder` from a Hugging Face folder and back."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

from gqa_jax.config import DecoderConfig
from gqa_jax.hf.checkpoint.folder import HFFolder
from gqa_jax.hf.checkpoint.huggingface import import_hf, placed, write_hf
from gqa_jax.hf.checkpoint.rules import Path
from gqa_jax.models.decoder import Decoder
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes, sharding_of_path

Shardings = Callable[[Path], jax.sharding.Sharding | None]


def load_hf(
    path: str | os.PathLike,
    *,
    config: DecoderConfig | None = None,
    ignore: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
    axes: MeshAxes | None = None,
    context_parallel: ContextParallel | None = None,
    dtype: Any = None,
    shardings: Shardings | None = None,
) -> Decoder:
    """Loads Llama, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next and Qwen3.5 (dense and mixture, text) checkpoints.

    One parameter at a time goes from the mapped file to its devices, so the host never holds a copy of the model, and
    a device never more than its shards. With a mesh over many processes all of them call this and see the folder.
    The decoder's config remembers the folder (`source`), and the tokens at which `generate` stops.

    Args:
      path: folder with `config.json` and safetensors, single or sharded.
      config: None reads `config.json`; given, for example with `scan_layers=True`, it must describe the same model.
      ignore: fields of `config.json` to read as if they were absent, see `DecoderConfig.from_hf`.
      mesh: where the parameters go; the files are the same for every mesh.
      axes, context_parallel: of the decoder; parameters are split over the mesh as `gqa_jax.sharding` says. Without
        `axes` they are replicated where `shardings` says nothing.
      dtype: of the parameters, and so of the computation; None keeps that of the checkpoint. Decay parameters of Gated
        DeltaNet are float32 in any case.
      shardings: path -> sharding of that parameter, before those of `axes`, or None.

    Raises:
      ValueError: `axes` without `mesh`, or that do not fit it; naming a config field or value, tensors that are
        missing, unexpected, of the wrong shape or fp8.

    Example:
      >>> decoder = load_hf("Qwen3-0.6B", dtype=jnp.bfloat16)  # doctest: +SKIP
      >>> decoder(tokens).shape  # doctest: +SKIP
      (1, 12, 151936)
    """
    if config is not None and ignore:
        raise ValueError(f"`ignore` must be empty when `config` is given, got {ignore}")
    if config is None:
        config = DecoderConfig.from_hf(path, ignore=ignore)
    config = dataclasses.replace(config, source=os.fspath(path))
    pairs = import_hf(
        config, HFFolder(path), dtype=dtype
    )  # names compared before anything is built
    if axes is not None and mesh is None:
        raise ValueError(f"`mesh` must be given with `axes={axes}`, got None")
    make = functools.partial(Decoder, config, axes=axes, context_parallel=context_parallel)
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), keep_rngs=False))
    graphdef, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    shapes: dict[Path, tuple[int, ...]] = {leaf: value.shape for leaf, value in flat.items()}
    by_rule = sharding_of_path(mesh, axes) if axes is not None else None

    def place(leaf: Path) -> jax.sharding.Sharding | None:
        chosen = None if shardings is None else shardings(leaf)
        if chosen is not None or mesh is None:
            return chosen
        if by_rule is None:
            return jax.NamedSharding(mesh, jax.P())
        return by_rule(".".join(map(str, leaf)), shapes[leaf])

    arrays = placed(pairs, place)
    if unexpected := flat.keys() ^ arrays.keys():
        raise ValueError(
            f"Decoder and checkpoint rules disagree about {sorted(map(str, unexpected))}"
        )
    filled = {leaf: variable.replace(arrays[leaf]) for leaf, variable in flat.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save_hf(
    decoder: Decoder,
    path: str | os.PathLike,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
    source: str | os.PathLike | None = None,
) -> None:
    """Saves a decoder as a folder that transformers loads; `decoder.config.family` names the `model_type`.

    What is not ours comes from the folder that the decoder was loaded from: tokenizer, chat template,
    `generation_config.json`, and the fields of `config.json` that do not concern the decoder (lengths, token ids).

    Args:
      decoder: its parameters are saved in their dtype, under any sharding, one at a time. Where they span
        processes, all of them call this, and process 0 writes.
      path: the folder; created if missing.
      max_shard_bytes: start another file rather than exceed this.
      extra_config: more fields for `config.json` that do not concern the decoder; they win over those of `source`.
      source: the folder; None means `decoder.config.source`, which `load_hf` sets. Where that is gone by now, a
        warning says so and the decoder is saved without.

    Raises:
      ValueError: a config that its family cannot express, safetensors files in the folder that would mix, or a
        `source` without `config.json`.

    Example:
      >>> save_hf(decoder, "out", extra_config={"eos_token_id": 0})  # doctest: +SKIP
    """
    config = decoder.config
    if source is None and config.source is not None:
        source = config.source
        if not os.path.isdir(source):
            message = (
                f"{source}, which the decoder was loaded from, is gone: {path} gets no tokenizer"
            )
            warnings.warn(message, stacklevel=2)
            source = None
    write_hf(
        config,
        parameters(decoder),
        path,
        max_shard_bytes=max_shard_bytes,
        extra_config=extra_config,
        source=source,
    )


def parameters(decoder: nnx.Module) -> dict[Path, jax.Array]:
    """The parameters of a module by path, as `read_hf` returns and `write_hf` takes them."""
    state = nnx.state(decoder, nnx.Param)
    return {path: variable[...] for path, variable in nnx.to_flat_state(state)}
