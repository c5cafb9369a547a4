"""Queries and keys made ready for attention: norm, rotation, and the write of keys and values to the pool.

For prompts (`rotate_write`) and for the vision encoder (`rotate_heads`); decode does it inside its attention kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.pdl import FUSED


@triton.jit
def _rotated(x, pair, cos, sin, d, HALF: tl.constexpr):
    """x * cos + pair * sin, where pair is x with the halves of each head swapped; the sine's sign is in here."""
    return x * cos[None, :] + pair * (tl.where(d < HALF, -1.0, 1.0) * sin)[None, :]


@triton.jit
def rotate_write_kernel(
    qkv, q_norm, k_norm, cos, sin, slots, q, keys, values, scale, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One token t: q [T H D] normalised, rotated and scaled; keys and values [slots K D] of it at slots[t]."""
    t = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, DP)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    inside = d < D
    h = tl.arange(0, HP)
    is_q = (h < H)[:, None]
    mask = (h < H + K)[:, None] & inside[None, :]
    row = qkv + t * (H + 2 * K) * D
    slot = tl.load(slots + t) * K
    c = tl.load(cos + t * HALF + d % HALF)
    s = tl.load(sin + t * HALF + d % HALF)
    x = tl.load(row + h[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(row + h[:, None] * D + other[None, :], mask=mask, other=0.0).to(tl.float32)
    wq = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)
    wk = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)
    wq_pair = tl.load(q_norm + other, mask=inside, other=0.0).to(tl.float32)
    wk_pair = tl.load(k_norm + other, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x = _rotated(x * tl.where(is_q, wq[None, :], wk[None, :]), pair * tl.where(is_q, wq_pair[None, :], wk_pair[None, :]),
                 c, s, d, HALF) * factor  # fmt: skip
    tl.store(q + t * H * D + h[:, None] * D + d[None, :], (x * scale).to(q.dtype.element_ty), mask=is_q & mask)
    key = (slot + h - H)[:, None] * D + d[None, :]
    tl.store(keys + key, x.to(keys.dtype.element_ty), mask=(h >= H)[:, None] & mask)
    k = tl.arange(0, KP)
    mask = (k < K)[:, None] & inside[None, :]
    v = tl.load(row + (H + K + k)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(values + (slot + k)[:, None] * D + d[None, :], v, mask=mask)


def rotate_write(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
    *, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """q [T H D], times `scale`, of qkv [T C]; writes `keys` and `values` [P S K D] at slots [T]."""
    tokens, width = qkv.shape
    kv_heads, size = keys.shape[2:]
    heads = width // size - 2 * kv_heads
    q = qkv.new_empty(tokens, heads, size)
    rotate_write_kernel[(tokens,)](
        qkv, q_norm, k_norm, cos, sin, slots, q, keys, values, scale, eps,
        H=heads, K=kv_heads, D=size, DP=triton.next_power_of_2(size), HP=triton.next_power_of_2(heads + kv_heads),
        KP=triton.next_power_of_2(kv_heads), **FUSED,
    )  # fmt: skip
    return q


@triton.jit
def rotate_heads_kernel(qkv, cos, sin, out, scale, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                        HP: tl.constexpr):  # fmt: skip
    """One patch: its queries, times scale, and keys of qkv [X 3 H D], rotated, to out [X 2 H D]."""
    x = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, DP)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    h = tl.arange(0, HP)
    mask = (h < 2 * H)[:, None] & (d < D)[None, :]
    row = qkv + x * 3 * H * D + h[:, None] * D
    c = tl.load(cos + x * HALF + d % HALF)
    s = tl.load(sin + x * HALF + d % HALF)
    value = tl.load(row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(row + other[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _rotated(value, pair, c, s, d, HALF) * tl.where(h < H, scale, 1.0)[:, None]
    tl.store(out + x * 2 * H * D + h[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Queries, times `scale`, and keys [X heads Dv] of qkv [X Cv], rotated: views of one new tensor."""
    count, width = qkv.shape
    size = width // (3 * heads)
    out = qkv.new_empty(count, 2, heads, size)
    rotate_heads_kernel[(count,)](
        qkv, cos, sin, out, scale, H=heads, D=size, DP=triton.next_power_of_2(size),
        HP=triton.next_power_of_2(2 * heads), **FUSED,
    )  # fmt: skip
    return out[:, 0], out[:, 1]


@triton.jit
def axial_kernel(coords, frequencies, cos, sin, X, QUARTER, QP: tl.constexpr):
    """cos, sin f32 [X 2*QUARTER] of patches at coords [4 X]: see `rotary.axial`."""
    x = tl.program_id(0)
    i = tl.arange(0, QP)
    turn = tl.load(frequencies + i, mask=i < QUARTER, other=0.0)
    for axis in tl.static_range(2):
        angle = tl.load(coords + axis * X + x).to(tl.float32) * turn  # below 2,000: the chip's sine is exact enough
        at = (2 * x + axis) * QUARTER + i
        tl.store(cos + at, tl.cos(angle), mask=i < QUARTER)
        tl.store(sin + at, tl.sin(angle), mask=i < QUARTER)


def axial(coords: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables f32 [X Dv/2] of patches at coords [4 X] (row, column, ...) for frequencies [Dv/4]."""
    count, quarter = coords.shape[1], len(frequencies)
    cos = torch.empty(count, 2 * quarter, dtype=torch.float32, device=coords.device)
    sin = torch.empty_like(cos)
    axial_kernel[(count,)](
        coords, frequencies, cos, sin, count, quarter, QP=triton.next_power_of_2(quarter), **FUSED
    )  # fmt: skip
    return cos, sin
