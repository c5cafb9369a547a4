"""What a group of four warps does in `flash_hopper`: the softmax of 64 queries, and their result.

Its next scores and last result are on the tensor cores while it computes the softmax between them. What that costs is
its instructions, so the largest score of a query is not kept up to date: the largest one of its first tile of keys is
taken off all of them, as any number may be. Should later scores be so much larger that a sum leaves its range, which the
sum tells at the end, all groups of the program attend once more with the largest score so far, tile by tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mllm.kernels.hopper import finished, for_rows, lines, mma, nothing


@gluon.constexpr_function
def _limit(dtype):
    """Where the range of a sum of weights ends, of which one is 1: each must be a number of its type, and what values times
    weights sum up to one of float32."""
    return 2.0**15 if dtype == gl.float16 else 2.0**64


@gluon.jit
def _scores(queries, ks, stage, zero):
    """Queries times the keys of a stage, under way."""
    s = warpgroup_mma(queries[0], ks[0].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if len(ks) > 1:
        s = warpgroup_mma(queries[1], ks[1].index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _masked(s, i, place, hidden, PAGED: gl.constexpr):
    """The scores of tile i without those keys that a query does not attend to."""
    BN: gl.constexpr = s.shape[1]
    column = gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    if PAGED:
        visible = (i * BN + column)[None, :] <= place[:, None]
    else:
        visible = (column >= hidden)[None, :]
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def _add_values(weights, vs, stage, accs):
    """accs plus the values of a stage, times weights [64 BN], under way."""
    coming = ()
    for j in gl.static_range(len(vs)):
        a = gl.convert_layout(weights, gl.DotOperandLayout(0, accs[j].type.layout, 2))
        coming += (warpgroup_mma(a, vs[j].index(stage), accs[j], is_async=True),)
    return coming


@gluon.jit
def _times(accs, factor):
    """accs, each row times its factor [64]."""
    out = ()
    for j in gl.static_range(len(accs)):
        out += (accs[j] * for_rows(factor, accs[j]),)
    return out


@gluon.jit
def _clean(vs, stage, live, group: gl.constexpr, GROUPS: gl.constexpr, cleaned, phase: gl.constexpr):
    """Make zeros of a stage's values from token `live` on: what lies there, times a weight of zero, could be no number.

    Each group does its part, and goes on when all have.
    """
    ROWS: gl.constexpr = vs[0].shape[1] // GROUPS
    W: gl.constexpr = vs[0].shape[2]
    layout: gl.constexpr = lines(W)
    part = vs[0].index(stage).slice(group * ROWS, ROWS)
    row = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    value = part.load(layout)
    part.store(gl.where((row < live)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    mbarrier.arrive(cleaned)
    mbarrier.wait(cleaned, phase)


@gluon.jit
def _queries_beyond(q, start, m, count, h, QS: gl.constexpr, D: gl.constexpr, W: gl.constexpr, REST: gl.constexpr):
    """The columns of 64 queries beyond W, in registers: zeros from D on, to meet what descriptors copy of the next head."""
    layout: gl.constexpr = gl.DotOperandLayout(0, m.type.layout.parent, 2)
    m = gl.convert_layout(m, gl.SliceLayout(1, layout))
    d = W + gl.arange(0, REST, gl.SliceLayout(0, layout))
    at = q + (start + m).to(gl.int64)[:, None] * QS + h * D + d[None, :]
    return gl.load(at, mask=(m < count)[:, None] & (d < D)[None, :], other=0.0)


@gluon.jit
def _store(out, acc, start, m, count, first, end, stride):
    """Columns from `first` on, as far as they are below `end`, of the rows start + m [64] of out below start + count."""
    layout: gl.constexpr = lines(acc.shape[1])
    m = gl.convert_layout(m, gl.SliceLayout(1, layout))
    d = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    at = out + (start + m).to(gl.int64)[:, None] * stride + d[None, :]
    value = gl.convert_layout(acc.to(out.dtype.element_ty), layout)
    gl.store(at, value, mask=(m < count)[:, None] & (d < end)[None, :])


@gluon.jit
def _partly_summed(p):
    """Sums [64 4] of p [64 BN]: over what a thread holds of each query, which four threads do."""
    return gl.sum(gl.sum(gl.reshape(p, [64, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _attend(
    queries, ring, turns, cleaned, rows, group: gl.constexpr, GROUPS: gl.constexpr, PAGED: gl.constexpr,
    ROUND: gl.constexpr,
):  # fmt: skip
    """(total [64], accs) of 64 queries: the sums of their weights over n tiles of keys, and of the values times them.

    ROUND: 0, or 1 where all tiles come again; then, and by one group, the largest score so far is taken off, tile by tile.
    """
    ks, vs, full, free = ring
    place, whole, hidden, n = rows
    k_full, v_full = full
    k_free, v_free = free
    STAGES: gl.constexpr = ks[0].shape[0]
    BN: gl.constexpr = ks[0].shape[1]
    EXACT: gl.constexpr = GROUPS == 1 or ROUND == 1
    TURNS: gl.constexpr = not EXACT
    first = ROUND * n  # of the tiles that have been in the ring
    zero = gl.zeros([64, BN], gl.float32, mma(BN))
    accs = ()
    for j in gl.static_range(len(vs)):
        accs += (nothing(vs[j].shape[2]),)
    stage = first % STAGES
    mbarrier.wait(k_full.index(stage), (first // STAGES) & 1)
    s = warpgroup_mma_wait(0, deps=[_scores(queries, ks, stage, zero)])
    mbarrier.arrive(k_free.index(stage))
    if whole == 0:
        s = _masked(s, 0, place, hidden, PAGED)
    top = gl.max(s, 1)
    p = gl.exp2(s - top[:, None])
    total = _partly_summed(p)
    weights = p.to(ks[0].dtype)
    if TURNS and group == GROUPS - 1:
        mbarrier.arrive(turns.index(0))
    for i in range(1, n):
        stage, last = (first + i) % STAGES, (first + i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), ((first + i) // STAGES) & 1)
        if TURNS:
            mbarrier.wait(turns.index(group), (i - 1) & 1)
        score = _scores(queries, ks, stage, zero)
        mbarrier.wait(v_full.index(last), ((first + i - 1) // STAGES) & 1)
        coming = _add_values(weights, vs, last, accs)
        if TURNS:
            mbarrier.arrive(turns.index((group + 1) % GROUPS))
        s = warpgroup_mma_wait(len(vs), deps=[score])
        mbarrier.arrive(k_free.index(stage))
        if i >= whole:
            s = _masked(s, i, place, hidden, PAGED)
        if EXACT:
            new = gl.maximum(top, gl.max(s, 1))
            fade = gl.exp2(top - new)
            top = new
            total *= for_rows(fade, total)
        p = gl.exp2(s - top[:, None])
        total += _partly_summed(p)
        accs = finished(coming, 0)
        mbarrier.arrive(v_free.index(last))
        if EXACT:
            accs = _times(accs, fade)
        weights = p.to(ks[0].dtype)
    last = (first + n - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((first + n - 1) // STAGES) & 1)
    if PAGED:  # noqa: SIM102  is the compiler's; the other is the program's
        if hidden > 0:
            _clean(vs, last, BN - hidden, group, GROUPS, cleaned, ROUND)
    accs = finished(_add_values(weights, vs, last, accs), 0)
    if not EXACT:  # all may come again
        mbarrier.arrive(v_free.index(last))
    return gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, mma(BN))), accs


@gluon.jit
def again(verdict, WARPS: gl.constexpr):
    """Whether a sum of any group has left its range, once each group has said so."""
    flags, said = verdict
    GROUPS: gl.constexpr = flags.shape[0]
    mbarrier.wait(said, 0)
    found = 0
    for i in gl.static_range(GROUPS):
        found += gl.max(flags.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    return found > 0


@gluon.jit
def consume(task, group: gl.constexpr, GROUPS: gl.constexpr, QS: gl.constexpr, D: gl.constexpr, PAGED: gl.constexpr):
    """A group of four warps: the softmax of 64 queries over n tiles of keys, and its result.

    One by itself keeps the largest score: where few tiles are, more instructions to fetch cost more than it does.
    """
    q, out, qs, q_full, ring, turns, cleaned, verdict, start, count, m0, offset, n, h = task
    ks, vs, _, _ = ring
    BN: gl.constexpr = ks[0].shape[1]
    m = m0 + 64 * group + gl.arange(0, 64, gl.SliceLayout(1, mma(BN)))
    whole = (offset + m0 + 64 * group + 1) // BN if PAGED else count // BN  # tiles that need no mask
    rows = (offset + m, whole, n * BN - offset - count, n)  # the last but one: keys of the last tile that are not there
    queries = (qs.index(group),)
    if len(ks) > 1:
        queries += (_queries_beyond(q, start, m, count, h, QS, D, ks[0].shape[2], ks[1].shape[2]),)
    mbarrier.wait(q_full.index(group), 0)
    total, accs = _attend(queries, ring, turns, cleaned, rows, group, GROUPS, PAGED, 0)
    if GROUPS > 1:
        flags, said = verdict
        within = (total < _limit(ks[0].dtype)) | (m >= count)  # what is no number is not
        left = 1 - gl.min(within.to(gl.int32), 0)
        flags.index(group).store(gl.full([1], left, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
        mbarrier.arrive(said)
        if again(verdict, 4):
            total, accs = _attend(queries, ring, turns, cleaned, rows, group, GROUPS, PAGED, 1)
    accs = _times(accs, 1.0 / total)
    for j in gl.static_range(len(vs)):
        first = h * D + j * accs[0].shape[1]
        _store(out, accs[j], start, m, count, first, h * D + D, gl.num_programs(0) * D)
