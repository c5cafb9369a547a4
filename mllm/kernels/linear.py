"""Products with one row: y = act(norm(x) @ w.T) + residual, where reading the weight is all of the time.

A program keeps all of x, normalised where that is asked for: computing the norm again in every program costs less than
a kernel of its own would. It goes over the outputs with the next tile's weights on their way, and loads the first of
them before it waits for the kernel ahead of it (see `kernels/pdl.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.errors import ShapeError
from mllm.kernels.attend import merged, shares
from mllm.kernels.decode_plan import SplitHeads
from mllm.kernels.pdl import launch_dependents, options, wait


@triton.jit
def _weights(w, n, N, K: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Rows n of w [N K] in pieces [BN PIECE]. They are read once, so they need not push anything out of the cache."""
    k = tl.arange(0, PIECE)
    at = w + n.to(tl.int64)[:, None] * K + k[None, :]
    pieces = ()
    for i in tl.static_range(PIECES):
        mask = n[:, None] < N
        if (i + 1) * PIECE > K:
            mask &= (i * PIECE + k)[None, :] < K
        pieces += (tl.load(at + i * PIECE, mask=mask, other=0.0, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _vector(x, K: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """x [K] in pieces f32 [PIECE]."""
    k = tl.arange(0, PIECE)
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces += (tl.load(x + i * PIECE + k, mask=i * PIECE + k < K, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _product(weights, value, PIECES: tl.constexpr):
    """The products of pieces of a weight and of a vector, added up: [BN]."""
    out = weights[0].to(tl.float32) * value[0][None, :]
    for i in tl.static_range(1, PIECES):
        out += weights[i].to(tl.float32) * value[i][None, :]
    return tl.sum(out, 1)


@triton.jit
def _normalised(value, scale, eps, K: tl.constexpr, PIECES: tl.constexpr):
    """RMSNorm of a vector in pieces."""
    square = value[0] * value[0]
    for i in tl.static_range(1, PIECES):
        square += value[i] * value[i]
    factor = tl.rsqrt(tl.sum(square, 0) / K + eps)
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces += (value[i] * scale[i] * factor,)  # type: ignore[assignment]
    return pieces


@triton.jit
def linear_kernel(
    x, sums, lengths, norm, w, residual, y, N, eps, K: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    GATE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] from x [K] and w [N K]. GATE: w [2N K] holds gate over up, and y is silu(gate) * up.

    SPLITS: x, `sums`, `lengths` and TILE are a `SplitHeads` of heads of D; else 0. What is long is kept in pieces, since
    the width of a tensor is a power of two here.
    """
    first = tl.program_id(0) * BN
    step = tl.num_programs(0) * BN
    r = tl.arange(0, BN)
    launch_dependents(PDL)
    tile = _weights(w, first + r, N, K, PIECE, PIECES)
    if GATE:
        tile_up = _weights(w + N * K, first + r, N, K, PIECE, PIECES)
    if NORM:
        scale = _vector(norm, K, PIECE, PIECES)
    if SPLITS > 0:
        _, _, live = shares(tl.load(lengths), SPLITS, TILE)
    wait(PDL)
    if SPLITS > 0:
        value = (merged(x, sums, live, K, D, PIECE, SPLITS),)
    else:
        value = _vector(x, K, PIECE, PIECES)
    if NORM:
        value = _normalised(value, scale, eps, K, PIECES)
    for at in tl.range(first, N, step):
        n = at + r
        if ADD:
            add = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
        after = _weights(w, n + step, N, K, PIECE, PIECES)
        out = _product(tile, value, PIECES)
        tile = after
        if GATE:
            after_up = _weights(w + N * K, n + step, N, K, PIECE, PIECES)
            out = out * tl.sigmoid(out) * _product(tile_up, value, PIECES)
            tile_up = after_up
        if ADD:
            out += add
        tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


class Loop(NamedTuple):
    """How a product is shared out: outputs that a program takes at a time, warps, programs at most."""

    outputs: int
    warps: int
    programs: int


def loop_for(outputs: int, inputs: int, *, gate: bool, merge: bool) -> Loop:
    """What was fastest in a whole step on an H200, at the shapes of the 2B, 4B and 8B models; the record is in
    `docs/performance.md`. A thread holds some 64 weights, and all programs are on the chip at once. With `merge` x is
    what attention left, and the fewer the programs, the less is read of that."""
    few = max(1, 2048 // triton.next_power_of_2(inputs))
    if merge:
        return Loop(16 * few, 8, 132) if inputs <= 2048 else Loop(4, 8, 264)
    if outputs > 2**16:  # a head
        return Loop(8, 8, 264) if inputs <= 2560 else Loop(4, 8, 264)
    if inputs <= 2048:
        return Loop((2 if gate else 4) * few, 4, 528)
    if inputs <= 2560:
        return Loop(2, 4, 528) if gate else Loop(4, 4, 396)
    if inputs <= 4096:
        return Loop(1 if gate else 2, 4, 528)
    if inputs <= 10240:
        return Loop(2, 8, 396 if inputs <= 8192 else 264)
    return Loop(1, 8, 264)


def pieces_for(inputs: int) -> tuple[int, int]:
    """(width, number) of the pieces that x is kept in: the widest, up to 4,096, that pad it by a sixteenth at most."""
    width = 4096
    while width > 512 and triton.cdiv(inputs, width) * width > inputs * 17 // 16:
        width //= 2
    width = min(width, triton.next_power_of_2(inputs))
    return width, triton.cdiv(inputs, width)


def linear(
    x: Tensor | SplitHeads, norm: Tensor | None, w: Tensor, residual: Tensor | None = None, *, eps: float = 0.0,
    gate: bool = False, pdl: bool, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """norm(x [1 K]) @ w [N K].T + residual: [1 N]; `gate`: silu(gate) * up, [1 N/2]."""
    if not w.is_contiguous():  # as a CPU may have it; read by rows it would give numbers, all wrong
        raise ShapeError(f"linear: expected a weight laid out by rows, got strides {w.stride()} for {list(w.shape)}")
    parts, sums, lengths, token_tile = x if isinstance(x, SplitHeads) else (x, None, x, 1)
    inputs = parts.shape[1]
    outputs = len(w) // 2 if gate else len(w)
    merge = sums is not None  # whose heads are laid out in one piece
    piece, pieces = (triton.next_power_of_2(inputs), 1) if merge else pieces_for(inputs)
    y = parts.new_empty(1, outputs, dtype=dtype or parts.dtype)
    loop = loop_for(outputs, inputs, gate=gate, merge=merge)
    linear_kernel[(min(loop.programs, triton.cdiv(outputs, loop.outputs)),)](
        parts, parts if sums is None else sums, lengths, parts if norm is None else norm, w,
        parts if residual is None else residual, y, outputs, eps,
        K=inputs, PIECE=piece, PIECES=pieces, BN=loop.outputs, SPLITS=0 if sums is None else len(sums),
        TILE=token_tile, D=1 if sums is None else inputs // sums.shape[1], NORM=norm is not None, GATE=gate,
        ADD=residual is not None, num_warps=loop.warps, **options(pdl),
    )  # fmt: skip
    return y
