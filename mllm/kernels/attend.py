"""Decode attention in one kernel: QK norm, rotary embedding, KV write, and split-KV attention over pages.

A program takes one key/value head of one row and one split of its context, so that keys and values are read once
for the group of query heads that share them. The context is cut by its length, which only the device knows. Where there
is one row, the first tokens of a split, which earlier steps wrote, are loaded before the program waits for the kernel
before it (`kernels/pdl.py`), and the splits are left for the output projection to merge, which reads them all anyway
(`kernels/linear.py`). With more rows, or a long one, the last split of a head to arrive merges the others'; a few short
rows load their first tokens early as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.decode_plan import DecodePlan, SplitHeads
from mllm.kernels.flash import LOG2E, slots_of
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.room import empty_rows


@triton.jit
def _swapped(d, D: tl.constexpr):
    """The columns d of a vector [D] with its halves swapped."""
    return tl.where(d < D // 2, d + D // 2, d - D // 2)


@triton.jit
def _vectors(base, mask, D: tl.constexpr, DP: tl.constexpr):
    """Head vectors at `base` [n], f32 [n DP], zeros beyond D: (as they are, with their halves swapped)."""
    d = tl.arange(0, DP)
    swapped = _swapped(d, D)
    mask = mask[:, None] & (d < D)[None, :]
    x = tl.load(base[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return x, tl.load(base[:, None] + swapped[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm(weight, D: tl.constexpr, DP: tl.constexpr):
    """A norm's weight f32 [DP]: (as it is, with its halves swapped)."""
    d = tl.arange(0, DP)
    swapped = _swapped(d, D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    return w, tl.load(weight + swapped, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _norm_rotate(x, pair, norm, c, s, eps, D: tl.constexpr):
    """`_vectors` normalised and rotated; the sine's sign is in s."""
    w, w_pair = norm
    factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    return factor[:, None] * (x * (w * c)[None, :] + pair * (w_pair * s)[None, :])


@triton.jit
def _newest(row, norm_q, norm_k, cos, sin, keys, values, slots, b, h, first, scale, eps, H: tl.constexpr,
            K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr):  # fmt: skip
    """(queries [GP DP] of the newest token, times `scale`; maximum, sum and result of its own key and value).

    That key and value are the `first` split's to count, and to write to the pool. What the kernels before wrote is asked
    for at once: a trip to L2 takes as long as the arithmetic.
    """
    G: tl.constexpr = H // K
    d = tl.arange(0, DP)
    g = tl.arange(0, GP)
    one = tl.arange(0, 1)
    qx, q_pair = _vectors(row + (h * G + g) * D, g < G, D, DP)
    kx, k_pair = _vectors(row + (H + h + one) * D, one < 1, D, DP)
    v = tl.load(row + (H + K + h) * D + d, mask=d < D, other=0.0)
    c = tl.load(cos + b * (D // 2) + d % (D // 2))
    s = tl.load(sin + b * (D // 2) + d % (D // 2)) * tl.where(d < D // 2, -1.0, 1.0)
    q = (_norm_rotate(qx, q_pair, norm_q, c, s, eps, D) * scale).to(keys.dtype.element_ty)
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    if first:
        k = _norm_rotate(kx, k_pair, norm_k, c, s, eps, D).to(keys.dtype.element_ty)
        slot = (tl.load(slots + b) * K + h) * D
        tl.store(keys + slot + d[None, :], k, mask=(d < D)[None, :])
        tl.store(values + slot + d, v, mask=d < D)
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        total += 1.0
        acc += v.to(tl.float32)[None, :]
    return q, top, total, acc


@triton.jit
def _tile(keys, values, at, t, end, h, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    """Keys and values [TILE DP] of one head of tokens from t on, which lie `at`; zeros from `end` on."""
    d = tl.arange(0, DP)
    mask = (t + tl.arange(0, TILE) < end)[:, None] & (d < D)[None, :]
    at = (at * K + h)[:, None] * D + d[None, :]
    return tl.load(keys + at, mask=mask, other=0.0), tl.load(values + at, mask=mask, other=0.0)


@triton.jit
def _merge(partial, stats, head, live, out, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """out [G D]: the splits of a key/value head's query heads, weighted by their softmax sums.

    Read from L2, where the other programs wrote them.
    """
    d = tl.arange(0, DP)
    s = tl.arange(0, SPLITS)
    for g in tl.static_range(G):
        at = (head * SPLITS + s) * G + g
        top = tl.load(stats + at * 2, mask=s < live, other=-float("inf"), cache_modifier=".cg")
        total = tl.load(stats + at * 2 + 1, mask=s < live, other=0.0, cache_modifier=".cg")
        mask = (s < live)[:, None] & (d < D)[None, :]
        acc = tl.load(partial + at[:, None] * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(top - tl.max(top, 0))
        merged = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(out + g * D + d, merged.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def shares(length, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """(tokens of a row that are in the pool, tokens of a split, splits that have work: the first always has)."""
    past = tl.maximum(length - 1, 0)  # the newest comes from qkv
    chunk = tl.cdiv(tl.cdiv(past, SPLITS), TILE) * TILE
    return past, chunk, tl.maximum(tl.cdiv(past, tl.maximum(chunk, 1)), 1)


@triton.jit
def merged(parts, sums, live, A: tl.constexpr, D: tl.constexpr, AP: tl.constexpr, SPLITS: tl.constexpr):
    """The first `live` splits of a `SplitHeads` as one vector f32 [AP], zeros beyond A. D is a power of two."""
    h = tl.arange(0, AP // D)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    inside = (h < A // D)[:, None] & (s < live)[None, :]
    at = s[None, :] * (A // D) + h[:, None]  # heads first: a thread then has all splits of what it sums up
    total = tl.load(sums + at, mask=inside, other=tl.where(s == 0, 0.0, -float("inf"))[None, :])
    acc = tl.load(parts + at[:, :, None] * D + d[None, None, :], mask=inside[:, :, None], other=0.0).to(tl.float32)
    weight = tl.exp2(total - tl.max(total, 1)[:, None])
    weight /= tl.sum(weight, 1)[:, None]
    return tl.reshape(tl.sum(acc * weight[:, :, None], 1), [AP])


@triton.jit
def attend_kernel(
    qkv, q_norm, k_norm, cos, sin, keys, values, slots, pages, lengths, partial, stats, arrived, out, N, scale, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MERGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B H*D] from qkv [B (H + 2K)*D]; writes the new keys and values [P S K D] at `slots`.

    Without MERGE there is one row, and `out` and `stats` are the parts and sums of a `SplitHeads`.
    """
    G: tl.constexpr = H // K
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    launch_dependents(PDL)
    past, chunk, live = shares(tl.load(lengths + b), SPLITS, TILE)
    begin = split * chunk
    end = tl.minimum(begin + chunk, past)
    pages += b * N
    at = slots_of(pages, begin, N, S, TILE)
    if STAGES == 1:
        kt, vt = _tile(keys, values, at, begin, end, h, K, D, DP, TILE)
    norm_q = _norm(q_norm, D, DP)
    norm_k = _norm(k_norm, D, DP)
    wait(PDL)
    d = tl.arange(0, DP)
    g = tl.arange(0, GP)
    handed = split * H + h * G + g
    if split >= live:
        return
    q, top, total, acc = _newest(
        qkv + b * (H + 2 * K) * D, norm_q, norm_k, cos, sin, keys, values, slots, b, h, split == 0, scale, eps, H, K, D,
        DP, GP,
    )  # fmt: skip
    for t in tl.range(begin, end, TILE):
        after = slots_of(pages, t + TILE, N, S, TILE)  # a tile ahead, or the loads of keys would wait for it
        if STAGES > 1:
            kt, vt = _tile(keys, values, at, t, end, h, K, D, DP, TILE)
            at = after
        inside = (t + tl.arange(0, TILE)) < end
        score = tl.dot(q, tl.trans(kt), input_precision="ieee")
        score = tl.where(inside[None, :], score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(vt.dtype), vt, acc * fade[:, None], input_precision="ieee")
        top = new
        if STAGES == 1:
            kt, vt = _tile(keys, values, after, t + TILE, end, h, K, D, DP, TILE)
    head = b * K + h
    mask = (g < G)[:, None] & (d < D)[None, :]
    if not MERGE:
        tl.store(out + handed[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(stats + handed, top + tl.log2(total), mask=g < G)
        return
    result = out + head * G * D
    if live == 1:
        tl.store(result + g[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        return
    mine = (head * SPLITS + split) * G + g
    tl.store(partial + mine[:, None] * D + d[None, :], acc, mask=mask)
    tl.store(stats + mine * 2, top, mask=g < G)
    tl.store(stats + mine * 2 + 1, total, mask=g < G)
    tl.debug_barrier()  # every store of this program comes before its arrival
    if tl.atomic_add(arrived + head, 1, sem="acq_rel") == live - 1:
        _merge(partial, stats, head, live, result, G, D, DP, SPLITS)
        tl.store(arrived + head, 0)


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: DecodePlan, keys: Tensor, values: Tensor, *, eps: float,
    pdl: bool,
) -> Tensor | SplitHeads:  # fmt: skip
    """As `reference.attend_`, one token a row."""
    rows, width = qkv.shape
    page_size, kv_heads, size = keys.shape[1:]
    heads = width // size - 2 * kv_heads
    split, workspace = plan.split, plan.workspace
    if workspace is None:
        out = qkv.new_empty(split.splits, heads * size)
        partial = arrived = stats = qkv.new_empty(split.splits, heads, dtype=torch.float32)
    else:
        out = empty_rows(qkv, rows, heads * size)
        partial, stats, arrived = workspace.partial, workspace.stats, workspace.arrived
    attend_kernel[(kv_heads, split.splits, rows)](
        qkv, q_norm, k_norm, plan.cos, plan.sin, keys, values, plan.slots, plan.pages, plan.lengths, partial, stats,
        arrived, out, plan.pages.shape[1], size**-0.5 * LOG2E, eps,
        H=heads, K=kv_heads, D=size, DP=max(16, triton.next_power_of_2(size)), S=page_size,
        GP=max(16, triton.next_power_of_2(heads // kv_heads)), SPLITS=split.splits, TILE=split.tile,
        STAGES=split.stages, MERGE=workspace is not None, num_warps=split.warps, num_stages=split.stages,
        **options(pdl),
    )  # fmt: skip
    return SplitHeads(out, stats, plan.lengths, split.tile) if workspace is None else out
