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
from mllm.kernels.pdl import launch_dependents, options, wait


@triton.jit
def _weights(w, n, k, N, K: tl.constexpr, KP: tl.constexpr):
    """A tile of w [N K]. It is read once, so it need not push anything out of the cache."""
    at = w + n.to(tl.int64)[:, None] * K + k[None, :]
    mask = n[:, None] < N
    if K < KP:
        mask &= k[None, :] < K
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def linear_kernel(x, norm, w, residual, y, N, eps, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
                  NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y [N] from x [K] and w [N K]. GATE: w [2N K] holds gate over up, and y is silu(gate) * up."""
    first = tl.program_id(0) * BN
    step = tl.num_programs(0) * BN
    k = tl.arange(0, KP)
    r = tl.arange(0, BN)
    launch_dependents(PDL)
    tile = _weights(w, first + r, k, N, K, KP)
    if GATE:
        tile_up = _weights(w + N * K, first + r, k, N, K, KP)
    if NORM:
        scale = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        value = value * scale * tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    for at in tl.range(first, N, step):
        n = at + r
        if ADD:
            add = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
        after = _weights(w, n + step, k, N, K, KP)
        out = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        if GATE:
            after_up = _weights(w + N * K, n + step, k, N, K, KP)
            out = out * tl.sigmoid(out) * tl.sum(tile_up.to(tl.float32) * value[None, :], 1)
            tile_up = after_up
        if ADD:
            out += add
        tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)
        tile = after


class Loop(NamedTuple):
    """How a product is shared out: outputs that a program takes at a time, warps, programs at most."""

    outputs: int
    warps: int
    programs: int


def loop_for(outputs: int, inputs: int, *, gate: bool) -> Loop:
    """What was fastest in a whole step on an H200, at the shapes of the 2B, 4B and 8B models; the record is in
    `docs/performance.md`. A few rows of weights are some 16 KB, and all programs are on the chip at once."""
    if inputs > 4096:
        return Loop(2, 4, 396) if inputs <= 8192 else Loop(1, 8, 264)
    if inputs > 2560:
        return Loop(1 if gate else 2, 4, 528)
    if inputs > 2048:
        return Loop(4, 4, 528 if gate else 396)
    if outputs > 2**16:  # a head
        return Loop(8, 8, 264)
    return Loop((2 if gate else 4) * 2048 // triton.next_power_of_2(inputs), 4, 528)


def _launch(
    x: Tensor, norm: Tensor | None, w: Tensor, residual: Tensor | None, *, eps: float, gate: bool, pdl: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if not w.is_contiguous():  # as a CPU may have it; read by rows it would give numbers, all wrong
        raise ShapeError(f"linear: expected a weight laid out by rows, got strides {w.stride()} for {list(w.shape)}")
    inputs = x.shape[1]
    outputs = len(w) // 2 if gate else len(w)
    y = x.new_empty(1, outputs, dtype=dtype or x.dtype)
    loop = loop_for(outputs, inputs, gate=gate)
    linear_kernel[(min(loop.programs, triton.cdiv(outputs, loop.outputs)),)](
        x, x if norm is None else norm, w, x if residual is None else residual, y, outputs, eps,
        K=inputs, KP=triton.next_power_of_2(inputs), BN=loop.outputs, NORM=norm is not None, GATE=gate,
        ADD=residual is not None, num_warps=loop.warps, **options(pdl),
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
