"""Hugging Face `config.json` to and from `DecoderConfig`, for the families that `gqa_jax` runs.

Reading is strict: a field that changes the mathematics is translated or refused by name, others are known not to matter
(by name, by prefix, or because they are empty), and what is left raises, so that a new variant of a family never loads
as an old one; `ignore=` is the way round. Both forms of RoPE parameters
are read (`rope_parameters`; `rope_theta` with `rope_scaling`); `rope_parameters` is written.
"""

from gqa_jax.hf.config.families import FAMILIES
from gqa_jax.hf.config.presets import PRESETS
from gqa_jax.hf.config.read import from_hf
from gqa_jax.hf.config.write import to_hf_config

__all__ = ["FAMILIES", "PRESETS", "from_hf", "to_hf_config"]
