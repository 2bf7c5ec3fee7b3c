"""The fields of a config: read with a type, known not to matter, or refused by name; and untrusted JSON files."""

import json
import os
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

REQUIRED: Any = object()
MAX_JSON_BYTES = 30_000_000  # indices of a trillion parameters have 15 MB
MAX_INT = 2**31 - 1

# Fields that do not change what the decoder computes. Those of other families and tools are listed when published
# configs have them.
_INERT = frozenset(
    {
        "architectures",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "flash_attn",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "language_model_only",
        "max_position_embeddings",
        "max_sequence_length",
        "model_max_length",
        "neftune_noise_alpha",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "seq_length",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention_2",
        "use_reentrant_checkpointing",
        "vision_config",
        # How to generate, which early configs held as well.
        "begin_suppress_tokens",
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "repetition_penalty",
        "return_dict_in_generate",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
_INERT_PREFIXES = ("_", "mtp_", "transformers.", "transformers_", "unsloth_")
_INERT_SUFFIXES = ("_token_id",)
_KINDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def is_inert(name: str, value: Any) -> bool:
    """Whether a field that no one reads leaves the decoder as it is: by name, or because its value says nothing."""
    named = name in _INERT or name.startswith(_INERT_PREFIXES) or name.endswith(_INERT_SUFFIXES)
    return named or not value


class Fields:
    """A config object whose every field must be taken."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = REQUIRED, *, minimum: int = 1) -> Any:
        """The field, which counts as read; null means the default.

        Args:
          name: of the field.
          kind: int, float (ints too), bool, str, list or dict; a list or an object may also be false.
          default: if the field is absent; without one it must be there.
          minimum: of an int.

        Raises:
          ValueError: naming the field, its rule and its value.
        """
        value = self._left.pop(name, None)
        if value is None or (value is False and kind in (list, dict)):
            if default is REQUIRED:
                raise ValueError(f"`config` must hold `{name}`")
            return default
        accepted = (int, float) if kind is float else kind
        known = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not known or (kind is float and not abs(value) <= sys.float_info.max):
            raise _wrong(name, _KINDS[kind], value)
        if kind is int and not minimum <= value <= MAX_INT:
            raise _wrong(name, f"in [{minimum}, {MAX_INT}]", value)
        return float(value) if kind is float else value

    def expect(self, name: str, *allowed: Any) -> None:
        """Reads a field of which only `allowed` values (the first if absent) are supported."""
        value = self._left.pop(name, None)
        if not any(value is None or (type(value) is type(a) and value == a) for a in allowed):
            raise _wrong(name, " or ".join(map(short, allowed)) + " to be supported", value)

    def drop(self, *names: str) -> None:
        """Fields that have no meaning next to another one."""
        for name in names:
            self._left.pop(name, None)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A field that holds one id, a list of them, or nothing."""
        value = self._left.pop(name, None)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(type(i) is int and abs(i) <= MAX_INT for i in ids):
            raise _wrong(name, "a token id or a list of them", value)
        return ids

    def finish(self) -> None:
        """Refuses what was not read and could matter."""
        unknown = {k: v for k, v in self._left.items() if not is_inert(k, v)}
        if "quantization_config" in unknown:
            raise ValueError(
                "`config.quantization_config` is not supported: save the model dequantized"
            )
        if unknown:
            shown = ", ".join(f"{k!r}: {short(v)}" for k, v in list(unknown.items())[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(
                f"`config` has fields that are not supported: {{{shown}}}{more}; if they do not change what "
                f"the decoder computes, pass `ignore={tuple(unknown)[:5]}`"
            )


def _wrong(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"`config.{name}` must be {rule}, got {short(value)}")


def short(value: Any) -> str:
    """`repr`, cut so that it fits an error."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of more digits than Python prints, a nest too deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ValueError: naming the file: too large, not UTF-8, not JSON, nested too deep, or not an object.
      OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {MAX_JSON_BYTES} bytes")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {short(values)}")
    return values


def without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A config without the fields `names`, at the top or in the objects that are read.

    Raises:
      TypeError: `names` is one string.
      ValueError: a name that is nowhere.
    """
    if isinstance(names, str):
        raise TypeError(f"`ignore` must be a collection of field names, got {names!r}")
    found: set[str] = set()

    def strip(values: Mapping[str, Any]) -> dict[str, Any]:
        found.update(name for name in names if name in values)
        kept = {k: v for k, v in values.items() if k not in names}
        for name in ("text_config", "rope_parameters", "rope_scaling"):
            if isinstance(kept.get(name), Mapping):
                kept[name] = strip(kept[name])
        return kept

    kept = strip(values)
    if absent := sorted(set(names) - found):
        raise ValueError(f"`ignore` must name fields of the config, got {absent}")
    return kept
