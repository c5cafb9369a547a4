"""Rotary embedding in plain PyTorch: interleaved M-RoPE for the decoder, axial for the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frequencies(count: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of `count` rotary pairs: f32 [count], theta ** (-i / count)."""
    # written as transformers writes it: the last bit is amplified by the position
    return 1.0 / (theta ** (torch.arange(count, device=device).float() * 2 / (2 * count)))


def mrope(positions: Tensor, *, head_dim: int, theta: float, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of interleaved M-RoPE: f32 [T 1 D/2] for positions [3 T] (temporal, height, width).

    Pair i turns with the temporal position, except i = 1, 4, 7, ... below 3 * sections[1], which turn with the
    height, and i = 2, 5, 8, ... below 3 * sections[2], with the width. In text the three positions are equal,
    which makes it ordinary rotary embedding.
    """
    half = head_dim // 2
    axis = torch.zeros(half, dtype=torch.int64, device=positions.device)
    for which in (1, 2):
        axis[which : 3 * sections[which] : 3] = which
    angle = positions.float()[axis].T * frequencies(half, theta, positions.device)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def axial(rows_columns: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for patches at (row, column) [2 X]: f32 [X 1 Dv/2]; half of the pairs turn with each."""
    inverse = frequencies(head_dim // 4, theta, rows_columns.device)
    angle = (rows_columns.float().unsqueeze(-1) * inverse).transpose(0, 1).flatten(1)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head: x [T heads D], in f32, back in the dtype of x."""
    a, b = x.float().chunk(2, -1)
    return torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), -1).to(x.dtype)
