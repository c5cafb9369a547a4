"""Products with one row: y = act(norm(x) @ w.T) + residual, where reading the weight is all of the time.

A program computes a few outputs. It loads its first weight tile before it waits for the kernel before it (see
`kernels/pdl.py`), and it recomputes the norm of x, which costs less than a kernel of its own would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.errors import ShapeError
from mllm.kernels.pdl import launch_dependents, options, wait


@triton.jit
def _weights(w, n, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile of w [N K]. It is read once, so it need not push anything out of the cache."""
    at = w + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        return tl.load(at, mask=n[:, None] < N, other=0.0, eviction_policy="evict_first")
    return tl.load(at, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0, eviction_policy="evict_first")


@triton.jit
def linear_kernel(x, norm, w, residual, y, N, eps, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [N] from x [K] and w [N K]. GATE: w [2N K] holds gate over up, and y is silu(gate) * up."""
    EVEN: tl.constexpr = K % BK == 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    launch_dependents(PDL)
    tile = _weights(w, n, k, N, K, EVEN)
    if GATE:
        tile_up = _weights(w + N * K, n, k, N, K, EVEN)
    if NORM:
        scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    wait(PDL)
    if ADD:
        add = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    square = tl.zeros([BK], tl.float32)
    acc = tl.zeros([BN, BK], tl.float32)
    acc_up = tl.zeros([BN, BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        if start > 0:
            tile = _weights(w, n, start + k, N, K, EVEN)
            if GATE:
                tile_up = _weights(w + N * K, n, start + k, N, K, EVEN)
            if NORM:
                scale = tl.load(norm + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        value = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if NORM:
            square += value * value
            value *= scale
        acc += tile.to(tl.float32) * value[None, :]
        if GATE:
            acc_up += tile_up.to(tl.float32) * value[None, :]
    out = tl.sum(acc, 1)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(square, 0) / K + eps)
        out *= factor
    if GATE:
        out = out * tl.sigmoid(out) * tl.sum(acc_up, 1) * factor
    if ADD:
        out += add
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def norm_linear_kernel(x, norm, w, y, N, eps, K: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """As `linear_kernel` with NORM, for a K that is a power of two: a program keeps the normalised x and goes over
    every num_programs-th tile of outputs, with the next tile's weights on their way while it sums up this one's."""
    first = tl.program_id(0) * BN
    step = tl.num_programs(0) * BN
    k = tl.arange(0, K)
    r = tl.arange(0, BN)
    launch_dependents(PDL)
    tile = _weights(w, first + r, k, N, K, True)
    if GATE:
        tile_up = _weights(w + N * K, first + r, k, N, K, True)
    scale = tl.load(norm + k).to(tl.float32)
    wait(PDL)
    value = tl.load(x + k).to(tl.float32)
    value = value * scale * tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    for at in tl.range(first, N, step):
        n = at + r
        after = _weights(w, n + step, k, N, K, True)
        out = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        if GATE:
            after_up = _weights(w + N * K, n + step, k, N, K, True)
            out = out * tl.sigmoid(out) * tl.sum(tile_up.to(tl.float32) * value[None, :], 1)
            tile_up = after_up
        tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)
        tile = after


class Tile(NamedTuple):
    """The work of one program: outputs, inputs at a time, warps."""

    outputs: int
    inputs: int
    warps: int


def tile(inputs: int, *, gate: bool) -> Tile:
    """What was fastest on an H200 at the shapes of the 2B model; the record is in `docs/performance.md`."""
    return Tile(4, min(1024 if gate else 2048, triton.next_power_of_2(inputs)), 4)


class Loop(NamedTuple):
    """How `norm_linear_kernel` goes over its outputs: outputs at a time, warps, programs at most."""

    outputs: int
    warps: int
    programs: int


def loop(inputs: int, *, gate: bool) -> Loop | None:
    """None where `linear_kernel` serves: x has to fit the registers of a program, as a power of two."""
    if inputs > 4096 or inputs != triton.next_power_of_2(inputs):
        return None
    return Loop(max(1, 8192 // inputs), 4, 396) if gate else Loop(max(1, 16384 // inputs), 8, 264)


def _launch(
    x: Tensor, norm: Tensor | None, w: Tensor, residual: Tensor | None, *, eps: float, gate: bool, pdl: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if not w.is_contiguous():  # as a CPU may have it; read by rows it would give numbers, all wrong
        raise ShapeError(f"linear: expected a weight laid out by rows, got strides {w.stride()} for {list(w.shape)}")
    inputs = x.shape[1]
    outputs = len(w) // 2 if gate else len(w)
    y = x.new_empty(1, outputs, dtype=dtype or x.dtype)
    if norm is not None and (over := loop(inputs, gate=gate)):
        norm_linear_kernel[(min(over.programs, triton.cdiv(outputs, over.outputs)),)](
            x, norm, w, y, outputs, eps, K=inputs, BN=over.outputs, GATE=gate, num_warps=over.warps, **options(pdl)
        )  # fmt: skip
        return y
    size = tile(inputs, gate=gate)
    linear_kernel[(triton.cdiv(outputs, size.outputs),)](
        x, x if norm is None else norm, w, x if residual is None else residual, y, outputs, eps,
        K=inputs, BN=size.outputs, BK=size.inputs, NORM=norm is not None, GATE=gate, ADD=residual is not None,
        num_warps=size.warps, **options(pdl),
    )  # fmt: skip
    return y


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> tuple[Tensor, Tensor]:
    return x, _launch(x, norm, weight, None, eps=eps, gate=False, pdl=pdl)


def norm_gate(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> tuple[Tensor, Tensor]:
    return x, _launch(x, norm, weight, None, eps=eps, gate=True, pdl=pdl)


def linear_add(y: Tensor, weight: Tensor, x: Tensor, *, pdl: bool) -> Tensor:
    return _launch(y, None, weight, x, eps=0.0, gate=False, pdl=pdl)


def head(x: Tensor, last: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> Tensor:
    """Of a step of one row, whose only position is the last."""
    return _launch(x, norm, weight, None, eps=eps, gate=False, pdl=pdl, dtype=torch.float32)
