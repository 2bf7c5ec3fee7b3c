"""The tiles and the place of one warpgroup of `gradients`, behind a number that the compiler cannot know.

Half of the registers there hold dq and dk, and every product needs most of the others. What the compiler can derive
from a thread's number (addresses, descriptors, masks) it would make once, ahead of the loop over value heads, and
spill: 472 bytes. So each use of a tile or of a place begins with a number read from shared memory, which is always 0
but might be anything: nothing is spilled. `lax.optimization_barrier` does not do: ptxas sees through it.
"""

from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.hopper.chains import COLUMNS
from pallas_kernels.delta_rule.hopper.chunk import CHUNK, MATRIX, PER_COLUMN, PER_ROW, SQUARE

# Rows of `positions`, both 0, 1, ..., 63: of one array the compiler would ask for one layout.
ROW, COLUMN = range(2)


class Place(NamedTuple):
    """Where a warpgroup stands."""

    row: Any
    index: Any
    key_head: Any
    wg: Any

    @property
    def tokens(self) -> Any:
        return pl.ds(self.index * CHUNK, CHUNK)

    @property
    def of_key(self) -> tuple[Any, ...]:
        return self.row, self.tokens, self.key_head

    def of_value(self, head) -> tuple[Any, ...]:
        return self.row, self.tokens, head, pl.ds(self.wg * COLUMNS, COLUMNS)


def locate(wg, zero=0) -> Place:
    """The place of a warpgroup; `zero` as in `Owner`."""
    row, index, key_head = (lax.axis_index(name) + zero for name in ("row", "chunk", "heads"))
    return Place(row, index, key_head, wg + zero)


class Owner:
    """The tiles of one warpgroup, by name; every use reads the 0 that their places depend on."""

    def __init__(self, s, wg):
        self._scratch, self._wg = s, wg

    def __getattr__(self, name: str) -> Any:
        zero = self.zero()
        shared = name in ("queries", "keys", "factors")
        return getattr(self._scratch, name).at[zero if shared else self._wg + zero]

    def zero(self):
        """0, which might be anything."""
        return self._scratch.positions[self._wg, ROW, 0]

    def locate(self) -> Place:
        """Where this warpgroup stands, asked again at each use: nothing of it would stay in a register."""
        return locate(self._wg, self.zero())

    def places(self):
        """Row and column of every entry, read too: masks would otherwise be kept from product to product."""
        positions = self.positions
        row = plgpu.load(positions.at[ROW], layout=PER_ROW)
        column = plgpu.load(positions.at[COLUMN], layout=PER_COLUMN)
        row, column = (
            lax.broadcast_in_dim(row, SQUARE, [0]),
            lax.broadcast_in_dim(column, SQUARE, [1]),
        )
        return plgpu.layout_cast(row, MATRIX), plgpu.layout_cast(column, MATRIX)
