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

from mllm.kernels.attend import shares
from mllm.kernels.decode_plan import DecodePlan, Split, Unmerged
from mllm.kernels.flash import LOG2E
from mllm.kernels.pdl import launch_dependents, options, wait

ROWS = gl.constexpr(16)
"""Of the tensor cores' tile: the query heads of a key/value head, its newest key, its newest value, and nothing."""
QUERIES = gl.constexpr(8)
"""Of them, at most: what is left of the tile after the scores."""
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


@gluon.constexpr_function
def _key_layout(warps):
    """How the warps hold keys [D TILE]: as a factor."""
    return gl.DotOperandLayout(1, _product(warps), 8)


@gluon.constexpr_function
def _value_layout(D, warps):
    """How they hold values [TILE D]: as they lie; what makes a factor of them is shared memory."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [warps, 1], [1, 0])


@gluon.jit
def _slots(pages, t, past, S: gl.constexpr):
    """Where tokens t lie in the pool."""
    return gl.load(pages + t // S, mask=t < past, other=0) * S + t % S


@gluon.jit
def _half(x):
    """The first half of the rows of x [ROWS n], of which a thread has the second as well."""
    first, _ = gl.split(gl.permute(gl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0]))
    return first


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
def _by_warp(x, WARPS: gl.constexpr):
    """x [n TILE] by the warps whose tokens they are [n . WARPS 8]."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // (8 * WARPS), WARPS, 8])


@gluon.jit
def _over(x):
    """x [n WARPS] over each warp's tokens."""
    return gl.expand_dims(gl.expand_dims(x, 2), 1)


@gluon.jit
def _powers(score, WARPS: gl.constexpr):
    """Of scores [QUERIES TILE], in units of log2: (2^score less the highest of a warp's tokens [QUERIES TILE], those highest
    [QUERIES WARPS])."""
    by_warp = _by_warp(score, WARPS)
    top = gl.max(gl.max(by_warp, 1), 2)
    return gl.reshape(gl.exp2(by_warp - _over(top)), score.shape), top


@gluon.jit
def _weighed(powers, tops, newest, first, WARPS: gl.constexpr):
    """Of all warps' powers and highest scores and the newest token's score [ROWS], which is the first split's, in shared
    memory: (the tokens' shares [ROWS TILE] as a factor; the newest's [QUERIES]; their sum, by which both are yet to be
    divided; the highest score)."""
    TILE: gl.constexpr = powers.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, _product(WARPS), 2)
    nothing = _half(gl.zeros([ROWS, TILE], powers.dtype, layout))
    p = _by_warp(powers.load(nothing.type.layout).to(gl.float32), WARPS)
    top = tops.load(gl.SliceLayout(2, gl.SliceLayout(1, p.type.layout)))
    newest = gl.where(first, newest.slice(0, QUERIES).load(gl.SliceLayout(1, top.type.layout)), MASKED)
    most = gl.maximum(gl.max(top, 1), newest)
    p *= _over(gl.exp2(top - most[:, None]))
    own = gl.exp2(newest - most)
    total = gl.sum(gl.sum(gl.sum(p, 1), 1), 1)
    total = gl.convert_layout(total, own.type.layout) + own
    p = gl.convert_layout(gl.reshape(p, [QUERIES, TILE]), nothing.type.layout, assert_trivial=True)
    p = gl.join(p.to(powers.dtype), nothing)
    p = gl.convert_layout(gl.reshape(gl.permute(p, [2, 0, 1]), [ROWS, TILE]), layout, assert_trivial=True)
    return p, own, total, most


@gluon.constexpr_function
def heads(D, warps):
    """How the warps hold the queries of a group, the newest key and the newest value, [ROWS D]: two rows each."""
    return gl.BlockedLayout([1, D // 32], [2, 16], [warps, 1], [1, 0])


@gluon.constexpr_function
def pairs(D, warps):
    """The same in pairs, [ROWS D/2]."""
    return gl.BlockedLayout([1, D // 64], [2, 16], [warps, 1], [1, 0])


@gluon.jit
def head_of(row, h, G: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    """Where the rows of a key/value head's group are among the heads of qkv: queries, key, value."""
    return gl.where(row < G, h * G + row, H + h + gl.where(row == G, 0, K))


@gluon.jit
def where(pages, past, chunk, split, S: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr):
    """Of the tokens of a split, of which there may be none, as its keys are read and as its values are: (which of them there
    are, their slots)."""
    begin = split * chunk
    end = gl.minimum(begin + chunk, past)
    t = begin + gl.arange(0, TILE, gl.SliceLayout(0, _key_layout(WARPS)))
    u = begin + gl.arange(0, TILE, gl.SliceLayout(1, _value_layout(D, WARPS)))
    return t < end, _slots(pages, t, end, S), u < end, _slots(pages, u, end, S)


@gluon.jit
def ask(keys, values, places, h, K: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Keys [D TILE] and values [TILE D] of one head, zeros where there are none, on their way."""
    some, slots, some_values, value_slots = places
    d = gl.arange(0, D, gl.SliceLayout(1, _key_layout(WARPS)))
    at = (slots.to(gl.int64) * K + h) * D
    kt = gl.load(keys + at[None, :] + d[:, None], mask=some[None, :], other=0.0)
    d = gl.arange(0, D, gl.SliceLayout(0, _value_layout(D, WARPS)))
    at = (value_slots.to(gl.int64) * K + h) * D
    return kt, gl.load(values + at[:, None] + d[None, :], mask=some_values[:, None], other=0.0)


@gluon.jit
def turns(cos, sin, D: gl.constexpr, WARPS: gl.constexpr):
    """Cosine and sine [D/2] of the newest token's place."""
    i = gl.arange(0, D // 2, gl.SliceLayout(0, heads(D, WARPS)))
    return gl.load(cos + i), gl.load(sin + i)


@gluon.jit
def norms(q_norm, k_norm, G: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """The norms' weights f32 [ROWS D]: of queries, and of the newest key."""
    R: gl.constexpr = heads(D, WARPS)
    query = (gl.arange(0, ROWS, gl.SliceLayout(1, R)) < G)[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, R))
    return gl.where(query, gl.load(q_norm + d)[None, :], gl.load(k_norm + d)[None, :]).to(gl.float32)


@gluon.jit
def answer(
    x, weight, rotary, keys, values, slot, kv, some, h, first, scale, eps, G: gl.constexpr, K: gl.constexpr,
    D: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """From queries, newest key and value f32 [ROWS D]: a split's results [QUERIES D] and log2 of their softmax sums
    [QUERIES]. `some`: which of its tokens there are. The `first` split's program counts and writes the newest token."""
    L: gl.constexpr = _product(WARPS)
    R: gl.constexpr = heads(D, WARPS)
    T: gl.constexpr = keys.dtype.element_ty
    kt, vt = kv
    cos, sin = rotary
    row = gl.arange(0, ROWS, gl.SliceLayout(1, R))
    factor = gl.rsqrt(gl.sum(x * x, 1) / D + eps)[:, None] * gl.where(row < G, scale, 1.0)[:, None]
    y = gl.where((row == G + 1)[:, None], x, _rotated(x * weight, cos, sin, D) * factor).to(T)
    ys = gl.allocate_shared_memory(T, [ROWS, D], _row_major(2), y)
    score = mma_v2(ys.load(gl.DotOperandLayout(0, L, 8)), kt, gl.zeros([ROWS, kt.shape[1]], gl.float32, L))
    newest = gl.sum(y.to(gl.float32) * ys.slice(G, 1).load(R).to(gl.float32), 1)
    news = gl.allocate_shared_memory(gl.float32, [ROWS], _row_major(1), newest)
    nothing = _half(gl.zeros([ROWS, D], T, L))
    v = nothing + ys.slice(G + 1, 1).load(nothing.type.layout)
    some = gl.convert_layout(some, gl.SliceLayout(0, L))
    p, top = _powers(_half(gl.where(some[None, :], score, MASKED)), WARPS)
    ps = gl.allocate_shared_memory(T, p.shape, _factor_of_16_bits(), p.to(T))
    vs = gl.allocate_shared_memory(T, vt.shape, _factor_of_16_bits(), vt)  # no earlier: the chain would wait for it
    tops = gl.allocate_shared_memory(gl.float32, [QUERIES, WARPS], _row_major(2), top)
    p, own, total, most = _weighed(ps, tops, news, first, WARPS)
    acc = _half(mma_v2(p, vs.load(gl.DotOperandLayout(1, L, 2)), gl.zeros([ROWS, D], gl.float32, L)))
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    own, total = gl.convert_layout(own, rows), gl.convert_layout(total, rows)
    acc = (acc + own[:, None] * v.to(gl.float32)) / total[:, None]
    at = (slot * K + h) * D + gl.arange(0, D, gl.SliceLayout(0, R))[None, :] + 0 * row[:, None]
    gl.store(keys + at, y, mask=first & (row == G)[:, None])
    gl.store(values + at, y, mask=first & (row == G + 1)[:, None])
    return acc, gl.convert_layout(most, rows) + gl.log2(total)


@gluon.jit
def attend_one_kernel(
    qkv, q_norm, k_norm, cos, sin, keys, values, slots, pages, lengths, out, sums, scale, eps, H: gl.constexpr,
    K: gl.constexpr, D: gl.constexpr, S: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The parts `out` [SPLITS H*D] and `sums` [SPLITS H] of an `Unmerged` from qkv [(H + 2K)*D]; writes the new keys and
    values [P S K D] at `slots`."""
    G: gl.constexpr = H // K
    h = gl.program_id(0)
    split = gl.program_id(1)
    launch_dependents(PDL)
    WARPS: gl.constexpr = gl.num_warps()
    past, chunk, live = shares(gl.load(lengths), SPLITS, TILE)
    places = where(pages, past, chunk, split, S, D, TILE, WARPS)
    kv = ask(keys, values, places, h, K, D, WARPS)
    weight = norms(q_norm, k_norm, G, D, WARPS)
    R: gl.constexpr = heads(D, WARPS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, R))
    at = qkv + head_of(row, h, G, H, K)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, R))[None, :]
    wait(PDL)
    if split >= live:
        return
    x = gl.load(at, mask=(row < G + 2)[:, None], other=0.0).to(gl.float32)
    rotary, slot = turns(cos, sin, D, WARPS), gl.load(slots)
    y, total = answer(x, weight, rotary, keys, values, slot, kv, places[0], h, split == 0, scale, eps, G, K, D, WARPS)
    r = gl.arange(0, QUERIES, total.type.layout)
    d = gl.arange(0, D, gl.SliceLayout(0, y.type.layout))
    at = split * H + h * G + r
    gl.store(out + at[:, None] * D + d[None, :], y.to(keys.dtype.element_ty), mask=(r < G)[:, None])
    gl.store(sums + at, total, mask=r < G)


def fits(split: Split, group: int, size: int, tokens: int) -> bool:
    """Whether splits of a row of at most `tokens` tokens are a tile each, with heads of this size, so many to a group."""
    return split.stages == 1 and split.splits * split.tile >= tokens and group <= QUERIES.value and size in (64, 128)


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
