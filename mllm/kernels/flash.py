"""Attention of many queries whose bounds only the device knows: prompts over the paged pool, patches over their image.

The grid covers the most tiles that a batch of its size can have, and a program finds its row from the bounds, so one
recording serves every batch that is padded to the same size. Tiles are taken from the end: those of a causal prompt
that have the most keys come first.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.pdl import FUSED

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries and keys that a program takes at a time, warps, tiles of keys in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _locate(indptr, tile, B, BP: tl.constexpr, BM: tl.constexpr):
    """(row, first query of the tile in the row, tiles in all): tiles are numbered row after row."""
    rows = tl.arange(0, BP)
    first = tl.load(indptr + rows, mask=rows < B, other=0)
    tiles = tl.cdiv(tl.load(indptr + rows + 1, mask=rows < B, other=0) - first, BM)
    upto = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    at = total - 1 - tile
    row = tl.sum((upto <= at).to(tl.int32), 0)
    before = tl.sum(tl.where(rows < row, tiles, 0), 0)
    return row, (at - before) * BM, total


@triton.jit
def _columns(base, rows, inside, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Columns [n W] from FIRST on of the head vectors at base + rows [n]; zeros beyond D, and where MASKED outside."""
    d = FIRST + tl.arange(0, W)
    at = base + rows[:, None] + d[None, :]
    if MASKED or FIRST + W > D:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _tokens(pages, t, end, S: tl.constexpr, BN: tl.constexpr, PAGED: tl.constexpr):
    """(where BN tokens from t on lie in the pool, whether they are before `end`)."""
    token = t + tl.arange(0, BN)
    at = token
    if PAGED:
        at = tl.load(pages + token // S, mask=token < end, other=0) * S + token % S
    return at.to(tl.int64), token < end


@triton.jit
def _attend(
    q, q_rest, keys, values, at, inside, top, total, acc, acc_rest, visible, KS: tl.constexpr, VS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum, sum and result of an online softmax."""
    k = _columns(keys, at * KS, inside, 0, W, D, MASKED)
    v = _columns(values, at * VS, inside, 0, W, D, MASKED)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST > 0:
        k_rest = _columns(keys, at * KS, inside, W, REST, D, MASKED)
        v_rest = _columns(values, at * VS, inside, W, REST, D, MASKED)
        score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
    if MASKED:
        score = tl.where(visible, score, -float("inf"))
    new = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new[:, None])
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * fade[:, None], input_precision="ieee")
    if REST > 0:
        acc_rest = tl.dot(p, v_rest, acc_rest * fade[:, None], input_precision="ieee")
    return new, total, acc, acc_rest


@triton.jit
def flash_kernel(
    q, keys, values, out, indptr, lengths, pages, B, N,
    QS: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    REST: tl.constexpr, S: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out [T H*D] of q [T H D], already times the scale; row b has queries indptr[b] to indptr[b + 1].

    PAGED: they are the last of the lengths[b] tokens whose keys and values lie in pages[b]. Else they attend to
    their own row of keys and values. A head is taken in W columns and, where D is more, REST beside them.
    """
    h = tl.program_id(0)
    b, m0, tiles = _locate(indptr, tl.program_id(1), B, BP, BM)
    if tl.program_id(1) >= tiles:
        return
    start = tl.load(indptr + b)
    count = tl.load(indptr + b + 1) - start
    length = count
    keys += (h // G) * D
    values += (h // G) * D
    if PAGED:
        length = tl.load(lengths + b)
        pages += b * N
    else:
        keys += start.to(tl.int64) * KS
        values += start.to(tl.int64) * VS
    m = m0 + tl.arange(0, BM)
    live = m < count
    rows = (start + m).to(tl.int64)
    place = length - count + m  # in the row's context
    end = length
    whole = length // BN * BN  # keys up to here need no mask
    if CAUSAL:
        end = tl.minimum(length, length - count + m0 + BM)
        whole = (length - count + m0 + 1) // BN * BN
    tile = _columns(q + h * D, rows * QS, live, 0, W, D, True)
    tile_rest = tile
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, W], tl.float32)
    acc_rest = total
    if REST > 0:
        tile_rest = _columns(q + h * D, rows * QS, live, W, REST, D, True)
        acc_rest = tl.zeros([BM, REST], tl.float32)
    for t in tl.range(0, whole, BN, num_stages=STAGES):
        at, inside = _tokens(pages, t, end, S, BN, PAGED)
        top, total, acc, acc_rest = _attend(
            tile, tile_rest, keys, values, at, inside, top, total, acc, acc_rest, True, KS, VS, D, W, REST, False
        )
    for t in tl.range(whole, end, BN):
        at, inside = _tokens(pages, t, end, S, BN, PAGED)
        visible = inside[None, :]
        if CAUSAL:
            visible &= (t + tl.arange(0, BN))[None, :] <= place[:, None]
        top, total, acc, acc_rest = _attend(
            tile, tile_rest, keys, values, at, inside, top, total, acc, acc_rest, visible, KS, VS, D, W, REST, True
        )
    d = tl.arange(0, W)
    result = out + (rows * tl.num_programs(0) * D + h * D)[:, None]
    acc /= total[:, None]
    tl.store(result + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    if REST > 0:
        d = W + tl.arange(0, REST)
        acc_rest /= total[:, None]
        tl.store(result + d[None, :], acc_rest.to(out.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


def _width(size: int) -> tuple[int, int]:
    """A head size as powers of two that tensor cores take: 128 as (128, 0), 72 as (64, 16), 112 as (128, 0)."""
    main = max(16, 1 << (size.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(size - main)) if size > main else 0
    return (2 * main, 0) if rest == main else (main, rest)


def _launch(
    q: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, lengths: Tensor, pages: Tensor, *,
    strides: tuple[int, int, int], group: int, page_size: int, paged: bool, tile: Tile,
) -> Tensor:  # fmt: skip
    tokens, heads, size = q.shape
    rows = len(indptr) - 1
    stages = max(1, tile.stages * 2 // q.element_size())  # measured for 16 bits; float32 takes twice the room
    out = q.new_empty(tokens, heads * size)
    main, rest = _width(size)
    grid = (heads, triton.cdiv(tokens, tile.queries) + rows)  # each row's last tile may be a part of one
    flash_kernel[grid](
        q, keys, values, out, indptr, lengths, pages, rows, pages.shape[-1],
        QS=strides[0], KS=strides[1], VS=strides[2], G=group, D=size, W=main, REST=rest, S=page_size,
        BP=triton.next_power_of_2(rows), BM=tile.queries, BN=tile.keys, STAGES=stages, PAGED=paged, CAUSAL=paged,
        num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    return out


def tile_for(tokens: int, size: int, *, wide: bool) -> Tile:
    """What was fastest on an H200 (`wide`: capability 9.0), and fits an Orin otherwise; see `docs/performance.md`."""
    if not wide:
        return Tile(64, 32, 4, 2)
    if size > 80:  # of decoders; the others are of vision encoders
        return Tile(64, 64, 4, 3)
    if tokens <= 2304:
        return Tile(64, 64, 4, 4)
    return Tile(128, 64, 8, 3) if size <= 64 else Tile(128, 64, 4, 4)


def prompts(
    q: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, lengths: Tensor, pages: Tensor, *, tile: Tile
) -> Tensor:
    """[T A] of q [T H D]: every token attends to those before it in its row, over the pool [P S K D]."""
    page_size, kv_heads, size = keys.shape[1:]
    heads = q.shape[1]
    return _launch(
        q, keys, values, indptr, lengths, pages, strides=(heads * size, kv_heads * size, kv_heads * size),
        group=heads // kv_heads, page_size=page_size, paged=True, tile=tile,
    )  # fmt: skip


def images(q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, *, tile: Tile) -> Tensor:
    """[X Ev] of q, k, v [X heads Dv], whose heads lie side by side: every patch attends to all of its image."""
    return _launch(
        q, k, v, indptr, indptr, indptr, strides=(q.stride(0), k.stride(0), v.stride(0)), group=1, page_size=1,
        paged=False, tile=tile,
    )  # fmt: skip
