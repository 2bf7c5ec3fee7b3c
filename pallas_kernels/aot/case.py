"""What a program that is compiled by name consists of; each operator registers its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

Program = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program by name.

    Attributes:
      name: `operator/direction/shape`.
      build: makes the function and its arguments (`jax.ShapeDtypeStruct`); every argument has a leading batch axis.
      flops: floating-point operations of its matrix products, counting only what the mask lets through.
      hbm_bytes: the least it must move: every input read and every output written once.
      tensor_instructions: per kernel, how many wgmma instructions its code must hold, derived on paper.
      donated: arguments whose memory the results may take.
    """

    name: str
    build: Callable[[], Program]
    flops: float = 0.0
    hbm_bytes: float = 0.0
    tensor_instructions: tuple[int, ...] = ()
    donated: tuple[int, ...] = ()
