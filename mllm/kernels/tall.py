"""Products of some hundred rows on Hopper (capability 9.0), which go on with what cuBLAS leaves to a kernel after it.

A warp copies tiles of both factors into a ring in shared memory; one or two groups of four warps take 64 rows of the
product each, and end it as `tall_ends` has it. In a chain with programmatic dependent launch, which cuBLAS would break,
the ring is filled with weights before the kernel waits for the one ahead of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from mllm.kernels.hopper import MULTIPROCESSORS, copy, descriptor, finished, new_barriers
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows
from mllm.kernels.tall_ends import adds, begin, finish, normalised, squares_of
from mllm.kernels.tall_tiles import HEAD, TURNED_HEAD, Tile, tile_for

INPUTS = 64
"""Of a tile: 128 bytes, the widest that descriptors copy."""
BAND = gl.constexpr(16)
"""Tiles of rows that are made together."""


@gluon.constexpr_function
def _rows(x, ws):
    return x.shape[1] + sum(w.shape[1] for w in ws)


@gluon.constexpr_function
def _columns(boxes):
    return sum(box.block_shape[0] for box in boxes)


@gluon.jit
def _copy_weights(boxes, ws, firsts, N, k, full, stage, ROWS: gl.constexpr):
    """A tile of each piece of the weight to a stage, and word of how many rows will come there, x's included.

    A piece of gate and up has the rows of both, N apart, one after the other.
    """
    BK: gl.constexpr = ws[0].shape[2]
    mbarrier.expect(full.index(stage), ROWS * BK * 2)
    for j in gl.static_range(len(ws)):
        _copy_piece(boxes[j], firsts[j], N, k, full.index(stage), ws[j].index(stage))


@gluon.jit
def _copy_piece(box, first, N, k, full, to):
    W: gl.constexpr = box.block_shape[0]
    for turn in gl.static_range(to.shape[0] // W):
        copy(box, [turn * N + first, k], full, to.slice(turn * W, W))


@gluon.jit
def _place(t, work, BM: gl.constexpr, BN: gl.constexpr, ONCE: gl.constexpr):
    """(first row, first column, part) of a program's tile, or of tile t. Programs are at a band of rows together, and at
    some columns, so that what they read is in L2."""
    if ONCE:
        m, n, part = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    else:
        _, MT, NT, _, _ = work
        part = t // (MT * NT)
        t = t % (MT * NT)
        first = t // (BAND * NT) * BAND
        rows = gl.minimum(MT - first, BAND)
        t = t % (BAND * NT)
        m, n = first + t % rows, t // rows
    return m * BM, n * BN, part


@gluon.jit
def _tiles(work, ONCE: gl.constexpr):
    """(first, end, step) of a program's tiles."""
    if ONCE:
        first, step = 0, 1
    else:
        first, step = gl.program_id(0), gl.num_programs(0)
    return first, work[0], step


@gluon.jit
def _firsts(boxes, n0):
    """Where the pieces of a tile begin whose columns begin at n0."""
    if len(boxes) == 1:
        firsts = (n0,)
    else:
        firsts = (n0, n0 + boxes[0].block_shape[0])
    return firsts


@gluon.jit
def _produce(copies, work, ONCE: gl.constexpr, PDL: gl.constexpr):
    """The warp that copies: a tile of x and of each piece of the weight, as soon as their place is free."""
    x_box, boxes, x, ws, full, free = copies
    _, _, _, N, KS = work
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BK: gl.constexpr = x.shape[2]
    BN: gl.constexpr = _columns(boxes)
    ROWS: gl.constexpr = _rows(x, ws)
    first, end, by = _tiles(work, ONCE)
    m0, n0, part = _place(first, work, BM, BN, ONCE)
    ahead = gl.minimum(gl.cdiv(KS, BK), STAGES)
    for i in range(ahead):
        _copy_weights(boxes, ws, _firsts(boxes, n0), N, part * KS + i * BK, full, i, ROWS)
    wait(PDL)  # for x
    step = 0
    for t in range(first, end, by):
        m0, n0, part = _place(t, work, BM, BN, ONCE)
        for k in range(part * KS, part * KS + KS, BK):
            stage = step % STAGES
            if step >= ahead:
                mbarrier.wait(free.index(stage), (step // STAGES) & 1 ^ 1)
                _copy_weights(boxes, ws, _firsts(boxes, n0), N, k, full, stage, ROWS)
            copy(x_box, [m0, k], full.index(stage), x.index(stage))
            step += 1


@gluon.jit
def _consume(
    task, work, group: gl.constexpr, END: gl.constexpr, NORM: gl.constexpr, ONCE: gl.constexpr, PDL: gl.constexpr
):
    """A group of four warps: 64 rows of the product, and what follows it."""
    boxes, x, ws, full, free, y, ending, norm, M = task
    _, _, _, N, KS = work
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BN: gl.constexpr = _columns(boxes)
    if adds(END) or NORM > 0:
        wait(PDL)  # for what is added to, or the norm's sums
    step = 0
    first, end, by = _tiles(work, ONCE)
    for t in range(first, end, by):
        m0, n0, part = _place(t, work, BM, BN, ONCE)
        firsts = _firsts(boxes, n0)
        accs = begin(ws, ending, m0 + 64 * group, firsts, M, N, END)
        if NORM > 0:
            sums = squares_of(norm, m0 + 64 * group, M, NORM)
        for i in range(gl.cdiv(KS, x.shape[2])):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = x.index(stage).slice(64 * group, 64)
            coming = ()
            for j in gl.static_range(len(ws)):
                coming += (warpgroup_mma(rows, ws[j].index(stage).permute((1, 0)), accs[j], is_async=True),)
            accs = finished(coming, len(ws))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=i > 0)  # the products before have been read
            step += 1
        accs = finished(accs, 0)
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        if NORM > 0:
            accs = normalised(accs, sums, norm, KS)
        finish(accs, y + (part * M).to(gl.int64) * N, ending, m0 + 64 * group, firsts, M, N, x.dtype, END)


@gluon.jit
def tall_kernel(
    x_box, w_box, w_rest_box, y, end, norm, work, M, REST: gl.constexpr, END: gl.constexpr, NORM: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, ONCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y [parts M N] of x [M K] and w [N K], ended as END has it (`tall_ends.finish`); for "gate" w [2N K] is gate over up.

    work: (total, MT, NT, N, KS), for KS inputs a part, each of MT by NT tiles. ONCE: a program makes one; else all of them
    are shared out, and the next is copied while one is ended. NORM: 0, or where x is `Scaled` the power of two that is
    enough for a row's sums in `norm`, which is as `tall_ends.squares_of` has it.
    """
    launch_dependents(PDL)
    BM: gl.constexpr = x_box.block_shape[0]
    BK: gl.constexpr = x_box.block_shape[1]
    W: gl.constexpr = w_box.block_shape[0]
    TURNS: gl.constexpr = 2 if END == "gate" else 1
    dtype: gl.constexpr = x_box.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_box.layout)
    boxes, ws = (w_box,), (gl.allocate_shared_memory(dtype, [STAGES, TURNS * W, BK], w_box.layout),)
    if REST > 0:
        boxes += (w_rest_box,)
        ws += (gl.allocate_shared_memory(dtype, [STAGES, TURNS * REST, BK], w_rest_box.layout),)
    full, free = new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS)
    task = (boxes, x, ws, full, free, y, end, norm, M)
    copies = (x_box, boxes, x, ws, full, free)
    if GROUPS == 1:
        gl.warp_specialize([
            (_consume, (task, work, gl.constexpr(0), END, NORM, ONCE, PDL)),
            (_produce, (copies, work, ONCE, PDL)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (task, work, gl.constexpr(0), END, NORM, ONCE, PDL)),
            (_consume, (task, work, gl.constexpr(1), END, NORM, ONCE, PDL)),
            (_produce, (copies, work, ONCE, PDL)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


class Scaled(NamedTuple):
    """What is yet to be normalised by RMSNorm: x [M K] times the norm's weight, and of each row of x sums of squares f32
    [n M], which are its own together. A product of it normalises what it made."""

    x: Tensor
    squares: Tensor
    eps: float


def _launch(
    x: Tensor | Scaled, weight: Tensor, y: Tensor, ending: str, end: tuple[Any, ...] = (), *, tile: Tile, pdl: bool
) -> Tensor:
    """`y`, filled."""
    norm, sums = (), 0
    if isinstance(x, Scaled):
        x, squares, eps = x
        norm, sums = (squares, len(squares), eps), max(2, triton.next_power_of_2(len(squares)))
    rows, inputs = x.shape
    outputs = len(weight) // 2 if ending == "gate" else len(weight)
    pieces = [descriptor(weight, n, INPUTS) for n in tile.outputs]  # one or two
    # a program that leaves registers lets the next kernel's start beside it; one of wide tiles needs them
    lean = tile.columns <= 64 and ending != "gate"
    grid = down, across, parts = tile.grid(rows, outputs)
    once = tile.turns(rows, outputs) == 1
    each = inputs if parts == 1 else triton.cdiv(inputs, parts * INPUTS) * INPUTS  # beyond the last there are zeros
    work = 1 if once else math.prod(grid), down, across, outputs, each
    tall_kernel[grid if once else (MULTIPROCESSORS,)](
        descriptor(x, tile.rows, INPUTS), pieces[0], pieces[-1], y, end, norm, work, rows, REST=sum(tile.outputs[1:]),
        END=ending, NORM=sums, GROUPS=tile.groups, STAGES=tile.stages, REGISTERS=104 if lean else 232, ONCE=once,
        num_warps=4, **options(pdl), **({"maxnreg": 80} if lean else {}),
    )  # fmt: skip
    return y


def tensor_of(x: Tensor | Scaled) -> Tensor:
    """What a product reads, to be normalised or not."""
    return x.x if isinstance(x, Scaled) else x


def _tile(x: Tensor | Scaled, weight: Tensor, ending: str, *, whole: bool = False) -> Tile:
    """The tile; `whole`: in one part, since programs that make parts of a sum cannot end it."""
    rows, inputs = tensor_of(x).shape
    outputs = len(weight) // 2 if ending == "gate" else len(weight)
    tile = tile_for(ending, rows, outputs, inputs)
    return tile._replace(parts=1) if whole else tile


def linear(
    x: Tensor | Scaled, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", pdl: bool = False
) -> Tensor:
    """x [M K] @ weight [N K].T + bias: [M N]; `gelu`: the "tanh" form of GELU of it, or "none" of its approximations."""
    ending = "plain" if bias is None else f"gelu_{gelu}" if gelu else "bias"
    rows = tensor_of(x)
    y = empty_rows(rows, len(rows), len(weight))
    return _launch(x, weight, y, ending, () if bias is None else (bias,), tile=_tile(x, weight, "other"), pdl=pdl)


def added(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """y + x [M K] @ weight [N K].T + bias: [M N]."""
    total = empty_rows(x, len(x), len(weight))
    ending, end = ("add", (y,)) if bias is None else ("bias_add", (bias, y))
    return _launch(x, weight, total, ending, end, tile=_tile(x, weight, "sum", whole=True), pdl=pdl)


def split(x: Tensor, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """x [M K] @ weight [N K].T in parts [... M N] whose sum it is."""
    tile = _tile(x, weight, "sum")
    return _launch(x, weight, x.new_empty(tile.parts, len(x), len(weight)), "plain", tile=tile, pdl=pdl)


def scaled(
    x: Tensor, weight: Tensor, y: Tensor, norm: Tensor, *, eps: float, pdl: bool = False
) -> tuple[Tensor, Scaled]:
    """As `added`, and what RMSNorm of that with the weight `norm` is made of."""
    tile = _tile(x, weight, "sum", whole=True)
    total, times = empty_rows(x, len(x), len(weight)), empty_rows(x, len(x), len(weight))
    sums = tile.grid(len(x), len(weight))[1] * len(tile.outputs)
    squares = x.new_empty(sums, len(x), dtype=torch.float32)
    _launch(x, weight, total, "scale", (norm, times, squares, y), tile=tile, pdl=pdl)
    return total, Scaled(times, squares, eps)


def gated(x: Tensor | Scaled, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    rows = tensor_of(x)
    y = empty_rows(rows, len(rows), len(weight) // 2)
    return _launch(x, weight, y, "gate", tile=_tile(x, weight, "gate"), pdl=pdl)


def turned(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, *, scale: float, pdl: bool = False
) -> Tensor:
    """Queries, times `scale`, keys and values [X 3 H 64] of x [X K], weight [N K] and bias [N]; queries and keys are
    rotated by cos, sin f32 [X 32]."""
    heads = len(weight) // (3 * TURNED_HEAD)
    y = empty_rows(x, len(x), 3, heads, TURNED_HEAD)
    return _launch(x, weight, y, "turn", (bias, cos, sin, scale, heads), tile=_tile(x, weight, "turn"), pdl=pdl)


def written(
    x: Tensor | Scaled, weight: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
    keys: Tensor, values: Tensor, *, scale: float, eps: float, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """As `rope.rotate_write` of x [T K] @ weight [C K].T, with heads of 128: q [T H 128]."""
    kv_heads = keys.shape[2]
    heads = len(weight) // HEAD - 2 * kv_heads
    end = (q_norm, k_norm, cos, sin, slots, keys, values, scale, eps, heads, kv_heads)
    rows = tensor_of(x)
    q = empty_rows(rows, len(rows), heads, HEAD)
    return _launch(x, weight, q, "heads", end, tile=_tile(x, weight, "heads"), pdl=pdl)
