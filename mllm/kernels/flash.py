"""Attention of many queries whose bounds only the device knows: prompts over the paged pool, patches over their image.

The grid covers the most tiles that a batch of its size can have, and a program finds its row from the bounds, so one
recording serves every batch that is padded to the same size. Tiles are taken from the end: those of a causal prompt
that have the most keys come first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Queries and keys that a program takes at a time, warps, tiles of keys in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _locate(indptr, B, BP: tl.constexpr, BM: tl.constexpr, ONE: tl.constexpr):
    """(row, its first query, its queries, the first one of this program's tile in the row): a tile for each program.

    Tiles are numbered row after row. A program for which there is none gets one that begins at the row's end or beyond.
    ONE: there is one row, so only the number of its queries is to be loaded.
    """
    if ONE:
        row = 0
        start = 0
        count = tl.load(indptr + 1)
        m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    else:
        rows = tl.arange(0, BP)
        first = tl.load(indptr + rows, mask=rows < B, other=0)
        tiles = tl.cdiv(tl.load(indptr + rows + 1, mask=rows < B, other=0) - first, BM)
        upto = tl.cumsum(tiles, 0)
        at = tl.sum(tiles, 0) - 1 - tl.program_id(1)
        row = tl.sum((upto <= at).to(tl.int32), 0)
        start = tl.load(indptr + row)
        count = tl.load(indptr + row + 1) - start
        m0 = tl.where(at < 0, count, (at - tl.sum(tl.where(rows < row, tiles, 0), 0)) * BM)
    return row, start, count, m0


@triton.jit
def _columns(base, rows, inside, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Columns [n W] from FIRST on of the head vectors at base + rows [n]; zeros beyond D, and where MASKED outside."""
    d = FIRST + tl.arange(0, W)
    at = base + rows[:, None] + d[None, :]
    if MASKED or FIRST + W > D:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def slots_of(pages, t, N, S: tl.constexpr, BN: tl.constexpr):
    """Where BN tokens from t on lie in the pool. Those beyond the N pages lie in the first, so no length is needed."""
    token = t + tl.arange(0, BN)
    return (tl.load(pages + token // S, mask=token < N * S, other=0) * S + token % S).to(tl.int64)


@triton.jit
def _load(keys, values, at, inside, KS: tl.constexpr, VS: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
          REST: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """(keys, values, and their columns beyond W) of the tokens that lie `at`; zeros outside where MASKED."""
    k = _columns(keys, at * KS, inside, 0, W, D, MASKED)
    v = _columns(values, at * VS, inside, 0, W, D, MASKED)
    k_rest, v_rest = k, v
    if REST > 0:
        k_rest = _columns(keys, at * KS, inside, W, REST, D, MASKED)
        v_rest = _columns(values, at * VS, inside, W, REST, D, MASKED)
    return k, v, k_rest, v_rest


@triton.jit
def _attend(
    q, q_rest, tile, visible, top, total, acc, acc_rest, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values: the running maximum, sum and result of an online softmax."""
    k, v, k_rest, v_rest = tile
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST > 0:
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
def _keys(
    q, q_rest, keys, values, boxes, row, column, pages, end, place, N, KS: tl.constexpr, VS: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGED: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """Sum and result of the softmax of the queries at `place` [BM] over the keys before `end`.

    Those of a prompt are masked one and all: a loop of its own for the last ones would begin with empty hands. Their
    pages are looked up a tile ahead, or the loads of keys would wait for them and not be in flight.
    """
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, W], tl.float32)
    acc_rest = tl.zeros([BM, REST], tl.float32) if REST > 0 else total
    whole = 0
    if PAGED:
        ahead = slots_of(pages, 0, N, S, BN)
    else:
        whole = end // BN * BN
        for t in tl.range(0, whole, BN):
            if BOXED:
                k_box, v_box, k_rest_box, v_rest_box = boxes
                tile = (k_box.load([row + t, column]), v_box.load([row + t, column]),
                        k_rest_box.load([row + t, column + W]), v_rest_box.load([row + t, column + W]))  # fmt: skip
            else:
                token = t + tl.arange(0, BN)
                tile = _load(keys, values, token.to(tl.int64), token < end, KS, VS, D, W, REST, False)
            top, total, acc, acc_rest = _attend(q, q_rest, tile, True, top, total, acc, acc_rest, REST, False)
    for t in tl.range(whole, end, BN):
        token = t + tl.arange(0, BN)
        visible = (token < end)[None, :]
        at = token.to(tl.int64)
        if PAGED:
            at = ahead
            ahead = slots_of(pages, t + BN, N, S, BN)
            visible &= token[None, :] <= place[:, None]
        tile = _load(keys, values, at, token < end, KS, VS, D, W, REST, True)
        top, total, acc, acc_rest = _attend(q, q_rest, tile, visible, top, total, acc, acc_rest, REST, True)
    return total, acc, acc_rest


@triton.jit
def flash_kernel(
    q, keys, values, k_box, v_box, k_rest_box, v_rest_box, out, indptr, lengths, pages, B, N, T,
    QS: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    REST: tl.constexpr, S: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGED: tl.constexpr,
    ONE: tl.constexpr, BOXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T H*D] of q [T H D], already times the scale; row b has queries indptr[b] to indptr[b + 1].

    PAGED: they are the last of the lengths[b] tokens whose keys and values lie in pages[b], and attend to those before
    them. Else they attend to their own row of keys and values. ONE: there is one row. A head is taken in W columns and,
    where D is more, REST beside them. BOXED: whole tiles of those are copied by the descriptors of the tensors; what
    they hold beyond D is of the next head, and is met by zeros of q.
    """
    launch_dependents(PDL)
    h = tl.program_id(0)
    b, start, count, m0 = _locate(indptr, B, BP, BM, ONE)
    length = count
    keys += (h // G) * D
    values += (h // G) * D
    if PAGED:
        length = tl.load(lengths + b)
        pages += b * N
    else:
        keys += tl.cast(start, tl.int64) * KS
        values += tl.cast(start, tl.int64) * VS
    m = m0 + tl.arange(0, BM)
    live = m < count
    given = m < T if ONE else live  # of one row also what pads the batch: it is loaded while the count is
    rows = (start + m).to(tl.int64)
    wait(PDL)
    tile = _columns(q + h * D, rows * QS, given, 0, W, D, True)
    tile_rest = _columns(q + h * D, rows * QS, given, W, REST, D, True) if REST > 0 else tile
    length = tl.where(m0 < count, length, 0)  # a program without a tile goes over no keys: to return, it had to wait
    end = tl.minimum(length, length - count + m0 + BM) if PAGED else length
    total, acc, acc_rest = _keys(
        tile, tile_rest, keys, values, (k_box, v_box, k_rest_box, v_rest_box), start, h * D, pages, end,
        length - count + m, N, KS, VS, D, W, REST, S, BM, BN, PAGED, BOXED,
    )  # fmt: skip
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
    strides: tuple[int, int, int], group: int, page_size: int, paged: bool, tile: Tile, boxes: tuple[Any, ...] = (),
    pdl: bool,
) -> Tensor:  # fmt: skip
    tokens, heads, size = q.shape
    rows = len(indptr) - 1
    one = rows == 1
    stages = max(1, tile.stages * 2 // q.element_size())  # measured for 16 bits; float32 takes twice the room
    out = empty_rows(q, tokens, heads * size)
    main, rest = _width(size)
    tiles = triton.cdiv(tokens, tile.queries) + (0 if one else rows)  # each row's last tile may be a part of one
    flash_kernel[(heads, tiles)](
        q, keys, values, *(boxes or (keys, values, keys, values)), out, indptr, lengths, pages, rows, pages.shape[-1],
        tokens, QS=strides[0], KS=strides[1], VS=strides[2], G=group, D=size, W=main, REST=rest, S=page_size,
        BP=triton.next_power_of_2(rows), BM=tile.queries, BN=tile.keys, PAGED=paged, ONE=one, BOXED=bool(boxes),
        num_warps=tile.warps, num_stages=stages, **options(pdl),
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
    q: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, lengths: Tensor, pages: Tensor, *, tile: Tile,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """[T A] of q [T H D]: every token attends to those before it in its row, over the pool [P S K D]."""
    page_size, kv_heads, size = keys.shape[1:]
    heads = q.shape[1]
    return _launch(
        q, keys, values, indptr, lengths, pages, strides=(heads * size, kv_heads * size, kv_heads * size),
        group=heads // kv_heads, page_size=page_size, paged=True, tile=tile, pdl=pdl,
    )  # fmt: skip


def images(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, *, tile: Tile, boxed: bool = False, pdl: bool = False
) -> Tensor:
    """[X Ev] of q, k, v [X heads Dv], whose heads lie side by side: every patch attends to all of its image.

    `boxed`: by tensor descriptors, from capability 9.0 on, where the size of a head is no power of two. Those are copied
    with less ado then, 1.15 times as fast; the others gain nothing.
    """
    boxes = ()
    main, rest = _width(q.shape[2])
    if boxed and rest and all(x.stride(0) * x.element_size() % 16 == 0 for x in (k, v)):
        boxes = tuple(_box(x, tile.keys, columns) for columns in (main, rest) for x in (k, v))
    return _launch(
        q, k, v, indptr, indptr, indptr, strides=(q.stride(0), k.stride(0), v.stride(0)), group=1, page_size=1,
        paged=False, tile=tile, boxes=boxes, pdl=pdl,
    )  # fmt: skip


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of tiles of `rows` by `columns` of x [X heads Dv]."""
    return TensorDescriptor(x, [len(x), x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, columns])
