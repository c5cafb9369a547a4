"""Products with few rows, compiled: weights pass through the cores once, with norm, gate and residual around them.

MKL's take 2 to 3 times as long on an AMD core. A row's sums are taken in one order whatever the number of rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mllm.kernels.cpu_lanes import HOST, address, compiled, exp, f32, tile
from mllm.kernels.cpu_team import fork, parts_for

_tile_8x2, _tile_4x4, _tile_2x4, _tile_1x4, _tile_1x1 = tile(8, 2), tile(4, 4), tile(2, 4), tile(1, 4), tile(1, 1)
DEPTH = 1024  # inputs in one go: 8 rows of x that long and 2 of weights fit the first cache,
ROWS = 64  # and that many rows of x the second


@compiled()
def _product(x, rows, depth, w, out, ldo, first, last):
    """out[r, n] += x[r] . w[n] for outputs n from `first` to `last`: x [rows depth], w [... depth], out [rows ldo]."""
    for row in range(0, rows, ROWS):
        for at in range(0, depth, DEPTH):
            xs, ws, outs = x + 4 * (row * depth + at), w + 4 * (first * depth + at), out + 4 * (row * ldo + first)
            panel(xs, depth, min(ROWS, rows - row), ws, depth, last - first, min(DEPTH, depth - at), outs, ldo)


@compiled()
def panel(x, ldx, rows, w, ldw, outputs, depth, out, ldo):
    """out[r, n] += x[r, :depth] . w[n, :depth], tile by tile: 4 outputs' weights stay in the first cache while the
    rows pass. `ldx`, `ldw` and `ldo` are the floats between two rows of each."""
    for n in range(0, outputs - 3, 4):
        weights, to = w + 4 * n * ldw, out + 4 * n
        for r in range(0, rows - 7, 8):
            _tile_8x2(x + 4 * r * ldx, ldx, weights, ldw, depth, to + 4 * r * ldo, ldo)
            _tile_8x2(x + 4 * r * ldx, ldx, weights + 8 * ldw, ldw, depth, to + 4 * r * ldo + 8, ldo)
        r = rows // 8 * 8
        if rows & 4:
            _tile_4x4(x + 4 * r * ldx, ldx, weights, ldw, depth, to + 4 * r * ldo, ldo)
            r += 4
        if rows & 2:
            _tile_2x4(x + 4 * r * ldx, ldx, weights, ldw, depth, to + 4 * r * ldo, ldo)
            r += 2
        if rows & 1:
            _tile_1x4(x + 4 * r * ldx, ldx, weights, ldw, depth, to + 4 * r * ldo, ldo)
    for n in range(outputs // 4 * 4, outputs):
        for r in range(rows):
            _tile_1x1(x + 4 * r * ldx, ldx, w + 4 * n * ldw, ldw, depth, out + 4 * (r * ldo + n), ldo)


@compiled(fastmath={"reassoc", "contract"})
def square(x, count):
    """The sum of the squares of `count` numbers."""
    row, total = f32(x, count), np.float32(0)
    for i in range(count):
        total += row[i] * row[i]
    return total


@compiled()
def norm(x, scale, eps, count, out):
    """`count` numbers over their root mean square, times `scale`."""
    row, scales, to = f32(x, count), f32(scale, count), f32(out, count)
    factor = np.float32(1) / np.sqrt(square(x, count) / np.float32(count) + np.float32(eps))
    for i in range(count):
        to[i] = row[i] * factor * scales[i]


@compiled()
def _share(count, part, parts):
    """Where part number `part` of `count` outputs starts: whole tiles for each."""
    return min((count + 4 * parts - 1) // (4 * parts) * 4 * part, count)


@compiled()
def _linear_part(part, parts, x, rows, depth, w, out, outputs):
    _product(x, rows, depth, w, out, outputs, _share(outputs, part, parts), _share(outputs, part + 1, parts))


_linear_fork = fork(_linear_part)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def _linear(parts, x, rows, depth, w, out, outputs):
    """out [rows outputs] += x [rows depth] @ w [outputs depth].T"""
    _linear_fork(parts, (x, rows, depth, w, out, outputs))


@compiled("void(int64, int64, float64, int64, int64, int64)")
def _norm_rows(x, scale, eps, rows, depth, out):
    for r in range(rows):
        norm(x + 4 * r * depth, scale, eps, depth, out + 4 * r * depth)


@compiled()
def _gate(gates, ups, count):
    gate, up = f32(gates, count), f32(ups, count)
    for i in range(count):
        up[i] = up[i] * gate[i] / (np.float32(1) + exp(-gate[i]))


@compiled()
def _gate_part(part, parts, x, rows, depth, w, gates, out, outputs):
    first, last = _share(outputs, part, parts), _share(outputs, part + 1, parts)
    for to, skip in ((gates, 0), (out, outputs)):
        _product(x, rows, depth, w + 4 * skip * depth, to, outputs, first, last)
    for r in range(rows):
        at = 4 * (r * outputs + first)
        _gate(gates + at, out + at, last - first)


_gate_fork = fork(_gate_part)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def _linear_gate(parts, x, rows, depth, w, gates, out, outputs):
    """out = silu(x @ gate.T) * (x @ up.T), where w [2*outputs depth] is gate, then up; `gates` and `out` are zeros."""
    _gate_fork(parts, (x, rows, depth, w, gates, out, outputs))


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, **HOST)
    _norm_rows(address(x), address(norm), eps, *x.shape, address(out))
    return out


def _plus_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out [T N] += x [T K] @ weight [N K].T"""
    weight, (rows, depth) = weight.contiguous(), x.shape
    _linear(parts_for(weight.numel(), rows), address(x), rows, depth, address(weight), address(out), len(weight))
    return out


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return x, _plus_product(torch.zeros(len(x), len(weight), **HOST), _normed(x, norm, eps), weight)


def linear_add(y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return _plus_product(x.clone(memory_format=torch.contiguous_format), y.contiguous(), weight)


def head(x: Tensor, last: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return norm_linear(x if last is None else x.index_select(0, last), norm, weight, eps=eps)[1]


def norm_gate(x: Tensor, norm: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    (rows, depth), outputs = x.shape, len(weight) // 2
    normed, weight = _normed(x, norm, eps), weight.contiguous()
    gates, out = torch.zeros(2, rows, outputs, **HOST)
    at = address(normed), rows, depth, address(weight), address(gates), address(out), outputs
    _linear_gate(parts_for(weight.numel(), rows), *at)
    return x, out
