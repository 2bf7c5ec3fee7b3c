"""The settings of a Hugging Face PEFT adapter (`adapter_config.json`): read, known to change nothing, or refused.

An adapter's function is in its tensors and in few settings: r, lora_alpha, their patterns per module and use_rslora.
Every other setting that could change the function is refused, so that no adapter is read as something else.
"""

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

FILE = "adapter_config.json"
_READ = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"
)  # fmt: skip
# Bookkeeping, which modules have tensors, how tensors were initialised or their gradients computed.
_INERT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
_REQUIRED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "lora_bias": False}
# Initialisations that leave the base model's weights as they were.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_WAY_OUT = (
    "merge the adapter into its model with PEFT's merge_and_unload, if it can, and load that model"
)
_CONVERT = (
    "it changes the base model's weights too; save the adapter with PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=...), or " + _WAY_OUT
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What of an `adapter_config.json` the function depends on, besides the tensors.

    Attributes:
      r, lora_alpha: of modules that no pattern matches.
      rank_pattern, alpha_pattern: the same by regular expressions for the end of a module's name; the first counts.
      use_rslora: multiply by lora_alpha / sqrt(r) instead of lora_alpha / r.
      use_dora: tensors have magnitudes.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool

    def rank(self, module: str) -> int:
        """r of a module."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What multiplies a module's `lora_B @ lora_A`."""
        rank = self.rank(module)
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def read(path: str | pathlib.Path, *, ignore: Collection[str] = ()) -> PeftConfig:
    """Reads the settings of an adapter's directory.

    Args:
      path: the directory.
      ignore: settings that may have any value.

    Raises:
      ValueError: no such file, no JSON object, a value of the wrong kind, or a setting that changes the function in a
        way that has no counterpart here.
    """
    settings = _read_object(pathlib.Path(path) / FILE)
    for name, value in settings.items():
        if name not in ignore:
            _check_setting(name, value)
    positive = lambda x: _is_number(x) and isinstance(x, int) and x > 0
    patterns: dict[str, Any] = {
        name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")
    }
    r, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    _require("r", r, positive(r), "a positive integer")
    _require("lora_alpha", alpha, _is_number(alpha), "a finite number")
    for name, kind, check in (
        ("rank_pattern", "positive integers", positive),
        ("alpha_pattern", "finite numbers", _is_number),
    ):
        pattern = patterns[name]
        fits = isinstance(pattern, dict) and all(map(check, pattern.values()))
        _require(
            name, pattern, fits and all(map(_compiles, pattern)), f"{kind} by regular expression"
        )
    switches: dict[str, Any] = {
        name: settings.get(name) or False for name in ("use_rslora", "use_dora")
    }
    for name, value in switches.items():
        _require(name, value, isinstance(value, bool), "true or false")
    if settings.get("lora_dropout"):
        warnings.warn(
            f"`lora_dropout={settings['lora_dropout']}` of {FILE} has no counterpart here: further training goes "
            "without dropout of the adapters' inputs",
            stacklevel=3,
        )
    return PeftConfig(r=r, lora_alpha=float(alpha), **patterns, **switches)


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"`path` must hold {FILE}, got {file.parent}") from None
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"`{file}` must be JSON, got: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"`{file}` must hold a JSON object, got {type(settings).__name__}")
    return settings


def _check_setting(name: str, value: Any) -> None:
    """Raises `ValueError` for a setting that may change what the tensors mean."""
    if name in _READ or name in _INERT:
        return
    if name in _REQUIRED:
        required = _REQUIRED[name]
        _require(name, value, value == required or value is None, f"{required!r}", _WAY_OUT)
    elif name == "init_lora_weights":
        lower = value.lower() if isinstance(value, str) else value
        one_of = "one of " + ", ".join(map(repr, _INITIALISATIONS))
        _require(name, value, lower in _INITIALISATIONS, one_of, _CONVERT)
    else:  # a variant of LoRA, other tensors than those of linear layers, or a setting newer than this page
        trivial = value is None or value is False or value in ("", [], {})
        _require(name, value, trivial, "empty", f"{_WAY_OUT}, or pass ignore=({name!r},)")


def _require(name: str, value: Any, fits: bool, rule: str, way_out: str = "") -> None:
    if not fits:
        hint = f": {way_out}" if way_out else ""
        raise ValueError(f"`{name}` of {FILE} must be {rule}, got {value!r}{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
