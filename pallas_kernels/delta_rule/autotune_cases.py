"""What `pallas_kernels.autotune` tries, times and accepts of the gated delta rule's Hopper kernels.

`forward` and `backward` time the kernels by themselves, on what the prologue makes of random tokens; `lanes` times a
whole forward call, whose kernels have the configurations in use (the defaults, unless a file was loaded).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.aot.case import Case
from pallas_kernels.delta_rule import order, vjp
from pallas_kernels.delta_rule.hopper import chains, fwd, tuning
from pallas_kernels.delta_rule.hopper import prologue as hopper_prologue
from pallas_kernels.delta_rule.hopper.aot_bwd_cases import DeltaBackwardShape, backward_case
from pallas_kernels.delta_rule.hopper.aot_fwd_cases import DeltaShape, forward_case
from pallas_kernels.delta_rule.hopper.chunk import power_of_two

# Chunks of a timed chain: 4k tokens, so that starting does not count. Chunks take equally long.
TIMED_CHUNKS = 64
# As models have them: one per bucket.
HEADS = (8, 16, 32, 64, 128, 256)
LENGTHS = (2048, 8192, 32768, 131072)
# Barriers, and what is left free so that tiles start on multiples of 1024 bytes.
SPARE_BYTES = 2048
KINDS = {
    "forward": tuning.ForwardConfig,
    "backward": tuning.BackwardConfig,
    "lanes": tuning.LanesConfig,
}
OPTIONS = {
    "direction": tuning.DIRECTIONS,
    "head_dim": tuning.HEAD_DIMS,
    "heads": None,
    "length": None,
}
use_tuned = tuning.use_tuned


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a bucket's problems have in common, and the heads and chunks at which it is measured."""

    direction: str
    width: int
    heads: int
    chunks: int

    @property
    def key(self) -> str:
        return tuning.bucket(self.direction, width=self.width, heads=self.heads, chunks=self.chunks)

    @property
    def key_heads(self) -> int:
        """Two value heads to a key head, where they are even."""
        return self.heads if self.heads % 2 else self.heads // 2

    def sizes(self) -> dict[str, Any]:
        return {
            "chunks": self.chunks,
            "key_heads": self.key_heads,
            "value_heads": self.heads,
            "dim": self.width,
        }

    def default(self) -> tuning.Config:
        """What runs now."""
        if self.direction == "forward":
            return tuning.forward_config(width=self.width, heads=self.heads)
        if self.direction == "backward":
            return tuning.backward_config(heads=self.heads)
        lanes = tuning.lanes(heads=self.heads, value_dim=self.width, chunks=self.chunks)
        return tuning.LanesConfig(lanes)

    def candidates(self) -> list[tuning.Config]:
        """What is tried, the default first."""
        found: Sequence[tuning.Config]
        if self.direction == "forward":
            found = tuning.forward_candidates(width=self.width)
        elif self.direction == "backward":
            found = tuning.backward_candidates()
        else:
            found = tuning.lanes_candidates(heads=self.heads, chunks=self.chunks)
        default = self.default()
        return [default, *(c for c in found if c != default)]

    def case(self, config: tuning.Config) -> Case:
        if isinstance(config, tuning.ForwardConfig):
            return forward_case(DeltaShape(self.key, **self.sizes()), config)
        if isinstance(config, tuning.BackwardConfig):
            return backward_case(DeltaBackwardShape(self.key, **self.sizes(), config=config))
        return Case(self.key, lambda: (self._call(config), tuple(self._structs().values())))

    def _plan(self, lanes: int) -> order.Plan:
        return order.Plan(
            batch=1,
            length=self.chunks * tuning.CHUNK,
            chunk=tuning.CHUNK,
            lanes=lanes,
            steps=math.ceil(self.chunks / lanes),
            scale=self.width**-0.5,
            use_qk_l2norm=True,
        )

    def _call(self, config: tuning.LanesConfig):
        def gated_delta_rule(query, key, value, g, beta, start):
            tokens = order.Tokens(query, key, value, g, beta)
            plan = self._plan(config.lanes)
            return vjp.mosaic_gpu(plan, tokens, start, segment_ids=None, cu_seqlens=None)

        return gated_delta_rule

    def _structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = DeltaShape(self.key, **self.sizes()).arrays()
        found = {name: arrays[name] for name in ("query", "key", "value")}
        gate = jax.ShapeDtypeStruct((*found["value"].shape[:3],), jnp.float32)
        return {**found, "g": gate, "beta": gate, "start": arrays["start"]}

    def inputs(self) -> tuple[jax.Array, ...]:
        """Operands of the case: keys of length 1, states of a few hundred tokens, every strength of writing."""
        random = iter(jax.random.split(jax.random.key(0), 16))
        normal = lambda x: jax.random.normal(next(random), x.shape, x.dtype)
        structs = self._structs()
        made = {name: normal(struct) for name, struct in structs.items()}
        key = made["key"].astype(jnp.float32)
        key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
        made |= {
            "key": key.astype(made["key"].dtype),
            # A decay per token of 0.9 to nearly 1.
            "g": -0.1 * jax.random.uniform(next(random), structs["g"].shape) ** 2,
            "beta": jax.nn.sigmoid(made["beta"]),
            "start": 0.1 * made["start"],
        }
        if self.direction == "lanes":
            return tuple(made[name] for name in structs)
        gates = order.gates(self._plan(1), order.Order(), made["g"], made["beta"])
        prologue = lambda key, gates: hopper_prologue.prologue(key, gates, use_qk_l2norm=True)
        made["inverse"], made["tables"] = jax.jit(prologue)(made["key"], gates)
        if self.direction == "forward":
            return tuple(made[name] for name in DeltaShape(self.key, **self.sizes()).arrays())
        made["start_state"] = made["start"]
        made["d_out"], made["d_final"] = normal(made["value"]), normal(made["start"])
        size = lambda name: jnp.max(jnp.abs(made[name])).astype(jnp.float32)
        # What the kernels divide by, the same for every head.
        unit = lambda *names: power_of_two(
            jnp.broadcast_to(jnp.max(jnp.stack([size(name) for name in names])), (1, self.heads))
        )
        made |= {"held": unit("value", "start"), "pulled": unit("d_out", "d_final")}
        made["asked"] = jnp.ones_like(made["held"])  # queries are normalised
        return tuple(made[name] for name in DeltaBackwardShape(self.key, **self.sizes()).arrays())


def widths_of(direction: str, widths: Iterable[int] = tuning.HEAD_DIMS) -> Iterable[int]:
    """Value channels at which a direction is timed; the keys of the backward do not hold them."""
    return (tuning.HEAD_DIMS[-1],) if direction == "backward" else widths


def cells(
    directions: Iterable[str], widths: Iterable[int], heads: Iterable[int], chunks: Iterable[int]
) -> list[Cell]:
    """The product, without what a key does not hold, and without lanes where there is room for one only."""
    found = [
        Cell(direction, width, count, length)
        for direction in directions
        for width in widths_of(direction, widths)
        for count in heads
        for length in (chunks if direction == "lanes" else (TIMED_CHUNKS,))
    ]
    return [c for c in found if c.direction != "lanes" or len(c.candidates()) > 1]


def asked(options: Mapping[str, Sequence[Any]], /, *, timed: bool) -> list[Cell]:
    """The cells of a command line. Numbers of lanes are different programs: machine code does not compare them."""
    compared = tuning.DIRECTIONS if timed else ("forward", "backward")
    directions = options.get("direction", compared)
    if not set(directions) <= set(compared):
        raise ValueError("--direction lanes does not apply to --by-machine-code")
    if "length" in options and "lanes" not in directions:
        raise ValueError(f"--length does not apply to --direction {' '.join(directions)}")
    if "head_dim" in options and set(directions) == {"backward"}:
        raise ValueError("--head-dim does not apply to --direction backward")
    lengths = options.get("length", LENGTHS)
    return cells(
        directions,
        options.get("head_dim", tuning.HEAD_DIMS),
        options.get("heads", HEADS),
        [math.ceil(length / tuning.CHUNK) for length in lengths],
    )


def _known() -> dict[str, Cell]:
    above = lambda bounds: (*bounds, bounds[-1] + 1)
    every = [
        Cell(direction, width, heads, chunks)
        for direction in tuning.DIRECTIONS
        for width in widths_of(direction)
        for heads in above(tuning.HEADS)
        for chunks in above(tuning.CHUNKS)
    ]
    return {cell.key: cell for cell in every}


def kinds() -> dict[str, type]:
    """Every key there is -> its kind of configuration."""
    return {key: KINDS[cell.direction] for key, cell in _known().items()}


def refusal(key: str, config: tuning.Config) -> str | None:
    """Why the kernels cannot be laid out so, or None."""
    width = _known()[key].width
    error = tuning.layout_error(config, width=width)
    if error is None and shared_bytes(config, width) + SPARE_BYTES > _dispatch.SHARED_MEMORY_BYTES:
        return f"it does not fit into a block: {config}"
    return error


def shared_bytes(config: tuning.Config, width: int) -> int:
    """Shared memory of the tiles of the kernel that needs most, for key and value heads of `width` channels."""
    half = jnp.bfloat16
    if isinstance(config, tuning.ForwardConfig):
        spec = fwd.scratch_spec(
            fwd.Shapes(
                rows=1,
                value_heads=1,
                group=1,
                key_dim=width,
                width=width,
                given=half,
                use_qk_l2norm=True,
                scale=1.0,
                value_dtype=half,
                segments=True,
                values=True,
                output=True,
                config=config,
            )
        )
    elif isinstance(config, tuning.BackwardConfig):
        shapes = chains.Shapes(
            rows=1,
            chunks=1,
            key_heads=1,
            value_heads=1,
            key_dim=width,
            value_dim=width,
            given=half,
            value_dtype=half,
            use_qk_l2norm=True,
            scale=1.0,
            segments=True,
            config=config,
        )
        spec = chains.chain_scratch(shapes, backwards=True)
    else:
        return 0
    tiles = [x for x in spec.values() if hasattr(x, "dtype")]
    return sum(math.prod(tile.shape) * jnp.dtype(tile.dtype).itemsize for tile in tiles)
