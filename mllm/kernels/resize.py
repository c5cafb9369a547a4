"""Pictures to another size, as Pillow's bicubic filter has it, byte for byte.

One pass a side. An output is the sum of the inputs around it by weights in whole numbers, and a byte again before the next
pass, so there is nothing that another machine could round otherwise. Pillow takes 20 ms for two million pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from mllm.batch import upload_all
from mllm.kernels.pdl import FUSED

BITS = 22
"""Of a weight behind its point, as in Pillow: the other ten are for the byte, the sign, and weights above 1."""
REACH = 2.0
"""Inputs to each side that the filter sees, where a picture is not made smaller."""
BLOCK = 1024
DOWN_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether Pillow begins with the height where that loses more than twice as many pixels as the width. Before 13 it begins
with the width."""


@triton.jit(do_not_specialize=["COUNT", "IN", "OUT", "INNER", "TAPS"])  # sizes of pictures are all different
def resize_kernel(pixels, first, weights, out, COUNT, IN, OUT, INNER, TAPS, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """`out` [n OUT INNER] of `pixels` [n IN INNER], COUNT bytes: output o is TAPS inputs from `first`[o] on by `weights`
    [OUT TAPS]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < COUNT
    o, inner, outer = i // INNER % OUT, i % INNER, (i // INNER // OUT).to(tl.int64)
    begin = tl.load(first + o, mask=inside, other=0)
    total = tl.full([BLOCK], 1 << (BITS - 1), tl.int32)  # half, to round
    for tap in range(TAPS):
        there = inside & (begin + tap < IN)  # a weight beyond is 0
        at = (outer * IN + begin + tap) * INNER + inner
        byte = tl.load(pixels + at, mask=there, other=0).to(tl.int32)
        total += byte * tl.load(weights + o * TAPS + tap, mask=inside, other=0)
    value = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
    tl.store(out + i, value, mask=inside)


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [height width 3] of a picture's pixels, uint8 [rows columns 3]: `PIL.Image.resize` with `BICUBIC`."""
    rows, columns, _ = pixels.shape
    lost = rows - height
    down_first = DOWN_FIRST and lost > 0 and lost > 2 * (columns - width)
    passes = [(0, height), (1, width)] if down_first else [(1, width), (0, height)]
    for side, wanted in passes:
        pixels = _along(pixels, side, wanted)
    return pixels


def _along(pixels: Tensor, side: int, wanted: int) -> Tensor:
    """The pixels themselves where there is nothing to do."""
    shape = list(pixels.shape)
    size, shape[side] = shape[side], wanted
    if size == wanted:
        return pixels
    first, weights = upload_all(coefficients(size, wanted), pixels.device)
    out = pixels.new_empty(shape)
    resize_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        pixels, first, weights, out, out.numel(), size, wanted, math.prod(shape[side + 1 :]), weights.shape[1], BITS=BITS,
        BLOCK=BLOCK, **FUSED,
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def coefficients(size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Of `wanted` outputs of a side of `size` inputs: the first input of each, i32 [wanted], and the weights of those from
    there on, in units of 2^-BITS, i32 [wanted taps]. In double precision and in the order in which Pillow counts them."""
    scale = size / wanted
    stretch = max(scale, 1.0)  # of the filter: an output of a smaller picture sees as much of the larger one
    taps = math.ceil(REACH * stretch) * 2 + 1
    centre = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centre - REACH * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + REACH * stretch + 0.5).astype(np.int64), size)
    place = first[:, None] + np.arange(taps)
    weights = np.where(place < last[:, None], _bicubic((place - centre[:, None] + 0.5) * (1 / stretch)), 0.0)
    total = np.zeros(wanted)
    for tap in range(taps):
        total += weights[:, tap]
    units = weights / total[:, None] * 2**BITS
    whole = np.trunc(units + np.where(units < 0, -0.5, 0.5)).astype(np.int32)
    return torch.from_numpy(first.astype(np.int32)), torch.from_numpy(whole)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -1/2."""
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
