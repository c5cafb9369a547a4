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
        out += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


class Tile(NamedTuple):
    """The work of one program: outputs, inputs at a time, warps."""

    outputs: int
    inputs: int
    warps: int


def tile(inputs: int, *, gate: bool) -> Tile:
    """What was fastest on an H200 at the shapes of the 2B model; the record is in `docs/performance.md`."""
    return Tile(4, min(1024 if gate else 2048, triton.next_power_of_2(inputs)), 4)


def _launch(
    x: Tensor, norm: Tensor | None, w: Tensor, residual: Tensor | None, *, eps: float, gate: bool, pdl: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if not w.is_contiguous():  # as a CPU may have it; read by rows it would give numbers, all wrong
        raise ShapeError(f"linear: expected a weight laid out by rows, got strides {w.stride()} for {list(w.shape)}")
    inputs = x.shape[1]
    outputs = len(w) // 2 if gate else len(w)
    y = x.new_empty(1, outputs, dtype=dtype or x.dtype)
    size = tile(inputs, gate=gate)
    linear_kernel[(triton.cdiv(outputs, size.outputs),)](
        x, x if norm is None else norm, w, x if residual is None else residual, y, outputs, eps,
        K=inputs, BN=size.outputs, BK=size.inputs, NORM=norm is not None, GATE=gate, ADD=residual is not None,
        num_warps=size.warps, **options(pdl),
    )  # fmt: skip
    return y


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> Tensor:
    return _launch(x, norm, weight, None, eps=eps, gate=False, pdl=pdl)


def norm_gate(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> Tensor:
    return _launch(x, norm, weight, None, eps=eps, gate=True, pdl=pdl)


def linear_add(y: Tensor, weight: Tensor, x: Tensor, *, pdl: bool) -> Tensor:
    return _launch(y, None, weight, x, eps=0.0, gate=False, pdl=pdl)


def head(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, pdl: bool) -> Tensor:
    return _launch(x, norm, weight, None, eps=eps, gate=False, pdl=pdl, dtype=torch.float32)
