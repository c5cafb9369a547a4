"""Which tiles `tall` takes for a product, and where it is faster than cuBLAS. Pure functions of shapes, by what was
measured on an H200; the record is in `docs/performance.md`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor

from mllm.kernels.hopper import MULTIPROCESSORS, TYPES

HEAD = 128
"""The size of the heads of a decoder that are normalised, rotated and written where they are made."""
TURNED_HEAD = 64
"""The same for those of an encoder, which are rotated."""
LEAST = 128
"""Rows up to which starting and ending is so much of a product that it is ours."""
FEW = 256
"""Rows up to which it is where the chip makes it in one turn, with little that is not wanted."""
MOSTLY = 0.8
"""Share of that turn's outputs that must be wanted."""
WORK = 2_500_000_000
"""Multiplications up to which that doesn't matter, nor, where outputs are few, the rows: cuBLAS leaves much of the chip idle
there."""
TURNED_ROWS = 1536
"""Patches up to which rotating in the product's kernel beats cuBLAS's larger tiles and a kernel after it."""
FULL = 0.94
"""Share of the outputs of all turns of the chip that must be wanted for ours to be faster elsewhere."""


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
        return triton.cdiv(rows, self.rows), triton.cdiv(outputs, self.columns), self.parts

    def turns(self, rows: int, outputs: int) -> int:
        """Of the chip, a multiprocessor for each program."""
        return triton.cdiv(math.prod(self.grid(rows, outputs)), MULTIPROCESSORS)


TILES = {
    "heads": (Tile(1, (128,), 8), Tile(2, (128,), 6)),
    "turn": (Tile(2, (64,), 8), Tile(1, (128,), 8), Tile(2, (128,), 6), Tile(2, (128, 64), 5)),
    "gate": (Tile(2, (64,), 6), Tile(1, (64,), 8), Tile(1, (64, 32), 6), Tile(2, (64, 32), 5), Tile(2, (128,), 4)),
    "parts": (Tile(2, (64,), 8), Tile(1, (128,), 8), Tile(1, (64,), 12), Tile(2, (128,), 6)),
    "other": (Tile(2, (64,), 8), Tile(2, (64, 32), 7), Tile(1, (128,), 8), Tile(1, (64,), 12), Tile(2, (128,), 6)),
}
"""By what ends a product. Programs with 32 outputs beside 64 are for short or low ones; in others they wait for L2."""


@lru_cache(maxsize=1024)
def tile_for(ending: str, rows: int, outputs: int, inputs: int) -> Tile:
    """The tile for which the chip's turns read least: what a turn takes is mostly what its programs read from L2."""
    gate = ending == "gate"
    parts = [1]
    if ending == "parts":
        least = 1024 if rows <= 128 else 1536  # inputs of a part: the norm that adds them up reads them all
        parts += [n for n in (2, 4) if inputs % (64 * n) == 0 and inputs // n >= least]

    def read(tile: Tile) -> int:
        each = tile.rows + tile.columns * (2 if gate else 1)
        return tile.turns(rows, outputs) * each * inputs // tile.parts

    tiles = TILES.get(ending, TILES["other"])
    narrow = rows <= FEW if gate else inputs <= 2048
    return min((tile._replace(parts=n) for tile in tiles for n in parts if narrow or 32 not in tile.outputs), key=read)


def pays(ending: str, x: Tensor, outputs: int) -> bool:
    """Whether `tall` is faster than cuBLAS, with what it needs after it, for x [M K] and so many outputs; False also where
    `tall` can't take x."""
    rows, inputs = x.shape
    if x.dtype not in TYPES or inputs % 8:  # what tensor cores take from shared memory, and descriptors copy
        return False
    if ending == "turn":
        return rows <= TURNED_ROWS
    work = rows * outputs * inputs * (2 if ending == "gate" else 1)
    if rows <= LEAST or (ending == "parts" and inputs <= 2048 and work <= WORK):
        return True
    tile = tile_for(ending, rows, outputs, inputs)
    turns = tile.turns(rows, outputs)
    wanted = rows * outputs * tile.parts / (turns * MULTIPROCESSORS * tile.rows * tile.columns)
    if rows <= FEW:
        return turns == 1 and (wanted >= MOSTLY or work <= WORK)
    if ending == "gate":
        return wanted >= FULL
    return ending in ("heads", "parts") and turns == 1 and wanted >= FULL  # cuBLAS has the others' endings too
