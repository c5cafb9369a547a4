"""The ends of a decode step, compiled: the likeliest token of each row, and the batch one token further."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mllm.batch import ForwardBatch, SamplingBatch
from mllm.kernels import reference
from mllm.kernels.cpu_lanes import address, compiled, i32, i64
from mllm.kernels.cpu_team import fork, parts_for
from mllm.kernels.ops import NOT_FINITE

INFINITY = 0x7F800000  # the bits of the float; those of a NaN are larger


@compiled()
def _ordered(bits):
    """A whole number that orders as the float with these bits does: the two zeros are one."""
    size = bits & np.int32(0x7FFFFFFF)
    return size if bits >= 0 else -size


@compiled()
def _best(logits, count):
    """The first of the largest numbers, `NOT_FINITE` where any is a NaN or an infinity.

    As whole numbers, whose maximum becomes vector code; that of floats, which may be NaNs, does not.
    """
    bits = i32(logits, count)
    best, furthest = np.int32(-INFINITY), np.int32(0)
    for i in range(count):
        best = max(best, _ordered(bits[i]))
        furthest = max(furthest, bits[i] & np.int32(0x7FFFFFFF))
    if furthest < INFINITY:
        for i in range(count):
            if _ordered(bits[i]) == best:
                return i
    return NOT_FINITE


@compiled()
def _argmax_part(part, parts, logits, rows, count, out):
    tokens = i32(out, rows)
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        tokens[row] = _best(logits + 4 * row * count, count)


_argmax_fork = fork(_argmax_part)


@compiled("void(int64, int64, int64, int64, int64)")
def _argmax(parts, logits, rows, count, out):
    _argmax_fork(parts, (logits, rows, count, out))


def sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor) -> Tensor:
    if not sampling.greedy:
        return reference.sample(logits, sampling, lengths)
    logits, (rows, count) = logits.contiguous(), logits.shape
    out = torch.empty(rows, dtype=torch.int32, device="cpu")
    _argmax(min(parts_for(rows * count, 1), rows), address(logits), rows, count, out.data_ptr())
    return out


@compiled("void(" + "int64, " * 8 + "int64)")
def _advance(tokens, new, positions, slots, lengths, pages, rows, listed, page_size):
    token, chosen, place = i32(tokens, rows), i32(new, rows), i32(positions, 3 * rows)
    slot, length, page = i64(slots, rows), i32(lengths, rows), i32(pages, rows * listed)
    for row in range(rows):
        token[row] = max(chosen[row], 0)  # a row that failed goes on with some token until the host ends it
        index = length[row]  # of the newest token: the old length
        if index > 0:
            at = min(index // page_size, listed - 1)
            slot[row] = np.int64(page[row * listed + at]) * page_size + index % page_size
            length[row] += 1
            for axis in range(3):
                place[axis * rows + row] += 1


def advance_(batch: ForwardBatch, tokens: Tensor, *, page_size: int) -> None:
    rows, listed = batch.pages.shape
    _advance(
        batch.tokens.data_ptr(), tokens.contiguous().data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr(),
        batch.lengths.data_ptr(), batch.pages.data_ptr(), rows, listed, page_size,
    )  # fmt: skip
