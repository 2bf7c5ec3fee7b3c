"""Artefacts: an operator or a model for given shapes and platforms, with gradients, loadable without this source.

One StableHLO file per platform (kernels differ), a manifest with versions, shapes and hashes, and the loader itself.
"""

import hashlib
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.custom_batching
import jax.export
import jax.numpy as jnp
import torch

from interop import artefact_loader, lending
from interop.dlpack import dtype_to_jax, dtype_to_torch
from interop.torch_function import wrap
from pallas_kernels import _dispatch

_KERNEL_CALLS = ("mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton", "triton_kernel_call")


def export_operator(
    function: Callable,
    specs: Sequence[Any],
    folder: str | pathlib.Path,
    *,
    name: str | None = None,
    platforms: Sequence[str] = ("cpu",),
    vjp_order: int = 1,
) -> pathlib.Path:
    """Writes `function` (of positional arrays; a module closes over its weights) as an artefact.

    Kernels written for a GPU have no promise of compatibility: their artefact loads under the same jax version only.

    Args:
      function: jittable; its options bound, for example by `functools.partial`.
      specs: one per argument: an array, a tensor or a `jax.ShapeDtypeStruct`. Sizes may be symbolic, from
        `jax.export.symbolic_shape`: in the operators of `pallas_kernels` the batch, on every XLA implementation, and
        the lengths T and S, which only "reference" can do: it is then chosen by itself, with O(T^2) memory in attention
        and one step per token in the delta rule. float64 makes the whole artefact 64-bit.
      folder: made if need be; must be empty.
      name: in the manifest and messages; the function's own by default.
      platforms: of "cpu", "cuda", "rocm", "tpu"; one file each.
      vjp_order: how often the artefact can be differentiated, 0 or 1.

    Returns:
      The folder: `manifest.json`, `<platform>.jaxexport`, `loader.py` and the `lending.py` it imports.

    Raises:
      ImportError: flatbuffers is missing.
      ValueError: no platform, an unknown one, another `vjp_order`, or a folder that is not empty.
      TypeError: a spec without shape and dtype, or with 64-bit integers while JAX has 32 bits; results that are not
        arrays.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> spec = jax.ShapeDtypeStruct((2, 3), jnp.float32)
      >>> folder = export_operator(lambda x: x * 2, [spec], tempfile.mkdtemp())
      >>> load(folder)(torch.ones(2, 3)).sum()
      tensor(12.)
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("export needs flatbuffers: pip install 'gqa-jax[export]'")
    known = ("cpu", "cuda", "rocm", "tpu")
    if not platforms or set(platforms) - set(known):
        raise ValueError(f"`platforms` must be some of {known}, got {tuple(platforms)}")
    if vjp_order not in (0, 1):
        raise ValueError(f"`vjp_order` must be 0 or 1, got {vjp_order}")
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`folder` must be empty, got {folder}")
    inputs = [_spec(index, spec) for index, spec in enumerate(specs)]
    wide = _wide(inputs)
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in _KERNEL_CALLS]

    blobs, outputs, custom_calls = {}, [], False
    for platform in platforms:
        target = _dispatch.target_of(platform)
        with jax.enable_x64(wide), _dispatch.targeting(target):
            exported = jax.export.export(
                jax.jit(function), platforms=(platform,), disabled_checks=checks
            )(*inputs)
            blobs[platform] = exported.serialize(vjp_order=vjp_order)
        outputs = [_describe(aval) for aval in exported.out_avals]
        custom_calls |= any(call in exported.mlir_module() for call in _KERNEL_CALLS)

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for platform, blob in blobs.items():
        path = folder / f"{platform}.jaxexport"
        path.write_bytes(blob)
        digest = hashlib.sha256(blob).hexdigest()
        files[platform] = {"file": path.name, "bytes": len(blob), "sha256": digest}
    manifest = {
        "format": artefact_loader.FORMAT,
        "name": name or getattr(function, "__name__", "operator").replace("<lambda>", "operator"),
        "jax": jax.__version__,
        "inputs": [_describe(spec) for spec in inputs],
        "outputs": outputs,
        "vjp_order": vjp_order,
        "custom_calls": custom_calls,
        "files": files,
    }
    loader = pathlib.Path(artefact_loader.__file__).read_text()
    (folder / "loader.py").write_text(loader.replace("from interop.lending", "from lending"))
    shutil.copyfile(lending.__file__, folder / "lending.py")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def load(folder: str | pathlib.Path) -> Callable:
    """An artefact as a function of tensors, with all that `interop.wrap` gives.

    Derivatives beyond `vjp_order` raise. Where this package is not installed, the artefact's own `loader.py` does.

    Raises:
      FileNotFoundError, ValueError: files that are missing or damaged, or made for another platform or version; nothing
        of them has been run then.
    """
    manifest = artefact_loader.read_manifest(folder)
    exported = artefact_loader.read_exported(folder)
    call = wrap(_batchable(exported), name=manifest["name"])

    def checked(*tensors):
        artefact_loader.check_inputs(manifest, tensors)
        return call(*tensors)

    checked.__name__ = manifest["name"]
    return checked


def _batchable(exported: jax.export.Exported) -> Callable:
    """The exported function under `jax.vmap` too, for which it has no rule: one row after the other."""
    forward = jax.custom_batching.sequential_vmap(exported.call)

    @jax.custom_vjp
    def call(*arrays):
        return forward(*arrays)

    def pull_back(arrays, cotangents):
        inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]
        leaves, tree = jax.tree.flatten(cotangents)
        tangible = [leaf.dtype != jax.dtypes.float0 for leaf in leaves]

        @jax.custom_batching.sequential_vmap
        def of_floats(arrays, inexact_cotangents):
            rest = iter(inexact_cotangents)
            full = [next(rest) if t else x for t, x in zip(tangible, leaves, strict=True)]
            gradients = jax.vjp(exported.call, *arrays)[1](tree.unflatten(full))
            return [g for g, real in zip(gradients, inexact, strict=True) if real]

        inexact_cotangents = [leaf for leaf, real in zip(leaves, tangible, strict=True) if real]
        gradients_of_floats = iter(of_floats(arrays, inexact_cotangents))
        return tuple(next(gradients_of_floats) if real else None for real in inexact)

    call.defvjp(lambda *arrays: (forward(*arrays), arrays), pull_back)
    return call


def _spec(index: int, spec: Any) -> jax.ShapeDtypeStruct:
    if isinstance(spec, torch.Tensor):
        return jax.ShapeDtypeStruct(tuple(spec.shape), dtype_to_jax(spec.dtype))
    if not hasattr(spec, "shape") or not hasattr(spec, "dtype"):
        raise TypeError(
            f"`specs[{index}]` must have a shape and a dtype, got {type(spec).__name__}"
        )
    dtype_to_torch(spec.dtype)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)


def _wide(specs: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether JAX has 64 bits for these, as `interop.wrap` decides it."""
    names = [jnp.dtype(spec.dtype).name for spec in specs]
    wide = bool(jax.config.jax_enable_x64) or not {"float64", "complex128"}.isdisjoint(names)
    for index, name in enumerate(names):
        if name in ("int64", "uint64") and not wide:
            raise TypeError(
                f"`specs[{index}]` must have 32 bits while jax_enable_x64 is off, got {name}"
            )
    return wide


def _describe(aval: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": jnp.dtype(aval.dtype).name}
