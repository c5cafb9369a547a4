"""The kernel of `tall`. A warp copies tiles of both factors into a ring in shared memory; one or two groups of four warps
take 64 rows of the product each, to the end of its epilogue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from mllm.kernels.hopper import copy, finished, new_barriers
from mllm.kernels.pdl import launch_dependents, wait
from mllm.kernels.tall_epilogue import begin, biases_of, finish, meanwhile, measures_of, normalised, waits

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
        _, MT, NT, _, _, _, _ = work
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
def _origin(part, work, APART: gl.constexpr):
    """Where a part begins, which may be a product of its own: (row of x, row of the weight, input)."""
    _, _, _, N, KS, MX, _ = work
    if APART:
        origin = part * MX, part * N, 0
    else:
        origin = 0, 0, part * KS
    return origin


@gluon.jit
def _produce(copies, work, ONCE: gl.constexpr, APART: gl.constexpr, PDL: gl.constexpr):
    """The warp that copies: a tile of x and of each piece of the weight, as soon as their place is free."""
    x_box, boxes, x, ws, full, free = copies
    _, _, _, N, KS, _, _ = work
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BK: gl.constexpr = x.shape[2]
    BN: gl.constexpr = _columns(boxes)
    ROWS: gl.constexpr = _rows(x, ws)
    first, end, by = _tiles(work, ONCE)
    m0, n0, part = _place(first, work, BM, BN, ONCE)
    _, w0, k0 = _origin(part, work, APART)
    ahead = gl.minimum(gl.cdiv(KS, BK), STAGES)
    for i in range(ahead):
        _copy_weights(boxes, ws, _firsts(boxes, w0 + n0), N, k0 + i * BK, full, i, ROWS)
    wait(PDL)  # for x
    step = 0
    for t in range(first, end, by):
        m0, n0, part = _place(t, work, BM, BN, ONCE)
        x0, w0, k0 = _origin(part, work, APART)
        for k in range(k0, k0 + KS, BK):
            stage = step % STAGES
            if step >= ahead:
                mbarrier.wait(free.index(stage), (step // STAGES) & 1 ^ 1)
                _copy_weights(boxes, ws, _firsts(boxes, w0 + n0), N, k, full, stage, ROWS)
            copy(x_box, [x0 + m0, k], full.index(stage), x.index(stage))
            step += 1


@gluon.jit
def _consume(
    task, work, group: gl.constexpr, EPILOGUE: gl.constexpr, SIZE: gl.constexpr, NORM: gl.constexpr, ONCE: gl.constexpr,
    APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 rows of the product, and what follows it."""
    boxes, x, ws, full, free, y, operands, norm, M = task
    _, _, _, N, KS, _, YS = work
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BN: gl.constexpr = _columns(boxes)
    if waits(EPILOGUE) or NORM > 0:
        wait(PDL)
    step = 0
    first, end, by = _tiles(work, ONCE)
    for t in range(first, end, by):
        m0, n0, part = _place(t, work, BM, BN, ONCE)
        firsts = _firsts(boxes, n0)
        if APART:
            its = (operands[0] + part * N,)  # a bias
        else:
            its = operands
        accs = begin(ws, its, m0 + 64 * group, firsts, M, N, EPILOGUE, NORM)
        coming = meanwhile(accs, its, m0 + 64 * group, firsts, M, N, EPILOGUE, SIZE)
        if NORM > 0:
            measures = measures_of(norm, m0 + 64 * group, M, NORM)
            biases = biases_of(ws, its, firsts, N, EPILOGUE)
        for i in range(gl.cdiv(KS, x.shape[2])):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = x.index(stage).slice(64 * group, 64)
            products = ()
            for j in gl.static_range(len(ws)):
                products += (warpgroup_mma(rows, ws[j].index(stage).permute((1, 0)), accs[j], is_async=True),)
            accs = finished(products, len(ws))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=i > 0)  # the products before have been read
            step += 1
        accs = finished(accs, 0)
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        if NORM > 0:
            accs = normalised(accs, measures, biases, norm, KS)
        finish(accs, coming, y + part.to(gl.int64) * YS, its, m0 + 64 * group, firsts, M, N, x.dtype, EPILOGUE, SIZE)


@gluon.jit
def tall_kernel(
    x_box, w_box, w_rest_box, y, operands, norm, work, M, REST: gl.constexpr, EPILOGUE: gl.constexpr, SIZE: gl.constexpr,
    NORM: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, ONCE: gl.constexpr,
    APART: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y [parts M N] of x [M K] and w [N K] after EPILOGUE (`tall_epilogue.finish`); for "gate" w [2N K] is gate over up.

    work: (total, MT, NT, N, KS, MX, YS), for KS inputs a part, each of MT by NT tiles, and YS numbers from that of the part
    before. SIZE: of the heads to "turn". APART: each part is a product of its own, of the next MX rows of x, N of w and N of
    a bias. ONCE: a program makes one tile; else all are shared out, and the next is copied while one is ended. NORM: 0, or
    where x is `Unnormed` the power of two that is enough for a row's sums in `norm`, as `tall_epilogue.measures_of` has it.
    """
    launch_dependents(PDL)
    BM: gl.constexpr = x_box.block_shape[0]
    BK: gl.constexpr = x_box.block_shape[1]
    W: gl.constexpr = w_box.block_shape[0]
    TURNS: gl.constexpr = 2 if EPILOGUE == "gate" else 1
    dtype: gl.constexpr = x_box.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_box.layout)
    boxes, ws = (w_box,), (gl.allocate_shared_memory(dtype, [STAGES, TURNS * W, BK], w_box.layout),)
    if REST > 0:
        boxes += (w_rest_box,)
        ws += (gl.allocate_shared_memory(dtype, [STAGES, TURNS * REST, BK], w_rest_box.layout),)
    full, free = new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS)
    task = (boxes, x, ws, full, free, y, operands, norm, M)
    copies = (x_box, boxes, x, ws, full, free)
    if GROUPS == 1:
        gl.warp_specialize([
            (_consume, (task, work, gl.constexpr(0), EPILOGUE, SIZE, NORM, ONCE, APART, PDL)),
            (_produce, (copies, work, ONCE, APART, PDL)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (task, work, gl.constexpr(0), EPILOGUE, SIZE, NORM, ONCE, APART, PDL)),
            (_consume, (task, work, gl.constexpr(1), EPILOGUE, SIZE, NORM, ONCE, APART, PDL)),
            (_produce, (copies, work, ONCE, APART, PDL)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
