"""Loads an exported operator and calls it on torch tensors. Needs torch, jax and flatbuffers, no more of this project.

`interop.export.export_operator` puts a copy of this file and of `interop.lending` beside every artefact, so that it
also works where `gqa_jax` is not installed:

    from loader import load
    attention = load(".")
    out = attention(query, key, value)      # under autograd

The files are data: they are checked against the manifest's sizes and SHA-256 hashes before anything reads them. Hashes
find damage, not forgery; take artefacts from places you trust.
"""

import hashlib
import json
import pathlib
import re
from typing import Any

import jax
import jax.export
import torch

from interop.lending import lend, refuse_fork

FORMAT = 1
_FIELDS = {"format", "name", "jax", "inputs", "outputs", "vjp_order", "custom_calls", "files"}


def read_manifest(folder: Any) -> dict[str, Any]:
    """The manifest of an artefact.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another format.
    """
    path = pathlib.Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}: export the operator again")
    missing = _FIELDS - manifest.keys()
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {sorted(missing)}")
    if not isinstance(manifest["files"], dict):
        raise ValueError(f"{path} is damaged: `files` must be an object, got {manifest['files']!r}")
    for entry in manifest["files"].values():
        if not isinstance(entry, dict) or not entry.keys() >= {"file", "bytes", "sha256"}:
            raise ValueError(f"{path} is damaged: {entry!r} describes no file")
        if not re.fullmatch(r"\w[\w.-]*", str(entry["file"])):
            raise ValueError(f"{path} is damaged: {entry['file']!r} is no file name")
    return manifest


def read_exported(folder: Any, platform: str | None = None) -> jax.export.Exported:
    """The exported function for a platform ("cpu", "cuda"; None means this process's), after all checks.

    Raises:
      FileNotFoundError, ValueError: files that are missing, damaged, made for other platforms or by a JAX that this one
        cannot stand in for.
    """
    manifest = read_manifest(folder)
    platform = platform or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    files = manifest["files"]
    if platform not in files:
        raise ValueError(
            f"{manifest['name']} was exported for {', '.join(files)}, not for {platform!r}: export it for that too"
        )
    if manifest["custom_calls"] and manifest["jax"] != jax.__version__:
        raise ValueError(
            f"{manifest['name']} holds kernels of jax {manifest['jax']}, which jax {jax.__version__} may read "
            "otherwise: export it again with this version"
        )
    path = pathlib.Path(folder) / files[platform]["file"]
    blob = path.read_bytes()
    if len(blob) != files[platform]["bytes"]:
        raise ValueError(
            f"{path} is damaged: {len(blob)} bytes, the manifest says {files[platform]['bytes']}"
        )
    if hashlib.sha256(blob).hexdigest() != files[platform]["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's")
    try:
        exported = jax.export.deserialize(bytearray(blob))
    except Exception as error:  # flatbuffers raises whatever the bytes lead it to
        raise ValueError(f"{path} is damaged: it holds no exported function ({error})") from error
    version = exported.calling_convention_version
    lowest = jax.export.minimum_supported_calling_convention_version
    highest = jax.export.maximum_supported_calling_convention_version
    if not lowest <= version <= highest:
        raise ValueError(
            f"{manifest['name']} was exported by jax {manifest['jax']} with calling convention {version}; jax "
            f"{jax.__version__} reads {lowest} to {highest}: export it again"
        )
    return exported


def check_inputs(manifest: dict[str, Any], tensors: tuple) -> None:
    """Raises `ValueError` or `TypeError` where inputs are not what was exported."""
    expected = manifest["inputs"]
    if len(tensors) != len(expected):
        raise ValueError(f"{manifest['name']} takes {len(expected)} tensors, got {len(tensors)}")
    for index, (tensor, spec) in enumerate(zip(tensors, expected, strict=True)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{manifest['name']}: input {index} must be a tensor, got {type(tensor).__name__}"
            )
        fixed = [size for size in spec["shape"] if isinstance(size, int)]
        shape = [
            size
            for size, wanted in zip(tensor.shape, spec["shape"], strict=False)
            if isinstance(wanted, int)
        ]
        if tensor.dim() != len(spec["shape"]) or shape != fixed:
            raise ValueError(
                f"{manifest['name']}: input {index} must have shape {spec['shape']}, got {list(tensor.shape)}"
            )
        if str(tensor.dtype) != f"torch.{spec['dtype']}":
            raise TypeError(
                f"{manifest['name']}: input {index} must be {spec['dtype']}, got {tensor.dtype}"
            )


def load(folder: Any):
    """The artefact as a function of tensors, differentiable once if it was exported with gradients.

    Raises:
      FileNotFoundError, ValueError: see `read_exported`; calling it with other shapes or dtypes raises too.
    """
    manifest, exported = read_manifest(folder), read_exported(folder)
    wide = any(spec["dtype"] in ("float64", "complex128") for spec in manifest["inputs"])
    forward = jax.jit(exported.call)
    differentiable = exported.has_vjp()
    backward = jax.jit(lambda xs, cts: jax.vjp(exported.call, *xs)[1](cts))

    class Exported(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            with jax.enable_x64(wide):
                outs = forward(*map(_to_jax, tensors))
            leaves, ctx.tree = jax.tree.flatten(outs)
            ctx.save_for_backward(*tensors)
            return tuple(torch.from_dlpack(leaf) for leaf in leaves)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *cotangents):  # pyright: ignore[reportIncompatibleMethodOverride]
            if not differentiable:
                raise RuntimeError(f"{manifest['name']} was exported without gradients")
            tensors = ctx.saved_tensors
            with jax.enable_x64(wide):
                outs = jax.tree.unflatten(ctx.tree, [_to_jax(c) for c in cotangents])
                grads = backward(tuple(map(_to_jax, tensors)), outs)
            return tuple(
                torch.from_dlpack(g) if t.is_floating_point() else None
                for t, g in zip(tensors, grads, strict=True)
            )

    def call(*tensors):
        check_inputs(manifest, tensors)
        refuse_fork()
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{manifest['name']} works under autograd, not torch.func and torch.vmap: use interop.export.load"
            )
        outs = Exported.apply(*tensors)
        return jax.tree.unflatten(exported.out_tree, outs)

    return call


def _to_jax(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
        tensor = (
            tensor.clone()
        )  # XLA wants this alignment, and torch copies before anyone can write
    return jax.dlpack.from_dlpack(lend(tensor))
