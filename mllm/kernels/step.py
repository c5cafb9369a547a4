"""The small kernels around the layers of a decode step: embedding and rotary tables, argmax, advance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.batch import ForwardBatch
from mllm.config import TextConfig
from mllm.kernels import rope
from mllm.kernels.ops import NOT_FINITE
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.rotary import check_sections


@triton.jit
def embed_kernel(tokens, table, out, E, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[t] = table[tokens[t]]"""
    launch_dependents(PDL)
    wait(PDL)
    t = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens + t).to(tl.int64) * E
    tl.store(out + t * E + e, tl.load(table + row + e, mask=e < E, other=0.0), mask=e < E)


def embed(tokens: Tensor, table: Tensor, *, pdl: bool) -> Tensor:
    width = table.shape[1]
    out = table.new_empty(len(tokens), width)
    embed_kernel[(len(tokens), triton.cdiv(width, 1024))](tokens, table, out, width, BLOCK=1024, **options(pdl))
    return out


@triton.jit
def rotary_kernel(positions, frequencies, cos, sin, ACROSS, ALONG, HALF, HEIGHT, WIDTH, INTERLEAVED: tl.constexpr,
                  BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """cos, sin f32 [T HALF] of M-RoPE at positions [3 T], whose steps are ACROSS and ALONG; see `rotary.mrope`."""
    launch_dependents(PDL)
    wait(PDL)
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if INTERLEAVED:
        axis = tl.where((i % 3 == 1) & (i < 3 * HEIGHT), 1, tl.where((i % 3 == 2) & (i < 3 * WIDTH), 2, 0))
    else:
        axis = tl.where(i >= HALF - WIDTH, 2, tl.where(i >= HALF - WIDTH - HEIGHT, 1, 0))
    place = tl.load(positions + axis * ACROSS + t * ALONG).to(tl.float32)
    angle = place * tl.load(frequencies + i, mask=i < HALF, other=0.0)
    # the chip's sine is exact to 2**-21 within one turn only, so whole turns go first, in float64
    turns = angle.to(tl.float64) * 0.15915494309189535
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    tl.store(cos + t * HALF + i, tl.cos(angle), mask=i < HALF)
    tl.store(sin + t * HALF + i, tl.sin(angle), mask=i < HALF)


def rotary_of(batch: ForwardBatch, config: TextConfig, *, pdl: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine f32 [T D/2] of a batch's positions."""
    frequencies = rope.frequencies(config.head_dim // 2, config.rope_theta, batch.positions.device)
    return rotary(batch.positions, frequencies, config.mrope_section, pdl=pdl)


def rotary(
    positions: Tensor, frequencies: Tensor, sections: Sequence[int], *, interleaved: bool = True, pdl: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of M-RoPE: f32 [T pairs] for positions [3 T] of any strides and frequencies f32 [pairs].

    The layouts are those of `rotary.mrope`, and so is the `ShapeError` for sections that do not hold the pairs.
    """
    count, half = positions.shape[1], len(frequencies)
    if not interleaved:
        check_sections(half, sections)
    cos = torch.empty(count, half, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    rotary_kernel[(count,)](
        positions, frequencies, cos, sin, *positions.stride(), half, sections[1], sections[2],
        INTERLEAVED=interleaved, BLOCK=triton.next_power_of_2(half), **options(pdl),
    )  # fmt: skip
    return cos, sin


@triton.jit
def argmax_kernel(logits, best, where, finite, clear, V, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                  CLEAR: tl.constexpr, CP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The largest logit of each part of each row, its index, and whether the part's sum is finite.

    Sets `clear` [B CLEAR] to 0: sums that later kernels add to, which a memset would keep from following at once.
    """
    launch_dependents(PDL)
    wait(PDL)
    b = tl.program_id(0)
    part = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=-float("inf"))
    total = tl.sum(tl.where(at < V, x, 0.0), 0)
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(best + b * PARTS + part, value)
    tl.store(where + b * PARTS + part, part * BLOCK + index)
    tl.store(finite + b * PARTS + part, (total - total == 0.0).to(tl.int32))  # inf - inf and NaN - NaN are NaN
    if CLEAR > 0:
        c = tl.arange(0, CP)
        tl.store(clear + b * CLEAR + c, 0, mask=c < tl.where(part == 0, CLEAR, 0))


@triton.jit
def pick_kernel(best, where, finite, tokens, PARTS: tl.constexpr, PP: tl.constexpr, NOT_FINITE: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """The likeliest token of a row, the first of equals, or NOT_FINITE."""
    launch_dependents(PDL)
    wait(PDL)
    b = tl.program_id(0)
    p = tl.arange(0, PP)
    value = tl.load(best + b * PARTS + p, mask=p < PARTS, other=-float("inf"))
    good = tl.min(tl.load(finite + b * PARTS + p, mask=p < PARTS, other=1), 0)
    first = tl.argmax(value, 0)
    token = tl.load(where + b * PARTS + first)
    tl.store(tokens + b, tl.where(good == 1, token, NOT_FINITE))


def likeliest(logits: Tensor, block: int, *, clear: Tensor | None = None, pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each part of `block` logits, f32 [B V]: the largest, its index i32, and whether all are finite, i32, each
    [B parts]. Sets `clear` [B ...] to 0."""
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, block)
    best = logits.new_empty(rows, parts)
    where = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    finite = torch.empty_like(where)
    count = 0 if clear is None else clear[0].numel()
    argmax_kernel[(rows, parts)](
        logits, best, where, finite, where if clear is None else clear, vocabulary, PARTS=parts, BLOCK=block,
        CLEAR=count, CP=triton.next_power_of_2(max(count, 1)), **options(pdl),
    )  # fmt: skip
    return best, where, finite


def pick(best: Tensor, where: Tensor, finite: Tensor, *, pdl: bool) -> Tensor:
    """Tokens i32 [B]: of each row of [B parts] the index of the best part, the first of equals, or `NOT_FINITE`."""
    rows, parts = best.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=best.device)
    pick_kernel[(rows,)](
        best, where, finite, tokens, PARTS=parts, PP=triton.next_power_of_2(parts), NOT_FINITE=NOT_FINITE,
        **options(pdl),
    )  # fmt: skip
    return tokens


def argmax(logits: Tensor, *, pdl: bool) -> Tensor:
    """Greedy tokens i32 [B] of logits f32 [B V]; `NOT_FINITE` for a row with a NaN or an infinity."""
    return pick(*likeliest(logits, 2048, pdl=pdl), pdl=pdl)


@triton.jit
def advance_kernel(tokens, new, positions, slots, pages, lengths, B, N, S: tl.constexpr, BP: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """One token further for every row; see `reference.advance_`.

    It lets no kernel start early: those of the next step read lengths before they wait.
    """
    wait(PDL)
    b = tl.arange(0, BP)
    row = b < B
    length = tl.load(lengths + b, mask=row, other=0)
    live = row & (length > 0)
    tl.store(tokens + b, tl.maximum(tl.load(new + b, mask=row, other=0), 0), mask=row)
    for axis in tl.static_range(3):
        tl.store(positions + axis * B + b, tl.load(positions + axis * B + b, mask=live, other=0) + 1, mask=live)
    page = tl.load(pages + b * N + tl.minimum(length // S, N - 1), mask=live, other=0)
    tl.store(slots + b, page.to(tl.int64) * S + length % S, mask=live)
    tl.store(lengths + b, length + 1, mask=live)


def advance_(batch: ForwardBatch, tokens: Tensor, *, page_size: int, pdl: bool) -> None:
    rows, listed = batch.pages.shape
    advance_kernel[(1,)](
        batch.tokens, tokens, batch.positions, batch.slots, batch.pages, batch.lengths, rows, listed,
        S=page_size, BP=triton.next_power_of_2(rows), **options(pdl),
    )  # fmt: skip
