"""Decoders from and to Hugging Face checkpoints."""

from gqa_jax.hf.checkpoint.decoder import load_hf, parameters, save_hf
from gqa_jax.hf.checkpoint.folder import HFFolder
from gqa_jax.hf.checkpoint.huggingface import (
    export_hf,
    hf_names,
    import_hf,
    read_hf,
    write_hf,
)

__all__ = [
    "HFFolder",
    "export_hf",
    "hf_names",
    "import_hf",
    "load_hf",
    "parameters",
    "read_hf",
    "save_hf",
    "write_hf",
]
