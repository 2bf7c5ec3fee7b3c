"""Files and fields beside the weights of a Hugging Face folder (tokenizer ...): copied, so that a copy works."""

import json
import os
import pathlib
import shutil
from typing import Any

from gqa_jax.config import DecoderConfig
from gqa_jax.hf.config import from_hf, to_hf_config
from gqa_jax.hf.config.fields import is_inert, read_json
from gqa_jax.hf.config.read import GENERATION, config_file, text_config

_PATTERNS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    GENERATION,
)
# They describe the file itself, or parts of the model that are not copied.
_NOT_INHERITED = ("dtype", "torch_dtype", "eos_token_id", "pad_token_id", "language_model_only")
_NOT_INHERITED_PREFIXES = ("_", "mtp_", "image_", "video_", "vision_", "transformers_")


def inherited_fields(source: str | os.PathLike, config: DecoderConfig) -> dict[str, Any]:
    """The fields of a folder's `config.json` that no decoder reads and that `config` does not write itself.

    Raises:
      ValueError: no `config.json`, or one that is not JSON.
    """
    own = to_hf_config(config)
    values = text_config(read_json(config_file(source)))
    return {
        name: value
        for name, value in values.items()
        if is_inert(name, True)  # by its name, whatever its value
        and name not in own
        and name not in _NOT_INHERITED
        and not name.startswith(_NOT_INHERITED_PREFIXES)
    }


def copy_companions(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Copies tokenizer, chat template and generation config to a folder that has its `config.json`.

    Stop and padding tokens of the generation config become those of that `config.json`.
    """
    source, path = pathlib.Path(source), pathlib.Path(path)
    if source.resolve() != path.resolve():
        for file in (file for pattern in _PATTERNS for file in source.glob(pattern)):
            if file.is_file():
                target = path / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    generation, values = path / GENERATION, read_json(path / "config.json")
    wanted, read = from_hf(values), from_hf(path)
    if (wanted.stop_tokens, wanted.pad_token) != (read.stop_tokens, read.pad_token):
        ids = {name: values.get(name) for name in ("eos_token_id", "pad_token_id")}
        generation.write_text(json.dumps(read_json(generation) | ids, indent=2) + "\n")
