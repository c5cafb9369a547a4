"""Rotary embedding in plain PyTorch: M-RoPE in both layouts for decoders, axial for the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.errors import ShapeError


def frequencies(count: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of `count` rotary pairs: f32 [count], theta ** (-i / count)."""
    # written as transformers writes it: the last bit is amplified by the position
    return 1.0 / (theta ** (torch.arange(count, device=device).float() * 2 / (2 * count)))


def axes(count: int, sections: Sequence[int], *, interleaved: bool, device: torch.device) -> Tensor:
    """Which of the three positions each of `count` rotary pairs turns with: i64 [count], see `mrope`.

    Raises `ShapeError` where sections that follow each other are not three or do not hold `count` pairs.
    """
    axis = torch.zeros(count, dtype=torch.int64, device=device)
    if interleaved:
        for which in (1, 2):
            axis[which : 3 * sections[which] : 3] = which
        return axis
    check_sections(count, sections)
    axis[sections[0] :] = 1
    axis[count - sections[2] :] = 2
    return axis


def check_sections(count: int, sections: Sequence[int]) -> None:
    """Raises `ShapeError` unless the three sections, one after the other, hold `count` pairs."""
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != count:
        raise ShapeError(f"mrope: expected three sections of {count} rotary pairs in all, got {tuple(sections)}")


def mrope(
    positions: Tensor, *, head_dim: int, theta: float, sections: Sequence[int], interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of M-RoPE: f32 [T 1 D/2] for positions [3 T] (temporal, height, width).

    Interleaved, as in Qwen3-VL: pair i turns with the temporal position, except i = 1, 4, 7, ... below
    3 * sections[1], which turn with the height, and i = 2, 5, 8, ... below 3 * sections[2], with the width. If not,
    as in Qwen2-VL: the first sections[0] pairs turn with the temporal position, the next sections[1] with the
    height, the last sections[2] with the width. In text the three positions are equal, which makes either of them
    ordinary rotary embedding. Where only a part of each head is rotated, `head_dim` is the size of that part.
    """
    half = head_dim // 2
    axis = axes(half, sections, interleaved=interleaved, device=positions.device)
    angle = positions.float()[axis].T * frequencies(half, theta, positions.device)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def axial(rows_columns: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for patches at (row, column) [2 X]: f32 [X 1 Dv/2]; half of the pairs turn with each."""
    inverse = frequencies(head_dim // 4, theta, rows_columns.device)
    angle = (rows_columns.float().unsqueeze(-1) * inverse).transpose(0, 1).flatten(1)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of every head: x [T heads D], in f32, back in the dtype of x.

    The tables [T 1 half] say how much of a head that is: what follows its first 2 * half numbers stays as it is.
    """
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].float().chunk(2, -1)
    turned = torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), -1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbours (2i, 2i + 1) of every head: x [X heads D] by tables [X 1 D/2], in f32, back in the dtype of x."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
