"""Products of many rows on Hopper (capability 9.0) that go on with what cuBLAS leaves to a kernel after it.

The gate of an MLP, and the bias and rotation of an encoder's queries and keys: each saves the trip of all outputs to
memory and back. A warp copies tiles of both factors into a ring in shared memory; two groups of four warps take 64 rows
of the product each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from mllm.kernels.hopper import MULTIPROCESSORS, TYPES, copy, descriptor, finished, new_barriers, nothing
from mllm.kernels.pdl import FUSED

HEAD = 64
"""The size of the heads that `turned` rotates."""
ROWS = 128
"""Of a program: 64 for each of its two groups."""


class Tile(NamedTuple):
    """Outputs of a program, as powers of two side by side; tiles of 64 inputs in flight."""

    outputs: tuple[int, ...]
    stages: int


GATED = Tile((128,), 4)
"""What was fastest for `gated` on an H200; the record is in `docs/performance.md`."""


@gluon.constexpr_function
def _rows(x, ws):
    return x.shape[1] + sum(w.shape[1] for w in ws)


@gluon.jit
def _produce(copies):
    """The warp that copies: a tile of x and of each piece of the weight, as soon as their place is free."""
    x_box, boxes, x, ws, full, free, m0, firsts, n = copies
    STAGES: gl.constexpr = x.shape[0]
    BK: gl.constexpr = x.shape[2]
    ROWS: gl.constexpr = _rows(x, ws)
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES) & 1 ^ 1)
        mbarrier.expect(full.index(stage), ROWS * BK * 2)
        copy(x_box, [m0, i * BK], full.index(stage), x.index(stage))
        for j in gl.static_range(len(ws)):
            copy(boxes[j], [firsts[j], i * BK], full.index(stage), ws[j].index(stage))


@gluon.jit
def _turned(acc, n0, m, cos, sin, scale, M, H):
    """acc [64 BN] rotated by heads, whose first H are queries, times scale, the next H keys, and the others left alone."""
    COUNT: gl.constexpr = acc.shape[1] // 64
    a, b = gl.split(gl.permute(gl.reshape(acc, [64, COUNT, 2, 32]), [0, 1, 3, 2]))
    layout: gl.constexpr = a.type.layout
    m = m + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    h = n0 // 64 + gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    i = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    at = m[:, None, None] * 32 + i[None, None, :]
    inside = (m < M)[:, None, None]
    turn = (h < 2 * H)[None, :, None]
    c = gl.where(turn, gl.load(cos + at, mask=inside, other=0.0), 1.0)
    s = gl.where(turn, gl.load(sin + at, mask=inside, other=0.0), 0.0)
    times = gl.where(h < H, scale, 1.0)[None, :, None]
    pair = gl.join((a * c - b * s) * times, (b * c + a * s) * times)
    return gl.reshape(gl.permute(pair, [0, 1, 3, 2]), [64, acc.shape[1]])


@gluon.jit
def _store(acc, y, m, n0, M, N, dtype: gl.constexpr):
    """acc [64 BN] to the rows from m and the columns from n0 on of y [M N]."""
    BN: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    r = m + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
    out = gl.convert_layout(acc.to(dtype), layout)
    gl.store(y + r.to(gl.int64)[:, None] * N + c[None, :], out, mask=(r < M)[:, None] & (c < N)[None, :])


@gluon.jit
def _biased(acc, bias, n0, N):
    c = n0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    return acc + gl.load(bias + c, mask=c < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _consume(task, group: gl.constexpr, GATE: gl.constexpr):
    """A group of four warps: 64 rows of the product, and what follows it."""
    x, ws, full, free, y, bias, cos, sin, scale, m0, firsts, n, M, N, H = task
    STAGES: gl.constexpr = x.shape[0]
    accs = ()
    for j in gl.static_range(len(ws)):
        accs += (nothing(ws[j].shape[1]),)
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        rows = x.index(stage).slice(64 * group, 64)
        coming = ()
        for j in gl.static_range(len(ws)):
            coming += (warpgroup_mma(rows, ws[j].index(stage).permute((1, 0)), accs[j], is_async=True),)
        accs = finished(coming, len(ws))
        mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), pred=i > 0)  # the products before have been read
    accs = finished(accs, 0)
    m = m0 + 64 * group
    if GATE:
        _store(accs[0] * accs[1] / (1.0 + gl.exp(-accs[0])), y, m, firsts[0], M, N, x.dtype)
    else:
        for j in gl.static_range(len(ws)):
            acc = _biased(accs[j], bias, firsts[j], N)
            _store(_turned(acc, firsts[j], m, cos, sin, scale, M, H), y, m, firsts[j], M, N, x.dtype)


@gluon.jit
def tall_kernel(
    x_box, w_box, w_rest_box, y, bias, cos, sin, scale, M, N, K, H, REST: gl.constexpr, GATE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """y [M N] of x [M K] and w [N K]: rotated, the bias added. GATE: w [2N K] holds gate over up, y is silu(gate) * up."""
    BM: gl.constexpr = x_box.block_shape[0]
    BK: gl.constexpr = x_box.block_shape[1]
    W: gl.constexpr = w_box.block_shape[0]
    dtype: gl.constexpr = x_box.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_box.layout)
    m0 = gl.program_id(0) * BM
    n0 = gl.program_id(1) * (W + REST)
    ws, boxes, firsts = (gl.allocate_shared_memory(dtype, [STAGES, W, BK], w_box.layout),), (w_box,), (n0,)
    if GATE:
        ws += (gl.allocate_shared_memory(dtype, [STAGES, W, BK], w_box.layout),)
        boxes += (w_box,)
        firsts += (N + n0,)
    if REST > 0:
        ws += (gl.allocate_shared_memory(dtype, [STAGES, REST, BK], w_rest_box.layout),)
        boxes += (w_rest_box,)
        firsts += (n0 + W,)
    full, free = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    n = gl.cdiv(K, BK)
    task = (x, ws, full, free, y, bias, cos, sin, scale, m0, firsts, n, M, N, H)
    gl.warp_specialize([
        (_consume, (task, gl.constexpr(0), GATE)),
        (_consume, (task, gl.constexpr(1), GATE)),
        (_produce, ((x_box, boxes, x, ws, full, free, m0, firsts, n),)),
    ], [4, 1], [232, 24])  # fmt: skip


def fits(x: Tensor) -> bool:
    """Whether its type and its width are those that descriptors copy and these tensor cores multiply."""
    return x.dtype in TYPES and x.shape[1] % 8 == 0


def gate_pays(rows: int, outputs: int) -> bool:
    """Whether `gated` is faster than cuBLAS and a kernel after it: where its tiles fill the turns that they take."""
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, sum(GATED.outputs))
    return 768 <= rows <= 2048 and tiles >= 0.9 * MULTIPROCESSORS * triton.cdiv(tiles, MULTIPROCESSORS)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    return _launch(x, weight, len(weight) // 2, tile=GATED)


def turning_pays(patches: int) -> bool:
    """Whether `turned` is faster than cuBLAS and a kernel after it, whose larger tiles win where there is much to do."""
    return patches <= 1536


def turned(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, *, scale: float) -> Tensor:
    """Queries, times `scale`, keys and values [X 3 H 64] of x [X K], weight [N K] and bias [N]; queries and keys are
    rotated by cos, sin f32 [X 32]."""
    tile = Tile((64,), 6) if len(x) <= 320 else Tile((128,), 4) if len(x) < 768 else Tile((128, 64), 4)
    heads = len(weight) // (3 * HEAD)
    y = _launch(x, weight, len(weight), tile=tile, turn=(bias, cos, sin, scale, heads))
    return y.view(len(x), 3, heads, HEAD)


def _launch(x: Tensor, weight: Tensor, outputs: int, *, tile: Tile, turn: tuple[Any, ...] = ()) -> Tensor:
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    bias, cos, sin, scale, heads = turn or (y, y, y, 0.0, 0)
    pieces = [descriptor(weight, n, 64) for n in tile.outputs]  # one or two
    tall_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, sum(tile.outputs)))](
        descriptor(x, ROWS, 64), pieces[0], pieces[-1], y, bias, cos, sin, scale, rows, outputs, inputs, heads,
        REST=sum(tile.outputs[1:]), GATE=not turn, STAGES=tile.stages, num_warps=4, **FUSED,
    )  # fmt: skip
    return y
