"""RMSNorm and layer norm of many rows, one program a row; and the sum that a split product leaves to the norm after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.pdl import launch_dependents, options, wait


@triton.jit
def norm_kernel(x, parts, weight, bias, y, total, B, E, eps, EP: tl.constexpr, PARTS: tl.constexpr,
                CENTRE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [B E] = norm(x + the sum of parts [PARTS B E]); with parts, that sum goes to `total`. CENTRE: layer norm."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    inside = e < E
    launch_dependents(PDL)
    w = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    v = tl.load(x + b * E + e, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        v += tl.load(parts + (part * B + b) * E + e, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        v = v.to(total.dtype.element_ty).to(tl.float32)  # what is normalised is what the next layer adds to
        tl.store(total + b * E + e, v.to(total.dtype.element_ty), mask=inside)
    if CENTRE:
        v = tl.where(inside, v - tl.sum(v, 0) / E, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / E + eps) * w
    if CENTRE:
        v += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * E + e, v.to(y.dtype.element_ty), mask=inside)


WARP_WIDTH = 256
"""Elements of a row for each warp."""


class Pending(NamedTuple):
    """A residual stream x [T E] and the parts [... T E] of a product that are still to be added to it.

    Products with many or few rows leave their results so, because the norm that follows reads the stream anyway.
    """

    x: Tensor
    parts: Tensor

    def at(self, rows: Tensor) -> Pending:
        """Some rows of it."""
        return Pending(self.x.index_select(0, rows), self.parts.index_select(1, rows))


Stream = Tensor | Pending


def add_norm(
    stream: Stream, weight: Tensor, bias: Tensor | None = None, *, eps: float, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(the stream with nothing pending, its norm), both [T E]: RMSNorm, or layer norm where there is a bias."""
    x, parts = stream if isinstance(stream, Pending) else (stream, None)
    rows, width = x.shape
    y = torch.empty_like(x)
    total = x if parts is None else torch.empty_like(x)
    padded = triton.next_power_of_2(width)
    norm_kernel[(rows,)](
        x, x if parts is None else parts, weight, weight if bias is None else bias, y, total, rows, width, eps,
        EP=padded, PARTS=0 if parts is None else len(parts), CENTRE=bias is not None,
        num_warps=max(1, min(8, padded // WARP_WIDTH)), **options(pdl),
    )  # fmt: skip
    return total, y
