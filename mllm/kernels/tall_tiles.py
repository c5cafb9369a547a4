"""Which tiles `tall` takes for a product, and where it is faster than cuBLAS. Pure functions of shapes, by what was
measured on an H200; the record is in `docs/performance.md`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from mllm.kernels.hopper import MULTIPROCESSORS, TYPES

HEAD = 128
"""The size of the heads of a decoder that are normalised, rotated and written where they are made."""
LEAST = 128
"""Rows up to which every product is ours: what starting and finishing takes is so much of it."""
FEW = 256
"""Rows up to which a product is ours where one turn of the chip makes it, with few outputs beyond those wanted."""
SOME = 1536
"""Rows up to which a product is ours where cuBLAS needs a kernel after it to rotate, or too few outputs fill the chip."""
WORK = 2_500_000_000
"""Multiplications up to which a product's outputs are too few for that, or outputs beyond those wanted don't matter."""
MOSTLY, FULL = 0.75, 0.94
"""Shares of the outputs of the chip's turns that must be wanted: for few rows, a gate or the widest tile, and for others."""
BUSY, BUSY_TURNING = 0.85, 0.7
"""Shares of the time that the tensor cores must be busy, by `_clocks`, for ours to be faster elsewhere."""


class Tile(NamedTuple):
    """Groups of a program, with 64 rows each; its outputs, as powers of two side by side; tiles of inputs in flight; parts
    that the inputs are split into, each by programs of its own."""

    groups: int
    outputs: tuple[int, ...]
    stages: int
    parts: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def columns(self) -> int:
        return sum(self.outputs)

    def grid(self, rows: int, outputs: int) -> tuple[int, int, int]:
        """The programs that a product of so many rows and outputs takes."""
        return (
            -(-rows // self.rows),
            -(-outputs // self.columns),
            self.parts,
        )  # at each launch: `triton.cdiv` takes 4 us

    def turns(self, rows: int, outputs: int) -> int:
        """Of the chip, a multiprocessor for each program."""
        return -(-math.prod(self.grid(rows, outputs)) // MULTIPROCESSORS)


TILES = {
    "heads": (Tile(1, (128,), 8), Tile(2, (128,), 6)),
    "turn": (Tile(2, (64,), 8), Tile(1, (128,), 8), Tile(2, (128,), 6), Tile(2, (128, 64), 5)),
    "gate": (Tile(2, (64,), 6), Tile(1, (64,), 8), Tile(1, (64, 32), 6), Tile(2, (64, 32), 5), Tile(2, (128,), 4)),
    "sum": (Tile(2, (64,), 8), Tile(1, (128,), 8), Tile(1, (64,), 12), Tile(2, (128,), 6), Tile(1, (128, 16), 8),
            Tile(2, (128, 16), 6)),
    "other": (Tile(2, (64,), 8), Tile(2, (64, 32), 7), Tile(1, (128,), 8), Tile(1, (64,), 12), Tile(2, (128,), 6),
              Tile(1, (128, 16), 8)),
}  # fmt: skip
"""Tiles by epilogue, where the chip can make a product in one turn. What is written by whole heads has its outputs in one
piece."""
WIDE = {
    "heads": (Tile(2, (128,), 6), Tile(2, (256,), 4)),
    "sum": (Tile(2, (128,), 6), Tile(2, (256,), 4)),
    "gate": (Tile(2, (64,), 6), Tile(2, (64, 32), 5), Tile(2, (128,), 4)),
}
WIDEST = Tile(2, (128,), 6), Tile(2, (128, 64), 5), Tile(2, (256,), 4), Tile(2, (256, 16), 4), Tile(2, (256, 32), 4)
"""Tiles where it needs more than one turn: for these epilogues, and for others. In the last two 4,304 and 1,152 outputs
come out."""
LARGE = 256
"""Outputs of a tile from which on a product reads little."""
TURN = 2000
"""Clocks of a turn beside its products."""
TENSOR = 2048
"""Products that a multiprocessor's tensor cores make in a clock."""


@lru_cache(maxsize=1024)
def tile_for(epilogue: str, rows: int, outputs: int, inputs: int) -> Tile:
    """One turn of the chip takes mostly what its programs read from L2; where it needs more, what `_clocks` says."""
    gate = epilogue == "gate"
    parts = [1]
    if epilogue == "sum":
        # inputs of a part: the norm that adds them up reads them all
        least = 1024 if rows <= LEAST or rows * outputs <= 2**18 else 1536
        parts += [n for n in (2, 4) if inputs // n >= least]

    def read(tile: Tile) -> int:
        each = tile.rows + tile.columns * (2 if gate else 1)
        return tile.turns(rows, outputs) * each * inputs // tile.parts

    narrow = rows <= FEW if gate else inputs <= 2048  # programs with 32 outputs beside 64 wait for L2 in others
    taken = [tile for tile in TILES[epilogue] if narrow or 32 not in tile.outputs]
    taken = [tile for tile in taken if 16 not in tile.outputs or outputs % tile.columns == 0]  # for widths like 1,152
    if epilogue == "sum" and rows > FEW:  # of those that read as much, that with more weights, which come before x does
        taken = sorted(taken, key=lambda tile: tile.groups)
    tiles = [tile._replace(parts=n) for tile in taken for n in parts]
    tile = min(tiles, key=read)
    if tile.turns(rows, outputs) == 1:
        return tile
    return min(WIDE.get(epilogue, WIDEST), key=lambda tile: _clocks(tile, rows, outputs, inputs, gate=gate))


def _clocks(tile: Tile, rows: int, outputs: int, inputs: int, *, gate: bool) -> float:
    """What a product takes. Shared memory, which holds 64 inputs a row, gives or takes a row a clock: for each 64 inputs a
    tile's rows are brought once, and each group reads its own for each piece of the outputs, and those of all outputs."""
    columns = tile.columns * (2 if gate else 1)
    read = tile.groups * (64 * len(tile.outputs) + columns)
    each = max(read + tile.rows + columns, 64 * tile.rows * columns / TENSOR)
    return tile.turns(rows, outputs) * (inputs / 64 * each + TURN)


def pays(epilogue: str, x: Tensor, outputs: int, *, normed: bool = False) -> bool:
    """Whether `tall` is faster than cuBLAS, with what it needs after it, for x [M K] and so many outputs; False also where
    `tall` can't take x. The epilogue of a product is one of `TILES`; `normed`: it would end the norm before it, too."""
    rows, inputs = x.shape
    if x.dtype not in TYPES or inputs % 8:  # what tensor cores take from shared memory, and descriptors copy
        return False
    return _is_faster(epilogue, rows, outputs, inputs, normed=normed)


@lru_cache(maxsize=1024)
def _is_faster(epilogue: str, rows: int, outputs: int, inputs: int, *, normed: bool) -> bool:
    tile = tile_for(epilogue, rows, outputs, inputs)
    turns = tile.turns(rows, outputs)
    wanted = rows * outputs * tile.parts / (turns * MULTIPROCESSORS * tile.rows * tile.columns)
    if normed and rows > FEW:
        # a norm by itself hides the start of the next product, for which there is no room beside the one before
        if turns == 1 or epilogue not in ("turn", "other"):
            return False
        if epilogue == "other":
            return wanted >= FULL
    work = rows * outputs * inputs
    few = epilogue == "sum" and inputs <= 2048 and work <= WORK
    if rows <= LEAST or (rows <= SOME and (few or epilogue == "turn")):
        return True
    if epilogue == "gate":
        return wanted >= MOSTLY
    if turns == 1 and rows <= FEW:
        return wanted >= MOSTLY or work <= WORK
    if epilogue == "other":  # cuBLAS ends it as well
        return turns == 1 and tile.columns >= LARGE and wanted >= MOSTLY
    if turns == 1 and epilogue != "turn" and wanted >= FULL:
        return True
    busy = work / (TENSOR * MULTIPROCESSORS) / _clocks(tile, rows, outputs, inputs, gate=False)
    return busy >= (BUSY_TURNING if epilogue == "turn" else BUSY)
