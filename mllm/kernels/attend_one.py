"""Decode attention of one row on Hopper, of contexts whose splits are a tile each: all that takes long is done early.

As `kernels/attend.py` has it, with the order of things laid down by hand. Before it waits for the kernel ahead of it, a
program asks for its keys, as the tensor cores take them, and its values. What is left until the next kernel can start
is a chain of few links: some threads normalise and rotate the queries and the newest key; all score them; the warps, which
have some tokens each, meet once more; and each weighs some columns of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from mllm.kernels.attend import DecodePlan, Split, Unmerged, shares
from mllm.kernels.flash import LOG2E
from mllm.kernels.pdl import launch_dependents, options, wait

ROWS = gl.constexpr(16)
"""Of the tensor cores' tile: the query heads of a key/value head, its newest key, and nothing."""
MASKED = gl.constexpr(-1e30)


@gluon.constexpr_function
def _product(warps):
    """How the warps hold a product [ROWS n]: each some columns."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def _row_major(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def _factor_of_16_bits():
    """A layout in shared memory from which tensor cores' factors are read without conflicts."""
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.jit
def _slots(pages, t, end, S: gl.constexpr):
    """Where tokens t lie in the pool."""
    return gl.load(pages + t // S, mask=t < end, other=0).to(gl.int64) * S + t % S


@gluon.jit
def _keys(keys, pages, begin, end, h, K: gl.constexpr, D: gl.constexpr, S: gl.constexpr, TILE: gl.constexpr):
    """Keys [D TILE] of one head of the tokens from `begin` on, as a factor; zeros from `end` on."""
    layout: gl.constexpr = gl.DotOperandLayout(1, _product(gl.num_warps()), 8)
    t = begin + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    d = gl.arange(0, D, gl.SliceLayout(1, layout))
    at = (_slots(pages, t, end, S) * K + h) * D
    return gl.load(keys + at[None, :] + d[:, None], mask=(t < end)[None, :], other=0.0)


@gluon.jit
def _values(values, pages, begin, end, h, K: gl.constexpr, D: gl.constexpr, S: gl.constexpr, TILE: gl.constexpr):
    """The same of values [TILE D], as they lie; what makes a factor of them is shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    t = begin + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    at = (_slots(pages, t, end, S) * K + h) * D
    return gl.load(values + at[:, None] + d[None, :], mask=(t < end)[:, None], other=0.0)


@gluon.jit
def _rotated(x, cos, sin, D: gl.constexpr):
    """x [ROWS D] rotated by halves, of which a thread has both; cos, sin [D/2]."""
    a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, D // 2]), [0, 2, 1]))
    half: gl.constexpr = gl.SliceLayout(0, a.type.layout)
    c = gl.convert_layout(cos, half, assert_trivial=True)[None, :]
    s = gl.convert_layout(sin, half, assert_trivial=True)[None, :]
    pair = gl.permute(gl.join(a * c - b * s, b * c + a * s), [0, 2, 1])
    return gl.convert_layout(gl.reshape(pair, [ROWS, D]), x.type.layout, assert_trivial=True)


@gluon.jit
def _by_warp(x, TILE: gl.constexpr, WARPS: gl.constexpr):
    """x [ROWS TILE] by the warps whose tokens they are [ROWS . WARPS 8]."""
    return gl.reshape(x, [ROWS, TILE // (8 * WARPS), WARPS, 8])


@gluon.jit
def _over(x):
    """x [ROWS WARPS] over each warp's tokens."""
    return gl.expand_dims(gl.expand_dims(x, 2), 1)


@gluon.jit
def _powers(score, t, end, TILE: gl.constexpr, WARPS: gl.constexpr):
    """Of scores [ROWS TILE] of tokens t, in units of log2: (2^score less the highest of a warp's tokens [ROWS TILE], those
    highest [ROWS WARPS])."""
    score = _by_warp(gl.where((t < end)[None, :], score, MASKED), TILE, WARPS)
    top = gl.max(gl.max(score, 1), 2)
    return gl.reshape(gl.exp2(score - _over(top)), [ROWS, TILE]), top


@gluon.jit
def _weighed(powers, tops, newest, first, WARPS: gl.constexpr):
    """Of all warps' powers and highest scores and the newest token's score [ROWS], which is the first split's, in shared
    memory: (the tokens' shares as a factor; the newest's [ROWS]; their sum, by which both are yet to be divided; the highest
    score)."""
    TILE: gl.constexpr = powers.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, _product(WARPS), 2)
    p = _by_warp(powers.load(layout).to(gl.float32), TILE, WARPS)
    top = tops.load(gl.SliceLayout(2, gl.SliceLayout(1, p.type.layout)))
    newest = gl.where(first, newest.load(gl.SliceLayout(1, top.type.layout)), MASKED)
    most = gl.maximum(gl.max(top, 1), newest)
    p *= _over(gl.exp2(top - most[:, None]))
    own = gl.exp2(newest - most)
    total = gl.sum(gl.sum(gl.sum(p, 1), 1), 1)
    rows: gl.constexpr = gl.SliceLayout(1, _product(WARPS))
    own = gl.convert_layout(own, rows)
    total = gl.convert_layout(total, rows) + own
    p = gl.convert_layout(gl.reshape(p, [ROWS, TILE]).to(powers.dtype), layout, assert_trivial=True)
    return p, own, total, gl.convert_layout(most, rows)


@gluon.jit
def attend_one_kernel(
    qkv, q_norm, k_norm, cos, sin, keys, values, slots, pages, lengths, out, sums, scale, eps, H: gl.constexpr,
    K: gl.constexpr, D: gl.constexpr, S: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The parts `out` [SPLITS H*D] and `sums` [SPLITS H] of an `Unmerged` from qkv [(H + 2K)*D]; writes the new keys and
    values [P S K D] at `slots`."""
    G: gl.constexpr = H // K
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = _product(WARPS)
    T: gl.constexpr = keys.dtype.element_ty
    h = gl.program_id(0)
    split = gl.program_id(1)
    launch_dependents(PDL)
    past, chunk, live = shares(gl.load(lengths), SPLITS, TILE)
    begin = split * chunk
    end = gl.minimum(begin + chunk, past)
    kt = _keys(keys, pages, begin, end, h, K, D, S, TILE)
    vt = _values(values, pages, begin, end, h, K, D, S, TILE)
    R: gl.constexpr = gl.BlockedLayout([1, D // 32], [2, 16], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, R))
    d = gl.arange(0, D, gl.SliceLayout(0, R))
    query = (row < G)[:, None]
    weight = gl.where(query, gl.load(q_norm + d)[None, :], gl.load(k_norm + d)[None, :]).to(gl.float32)
    head = gl.where(row < G, h * G + row, H + h)
    wait(PDL)
    if split >= live:
        return
    x = gl.load(qkv + head[:, None] * D + d[None, :], mask=(row <= G)[:, None], other=0.0).to(gl.float32)
    i = gl.arange(0, D // 2, gl.SliceLayout(0, R))
    c, s = gl.load(cos + i), gl.load(sin + i)
    dv = gl.arange(0, D, gl.SliceLayout(0, L))
    v = gl.load(qkv + (H + K + h) * D + dv)
    slot = (gl.load(slots) * K + h) * D
    factor = gl.rsqrt(gl.sum(x * x, 1) / D + eps)[:, None] * gl.where(query, scale, 1.0)
    y = (_rotated(x * weight, c, s, D) * factor).to(T)
    ys = gl.allocate_shared_memory(T, [ROWS, D], _row_major(2), y)
    score = mma_v2(ys.load(gl.DotOperandLayout(0, L, 8)), kt, gl.zeros([ROWS, TILE], gl.float32, L))
    first = split == 0  # whose the newest token is to count and to write
    newest = gl.sum(y.to(gl.float32) * ys.slice(G, 1).load(R).to(gl.float32), 1)
    news = gl.allocate_shared_memory(gl.float32, [ROWS], _row_major(1), newest)
    gl.store(keys + slot + d[None, :] + 0 * row[:, None], y, mask=first & (row == G)[:, None])
    gl.store(values + slot + dv, v, mask=first)
    t = begin + gl.arange(0, TILE, gl.SliceLayout(0, L))
    p, top = _powers(score, t, end, TILE, WARPS)
    ps = gl.allocate_shared_memory(T, [ROWS, TILE], _factor_of_16_bits(), p.to(T))
    vs = gl.allocate_shared_memory(T, [TILE, D], _factor_of_16_bits(), vt)  # no earlier: the chain would wait for it
    tops = gl.allocate_shared_memory(gl.float32, [ROWS, WARPS], _row_major(2), top)
    p, own, total, most = _weighed(ps, tops, news, first, WARPS)
    acc = own[:, None] * v.to(gl.float32)[None, :]
    acc = mma_v2(p, vs.load(gl.DotOperandLayout(1, L, 2)), acc)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    at = split * H + h * G + r
    gl.store(out + at[:, None] * D + dv[None, :], (acc / total[:, None]).to(T), mask=(r < G)[:, None])
    gl.store(sums + at, most + gl.log2(total), mask=r < G)


def fits(split: Split, group: int, size: int, tokens: int) -> bool:
    """Whether splits of a row of at most `tokens` tokens are a tile each, with heads of this size, so many to a group."""
    return split.stages == 1 and split.splits * split.tile >= tokens and group < ROWS.value and size in (64, 128)


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: DecodePlan, keys: Tensor, values: Tensor, *, eps: float,
    pdl: bool,
) -> Unmerged:  # fmt: skip
    """As `reference.attend_`, of one row."""
    page_size, kv_heads, size = keys.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    split = plan.split
    out = qkv.new_empty(split.splits, heads * size)
    sums = qkv.new_empty(split.splits, heads, dtype=torch.float32)
    attend_one_kernel[(kv_heads, split.splits)](
        qkv, q_norm, k_norm, plan.cos, plan.sin, keys, values, plan.slots, plan.pages, plan.lengths, out, sums,
        size**-0.5 * LOG2E, eps, H=heads, K=kv_heads, D=size, S=page_size, SPLITS=split.splits, TILE=split.tile,
        num_warps=split.warps, **options(pdl),
    )  # fmt: skip
    return Unmerged(out, sums, plan.lengths, split.tile)
