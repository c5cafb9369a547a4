"""Queries and keys made ready for attention: norm, rotation, and the write of keys and values to the pool.

For prompts (`rotate_write`) and for the vision encoder (`rotate_heads`); decode does it inside its attention kernel.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels import rotary
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows


@lru_cache(maxsize=1024)  # beyond all that a process has: CUDA graphs read what lies here, and do not hold it
def frequencies(count: int, theta: float, device: torch.device) -> Tensor:
    """As `rotary.frequencies`, made once: six small kernels that a pass need not repeat."""
    return rotary.frequencies(count, theta, device)


@triton.jit
def _heads(row, count, HALF: tl.constexpr, HP: tl.constexpr, PP: tl.constexpr):
    """The two halves of `count` heads at `row`, f32 [HP PP] each, and where they and their mask lie."""
    h = tl.arange(0, HP)
    i = tl.arange(0, PP)
    at = h[:, None] * (2 * HALF) + i[None, :]
    mask = (h < count)[:, None] & (i < HALF)[None, :]
    a = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(row + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return a, b, at, mask


@triton.jit
def _store(out, at, mask, a, b, c, s, scale, HALF: tl.constexpr):
    """The pairs (a, b) turned by the angle of (c, s), times scale."""
    tl.store(out + at, ((a * c - b * s) * scale).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, ((b * c + a * s) * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate_write_kernel(
    qkv, q_norm, k_norm, cos, sin, slots, q, keys, values, scale, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, PP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token t: q [T H D] normalised, rotated and scaled; keys and values [slots K D] of it at slots[t]."""
    launch_dependents(PDL)
    t = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, PP)
    inside = i < HALF
    wait(PDL)
    row = qkv + t * (H + 2 * K) * D
    slot = tl.load(slots + t) * K * D
    c = tl.load(cos + t * HALF + i, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + t * HALF + i, mask=inside, other=0.0)[None, :]
    qa, qb, q_at, q_mask = _heads(row, H, HALF, HP, PP)
    ka, kb, k_at, k_mask = _heads(row + H * D, K, HALF, KP, PP)
    va, vb, _, _ = _heads(row + (H + K) * D, K, HALF, KP, PP)
    wa = tl.load(q_norm + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(q_norm + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    factor = tl.rsqrt((tl.sum(qa * qa, 1) + tl.sum(qb * qb, 1)) / D + eps)[:, None]
    _store(q + t * H * D, q_at, q_mask, qa * factor * wa, qb * factor * wb, c, s, scale, HALF)
    wa = tl.load(k_norm + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(k_norm + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    factor = tl.rsqrt((tl.sum(ka * ka, 1) + tl.sum(kb * kb, 1)) / D + eps)[:, None]
    _store(keys + slot, k_at, k_mask, ka * factor * wa, kb * factor * wb, c, s, 1.0, HALF)
    tl.store(values + slot + k_at, va.to(values.dtype.element_ty), mask=k_mask)
    tl.store(values + slot + k_at + HALF, vb.to(values.dtype.element_ty), mask=k_mask)


def rotate_write(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
    *, scale: float, eps: float, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """q [T H D], times `scale`, of qkv [T C]; writes `keys` and `values` [P S K D] at slots [T]."""
    tokens, width = qkv.shape
    kv_heads, size = keys.shape[2:]
    heads = width // size - 2 * kv_heads
    q = empty_rows(qkv, tokens, heads, size)
    rotate_write_kernel[(tokens,)](
        qkv, q_norm, k_norm, cos, sin, slots, q, keys, values, scale, eps,
        H=heads, K=kv_heads, D=size, HP=triton.next_power_of_2(heads), KP=triton.next_power_of_2(kv_heads),
        PP=triton.next_power_of_2(size // 2), **options(pdl),
    )  # fmt: skip
    return q


@triton.jit
def rotate_heads_kernel(qkv, cos, sin, out, scale, COUNT, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    """out [X 2 H 2*HALF], COUNT pairs: the queries, times scale, and the keys of qkv [X 3 H 2*HALF], rotated."""
    launch_dependents(PDL)
    WIDTH: tl.constexpr = 4 * H * HALF  # of the queries and keys of a patch
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, p = j // (WIDTH // 2), j % (WIDTH // 2)
    angle = x * HALF + p % HALF
    n = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    own = qkv + (n // WIDTH).to(tl.int64) * (WIDTH // 2 * 3) + n % WIDTH
    wait(PDL)
    pair = tl.load(own, mask=n < 2 * COUNT, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=j < COUNT, other=0.0)
    s = tl.load(sin + angle, mask=j < COUNT, other=0.0)
    a, b = tl.split(tl.reshape(pair, [BLOCK, 2]))
    times = tl.where(p < WIDTH // 4, scale, 1.0)
    turned = tl.reshape(tl.join((a * c - b * s) * times, (b * c + a * s) * times), [2 * BLOCK])
    tl.store(out + n.to(tl.int64), turned.to(out.dtype.element_ty), mask=n < 2 * COUNT)


def rotate_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, *, scale: float = 1.0, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries, times `scale`, and keys [X heads Dv] of qkv [X Cv], of which neighbours are rotated: views of one new
    tensor."""
    count, width = qkv.shape
    size = width // (3 * heads)
    out = empty_rows(qkv, count, 2, heads, size)
    pairs = out.numel() // 2
    block = 512 if count < 512 else 1024  # for a program; fewer start sooner, more are fewer to start
    rotate_heads_kernel[(triton.cdiv(pairs, block),)](
        qkv, cos, sin, out, scale, pairs, H=heads, HALF=size // 2, BLOCK=block, **options(pdl)
    )
    return out[:, 0], out[:, 1]


@triton.jit
def axial_kernel(coords, frequencies, cos, sin, X, QUARTER, QP: tl.constexpr, PDL: tl.constexpr):
    """cos, sin f32 [X 2*QUARTER] of patches at coords [4 X]: see `rotary.axial`."""
    launch_dependents(PDL)
    wait(PDL)
    x = tl.program_id(0)
    i = tl.arange(0, QP)
    turn = tl.load(frequencies + i, mask=i < QUARTER, other=0.0)
    for axis in tl.static_range(2):
        angle = tl.load(coords + axis * X + x).to(tl.float32) * turn  # below 2,000: the chip's sine is exact enough
        at = (2 * x + axis) * QUARTER + i
        tl.store(cos + at, tl.cos(angle), mask=i < QUARTER)
        tl.store(sin + at, tl.sin(angle), mask=i < QUARTER)


def axial(coords: Tensor, frequencies: Tensor, *, pdl: bool) -> tuple[Tensor, Tensor]:
    """Rotary tables f32 [X Dv/2] of patches at coords [4 X] (row, column, ...) for frequencies [Dv/4]."""
    count, quarter = coords.shape[1], len(frequencies)
    cos = torch.empty(count, 2 * quarter, dtype=torch.float32, device=coords.device)
    sin = torch.empty_like(cos)
    axial_kernel[(count,)](
        coords, frequencies, cos, sin, count, quarter, QP=triton.next_power_of_2(quarter), **options(pdl)
    )  # fmt: skip
    return cos, sin
