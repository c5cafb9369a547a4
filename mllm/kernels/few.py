"""Products with 2 to 8 rows: y = act(norm(x) @ w.T) + residual, the weights straight from memory to the tensor cores.

A program is as `kernels/linear.py` has it for one row: it keeps x, normalised where that is asked for, and goes over the
outputs with the next weights on their way, the first of them loaded before it waits for the kernel ahead of it. Its
warps share out the inputs. In which order tensor cores take the inputs does not matter where both factors have the same,
so a thread loads 8 that lie side by side, and needs neither shared memory nor another thread's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from mllm.kernels.hopper import MULTIPROCESSORS, factor_layout, parts_layout
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.words import halves

OUTPUTS = gl.constexpr(16)
"""Outputs of a tile: the tensor cores' tall side. Of gate and up it has 8 each."""
ROWS = gl.constexpr(8)
"""Rows of x in a tile: the tensor cores' narrow side."""


@gluon.constexpr_function
def _axis(layout, dim):
    """The layout of an index along one dimension of three; two are left to add."""
    first, second = [d for d in (0, 1, 2) if d != dim]
    return gl.SliceLayout(first, gl.SliceLayout(second, layout))


@gluon.jit
def _tile(w, n, N, K: gl.constexpr, WARPS: gl.constexpr, INPUTS: gl.constexpr, GATE: gl.constexpr):
    """Where a tile of the weight begins, two inputs in 32 bits [WARPS OUTPUTS INPUTS/2], and which of it exist: its
    outputs from n on; GATE: half of its rows are those of gate, and half those of up, N apart."""
    L: gl.constexpr = factor_layout(0, WARPS, 4)
    w = w.to(gl.pointer_type(gl.int32), bitcast=True)
    warp = gl.arange(0, WARPS, _axis(L, 0))[:, None, None]
    pair = gl.arange(0, INPUTS // 2, _axis(L, 2))[None, None, :]
    row = gl.arange(0, OUTPUTS, _axis(L, 1))[None, :, None]
    column = row % (OUTPUTS // 2) if GATE else row
    row = column + row // (OUTPUTS // 2) * N if GATE else row
    return w + n.to(gl.int64) * (K // 2) + (row * (K // 2) + warp * (INPUTS // 2) + pair), n + column < N


@gluon.jit
def _weights(at, live, i: gl.constexpr, WIDTH: gl.constexpr):
    """Piece i of a tile. It is read once, so it need not push anything out of the cache."""
    return gl.load(at + i * (WIDTH // 2), mask=live, eviction_policy="evict_first")


@gluon.jit
def _inputs(at, live, i: gl.constexpr, WIDTH: gl.constexpr):
    """Piece i of x, zeros where not `live`."""
    return gl.load(at + i * WIDTH, mask=live, other=0.0)


@gluon.jit
def _scales(norm, COUNT: gl.constexpr, WARPS: gl.constexpr, INPUTS: gl.constexpr):
    """A norm's weight in pieces, in shared memory, since registers are short."""
    S: gl.constexpr = gl.SliceLayout(2, factor_layout(1, WARPS, 8))
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, S))[:, None]
    k = gl.arange(0, INPUTS, gl.SliceLayout(0, S))[None, :]
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scales = gl.allocate_shared_memory(norm.dtype.element_ty, [COUNT, WARPS, INPUTS], shared)
    for i in gl.static_range(COUNT):
        scales.index(i).store(gl.load(norm + (i * WARPS + warp) * INPUTS + k))
    return scales


@gluon.jit
def _nothing(WARPS: gl.constexpr):
    """Zeros, where the products of a tile are to be added."""
    return gl.zeros([WARPS, OUTPUTS, ROWS], gl.float32, parts_layout(WARPS))


@gluon.jit
def _add(acc, pairs, x):
    """acc and the product of a piece, whose halves a loop would have put in a register each."""
    low, high = halves(pairs, x.dtype)
    piece = gl.reshape(gl.join(low, high), [pairs.shape[0], OUTPUTS, 2 * pairs.shape[2]])
    return mma_v2(gl.convert_layout(piece, factor_layout(0, pairs.shape[0], 8), assert_trivial=True), x, acc)


@gluon.jit
def _normalised(xs, scales, eps, K: gl.constexpr):
    """Pieces of x times the norm's weight, and the factor [1 ROWS] that their products have yet to be multiplied by."""
    L: gl.constexpr = xs[0].type.layout
    square = gl.zeros(xs[0].shape, gl.float32, L)
    scaled = ()
    for i in gl.static_range(len(xs)):
        v = xs[i].to(gl.float32)
        square += v * v
        scaled += (xs[i] * scales.index(i).load(gl.SliceLayout(2, L))[:, :, None],)  # type: ignore[assignment]
    into: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, parts_layout(xs[0].shape[0])))
    square = gl.convert_layout(gl.sum(gl.sum(square, 1), 0), into)
    return scaled, gl.rsqrt(square / K + eps)[None, :]


@gluon.jit
def _finish(acc, factor, residual, y, n, B, N, GATE: gl.constexpr, ADD: gl.constexpr):
    """The warps' parts of a tile, added up, to y, with what follows."""
    L: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(0, L))[None, :]
    column = n + gl.arange(0, OUTPUTS, gl.SliceLayout(1, L))[:, None]
    if ADD:
        add = gl.load(residual + row * N + column, mask=(row < B) & (column < N), other=0.0).to(gl.float32)
    out = gl.sum(acc, 0)
    if factor is not None:
        out *= factor
    if ADD:
        out += add
    if GATE:
        gate, up = gl.split(gl.permute(gl.reshape(out, [2, OUTPUTS // 2, ROWS]), [1, 2, 0]))
        out = gate / (1 + gl.exp(-gate)) * up
        H: gl.constexpr = out.type.layout
        row = gl.arange(0, ROWS, gl.SliceLayout(0, H))[None, :]
        column = n + gl.arange(0, OUTPUTS // 2, gl.SliceLayout(1, H))[:, None]
    gl.store(y + row * N + column, out.to(y.dtype.element_ty), mask=(row < B) & (column < N))


@gluon.jit
def _only(at, live, tile, from_x, some, xs, PIECES: gl.constexpr, WIDTH: gl.constexpr):
    """The product of a program's only tile, in the warps' parts. `tile` and `xs`: the pieces that are on their way."""
    AHEAD: gl.constexpr = len(tile)
    XS: gl.constexpr = len(xs)
    acc = _nothing(tile[0].shape[0])
    for i in gl.static_range(PIECES):
        acc = _add(acc, tile[i], xs[i])
        if i + AHEAD < PIECES:
            tile += (_weights(at, live, i + AHEAD, WIDTH),)
        if i + XS < PIECES:
            xs += (_inputs(from_x, some, i + XS, WIDTH),)
    return acc


@gluon.jit
def _next(at, live, after, live_after, tile, xs, WIDTH: gl.constexpr):
    """The product of a tile that another comes after, with all of x at hand, and the pieces of the other, on their way."""
    AHEAD: gl.constexpr = len(tile)
    PIECES: gl.constexpr = len(xs)
    acc = _nothing(tile[0].shape[0])
    for i in gl.static_range(PIECES):
        acc = _add(acc, tile[0], xs[i])
        if i + AHEAD < PIECES:
            coming = _weights(at, live, i + AHEAD, WIDTH)
        else:
            coming = _weights(after, live_after, i + AHEAD - PIECES, WIDTH)
        tile = tile[1:] + (coming,)
    return acc, tile


@gluon.jit
def few_kernel(
    x, norm, w, residual, y, B, N, eps, K: gl.constexpr, INPUTS: gl.constexpr, AHEAD: gl.constexpr, XS: gl.constexpr,
    NORM: gl.constexpr, GATE: gl.constexpr, ADD: gl.constexpr, ONCE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y [B N] from x [B K] and w [N K], in pieces of so many INPUTS for each warp.

    AHEAD: pieces of the weight that are on their way; XS: those of x. GATE: w [2N K] holds gate over up, y is
    silu(gate) * up. ONCE: a program has one tile; else XS is all of x.
    """
    WARPS: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = WARPS * INPUTS
    PIECES: gl.constexpr = K // WIDTH
    OUT: gl.constexpr = OUTPUTS // 2 if GATE else OUTPUTS
    L: gl.constexpr = factor_layout(1, WARPS, 8)
    launch_dependents(PDL)
    first = gl.program_id(0) * OUT
    at, live = _tile(w, first, N, K, WARPS, INPUTS, GATE)
    tile = ()
    for i in gl.static_range(AHEAD):
        tile += (_weights(at, live, i, WIDTH),)  # type: ignore[assignment]
    if NORM:
        scales = _scales(norm, PIECES, WARPS, INPUTS)
    warp = gl.arange(0, WARPS, _axis(L, 0))[:, None, None]
    k = gl.arange(0, INPUTS, _axis(L, 1))[None, :, None]
    row = gl.arange(0, ROWS, _axis(L, 2))[None, None, :]
    from_x = x + row * K + warp * INPUTS + k
    wait(PDL)
    xs = ()
    for i in gl.static_range(XS):
        xs += (_inputs(from_x, row < B, i, WIDTH),)  # type: ignore[assignment]
    factor = None
    if NORM:
        xs, factor = _normalised(xs, scales, eps, K)
    if ONCE:
        acc = _only(at, live, tile, from_x, row < B, xs, PIECES, WIDTH)
        _finish(acc, factor, residual, y, first, B, N, GATE, ADD)
    else:
        step = gl.num_programs(0) * OUT
        for n in range(first, N, step):
            after, live_after = _tile(w, n + step, N, K, WARPS, INPUTS, GATE)
            acc, tile = _next(at, live, after, live_after, tile, xs, WIDTH)
            at, live = after, live_after
            _finish(acc, factor, residual, y, n, B, N, GATE, ADD)


class Tile(NamedTuple):
    """Warps of a program, inputs of each in a piece, pieces of the weight on their way, those of x, programs at most."""

    warps: int
    inputs: int
    ahead: int
    kept: int
    programs: int


ALL = 2**30
"""As many programs, or pieces of x, as there are."""


def tile_for(tiles: int, inputs: int, *, kept: bool) -> Tile:
    """What was fastest in a whole step on an H100 for so many tiles of outputs, at the shapes of the 2B, 4B and 8B models;
    the record is in `docs/performance.md`. `kept`: x is, in registers, and a program may have several tiles."""
    if kept:
        return Tile(4, 128, 3 if inputs <= 2048 else 2, ALL, 264) if inputs <= 2560 else Tile(8, 64, 3, ALL, 132)
    if inputs <= 4096:
        return Tile(4, 128, 4, 4, ALL)
    return Tile(8, 64, 10, 4, ALL) if tiles <= MULTIPROCESSORS else Tile(4, 128, 5, 2, ALL)


def fits(weight: Tensor, *, kept: bool) -> bool:
    """Whether a weight [N K] can be read so: by rows, in whole pieces, with `kept` of no more than registers have room for.
    In bfloat16: what is multiplied before it is divided by its norm could be more than float16 holds."""
    whole = weight.shape[1] % 512 == 0 and (weight.shape[1] <= 4096 or not kept)
    return whole and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.data_ptr() % 16 == 0


def linear(
    x: Tensor, norm: Tensor | None, w: Tensor, residual: Tensor | None = None, *, eps: float = 0.0, gate: bool = False,
    pdl: bool, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """norm(x [B K]) @ w [N K].T + residual: [B N]; `gate`: silu(gate) * up, [B N/2]. The weight `fits`."""
    rows, inputs = x.shape
    outputs = len(w) // 2 if gate else len(w)
    tiles = triton.cdiv(outputs, OUTPUTS.value // 2 if gate else OUTPUTS.value)
    tile = tile_for(tiles, inputs, kept=norm is not None)
    pieces = inputs // (tile.warps * tile.inputs)
    y = x.new_empty(rows, outputs, dtype=dtype or x.dtype)
    few_kernel[(min(tile.programs, tiles),)](
        x, x if norm is None else norm, w, x if residual is None else residual, y, rows, outputs, eps,
        K=inputs, INPUTS=tile.inputs, AHEAD=min(tile.ahead, pieces), XS=min(tile.kept, pieces), NORM=norm is not None,
        GATE=gate, ADD=residual is not None, ONCE=tiles <= tile.programs, num_warps=tile.warps, **options(pdl),
    )  # fmt: skip
    return y
