"""Attention within `persistent`: the splits of a row's context, and what they leave put together, by way of words.

Keys and values take their turn among the weights in the ring, and leave it for registers while queries are still to come.
Where the output projection of a chain of kernels reads all that the splits left, in every program, here each program first
merges a share of one group of heads: one trip more, but hardly anything to read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mllm.kernels import attend_one, ring
from mllm.kernels.attend_one import QUERIES, ROWS
from mllm.kernels.hopper import copy
from mllm.kernels.ring import HEIGHT, INPUTS, TILES, WARPS
from mllm.kernels.words import pack, receive, send, unpack

SECTOR = gl.constexpr(4)
"""Words in 32 bytes."""


@gluon.jit
def place(K: gl.constexpr):
    """This program's (key/value head, split of its context). Those that have most of the weights get the last splits."""
    at = gl.num_programs(0) - 1 - gl.program_id(0)
    return at % K, at // K


@gluon.jit
def span_of(length, K: gl.constexpr, SPLITS: gl.constexpr, TILE: gl.constexpr, RUN: gl.constexpr):
    """How a context is shared out: (this program's first token, that after its last, splits that have work: the first
    always has)."""
    _, split = place(K)
    past = gl.maximum(length - 1, 0)  # the newest is sent
    chunk = gl.maximum(gl.cdiv(gl.cdiv(past, SPLITS), RUN) * RUN, TILE)
    begin = split * chunk
    return begin, gl.minimum(begin + chunk, past), gl.maximum(gl.cdiv(past, chunk), 1)


@gluon.constexpr_function
def _stages(D, tile):
    """Stages of the ring for a tile of keys and values: parts of INPUTS columns, one after the other, keys first."""
    return -(-2 * D * tile // (INPUTS * TILES * HEIGHT).value)


@gluon.jit
def _fill_parts(boxes, column, slots, row, count, bar, to, FIRST: gl.constexpr, D: gl.constexpr):
    """The parts from the FIRST on that a tile of the ring has room for."""
    RUN: gl.constexpr = boxes[0].block_shape[0]
    COUNT: gl.constexpr = len(slots)
    LAST: gl.constexpr = max(FIRST, min(FIRST + HEIGHT // (COUNT * RUN), 2 * D // INPUTS))
    for i in gl.static_range(COUNT + 1):
        mbarrier.expect(bar, (LAST - FIRST) * i * RUN * INPUTS * 2, pred=count == i)
    for part in gl.static_range(FIRST, LAST):
        for i in gl.static_range(COUNT):
            there = to.slice(((part - FIRST) * COUNT + i) * RUN, RUN)
            copy(boxes[part * INPUTS // D], [row + slots[i], column + part * INPUTS % D], bar, there, pred=i < count)


@gluon.jit
def _fill_tile(boxes, column, slots, row, count, weights, step, ahead, D: gl.constexpr):
    """The next stages of the ring, with keys and values of one head, in runs of tokens that begin at the `slots`; the
    first `count` of those are copied."""
    TILE: gl.constexpr = len(slots) * boxes[0].block_shape[0]
    for stage in gl.static_range(_stages(D, TILE)):
        for i in gl.static_range(TILES):
            to, bar = ring.room(weights, step, i, ahead)
            _fill_parts(boxes, column, slots, row, count, bar, to, (stage * TILES + i) * (HEIGHT // TILE), D)
        step += 1
    return step


@gluon.jit
def slots_of(pages, first, end, S: gl.constexpr, TILE: gl.constexpr, RUN: gl.constexpr):
    """Where the runs of tokens from `first` on begin in the pool."""
    slots = ()
    for i in gl.static_range(TILE // RUN):
        t = first + i * RUN
        slots += (gl.load(pages + t // S, mask=t < end, other=0) * S + t % S,)  # type: ignore[assignment]
    return slots


@gluon.jit
def fill_context(
    boxes, pages, slots, span, row, weights, step, ahead, K: gl.constexpr, D: gl.constexpr, S: gl.constexpr
):
    """The keys and values of this program's `span` of a context, to the ring of `weights`, a tile at least where there is
    work; in a layer whose slots begin at a `row`. The `slots` of the first tile are known, as whoever reads memory waits
    behind all that has been asked for."""
    h, split = place(K)
    begin, end, live = span
    RUN: gl.constexpr = boxes[0].block_shape[0]
    TILE: gl.constexpr = len(slots) * RUN
    stop = gl.where(split < live, gl.maximum(end, begin + 1), begin)
    for first in range(begin, stop, TILE):
        following = slots_of(pages, first + TILE, end, S, TILE, RUN)
        count = gl.minimum(gl.cdiv(end - first, RUN), len(slots))
        step = _fill_tile(boxes, h * D, slots, row, count, weights, step, ahead, D)
        slots = following
    return step


@gluon.jit
def _held(weights, step, count, D: gl.constexpr, TILE: gl.constexpr):
    """The ring's next tile as factors, of INPUTS columns each: (keys, values), and zeros for values that are not there, as
    the ring holds anything then. It is out of the ring before it is wanted, for weights to take its place."""
    PARTS: gl.constexpr = D // INPUTS
    factor: gl.constexpr = gl.DotOperandLayout(1, attend_one.product(WARPS), 2)
    ring.arrived(weights, step, (2 * PARTS * TILE + HEIGHT - 1) // HEIGHT)
    keys, values = (), ()
    there = (gl.arange(0, TILE, gl.SliceLayout(1, factor)) < count)[:, None]
    for i in gl.static_range(2 * PARTS):
        part = ring.tile(weights, step, i * TILE // HEIGHT).slice(i * TILE % HEIGHT, TILE)
        if i < PARTS:
            keys += (part.permute((1, 0)).load(factor),)  # type: ignore[assignment]
        else:
            values += (gl.where(there, part.load(factor), 0.0),)  # type: ignore[assignment]
    ring.done(weights, step, _stages(D, TILE))
    return (keys, values), step + _stages(D, TILE)


@gluon.jit
def _with_tile(state, ys, kv, count, TILE: gl.constexpr):
    """A state with a tile in it, of which so many tokens are there."""
    keys, values = kv
    L: gl.constexpr = attend_one.product(WARPS)
    score = gl.zeros([ROWS, TILE], gl.float32, L)
    for i in gl.static_range(len(keys)):
        queries = ys.slice(i * INPUTS, INPUTS, 1).load(gl.DotOperandLayout(0, L, 2))
        score = mma_v2(queries, keys[i], score)
    there = gl.arange(0, TILE, gl.SliceLayout(0, L)) < count
    powers, tops = attend_one.spread(score, there, ys.dtype)
    return attend_one.fold(state, powers, tops, values)


@gluon.jit
def _pairs(x, dtype: gl.constexpr):
    """x [QUERIES n] in pairs of 16 bits [QUERIES n/2]."""
    low, high = gl.split(gl.reshape(x, [QUERIES, x.shape[1] // 2, 2]))
    return pack(low, high, dtype)


@gluon.jit
def _send_rows(words, apart: gl.constexpr, x, turn, G: gl.constexpr):
    """The first G rows of x [QUERIES n], to words so far apart."""
    row = gl.arange(0, QUERIES, gl.SliceLayout(1, x.type.layout))[:, None]
    i = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))[None, :]
    send(words + row * apart + i, x, turn, (row < G) & (i >= 0))


@gluon.jit
def attend(
    weights, step, qkv, parts, sums, norms, rotary, pool, slot, count, turn, scale, eps, H: gl.constexpr,
    K: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """A program's split of a head's context, of queries, key and value that are sent and of `count` tokens that
    `fill_context` copies; its results are sent in turn."""
    G: gl.constexpr = H // K
    h, split = place(K)
    kv, step = _held(weights, step, count, D, TILE)
    P: gl.constexpr = attend_one.pairs(D, WARPS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, P))[:, None]
    d = gl.arange(0, D // 2, gl.SliceLayout(0, P))[None, :]
    head = attend_one.head_of(row, h, G, H, K)
    (pairs,) = receive((qkv + head * (D // 2) + d,), turn, (row < G + 2) & (d >= 0), D // 32)
    low, high = unpack(pairs, T)
    x = gl.reshape(gl.join(low, high), [ROWS, D])
    x = gl.convert_layout(x, attend_one.heads(D, WARPS), assert_trivial=True)
    y, ys, newest = attend_one.ready(x, norms, rotary, scale, eps, G, T)
    state = _with_tile(attend_one.begun(ys, newest, split == 0, G, INPUTS), ys, kv, count, TILE)
    for done in range(TILE, count, TILE):
        kv, step = _held(weights, step, count - done, D, TILE)
        state = _with_tile(state, ys, kv, count - done, TILE)
    results, total = attend_one.ended(state)
    to = split * H + h * G
    for i in gl.static_range(len(results)):
        _send_rows(parts + to * (D // 2) + i * (INPUTS // 2), D // 2, _pairs(results[i], T), turn, G)
    L: gl.constexpr = results[0].type.layout
    same = gl.zeros([QUERIES, SECTOR], gl.int32, L) + total.to(gl.int32, bitcast=True)[:, None]
    _send_rows(sums + to * SECTOR, SECTOR, same, turn, G)
    attend_one.keep(y, pool[0], pool[1], slot, h, split == 0, G, K)
    return step


@gluon.jit
def merge(
    parts, sums, y, live, turn, H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr, T: gl.constexpr
):
    """A program's share of a group of heads, of what all splits send; sent to `y`."""
    SHARE: gl.constexpr = H // K * D // 2 // SPLITS
    L: gl.constexpr = gl.BlockedLayout([1, 1], [SPLITS, 32 // SPLITS], [1, WARPS], [1, 0])
    h, share = place(K)
    first = (h * SPLITS + share) * SHARE
    s = gl.arange(0, SPLITS, gl.SliceLayout(1, L))[:, None]
    i = gl.arange(0, SHARE, gl.SliceLayout(0, L))[None, :]
    there = (s < live) & (i >= 0)
    head = (first + i) // (D // 2)
    part, total = receive((parts + s * (H * D // 2) + first + i, sums + (s * H + head) * SECTOR), turn, there)
    low, high = unpack(part, T)
    total = gl.where(there, total.to(gl.float32, bitcast=True), -float("inf"))
    weight = gl.exp2(total - gl.max(total, 0)[None, :])
    weight = weight / gl.sum(weight, 0)[None, :]
    pairs = pack(gl.sum(low * weight, 0), gl.sum(high * weight, 0), T)
    send(y + first + gl.arange(0, SHARE, gl.SliceLayout(0, L)), pairs, turn)
