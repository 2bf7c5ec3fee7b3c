"""A `Decoder` from a Hugging Face folder and back."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from gqa_jax.checkpoint.huggingface import read_hf, write_hf
from gqa_jax.checkpoint.rules import Path
from gqa_jax.config import DecoderConfig
from gqa_jax.decoder import Decoder

Shardings = Callable[[Path], jax.sharding.Sharding | None]


def load_hf(
    path: str | os.PathLike,
    *,
    config: DecoderConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    shardings: Shardings | None = None,
) -> Decoder:
    """Loads Llama, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next and Qwen3.5 (dense and mixture, text) checkpoints.

    One parameter at a time goes from the mapped file to its devices, so the host never holds a copy of the model.

    Args:
      path: folder with `config.json` and safetensors, single or sharded.
      config: None reads `config.json`; given, for example with `scan_layers=True`, it must describe the same model.
      mesh: parameters are replicated over it where `shardings` says nothing.
      dtype: of the parameters, and so of the computation; None keeps that of the checkpoint. Decay parameters of Gated
        DeltaNet are float32 in any case.
      shardings: path -> sharding of that parameter, or None.

    Raises:
      ValueError: naming a config field or value, tensors that are missing, unexpected, of the wrong shape or fp8.

    Example:
      >>> decoder = load_hf("Qwen3-0.6B", dtype=jnp.bfloat16)  # doctest: +SKIP
      >>> decoder(tokens).shape  # doctest: +SKIP
      (1, 12, 151936)
    """
    config = DecoderConfig.from_hf(path) if config is None else config
    replicated = None if mesh is None else jax.NamedSharding(mesh, jax.P())

    def place(leaf: Path) -> jax.sharding.Sharding | None:
        chosen = None if shardings is None else shardings(leaf)
        return replicated if chosen is None else chosen

    arrays = read_hf(path, config, dtype=dtype, shardings=place)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    if strangers := flat.keys() ^ arrays.keys():
        raise ValueError(
            f"Decoder and checkpoint rules disagree about {sorted(map(str, strangers))}"
        )
    filled = {leaf: variable.replace(arrays[leaf]) for leaf, variable in flat.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save_hf(
    decoder: Decoder,
    path: str | os.PathLike,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Saves a decoder as a folder that transformers loads; `decoder.config.family` names the `model_type`.

    Args:
      decoder: its parameters are saved in their dtype, whatever their sharding, one at a time.
      path: the folder; created if missing.
      max_shard_bytes: start another file rather than exceed this.
      extra_config: fields for `config.json` that do not concern the decoder, such as token ids.

    Raises:
      ValueError: a config that its family cannot express, or safetensors files in the folder that would mix.

    Example:
      >>> save_hf(decoder, "out", extra_config={"eos_token_id": 0})  # doctest: +SKIP
    """
    write_hf(
        decoder.config,
        parameters(decoder),
        path,
        max_shard_bytes=max_shard_bytes,
        extra_config=extra_config,
    )


def parameters(decoder: nnx.Module) -> dict[Path, jax.Array]:
    """The parameters of a module by path, as `read_hf` returns and `write_hf` takes them."""
    state = nnx.state(decoder, nnx.Param)
    return {path: variable[...] for path, variable in nnx.to_flat_state(state)}
