"""Pictures to the encoder's input: bytes cut into patches, bytes to values, and the learned position of each patch."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.pdl import FUSED, launch_dependents, options, wait
from mllm.kernels.room import empty_rows


@triton.jit
def cut_kernel(pixels, patches, COLS, PATCH: tl.constexpr, MERGE: tl.constexpr, C: tl.constexpr, UP: tl.constexpr):
    """Patch x of `patches` [X C*PATCH*PATCH] out of `pixels` [rows*PATCH, COLS*PATCH, C]: see `images.patches`."""
    x = tl.program_id(0)
    u = tl.arange(0, UP)
    block, place = x // (MERGE * MERGE), x % (MERGE * MERGE)
    row = block // (COLS // MERGE) * MERGE + place // MERGE
    col = block % (COLS // MERGE) * MERGE + place % MERGE
    channel, inner = u // (PATCH * PATCH), u % (PATCH * PATCH)
    line = (row * PATCH + inner // PATCH).to(tl.int64)
    at = (line * COLS * PATCH + col * PATCH + inner % PATCH) * C + channel
    inside = u < C * PATCH * PATCH
    tl.store(patches + x.to(tl.int64) * C * PATCH * PATCH + u, tl.load(pixels + at, mask=inside), mask=inside)


def cut(pixels: Tensor, *, patch: int, merge: int) -> Tensor:
    """uint8 [X C*patch*patch] of a picture's pixels, uint8 [height width C]: `images.patches` on the device."""
    height, width, channels = pixels.shape
    rows, cols = height // patch, width // patch
    size = channels * patch**2
    out = pixels.new_empty(rows * cols, size)
    cut_kernel[(rows * cols,)](
        pixels, out, cols, PATCH=patch, MERGE=merge, C=channels, UP=triton.next_power_of_2(size), **FUSED
    )  # fmt: skip
    return out


@triton.jit
def _position(coords, table, p, X, E, SIDE, e):
    """Numbers e of the learned grid [SIDE*SIDE E] at patch p, bilinear between its entries, corners aligned."""
    row = tl.load(coords + p).to(tl.float32) * (SIDE - 1)
    col = tl.load(coords + X + p).to(tl.float32) * (SIDE - 1)
    row /= tl.maximum(tl.load(coords + 2 * X + p) - 1, 1).to(tl.float32)
    col /= tl.maximum(tl.load(coords + 3 * X + p) - 1, 1).to(tl.float32)
    r, c = row.to(tl.int32), col.to(tl.int32)
    fr, fc = row - r.to(tl.float32), col - c.to(tl.float32)
    r1, c1 = tl.minimum(r + 1, SIDE - 1), tl.minimum(c + 1, SIDE - 1)
    inside = e < E
    a = tl.load(table + (r * SIDE + c) * E + e, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(table + (r * SIDE + c1) * E + e, mask=inside, other=0.0).to(tl.float32)
    top = a + (b - a) * fc
    a = tl.load(table + (r1 * SIDE + c) * E + e, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(table + (r1 * SIDE + c1) * E + e, mask=inside, other=0.0).to(tl.float32)
    return top + (a + (b - a) * fc - top) * fr


@triton.jit
def enter_kernel(patches, scale, shift, coords, table, values, position, X, U, AREA, E, SIDE, UP: tl.constexpr,
                 EP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """values [X U] = bytes * scale + shift, which differ by channel, and the position [X E] of each patch."""
    launch_dependents(PDL)
    wait(PDL)
    x = tl.program_id(0).to(tl.int64)
    u = tl.arange(0, UP)
    e = tl.arange(0, EP)
    channel = u // AREA
    value = tl.load(patches + x * U + u, mask=u < U, other=0).to(tl.float32)
    place = _position(coords, table, x, X, E, SIDE, e)
    value = value * tl.load(scale + channel, mask=u < U) + tl.load(shift + channel, mask=u < U)
    tl.store(values + x * U + u, value.to(values.dtype.element_ty), mask=u < U)
    tl.store(position + x * E + e, place.to(position.dtype.element_ty), mask=e < E)


def enter(
    patches: Tensor, coords: Tensor, scale: Tensor, shift: Tensor, table: Tensor, *, pdl: bool
) -> tuple[Tensor, Tensor]:
    """Bytes [X U], channel by channel, as values in the type of `table`, and the learned grid `table` [W Ev] at `coords`
    [4 X] (row, column, rows, columns): [X Ev]; scale and shift f32 [channels]."""
    (count, size), width = patches.shape, table.shape[1]
    values = empty_rows(table, count, size)
    position = table.new_empty(count, width)
    enter_kernel[(count,)](
        patches, scale, shift, coords, table, values, position, count, size, size // len(scale), width,
        math.isqrt(len(table)), UP=triton.next_power_of_2(size), EP=triton.next_power_of_2(width), **options(pdl),
    )  # fmt: skip
    return values, position
