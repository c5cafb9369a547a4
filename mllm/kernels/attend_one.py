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
from mllm.kernels.decode_plan import DecodePlan, Split, SplitHeads
from mllm.kernels.flash import LOG2E
from mllm.kernels.pdl import launch_dependents, options, wait

ROWS = gl.constexpr(16)
"""Rows of the tensor cores' tile: the query heads of a key/value head, its newest key, its newest value, and zeros."""
QUERIES = gl.constexpr(8)
"""Query heads of a key/value head, at most: the rows that are left of a tile after the scores."""
MASKED = gl.constexpr(-1e30)


@gluon.constexpr_function
def product(warps):
    """The layout of a product [ROWS n]: each warp has some columns."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def _row_major(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def _factor_of_16_bits():
    """A layout in shared memory from which tensor cores' factors are read without conflicts."""
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


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
def _whole(x):
    """x [QUERIES n] with zeros below it: what `_half` left out."""
    both = gl.permute(gl.join(x, gl.zeros_like(x)), [2, 0, 1])
    return gl.convert_layout(gl.reshape(both, [ROWS, x.shape[1]]), product(gl.num_warps()), assert_trivial=True)


@gluon.jit
def spread(score, there, dtype: gl.constexpr):
    """Scores [ROWS TILE] of the tokens that are there [TILE], put into shared memory for all warps: (powers [QUERIES TILE],
    the highest scores [QUERIES WARPS])."""
    powers, top = _powers(_half(gl.where(there[None, :], score, MASKED)), gl.num_warps())
    ps = gl.allocate_shared_memory(dtype, powers.shape, _factor_of_16_bits(), powers.to(dtype))
    return ps, gl.allocate_shared_memory(gl.float32, top.shape, _row_major(2), top)


@gluon.jit
def fold(state, powers, tops, values):
    """A state with the tokens of a tile in it, whose scores are `spread`; values [TILE n]: factors, with some columns each.

    A state: the sums of values by their shares [QUERIES n], of the shares [QUERIES], and the highest score.
    """
    sums, total, most = state
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = powers.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, product(WARPS), 2)
    nothing = _half(gl.zeros([ROWS, TILE], powers.dtype, layout))
    p = _by_warp(powers.load(nothing.type.layout).to(gl.float32), WARPS)
    top = tops.load(gl.SliceLayout(2, gl.SliceLayout(1, p.type.layout)))
    now = gl.maximum(gl.max(top, 1), gl.convert_layout(most, gl.SliceLayout(1, top.type.layout), assert_trivial=True))
    p *= _over(gl.exp2(top - now[:, None]))
    shares = gl.convert_layout(gl.sum(gl.sum(gl.sum(p, 1), 1), 1), most.type.layout)
    p = gl.convert_layout(gl.reshape(p, [QUERIES, TILE]), nothing.type.layout, assert_trivial=True)
    p = gl.join(p.to(powers.dtype), nothing)
    p = gl.convert_layout(gl.reshape(gl.permute(p, [2, 0, 1]), [ROWS, TILE]), layout, assert_trivial=True)
    now = gl.convert_layout(now, most.type.layout, assert_trivial=True)
    kept = gl.exp2(most - now)
    results = ()
    for i in gl.static_range(len(sums)):
        results += (_half(mma_v2(p, values[i], _whole(sums[i] * kept[:, None]))),)  # type: ignore[assignment]
    return results, total * kept + shares, now


@gluon.constexpr_function
def heads(D, warps):
    """The layout of the queries of a group, the newest key and the newest value, [ROWS D]: two rows a warp."""
    return gl.BlockedLayout([1, D // 32], [2, 16], [warps, 1], [1, 0])


@gluon.constexpr_function
def pairs(D, warps):
    """The layout of those rows in pairs, [ROWS D/2]."""
    return gl.BlockedLayout([1, D // 64], [2, 16], [warps, 1], [1, 0])


@gluon.jit
def head_of(row, h, G: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    """Where the rows of a key/value head's group are among the heads of qkv: queries, key, value."""
    return gl.where(row < G, h * G + row, H + h + gl.where(row == G, 0, K))


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
def ready(x, weight, rotary, scale, eps, G: gl.constexpr, dtype: gl.constexpr):
    """Queries, newest key and newest value from f32 x [ROWS D], as they come from their projection: (those as they are
    held; in shared memory; there, the newest key's scores [ROWS])."""
    D: gl.constexpr = x.shape[1]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    factor = gl.rsqrt(gl.sum(x * x, 1) / D + eps)[:, None] * gl.where(row < G, scale, 1.0)[:, None]
    turned = _rotated(x * weight, rotary[0], rotary[1], D) * factor
    y = gl.where((row == G + 1)[:, None], x, turned).to(dtype)
    ys = gl.allocate_shared_memory(dtype, [ROWS, D], _row_major(2), y)
    newest = gl.sum(y.to(gl.float32) * ys.slice(G, 1).load(x.type.layout).to(gl.float32), 1)
    return y, ys, gl.allocate_shared_memory(gl.float32, [ROWS], _row_major(1), newest)


@gluon.jit
def begun(ys, newest, first, G: gl.constexpr, COLUMNS: gl.constexpr):
    """A state, for `fold`, of the newest token alone, which counts in the `first` split; its value in parts of so many
    columns."""
    nothing = _half(gl.zeros([ROWS, COLUMNS], gl.float32, product(gl.num_warps())))
    one = gl.where(first, 1.0, 0.0)
    sums = ()
    for i in gl.static_range(ys.shape[1] // COLUMNS):
        value = ys.slice(G + 1, 1).slice(i * COLUMNS, COLUMNS, 1).load(nothing.type.layout)
        sums += (nothing + one * value.to(gl.float32),)  # type: ignore[assignment]
    score = newest.slice(0, QUERIES).load(gl.SliceLayout(1, nothing.type.layout))
    return sums, gl.zeros_like(score) + one, gl.where(first, score, MASKED)


@gluon.jit
def ended(state):
    """(A split's results [QUERIES n] in parts, log2 of their softmax sums [QUERIES])."""
    sums, total, most = state
    results = ()
    for i in gl.static_range(len(sums)):
        results += (sums[i] / total[:, None],)  # type: ignore[assignment]
    return results, most + gl.log2(total)


@gluon.jit
def keep(y, keys, values, slot, h, first, G: gl.constexpr, K: gl.constexpr):
    """The newest key and value, of what is `ready`, to the pool, where this is the `first` split."""
    D: gl.constexpr = y.shape[1]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
    at = (slot * K + h) * D + gl.arange(0, D, gl.SliceLayout(0, y.type.layout))[None, :] + 0 * row[:, None]
    gl.store(keys + at, y, mask=first & (row == G)[:, None])
    gl.store(values + at, y, mask=first & (row == G + 1)[:, None])


@gluon.jit
def attend_one_kernel(
    qkv, q_norm, k_norm, cos, sin, keys, values, slots, pages, lengths, out, sums, scale, eps, H: gl.constexpr,
    K: gl.constexpr, D: gl.constexpr, S: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The parts `out` [SPLITS H*D] and `sums` [SPLITS H] of a `SplitHeads` from qkv [(H + 2K)*D]; writes the new keys and
    values [P S K D] at `slots`."""
    G: gl.constexpr = H // K
    T: gl.constexpr = keys.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = product(WARPS)
    h = gl.program_id(0)
    split = gl.program_id(1)
    launch_dependents(PDL)
    past, chunk, live = shares(gl.load(lengths), SPLITS, TILE)
    begin = split * chunk
    end = gl.minimum(begin + chunk, past)
    factor: gl.constexpr = gl.DotOperandLayout(1, L, 8)
    t = begin + gl.arange(0, TILE, gl.SliceLayout(0, factor))
    at = (_slots(pages, t, end, S).to(gl.int64) * K + h) * D
    kt = gl.load(keys + at[None, :] + gl.arange(0, D, gl.SliceLayout(1, factor))[:, None], (t < end)[None, :], 0.0)
    lying: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    t = begin + gl.arange(0, TILE, gl.SliceLayout(1, lying))
    at = (_slots(pages, t, end, S).to(gl.int64) * K + h) * D
    vt = gl.load(values + at[:, None] + gl.arange(0, D, gl.SliceLayout(0, lying))[None, :], (t < end)[:, None], 0.0)
    weight = norms(q_norm, k_norm, G, D, WARPS)
    R: gl.constexpr = heads(D, WARPS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, R))
    at = qkv + head_of(row, h, G, H, K)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, R))[None, :]
    wait(PDL)
    if split >= live:
        return
    x = gl.load(at, mask=(row < G + 2)[:, None], other=0.0).to(gl.float32)
    rotary, slot = turns(cos, sin, D, WARPS), gl.load(slots)
    y, ys, newest = ready(x, weight, rotary, scale, eps, G, T)
    score = mma_v2(ys.load(gl.DotOperandLayout(0, L, 8)), kt, gl.zeros([ROWS, TILE], gl.float32, L))
    powers, tops = spread(score, begin + gl.arange(0, TILE, gl.SliceLayout(0, L)) < end, T)
    vs = gl.allocate_shared_memory(T, vt.shape, _factor_of_16_bits(), vt)  # no earlier: the chain would wait for it
    state = begun(ys, newest, split == 0, G, D)
    results, total = ended(fold(state, powers, tops, (vs.load(gl.DotOperandLayout(1, L, 2)),)))
    keep(y, keys, values, slot, h, split == 0, G, K)
    r = gl.arange(0, QUERIES, total.type.layout)
    d = gl.arange(0, D, gl.SliceLayout(0, results[0].type.layout))
    at = split * H + h * G + r
    gl.store(out + at[:, None] * D + d[None, :], results[0].to(T), mask=(r < G)[:, None])
    gl.store(sums + at, total, mask=r < G)


def fits(split: Split, group: int, size: int, tokens: int) -> bool:
    """Whether splits of a row of at most `tokens` tokens are a tile each, with heads of this size, so many to a group."""
    return split.stages == 1 and split.splits * split.tile >= tokens and group <= QUERIES.value and size in (64, 128)


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: DecodePlan, keys: Tensor, values: Tensor, *, eps: float,
    pdl: bool,
) -> SplitHeads:  # fmt: skip
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
    return SplitHeads(out, sums, plan.lengths, split.tile)
