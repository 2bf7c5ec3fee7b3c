"""Two frameworks in one process: settings that must precede JAX's first use, and what is known to clash."""

import dataclasses
import importlib.metadata
import importlib.util
import os
from typing import Literal

import jax
from jax._src import xla_bridge

Allocator = Literal["default", "bfc", "platform", "cuda_async"]
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "safetensors", "flatbuffers")


def backend_initialised() -> bool:
    """Whether JAX has started its backends in this process (which fixes its memory settings)."""
    return xla_bridge.backends_are_initialized()


def configure(
    *,
    preallocate: bool = False,
    memory_fraction: float | None = None,
    allocator: Allocator | None = None,
) -> None:
    """Sets how JAX takes GPU memory, so that PyTorch finds some left. Call it before JAX is first used.

    Args:
      preallocate: let JAX take its share at once (its own default, 75 % of the memory) instead of growing.
      memory_fraction: the most that JAX may take, in (0, 1]; None leaves JAX's default.
      allocator: "default", "bfc", "platform" (slow, returns memory at once) or "cuda_async" (with PyTorch's
        `backend:cudaMallocAsync` both share one pool); None leaves it as it is.

    Raises:
      RuntimeError: JAX is already in use, so that nothing would change.
      ValueError: a value outside its range.

    Example:
      >>> import interop
      >>> interop.configure(preallocate=False, memory_fraction=0.4)  # doctest: +SKIP
    """
    if memory_fraction is not None and not 0.0 < memory_fraction <= 1.0:
        raise ValueError(f"`memory_fraction` must lie in (0, 1], got {memory_fraction}")
    known = ("default", "bfc", "platform", "cuda_async")
    if allocator is not None and allocator not in known:
        raise ValueError(f"`allocator` must be None or one of {known}, got {allocator!r}")
    if backend_initialised():
        raise RuntimeError(
            "`configure` must be called before JAX is first used: its memory settings are read once"
        )
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true" if preallocate else "false"
    if memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory_fraction)
    if allocator is not None:
        os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = allocator


@dataclasses.dataclass(frozen=True)
class EnvironmentReport:
    """What `check_environment` found.

    Attributes:
      versions: package -> version, None if it is not installed.
      backend_initialised: whether JAX is already in use.
      problems: sentences, each naming a cure; empty when all is well.
    """

    versions: dict[str, str | None]
    backend_initialised: bool
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{name} {version or 'not installed'}" for name, version in self.versions.items()]
        lines.append(f"JAX in use: {'yes' if self.backend_initialised else 'not yet'}")
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)


def check_environment() -> EnvironmentReport:
    """Versions, and what keeps JAX and PyTorch from sharing this process well. Starts no backend.

    Example:
      >>> import interop
      >>> report = interop.check_environment()
      >>> report.versions["jax"] is not None
      True
    """
    versions = {name: _version(name) for name in _PACKAGES}
    problems = [*_package_problems(versions), *_gpu_problems()]
    if jax.config.jax_enable_x64:
        problems.append(
            "jax_enable_x64 is on for the whole process: float64 and int64 tensors enter JAX as they are; "
            "the bridge turns it on by itself where a float64 tensor asks for it"
        )
    return EnvironmentReport(versions, backend_initialised(), tuple(problems))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_problems(versions: dict[str, str | None]) -> list[str]:
    problems = []
    if versions["torch"] is None:
        problems.append("PyTorch is not installed: pip install 'gqa-jax[torch]'")
    if versions["flatbuffers"] is None:
        problems.append(
            "interop.export cannot serialise without flatbuffers: pip install 'gqa-jax[export]'"
        )
    transformers = versions["transformers"]
    if transformers is not None and tuple(map(int, transformers.split(".")[:2])) < (5, 17):
        problems.append(
            f"interop.huggingface is written for transformers 5.17 and newer, found {transformers}"
        )
    for package in ("fla", "causal_conv1d", "kernels"):
        if importlib.util.find_spec(package) is not None:
            problems.append(
                f"`{package}` is installed: transformers may call it instead of its PyTorch code, so that "
                "un-patched layers are no plain reference"
            )
    return problems


def _gpu_problems() -> list[str]:
    plugin = next((f"cuda{n}" for n in (13, 12) if _version(f"jax-cuda{n}-plugin")), None)
    if plugin is None or importlib.util.find_spec("torch") is None:
        return []
    import torch

    problems = []
    torch_cuda = torch.version.cuda
    if torch_cuda is not None and f"cuda{torch_cuda.split('.')[0]}" != plugin:
        problems.append(
            f"JAX's plugin is built for {plugin}, PyTorch for CUDA {torch_cuda}: the first to load its libraries wins"
        )
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0"):
        problems.append(
            "JAX will take 75 % of the GPU memory when first used: call interop.configure() before"
        )
    if any("cuda" in entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        problems.append(
            "LD_LIBRARY_PATH names a CUDA folder: its cuDNN may be loaded instead of the pinned one; unset it"
        )
    return problems
