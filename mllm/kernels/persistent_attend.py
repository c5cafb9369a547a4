"""Attention within `persistent`: the splits of a row's context, and what they leave put together, by way of words.

Where the output projection of a chain of kernels reads all that the splits left, in every program, here each program first
merges a share of one group of heads: one trip more, but hardly anything to read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mllm.kernels import attend_one
from mllm.kernels.attend_one import QUERIES, ROWS
from mllm.kernels.ring import WARPS
from mllm.kernels.words import pack, receive, send, unpack

SECTOR = gl.constexpr(4)
"""Words in 32 bytes."""


@gluon.jit
def attend(
    qkv, parts, sums, norms, rotary, keys, values, slot, kv, some, turn, scale, eps, H: gl.constexpr, K: gl.constexpr,
    D: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """A program's split of a head's context, of queries, key and value that are sent; its results are sent in turn."""
    G: gl.constexpr = H // K
    h, split = gl.program_id(0) % K, gl.program_id(0) // K
    P: gl.constexpr = attend_one.pairs(D, WARPS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, P))[:, None]
    d = gl.arange(0, D // 2, gl.SliceLayout(0, P))[None, :]
    head = attend_one.head_of(row, h, G, H, K)
    (pairs,) = receive((qkv + head * (D // 2) + d,), turn, (row < G + 2) & (d >= 0), D // 32)
    low, high = unpack(pairs, T)
    x = gl.reshape(gl.join(low, high), [ROWS, D])
    x = gl.convert_layout(x, attend_one.heads(D, WARPS), assert_trivial=True)
    y, total = attend_one.answer(
        x, norms, rotary, keys, values, slot, kv, some, h, split == 0, scale, eps, G, K, D, WARPS
    )
    low, high = gl.split(gl.reshape(y, [QUERIES, D // 2, 2]))
    L: gl.constexpr = low.type.layout
    row = gl.arange(0, QUERIES, gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, D // 2, gl.SliceLayout(0, L))[None, :]
    to = split * H + h * G + row
    send(parts + to * (D // 2) + d, pack(low, high, T), turn, (row < G) & (d >= 0))
    total = gl.convert_layout(total, gl.SliceLayout(1, L)).to(gl.int32, bitcast=True)[:, None]
    i = gl.arange(0, SECTOR, gl.SliceLayout(0, L))[None, :]
    send(sums + to * SECTOR + i, total, turn, (row < G) & (i >= 0))


@gluon.jit
def merge(
    parts, sums, y, live, turn, H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr, T: gl.constexpr
):
    """A program's share of a group of heads, of what all splits send; sent to `y`."""
    SHARE: gl.constexpr = H // K * D // 2 // SPLITS
    L: gl.constexpr = gl.BlockedLayout([1, 1], [SPLITS, 32 // SPLITS], [1, WARPS], [1, 0])
    first = (gl.program_id(0) % K * SPLITS + gl.program_id(0) // K) * SHARE
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
