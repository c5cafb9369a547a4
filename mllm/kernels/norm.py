"""RMSNorm and layer norm of many rows, one program a row; and the sum that a split product leaves to the norm after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows


@triton.jit
def norm_kernel(x, parts, shift, weight, y, total, B, E, eps, EP: tl.constexpr, PARTS: tl.constexpr,
                SHIFT: tl.constexpr, CENTRE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [B E] = norm(x + the sum of parts [PARTS B E] + shift [E]); with parts, that sum goes to `total`.

    SHIFT: whether there is one. CENTRE: layer norm, which has no weight.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    inside = e < E
    launch_dependents(PDL)
    if not CENTRE:
        w = tl.load(weight + e, mask=inside, other=0.0)
    if SHIFT:
        added = tl.load(shift + e, mask=inside, other=0.0)
    wait(PDL)
    v = tl.load(x + b * E + e, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        v += tl.load(parts + (part * B + b) * E + e, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        v += added.to(tl.float32)
    if PARTS > 0:
        v = v.to(total.dtype.element_ty).to(tl.float32)  # what is normalised is what the next layer adds to
        tl.store(total + b * E + e, v.to(total.dtype.element_ty), mask=inside)
    if CENTRE:
        v = tl.where(inside, v - tl.sum(v, 0) / E, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / E + eps)
    if not CENTRE:
        v *= w.to(tl.float32)
    tl.store(y + b * E + e, v.to(y.dtype.element_ty), mask=inside)


FEW = 256
"""Rows up to which a multiprocessor has one or two of them, and more warps for each."""


def warps_for(rows: int, width: int) -> int:
    """Warps of a program that normalises a row: what was fastest on an H200, by the record in `docs/performance.md`."""
    each = width // (128 if rows <= FEW else 256)
    return min(16, 1 << max(0, each.bit_length() - 1))


class Pending(NamedTuple):
    """A residual stream x [T E] and the parts [... T E] of a product, and its bias [E], still to be added to it.

    Products with many or few rows leave their results so, because the norm that follows reads the stream anyway.
    """

    x: Tensor
    parts: Tensor
    bias: Tensor | None = None

    def at(self, rows: Tensor) -> Pending:
        """Some rows of it."""
        return Pending(self.x.index_select(0, rows), self.parts.index_select(1, rows), self.bias)


Stream = Tensor | Pending


def add_norm(stream: Stream, weight: Tensor | None, *, eps: float, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """(the stream with nothing pending, its norm), both [T E]: RMSNorm, or layer norm where there is no weight."""
    x, parts, shift = stream if isinstance(stream, Pending) else (stream, None, None)
    rows, width = x.shape
    y = empty_rows(x, rows, width)
    total = x if parts is None else torch.empty_like(x)
    norm_kernel[(rows,)](
        x, x if parts is None else parts, x if shift is None else shift, x if weight is None else weight, y, total, rows,
        width, eps, EP=triton.next_power_of_2(width), PARTS=0 if parts is None else len(parts), SHIFT=shift is not None,
        CENTRE=weight is None, num_warps=warps_for(rows, width), **options(pdl),
    )  # fmt: skip
    return total, y


def split_linear(y: Tensor, weight: Tensor) -> Tensor:
    """y [T K] @ weight [E K].T in parts [... T E], by cuBLAS.

    It does not split the inputs of a product of its own accord, so one of few rows and outputs keeps a part of the chip
    busy for long: K = 4,096 for 256 rows of 1,024 took 10.0 us on an H200, in four parts 6.7.
    """
    rows, inputs = y.shape
    tiles = triton.cdiv(rows, 128) * triton.cdiv(len(weight), 64)
    parts = min(4, 256 // tiles, inputs // 512)
    parts = 1 << (parts.bit_length() - 1) if parts > 1 and inputs % 64 == 0 else 1
    if parts == 1:
        return F.linear(y, weight).unsqueeze(0)
    y, weight = y.unflatten(1, (parts, -1)), weight.unflatten(1, (parts, -1))
    return torch.bmm(y.transpose(0, 1), weight.permute(1, 2, 0))
