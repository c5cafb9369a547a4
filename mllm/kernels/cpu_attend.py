"""Attention of one token a row, compiled: keys and values are read where they lie, page by page.

Each part of the work is one row and one of its key/value heads, with the query heads that share it: whoever does it
normalises and rotates those, writes the new key and value, and reads both as often as the group has heads, once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from mllm.batch import ForwardBatch
from mllm.config import TextConfig
from mllm.errors import TableError
from mllm.kernels import rotary
from mllm.kernels.cpu_lanes import HOST, LANES, address, ask, compiled, exp, f32, i32, i64, mix
from mllm.kernels.cpu_linear import norm, panel
from mllm.kernels.cpu_team import fork, parts_for

WIDE = 4 * LANES  # floats of a head that are summed in one go
_mix_2, _mix_1 = mix(2, 4), mix(1, 4)


@frozen(eq=False)
class Plan:
    """What a step computes once: `turns` f32 [2 B D/2] are cosine and sine of each row's rotation, `scratch` has a row
    for each part of the work that runs at one time, `pages` is how many a pool must have. The rest is the batch's."""

    turns: Tensor
    scratch: Tensor
    pages: int
    batch: ForwardBatch


@compiled("void(int64, int64, int64, int64, int64, int64)")
def _turns(positions, frequencies, axes, rows, half, out):
    """positions [3 rows], frequencies and axes [half] -> cosine, then sine, of every angle: [2 rows half]."""
    place, speed, axis = i32(positions, 3 * rows), f32(frequencies, half), i64(axes, half)
    cos, sin = f32(out, rows * half), f32(out + 4 * rows * half, rows * half)
    for row in range(rows):
        for i in range(half):
            angle = np.float32(place[axis[i] * rows + row]) * speed[i]
            cos[row * half + i], sin[row * half + i] = np.cos(angle), np.sin(angle)


@compiled()
def _head(x, scale, eps, cos, sin, size, out):
    """One head, normalised and rotated: pairs (i, i + size / 2)."""
    half = size // 2
    norm(x, scale, eps, size, out)
    a, b, c, s = f32(out, half), f32(out + 4 * half, half), f32(cos, half), f32(sin, half)
    for i in range(half):
        a[i], b[i] = a[i] * c[i] - b[i] * s[i], b[i] * c[i] + a[i] * s[i]


@compiled()
def _largest(x, count):
    row = f32(x, count)
    best = row[0]
    for i in range(count):
        best = row[i] if row[i] > best else best
    return best


@compiled(fastmath={"reassoc"})
def _total(x, count):
    row, total = f32(x, count), np.float32(0)
    for i in range(count):
        total += row[i]
    return total


@compiled()
def _softmax(x, count, scale):
    """exp(scale * (x - the largest)) over the sum of these, in place. A NaN makes all of it NaN."""
    row, best = f32(x, count), _largest(x, count)
    for i in range(count):
        row[i] = exp((row[i] - best) * scale)
    factor = np.float32(1) / _total(x, count)
    for i in range(count):
        row[i] *= factor


@compiled()
def _copy(x, count, out):
    row, to = f32(x, count), f32(out, count)
    for i in range(count):
        to[i] = row[i]


@compiled()
def _mix(p, ldp, rows, v, ldv, count, size, out, ldo):
    """out[r] += p[r, :count] @ v[:count, :size], two rows at a time; an ld is the floats between two rows."""
    for at in range(0, size, WIDE):
        for r in range(0, rows - 1, 2):
            _mix_2(p + 4 * r * ldp, ldp, v + 4 * at, ldv, count, out + 4 * (r * ldo + at), ldo, size - at)
        if rows & 1:
            last = rows - 1
            _mix_1(p + 4 * last * ldp, ldp, v + 4 * at, ldv, count, out + 4 * (last * ldo + at), ldo, size - at)


@compiled()
def _ask_for(x, tokens, stride, size):
    for token in range(tokens):
        for at in range(0, size, 16):  # the floats of a line
            ask(x + 4 * (token * stride + at))


@compiled()
def _group(q, group, keys, values, stride, size, pages, page_size, length, out, scores, sums):
    """Query heads [group size] over one key/value head, whose tokens lie `stride` floats apart in their pages.

    Scratch, all zeros: `scores` [group length], `sums` [group, size in whole `WIDE`].
    """
    width = (size + WIDE - 1) // WIDE * WIDE
    for first in range(0, length, page_size):
        at, count = 4 * pages[first // page_size] * page_size * stride, min(page_size, length - first)
        _ask_for(values + at, count, stride, size)
        if first + page_size < length:
            _ask_for(keys + 4 * pages[first // page_size + 1] * page_size * stride, page_size, stride, size)
        panel(q, size, group, keys + at, stride, count, size, scores + 4 * first, length)
    for head in range(group):
        _softmax(scores + 4 * head * length, length, np.float32(1 / np.sqrt(size)))
    for first in range(0, length, page_size):
        at, count = 4 * pages[first // page_size] * page_size * stride, min(page_size, length - first)
        _mix(scores + 4 * first, length, group, values + at, stride, count, size, sums, width)
    for head in range(group):
        _copy(sums + 4 * head * width, size, out + 4 * head * size)


@compiled()
def _one(qkv, q_norm, k_norm, eps, cos, sin, slot, pages, page_size, length, keys, values, out, shape, head, scratch):
    """One row and key/value head `head`: qkv [C], out [A]; keys and values [P S K D], of which `slot` is written."""
    heads, kv_heads, size = shape
    group, stride = heads // kv_heads, kv_heads * size
    new, at = 4 * (slot * stride + head * size), 4 * head * size
    _head(qkv + 4 * (heads + head) * size, k_norm, eps, cos, sin, size, keys + new)
    _copy(qkv + 4 * (heads + kv_heads + head) * size, size, values + new)
    for i in range(group):
        _head(qkv + 4 * (head * group + i) * size, q_norm, eps, cos, sin, size, scratch + 4 * i * size)
    scores = scratch + 4 * group * size
    sums = scores + 4 * group * length
    to = out + 4 * head * group * size
    _group(scratch, group, keys + at, values + at, stride, size, pages, page_size, length, to, scores, sums)


@compiled()
def _zero(x, count):
    row = f32(x, count)
    for i in range(count):
        row[i] = np.float32(0)


@compiled()
def _attend_part(
    part, parts, qkv, q_norm, k_norm, eps, turns, slots, pages, lengths, keys, values, out,
    rows, heads, kv_heads, size, listed, page_size, scratch, room,
):  # fmt: skip
    width, half, total = (heads + 2 * kv_heads) * size, size // 2, rows * kv_heads
    own = scratch + 4 * part * room
    for item in range(total * part // parts, total * (part + 1) // parts):
        row, head = item // kv_heads, item % kv_heads
        cos = turns + 4 * row * half
        _zero(own, room)
        _one(
            qkv + 4 * row * width, q_norm, k_norm, eps, cos, cos + 4 * rows * half, i64(slots, rows)[row],
            i32(pages + 4 * row * listed, listed), page_size, max(i32(lengths, rows)[row], 1), keys, values,
            out + 4 * row * heads * size, (heads, kv_heads, size), head, own,
        )  # fmt: skip


_attend_fork = fork(_attend_part)


@compiled("void(" + "int64, " * 4 + "float64, " + "int64, " * 14 + "int64)")
def _attend(
    parts, qkv, q_norm, k_norm, eps, turns, slots, pages, lengths, keys, values, out,
    rows, heads, kv_heads, size, listed, page_size, scratch, room,
):  # fmt: skip
    _attend_fork(parts, (
        qkv, q_norm, k_norm, eps, turns, slots, pages, lengths, keys, values, out,
        rows, heads, kv_heads, size, listed, page_size, scratch, room,
    ))  # fmt: skip


@lru_cache(maxsize=16)
def _constants(head_dim: int, theta: float, sections: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of each rotary pair, the radians per position and the position that it turns with."""
    half, cpu = head_dim // 2, torch.device("cpu")
    return rotary.frequencies(half, theta, cpu), rotary.axes(half, sections, interleaved=True, device=cpu)


def plan(batch: ForwardBatch, *, config: TextConfig, page_size: int, dtype: torch.dtype) -> Plan:
    rows, half = len(batch.lengths), config.head_dim // 2
    frequencies, axes = _constants(config.head_dim, config.rope_theta, tuple(config.mrope_section))
    turns = torch.empty(2, rows, half, **HOST)
    _turns(batch.positions.data_ptr(), address(frequencies), axes.data_ptr(), rows, half, address(turns))
    kv_heads, tokens = config.num_key_value_heads, batch.pages.shape[1] * page_size
    parts = min(parts_for(rows * tokens * kv_heads * config.head_dim * 2, 1), rows * kv_heads)
    room = config.num_attention_heads // kv_heads * (2 * config.head_dim + WIDE + tokens)
    pages = 1 + max(int(batch.pages.numpy().max()), int(batch.slots.numpy().max()) // page_size)
    return Plan(turns, torch.empty(parts, room, **HOST), pages, batch)


def attend_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, plan: Plan, keys: Tensor, values: Tensor, *, eps: float
) -> Tensor:
    batch, (rows, width), (_, page_size, kv_heads, size) = plan.batch, qkv.shape, keys.shape
    heads = width // size - 2 * kv_heads
    if plan.pages > len(keys):
        raise TableError(
            f"page {plan.pages - 1} of the batch is beyond a pool of {len(keys)}: is its table another pool's?"
        )
    out = torch.empty(rows, heads * size, **HOST)
    _attend(
        len(plan.scratch), address(qkv), address(q_norm), address(k_norm), eps, address(plan.turns),
        batch.slots.data_ptr(), batch.pages.data_ptr(), batch.lengths.data_ptr(), address(keys), address(values),
        address(out), rows, heads, kv_heads, size, batch.pages.shape[1], page_size,
        address(plan.scratch), plan.scratch.shape[1],
    )  # fmt: skip
    return out
