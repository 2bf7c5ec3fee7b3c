"""What `pallas_kernels.autotune` tries, times and accepts of the attention kernels."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import aot_cases
from pallas_kernels.attention.hopper import tuning

# Query heads and their groups as models have them, and enough tokens for every SM to have work.
HEADS = {64: (32, 32), 96: (32, 8), 128: (32, 8), 256: (16, 2)}
TOKENS = 16384
OPTIONS = {
    "direction": tuning.DIRECTIONS,
    "head_dim": tuning.HEAD_DIMS,
    "length": None,
    "mask": ("causal", "full"),
}
use_tuned = tuning.use_tuned


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a bucket's problems have in common, and the length at which it is measured."""

    direction: str
    head_dim: int
    length: int
    is_causal: bool

    @property
    def key(self) -> str:
        return tuning.bucket(
            self.direction, head_dim=self.head_dim, q_len=self.length, is_causal=self.is_causal
        )

    @property
    def shape(self) -> aot_cases.AttentionShape:
        heads, kv_heads = HEADS[self.head_dim]
        return aot_cases.AttentionShape(
            self.key,
            batch=max(1, TOKENS // self.length),
            length=self.length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            is_causal=self.is_causal,
        )

    def default(self) -> tuning.Config:
        """What runs now."""
        if self.direction == "forward":
            return self.shape.forward_config()
        return tuning.backward_config(
            head_dim=self.head_dim, atomic=self.direction == "backward_atomic"
        )

    def candidates(self) -> list[tuning.Config]:
        """What is tried, the default first."""
        default = self.default()
        found: list[tuning.Config]
        if isinstance(default, tuning.ForwardConfig):
            found = [*tuning.forward_candidates(head_dim=self.head_dim, pack=default.pack)]
        else:
            found = [*tuning.backward_candidates(head_dim=self.head_dim, atomic=default.atomic)]
        return [default, *(c for c in found if c != default)]

    def case(self, config: tuning.Config) -> aot_cases.Case:
        return aot_cases.DIRECTIONS[self.direction](self.shape, config)

    def inputs(self) -> tuple[jax.Array, ...]:
        """Random operands of the case."""
        random = np.random.default_rng(0)
        structs = self.case(self.default()).build()[1]
        return tuple(jnp.asarray(random.normal(size=x.shape), x.dtype) for x in structs)


def cells(
    directions: Iterable[str],
    head_dims: Iterable[int],
    lengths: Iterable[int],
    causal: Iterable[bool],
) -> list[Cell]:
    """The product, without what the atomic kernel cannot do."""
    return [
        Cell(direction, head_dim, length, is_causal)
        for direction in directions
        for head_dim in head_dims
        for length in lengths
        for is_causal in causal
        if direction != "backward_atomic" or head_dim in tuning.ATOMIC_HEAD_DIMS
    ]


def asked(options: Mapping[str, Sequence[Any]], /, *, timed: bool) -> list[Cell]:
    """The cells of a command line."""
    del timed  # machine code tells the candidates of every direction apart
    return cells(
        options.get("direction", tuning.DIRECTIONS[:2]),
        options.get("head_dim", (64, 128, 256)),
        options.get("length", tuning.LENGTHS[1:]),
        [mask == "causal" for mask in options.get("mask", ("causal", "full"))],
    )


def _known() -> dict[str, Cell]:
    lengths = (*tuning.LENGTHS, tuning.LENGTHS[-1] + 1)
    every = cells(tuning.DIRECTIONS, tuning.HEAD_DIMS, lengths, (True, False))
    return {cell.key: cell for cell in every}


def kinds() -> dict[str, type]:
    """Every key there is -> its kind of configuration."""
    kind = {"forward": tuning.ForwardConfig}
    return {key: kind.get(cell.direction, tuning.BackwardConfig) for key, cell in _known().items()}


def refusal(key: str, config: tuning.Config) -> str | None:
    """Why the kernels cannot be tiled so, or None."""
    for name, value in dataclasses.asdict(config).items():
        if type(value) is int and value < 1:
            return f"`{name}` must be at least 1, got {value}"
        if name in ("block_q", "block_kv") and value % 64:
            return f"`{name}` must be a multiple of 64, got {value}"
    cell = _known()[key]
    if not tuning.fits(config, cell.head_dim):
        return f"it does not fit into a block: {config}"
    atomic = cell.direction == "backward_atomic"
    if isinstance(config, tuning.BackwardConfig) and config.atomic != atomic:
        return f"`atomic` must be {atomic}, got {config.atomic}"
    return None
