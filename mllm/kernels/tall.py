"""Products of some hundred rows on Hopper (capability 9.0), which go on with what cuBLAS leaves to a kernel after it.

A warp copies tiles of both factors into a ring in shared memory; one or two groups of four warps take 64 rows of the
product each, and end it as `tall_ends` has it. In a chain with programmatic dependent launch, which cuBLAS would break,
the ring is filled with weights before the kernel waits for the one ahead of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from mllm.kernels.hopper import copy, descriptor, finished, new_barriers, nothing
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows
from mllm.kernels.tall_ends import finish
from mllm.kernels.tall_tiles import HEAD, TURNED_HEAD, Tile, tile_for

INPUTS = 64
"""Of a tile: 128 bytes, the widest that descriptors copy."""


@gluon.constexpr_function
def _rows(x, ws):
    return x.shape[1] + sum(w.shape[1] for w in ws)


@gluon.jit
def _copy_weights(boxes, ws, firsts, k, full, stage, ROWS: gl.constexpr):
    """A tile of each piece of the weight to a stage, and word of how many rows will come there, x's included."""
    BK: gl.constexpr = ws[0].shape[2]
    mbarrier.expect(full.index(stage), ROWS * BK * 2)
    for j in gl.static_range(len(ws)):
        copy(boxes[j % len(boxes)], [firsts[j], k], full.index(stage), ws[j].index(stage))


@gluon.jit
def _produce(copies, PDL: gl.constexpr):
    """The warp that copies: a tile of x and of each piece of the weight, as soon as their place is free."""
    x_box, boxes, x, ws, full, free, m0, firsts, k0, n = copies
    STAGES: gl.constexpr = x.shape[0]
    BK: gl.constexpr = x.shape[2]
    ROWS: gl.constexpr = _rows(x, ws)
    for i in range(gl.minimum(n, STAGES)):
        _copy_weights(boxes, ws, firsts, k0 + i * BK, full, i, ROWS)
    wait(PDL)  # for x
    for i in range(n):
        stage = i % STAGES
        if i >= STAGES:
            mbarrier.wait(free.index(stage), (i // STAGES) & 1 ^ 1)
            _copy_weights(boxes, ws, firsts, k0 + i * BK, full, stage, ROWS)
        copy(x_box, [m0, k0 + i * BK], full.index(stage), x.index(stage))


@gluon.jit
def _consume(task, group: gl.constexpr, END: gl.constexpr):
    """A group of four warps: 64 rows of the product, and what follows it."""
    x, ws, full, free, y, end, m0, firsts, n, M, N = task
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
    finish(finished(accs, 0), y, end, m0 + 64 * group, firsts, M, N, x.dtype, END)


@gluon.jit
def tall_kernel(
    x_box, w_box, w_rest_box, y, end, M, N, KS, REST: gl.constexpr, END: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y [parts M N] of x [M K] and w [N K], ended as END has it (`tall_ends.finish`); KS inputs a part.

    END "gate": w [2N K] holds gate over up.
    """
    launch_dependents(PDL)
    BM: gl.constexpr = x_box.block_shape[0]
    BK: gl.constexpr = x_box.block_shape[1]
    W: gl.constexpr = w_box.block_shape[0]
    dtype: gl.constexpr = x_box.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_box.layout)
    n0 = gl.program_id(1) * (W + REST)
    ws, boxes, firsts = (), (w_box,), ()
    if REST > 0:
        boxes += (w_rest_box,)
    for turn in gl.static_range(2 if END == "gate" else 1):
        ws += (gl.allocate_shared_memory(dtype, [STAGES, W, BK], w_box.layout),)
        firsts += (turn * N + n0,)
        if REST > 0:
            ws += (gl.allocate_shared_memory(dtype, [STAGES, REST, BK], w_rest_box.layout),)
            firsts += (turn * N + n0 + W,)
    full, free = new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS)
    m0, part, n = gl.program_id(0) * BM, gl.program_id(2), gl.cdiv(KS, BK)
    task = (x, ws, full, free, y + (part * M).to(gl.int64) * N, end, m0, firsts, n, M, N)
    copies = (x_box, boxes, x, ws, full, free, m0, firsts, part * KS, n)
    if GROUPS == 1:
        gl.warp_specialize([(_consume, (task, gl.constexpr(0), END)), (_produce, (copies, PDL))], [1], [24])
    else:
        gl.warp_specialize([
            (_consume, (task, gl.constexpr(0), END)),
            (_consume, (task, gl.constexpr(1), END)),
            (_produce, (copies, PDL)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


def _launch(
    x: Tensor, weight: Tensor, y: Tensor, ending: str, end: tuple[Any, ...] = (), *, tile: Tile, pdl: bool
) -> Tensor:
    """`y`, filled."""
    rows, inputs = x.shape
    outputs = len(weight) // 2 if ending == "gate" else len(weight)
    pieces = [descriptor(weight, n, INPUTS) for n in tile.outputs]  # one or two
    # a program that leaves registers lets the next kernel's start beside it; one of wide tiles needs them
    lean = tile.columns <= 64 and ending != "gate"
    tall_kernel[tile.grid(rows, outputs)](
        descriptor(x, tile.rows, INPUTS), pieces[0], pieces[-1], y, end, rows, outputs, inputs // tile.parts,
        REST=sum(tile.outputs[1:]), END=ending, GROUPS=tile.groups, STAGES=tile.stages, REGISTERS=104 if lean else 232,
        num_warps=4, **options(pdl), **({"maxnreg": 80} if lean else {}),
    )  # fmt: skip
    return y


def _tile(x: Tensor, weight: Tensor, ending: str) -> Tile:
    return tile_for(ending, len(x), len(weight) // 2 if ending == "gate" else len(weight), x.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str = "", pdl: bool = False) -> Tensor:
    """x [M K] @ weight [N K].T + bias: [M N]; `gelu`: the "tanh" form of GELU of it, or "none" of its approximations."""
    ending = "plain" if bias is None else f"gelu_{gelu}" if gelu else "bias"
    y = empty_rows(x, len(x), len(weight))
    return _launch(x, weight, y, ending, () if bias is None else (bias,), tile=_tile(x, weight, ending), pdl=pdl)


def split(x: Tensor, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """x [M K] @ weight [N K].T in parts [... M N] whose sum it is."""
    tile = _tile(x, weight, "parts")
    return _launch(x, weight, x.new_empty(tile.parts, len(x), len(weight)), "plain", tile=tile, pdl=pdl)


def gated(x: Tensor, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up [M N] of x [M K] and weight [2N K], gate over up."""
    y = empty_rows(x, len(x), len(weight) // 2)
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
    x: Tensor, weight: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor,
    values: Tensor, *, scale: float, eps: float, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """As `rope.rotate_write` of x [T K] @ weight [C K].T, with heads of 128: q [T H 128]."""
    kv_heads = keys.shape[2]
    heads = len(weight) // HEAD - 2 * kv_heads
    end = (q_norm, k_norm, cos, sin, slots, keys, values, scale, eps, heads, kv_heads)
    q = empty_rows(x, len(x), heads, HEAD)
    return _launch(x, weight, q, "heads", end, tile=_tile(x, weight, "heads"), pdl=pdl)
