"""Attention of many queries on Hopper (capability 9.0): what `flash` does, with each warp group at a task of its own.

A warp copies keys and values through a ring in shared memory, by tensor descriptors; one to four groups of four warps
take 64 queries each. A group's next scores and last result are on the tensor cores while it computes the softmax between
them, and the groups take turns at handing in, so that the one's softmax runs beside the other's products. Written in
Gluon, Triton's language for what its own compiler would not arrange.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mllm.kernels.flash_group import again, consume
from mllm.kernels.hopper import MULTIPROCESSORS, TYPES, copy, descriptor, new_barriers
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows


class Tile(NamedTuple):
    """Warp groups, each of which takes 64 queries; keys at a time; tiles of keys in flight."""

    groups: int
    keys: int
    stages: int


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _locate(indptr, B, BP: gl.constexpr, BM: gl.constexpr):
    """(row, its first query, its queries, the first one of this program's tile in the row): a tile for each program.

    As `flash._locate`, which is written in the other language: neither compiler takes the one's vectors for the other's.
    """
    rows = gl.arange(0, BP, gl.BlockedLayout([1], [32], [4], [0]))
    first = gl.load(indptr + rows, mask=rows < B, other=0)
    tiles = gl.cdiv(gl.load(indptr + rows + 1, mask=rows < B, other=0) - first, BM)
    upto = gl.associative_scan(tiles, 0, _add)
    at = gl.sum(tiles, 0) - 1 - gl.program_id(1)
    row = gl.sum((upto <= at).to(gl.int32), 0)
    start = gl.load(indptr + row)
    count = gl.load(indptr + row + 1) - start
    m0 = gl.where(at < 0, count, (at - gl.sum(gl.where(rows < row, tiles, 0), 0)) * BM)
    return row, start, count, m0


@gluon.jit
def _copy(boxes, rings, full, stage, rows, column, BOX: gl.constexpr):
    """Bring the columns of one head, of the tokens that lie at `rows` (one for each BOX of them), into a stage."""
    BN: gl.constexpr = rings[0].shape[1]
    W: gl.constexpr = rings[0].shape[2]
    REST: gl.constexpr = rings[1].shape[2] if len(rings) > 1 else 0
    mbarrier.expect(full.index(stage), BN * (W + REST) * 2)
    for part in gl.static_range(BN // BOX):
        to = rings[0].index(stage).slice(part * BOX, BOX)
        copy(boxes[0], [rows[part], column], full.index(stage), to)
        if REST > 0:
            to = rings[1].index(stage).slice(part * BOX, BOX)
            copy(boxes[1], [rows[part], column + W], full.index(stage), to)


@gluon.jit
def _produce(copies, verdict, S: gl.constexpr, BOX: gl.constexpr, PAGED: gl.constexpr):
    """The warp that copies: all keys and values, and again where the groups attend again."""
    _tiles(copies, S, BOX, PAGED, 0)
    if len(verdict) > 0:  # noqa: SIM102  is the compiler's; the other is the program's
        if again(verdict, 1):
            _tiles(copies, S, BOX, PAGED, 1)


@gluon.jit
def _tiles(copies, S: gl.constexpr, BOX: gl.constexpr, PAGED: gl.constexpr, ROUND: gl.constexpr):
    """n tiles of keys and of values, each copied as soon as its place is free. ROUND: how often all were before.

    The last tile of an image ends where the image does, so that nothing beyond is read: what pads a batch may be no
    numbers. An image shorter than a tile is met by the end of the image before it, whose weights are zero.
    """
    k_boxes, v_boxes, ring, start, count, pages, n, N, column = copies
    ks, vs, full, free = ring
    STAGES: gl.constexpr = ks[0].shape[0]
    BN: gl.constexpr = ks[0].shape[1]
    k_full, v_full = full
    k_free, v_free = free
    first = ROUND * n  # of the tiles that have been in the ring
    for i in range(n):
        stage = (first + i) % STAGES
        phase = ((first + i) // STAGES) & 1 ^ 1
        rows = ()
        for part in gl.static_range(BN // BOX):
            t = i * BN + part * BOX
            if PAGED:
                rows += (gl.load(pages + t // S, mask=t < N * S, other=0) * S + t % S,)
            else:
                rows += (start + gl.minimum(t, count - BN),)
        mbarrier.wait(k_free.index(stage), phase)
        _copy(k_boxes, ks, k_full, stage, rows, column, BOX)
        mbarrier.wait(v_free.index(stage), phase)
        _copy(v_boxes, vs, v_full, stage, rows, column, BOX)


@gluon.jit
def flash_hopper_kernel(
    q_box, k_box, v_box, k_rest_box, v_rest_box, q, out, indptr, lengths, pages, B, N,
    QS: gl.constexpr, G: gl.constexpr, D: gl.constexpr, REST: gl.constexpr, S: gl.constexpr, BP: gl.constexpr,
    BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr, PAGED: gl.constexpr,
    REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `flash_kernel`, by descriptors of all tokens, a head's columns beside each other. BOX: tokens of a descriptor,
    which for PAGED lie in one page."""
    launch_dependents(PDL)
    BM: gl.constexpr = 64 * GROUPS
    W: gl.constexpr = k_box.block_shape[1]
    dtype: gl.constexpr = q_box.dtype
    h = gl.program_id(0)
    b, start, count, m0 = _locate(indptr, B, BP, BM)
    if m0 < count:
        offset = 0
        if PAGED:
            offset = gl.load(lengths + b) - count
            pages += b * N
        n = gl.cdiv(gl.minimum(offset + count, offset + m0 + BM) if PAGED else count, BN)
        qs = gl.allocate_shared_memory(dtype, [GROUPS, 64, W], q_box.layout)
        k_boxes, v_boxes = (k_box,), (v_box,)
        ks = (gl.allocate_shared_memory(dtype, [STAGES, BN, W], k_box.layout),)
        vs = (gl.allocate_shared_memory(dtype, [STAGES, BN, W], v_box.layout),)
        if REST > 0:
            k_boxes += (k_rest_box,)
            v_boxes += (v_rest_box,)
            ks += (gl.allocate_shared_memory(dtype, [STAGES, BN, REST], k_rest_box.layout),)
            vs += (gl.allocate_shared_memory(dtype, [STAGES, BN, REST], v_rest_box.layout),)
        full = (new_barriers(STAGES, 1), new_barriers(STAGES, 1))
        free = (new_barriers(STAGES, GROUPS), new_barriers(STAGES, GROUPS))
        q_full, turns = new_barriers(GROUPS, 1), new_barriers(GROUPS, 1)
        cleaned, verdict = new_barriers(1, GROUPS).index(0), ()
        if GROUPS > 1:
            flags = gl.allocate_shared_memory(gl.int32, [GROUPS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            verdict = (flags, new_barriers(1, GROUPS).index(0))
        wait(PDL)  # and so do the other warps, which start from here
        for i in gl.static_range(GROUPS):
            mbarrier.expect(q_full.index(i), 64 * W * 2)
            copy(q_box, [start + m0 + 64 * i, h * D], q_full.index(i), qs.index(i))
        ring = (ks, vs, full, free)
        task = (q, out, qs, q_full, ring, turns, cleaned, verdict, start, count, m0, offset, n, h)
        copies = (k_boxes, v_boxes, ring, start, count, pages, n, N, h // G * D)
        # the compiler takes a list only as it is written here, so each number of groups has its own
        if GROUPS == 1:
            gl.warp_specialize([
                (consume, (task, gl.constexpr(0), GROUPS, QS, D, PAGED)),
                (_produce, (copies, verdict, S, BOX, PAGED)),
            ], [1], [24])  # fmt: skip
        elif GROUPS == 2:
            gl.warp_specialize([
                (consume, (task, gl.constexpr(0), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(1), GROUPS, QS, D, PAGED)),
                (_produce, (copies, verdict, S, BOX, PAGED)),
            ], [4, 1], [REGISTERS, 24])  # fmt: skip
        elif GROUPS == 3:
            gl.warp_specialize([
                (consume, (task, gl.constexpr(0), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(1), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(2), GROUPS, QS, D, PAGED)),
                (_produce, (copies, verdict, S, BOX, PAGED)),
            ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (consume, (task, gl.constexpr(0), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(1), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(2), GROUPS, QS, D, PAGED)),
                (consume, (task, gl.constexpr(3), GROUPS, QS, D, PAGED)),
                (_produce, (copies, verdict, S, BOX, PAGED)),
            ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip


REGISTERS = {1: 0, 2: 240, 3: 160, 4: 112}
"""Registers of a thread of a group, by the number of groups: 65,536 less those of the warp that copies. One takes all."""
COSTS = {Tile(2, 128, 2): 0.063, Tile(3, 128, 2): 0.053, Tile(4, 64, 4): 0.053}
"""Nanoseconds that a query takes for each key, measured with heads of 64: the more groups, the fewer keys are copied."""
SHORT = Tile(1, 64, 4)
"""The tile of prompts that are over so soon that small programs are best."""


def image_tile(patches: int, heads: int, size: int, dtype: torch.dtype) -> Tile | None:
    """What was fastest on an H200 for one image; None where `flash` serves. The record is in `docs/performance.md`."""
    if dtype not in TYPES or not (size in (64, 128) or (64 < size <= 80 and size % 8 == 0)):
        return None
    if size > 64 or patches <= 768:
        return Tile(1, 128, 1) if patches <= 512 and size < 128 else Tile(2, 128, 2)

    def duration(tile: Tile) -> float:
        queries = 64 * tile.groups
        return triton.cdiv(triton.cdiv(patches, queries) * heads, MULTIPROCESSORS) * queries * COSTS[tile]

    return min(COSTS, key=duration)


def prompt_tile(tokens: int, size: int, page_size: int, dtype: torch.dtype) -> Tile | None:
    """What was fastest on an H200 for prompts of so many tokens each; None where `flash` serves."""
    if not fits(size, page_size, dtype):
        return None
    return SHORT if tokens <= 384 else Tile(1 if tokens <= 768 else 2, 128, 2)


def fits(size: int, page_size: int, dtype: torch.dtype) -> bool:
    """Whether `prompts` takes heads of this size and pages of this many tokens: descriptors copy 8 and more at once."""
    return dtype in TYPES and size in (64, 128) and page_size % 8 == 0


def _launch(
    q: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, lengths: Tensor, pages: Tensor, *, page_size: int,
    paged: bool, tile: Tile, pdl: bool,
) -> Tensor:  # fmt: skip
    tokens, heads, size = q.shape
    rows = len(indptr) - 1
    out = empty_rows(q, tokens, heads * size)
    main, rest = (size, 0) if size in (64, 128) else (64, 16)
    each = gcd(page_size, tile.keys) if paged else tile.keys
    boxes = [descriptor(x, each, main) for x in (keys, values)]
    boxes += [descriptor(x, each, rest) for x in (keys, values)] if rest else boxes
    tiles = triton.cdiv(tokens, 64 * tile.groups) + (0 if rows == 1 else rows)  # each row's last may be a part of one
    flash_hopper_kernel[(heads, tiles)](
        descriptor(q, 64, main), *boxes, q, out, indptr, lengths, pages, rows, pages.shape[-1], QS=q.stride(0),
        G=heads // keys.shape[1], D=size, REST=rest, S=page_size, BP=max(32, triton.next_power_of_2(rows)), BN=tile.keys,
        GROUPS=tile.groups, STAGES=tile.stages, BOX=each, PAGED=paged, REGISTERS=REGISTERS[tile.groups], num_warps=4,
        **options(pdl),
    )  # fmt: skip
    return out


def images(q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, *, tile: Tile, pdl: bool = False) -> Tensor:
    """As `flash.images`: [X Ev] of q, k, v [X heads Dv], of 16 bits, with the queries times scale and log2(e)."""
    return _launch(q, k, v, indptr, indptr, indptr, page_size=1, paged=False, tile=tile, pdl=pdl)


def prompts(
    q: Tensor, keys: Tensor, values: Tensor, indptr: Tensor, lengths: Tensor, pages: Tensor, *, tile: Tile,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """As `flash.prompts`: [T A] of q [T H D] over the pool [P S K D], of 16 bits; a `Tile` of one or two groups."""
    keys, values, page_size = keys.flatten(0, 1), values.flatten(0, 1), keys.shape[1]
    return _launch(q, keys, values, indptr, lengths, pages, page_size=page_size, paged=True, tile=tile, pdl=pdl)
