"""Tensors with room behind them, for kernels that copy their rows by whole tiles.

Hopper's copies fill with zeros what lies beyond a tensor, and take up to 1.4 times as long for it: a product of 130 rows
took 9.9 us where one of 256 took 7.0. So what is copied has storage for whole tiles, and what those hold beyond the last
row is read and left unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128
"""Rows of the largest tile."""


def empty_rows(like: Tensor, rows: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """[rows *shape] on the device of `like`, and of its type unless another is named, with room for whole tiles."""
    return like.new_empty(-(-rows // ROWS) * ROWS, *shape, dtype=dtype)[:rows]


def empty_groups(like: Tensor, groups: int, rows: int, width: int) -> Tensor:
    """[groups rows width], each of which has room for whole tiles."""
    return like.new_empty(groups, -(-rows // ROWS) * ROWS, width)[:, :rows]


def rows_of(x: Tensor, tile: int) -> int:
    """The rows of x, a whole number of tiles where its storage has room for them."""
    count = x.shape[0]  # `len` takes PyTorch ten times as long, at every launch
    whole = -(-count // tile) * tile
    held = (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()) // max(x.stride(0), 1)
    return whole if whole <= held else count
