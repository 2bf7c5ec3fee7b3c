"""The GPUs that can be compiled for: text protos under `pallas_kernels/aot/targets`, and what those GPUs do at best."""

import pathlib
import re
from typing import NamedTuple

TARGETS = pathlib.Path(__file__).parent / "targets"
GPUS_PER_HOST = 8


class Rates(NamedTuple):
    """What one GPU of a target can do at best.

    Attributes:
      bf16_flops: dense operations of the tensor cores per second.
      hbm_bytes: of its memory, per second.
      nvlink_bytes, network_bytes: in one direction per second, within a host and between hosts.
      memory_bytes: size of its memory.
    """

    bf16_flops: float
    hbm_bytes: float
    nvlink_bytes: float
    network_bytes: float
    memory_bytes: float


def targets() -> tuple[str, ...]:
    """Names of the GPUs that can be compiled for."""
    return tuple(sorted(path.stem for path in TARGETS.glob("*.txtpb")))


def description(target: str) -> str:
    """The text proto of a target.

    Raises:
      ValueError: unknown target.
    """
    if target not in targets():
        raise ValueError(f"`target` must be one of {', '.join(targets())}, got {target!r}")
    return (TARGETS / f"{target}.txtpb").read_text()


def rates(target: str) -> Rates:
    """The rates that a target's text proto states, in its fields and in its comment on rates.

    Raises:
      ValueError: unknown target.
    """
    text = description(target)

    def stated(name: str) -> float:
        found = re.search(rf"\b{name}[=:] ?([\d.e]+)", text)
        assert found is not None, f"targets/{target}.txtpb must state {name}"
        return float(found[1])

    return Rates(
        bf16_flops=stated("bf16_flops"),
        hbm_bytes=stated("memory_bandwidth"),
        nvlink_bytes=stated("nvlink_bytes"),
        network_bytes=stated("network_bytes"),
        memory_bytes=stated("device_memory_size"),
    )


def capability(kind: str) -> str:
    """Compute capability of GPUs of a kind, e.g. "NVIDIA H200".

    Raises:
      ValueError: no target is of this kind.
    """
    for path in TARGETS.glob("*.txtpb"):
        text = path.read_text()
        found = re.search(r'platform_version: "Compute Capability ([\d.]+)a?"', text)
        if found and f'name: "{kind}"' in text:
            return found[1]
    raise ValueError(f"`mesh` must come from `topology`, got devices of kind {kind!r}")
