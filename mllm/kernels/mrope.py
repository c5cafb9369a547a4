"""Queries and keys turned where they lie: any strides, and the part of each head that the rotary tables cover.

For decoders whose attention does not do it by itself. The tables come from `step.rotary`, once per pass, in either
layout of M-RoPE; ordinary rotary embedding is M-RoPE of three equal positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.errors import ShapeError
from mllm.kernels.pdl import launch_dependents, options, wait

PAIRS = 1024
"""Rotary pairs of a program: eight a thread, which are the 16 bytes of one access in 16-bit numbers."""


@triton.jit
def _turn(x, step, h, count, c, s, HALF: tl.constexpr, PP: tl.constexpr):
    """Heads `h` of the `count` of one token, which begin at x and lie `step` apart, by the angles of (c, s)."""
    i = tl.arange(0, PP)
    at = x + h.to(tl.int64)[:, None] * step + i[None, :]  # 64 bits: heads of all tokens may lie far apart
    mask = (h < count)[:, None] & (i < HALF)[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (a * c - b * s).to(x.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    q, k, cos, sin, H, K, q_token, q_head, k_token, k_head,
    HALF: tl.constexpr, HP: tl.constexpr, PP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HP heads of one token: the first programs of it take those of q [T H D], the others those of k [T K D]."""
    launch_dependents(PDL)
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.cdiv(H, HP)
    h = tl.arange(0, HP)
    i = tl.arange(0, PP)
    wait(PDL)
    c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    if block < blocks:
        _turn(q + t * q_token, q_head, block * HP + h, H, c, s, HALF, PP)
    else:
        _turn(k + t * k_token, k_head, (block - blocks) * HP + h, K, c, s, HALF, PP)


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, pdl: bool = False) -> None:
    """Turn the pairs (i, i + half) of every head of q [T H D] and k [T K D] by tables f32 [T half]; see `rotary.rotate`.

    q and k may be views, of a fused projection for example, with heads and tokens at any distance; only the numbers
    of a head lie side by side. Written are the first 2 * half numbers of each head and nothing else.
    Raises `ShapeError` where that cannot be: sizes that differ, tables longer than a head, a head that is not laid out
    so, or one number that belongs to several heads (of an expanded tensor).
    """
    tokens, size, half = len(q), q.shape[-1], cos.shape[-1]
    for name, x in (("q", q), ("k", k)):
        _check(name, x, tokens, size)
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (tokens, half) or x.dtype != torch.float32 or not x.is_contiguous() or 2 * half > size:
            raise ShapeError(
                f"rotate_: expected {name} float32 [{tokens} half], contiguous, with 2 * half <= {size}, the head size "
                f"of q, got {x.dtype} {list(x.shape)} with strides {x.stride()}"
            )
    heads, kv_heads = q.shape[1], k.shape[1]
    if not tokens * half * (heads + kv_heads):
        return
    padded = triton.next_power_of_2(half)
    block = max(1, min(PAIRS // padded, triton.next_power_of_2(max(heads, kv_heads))))
    rotate_kernel[(tokens, triton.cdiv(heads, block) + triton.cdiv(kv_heads, block))](
        q, k, cos, sin, heads, kv_heads, *q.stride()[:2], *k.stride()[:2],
        HALF=half, HP=block, PP=padded, **options(pdl),
    )  # fmt: skip


def _check(name: str, x: Tensor, tokens: int, size: int) -> None:
    """Raises `ShapeError` unless x is [tokens heads size] and each of its heads can be written as it lies."""
    if x.dim() != 3 or (x.shape[0], x.shape[2]) != (tokens, size) or not x.is_floating_point():
        raise ShapeError(f"rotate_: expected {name} [{tokens} heads {size}] as q is, got {x.dtype} {list(x.shape)}")
    if size > 1 and x.stride(2) != 1:
        raise ShapeError(
            f"rotate_: expected the numbers of a head of {name} side by side, got strides {x.stride()} for "
            f"{list(x.shape)}; pass a view whose last dimension has stride 1, or make it contiguous"
        )
    if any(count > 1 and stride == 0 for count, stride in zip(x.shape, x.stride(), strict=True)):
        raise ShapeError(
            f"rotate_: expected {name} to hold each number once, got strides {x.stride()} for {list(x.shape)}; "
            "copy what was expanded before it is rotated in place"
        )
