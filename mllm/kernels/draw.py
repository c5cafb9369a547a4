"""Drawing tokens without a sort: a search for the last token that top-k and top-p keep, then Gumbel-max.

What is kept are the likeliest tokens of a row down to some logit, and of those equal to it the first. A token's distance
below the likeliest, `(max - logit) / temperature`, is never negative, so its bits as a whole number order as it does:
its key. The search narrows an interval of keys that holds the wanted one, BITS of them a level: programs for the parts
of a row add up how many tokens (top-k) or how much probability (top-p) each of DIGITS equal pieces of the interval has,
and the next level goes on in the piece where the sum reaches its goal. Sums are whole numbers, so the order in which
parts arrive changes nothing. A part whose likeliest token lies beyond the interval is not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.batch import SamplingBatch
from mllm.kernels import step
from mllm.kernels.pdl import launch_dependents, options, wait

BITS = tl.constexpr(5)
DIGITS = tl.constexpr(32)  # 2**BITS
LEVELS = tl.constexpr(6)
WIDTH = tl.constexpr(34)  # i64 of a level: the sum of each digit, where its interval starts, the sum before that
END = tl.constexpr(1 << 30)  # all keys are less: 2**(BITS * LEVELS)
# Noise spans 19.5 (`noise.gumbel`), so nothing that lies further below the likeliest is ever drawn, and distances of 32
# and beyond may have one key; that leaves 30 bits for the others, down to 2**-123.
REACH = tl.constexpr(20.0)
FLOOR = tl.constexpr(0x02000000)  # the bits of 32.0 less END
ONE = tl.constexpr(2.0**40)  # the probability of the likeliest as a whole number; 2**22 of them fit an int64
CHUNK = 512
"""Logits that a program looks at together, by one warp for each 128."""
FEW = 8
"""Rows up to which a program takes one chunk, so that one row has some 300 programs; beyond it takes two. Measured on
an H200: `docs/performance.md`."""


@triton.jit
def distance_of(x, top, temperature):
    """f32: how far logits lie below the likeliest, rounded as in `reference.sample`."""
    return tl.div_rn(top - x, temperature)


@triton.jit
def key_of(distance):
    """i32, from 0 to END - 1."""
    return tl.minimum(tl.maximum(distance.to(tl.int32, bitcast=True) - FLOOR, 0), END - 1)


@triton.jit
def mass_at(key):
    """i64: the probability of a token with this key, that of the likeliest being ONE."""
    return (tl.exp(-(key + FLOOR).to(tl.float32, bitcast=True)) * ONE).to(tl.int64)


@triton.jit
def narrow(level, shift, goal):
    """(where the last digit of a level starts that has less than `goal` before it, what it has before it)."""
    digit = tl.arange(0, DIGITS)
    sums = tl.load(level + digit)
    before = tl.load(level + DIGITS + 1) + tl.cumsum(sums, 0) - sums
    last = tl.max(tl.where(before < goal, digit, 0), 0)
    start = tl.load(level + DIGITS).to(tl.int32) + (last << shift)
    return start, tl.sum(tl.where(digit == last, before, 0), 0)


@triton.jit
def rank_limit(sums, k, V):
    """What top-k keeps: (all keys below this, so many of those at it)."""
    limit, before = narrow(sums + (LEVELS - 1) * WIDTH, 0, k)
    limited = (k > 0) & (k < V)
    return tl.where(limited, limit, END), tl.where(limited, k - before, 0)


@triton.jit
def mass_goal(sums, p, limit, equals):
    """i64: top_p of what top-k keeps; see `rank_limit`. A token is kept if what lies before it is less."""
    total = tl.sum(tl.load(sums + LEVELS * WIDTH + tl.arange(0, DIGITS)), 0) + equals * mass_at(limit)
    return tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def limit_of(sums, k, p, V, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """What both keep: (all keys below this, so many of those at it, the search that found it: 0 top-k, 1 top-p)."""
    limit, equals, search = tl.full([], END, tl.int32), tl.full([], 0, tl.int64), 0
    if TOP_K:
        limit, equals = rank_limit(sums, k, V)
    if TOP_P:
        goal = mass_goal(sums, p, limit, equals)
        key, before = narrow(sums + (2 * LEVELS - 1) * WIDTH, 0, goal)
        search = ((p < 1.0) & (key < limit)).to(tl.int32)
        limit = tl.where(search == 1, key, limit)
        each = tl.maximum(mass_at(limit), 1)
        count = tl.maximum((goal - before + each - 1) // each, 1)  # one token is always kept
        count = tl.where(search == 1, count, tl.minimum(count, equals))
        equals = tl.where(p < 1.0, count, equals)
    return limit, equals, search


@triton.jit
def search_kernel(logits, best, sums, ties, temperature, top_k, top_p, V, shift, PARTS: tl.constexpr, PP: tl.constexpr,
                  BLOCK: tl.constexpr, CHUNK: tl.constexpr, MASS: tl.constexpr, TOP_K: tl.constexpr,
                  FIRST: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One level of the search for top-k, or with MASS for top-p; TOP_K: among what the former kept.

    Adds to `sums` i64 [B 2 LEVELS WIDTH] for digits of 2**shift keys. The LAST level, where that is one key, also
    leaves how many tokens of each part have it, in `ties` i32 [B 2 DIGITS PARTS].
    """
    launch_dependents(PDL)
    wait(PDL)
    b = tl.program_id(0)
    part = tl.program_id(1)
    digit = tl.arange(0, DIGITS)
    q = tl.arange(0, PP)
    t = tl.load(temperature + b)
    k = tl.load(top_k + b)
    p = tl.load(top_p + b)
    nearest = tl.load(best + b * PARTS + part)
    top = tl.load(best + b * PARTS + q, mask=q < PARTS, other=-float("inf"))
    row = sums + b * 2 * LEVELS * WIDTH
    here = row + ((MASS + 1) * LEVELS - 1 - shift // BITS) * WIDTH
    goal, start = k.to(tl.int64), 0
    limit, equals = tl.full([], END, tl.int32), tl.full([], 0, tl.int64)
    if MASS and TOP_K:
        limit, equals = rank_limit(row, k, V)
    if not FIRST:
        if MASS:
            goal = mass_goal(row, p, limit, equals)
        start, before = narrow(here - WIDTH, shift + BITS, goal)
        if part == 0:
            tl.store(here + DIGITS, start.to(tl.int64))
            tl.store(here + DIGITS + 1, before)
    top = tl.max(top, 0)
    wanted = (t > 0.0) & (p < 1.0 if MASS else (k > 0) & (k < V))
    count = tl.zeros([DIGITS], tl.int32)
    beyond = start + (1 << shift) * DIGITS  # in this order: up to 3.8 Triton's interpreter takes no `DIGITS << shift`
    if wanted & (key_of(distance_of(nearest, top, t)) < tl.minimum(beyond, limit)):
        mass = tl.zeros([DIGITS], tl.float32)
        for first in range(0, BLOCK, CHUNK):
            at = part * BLOCK + first + tl.arange(0, CHUNK)
            x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=-float("inf"))
            distance = distance_of(x, top, t)
            key = key_of(distance)
            inside = (at < V) & (key >= start) & (key < limit)
            place = tl.where(inside, (key - start) >> shift, -1)
            if MASS and not LAST:  # one number holds both: two take turns on their way to the digits, and 140 registers
                chance = tl.exp(-distance).to(tl.int32, bitcast=True)
                both = ((place.to(tl.int64) << 32) | chance.to(tl.int64))[:, None]
                chance = both.to(tl.int32).to(tl.float32, bitcast=True)
                mass += tl.sum(tl.where((both >> 32).to(tl.int32) == digit[None, :], chance, 0.0), 0)
            else:
                count += tl.sum((place[:, None] == digit[None, :]).to(tl.int32), 0)
        if MASS:
            amount = count * mass_at(start + digit) if LAST else (mass * ONE).to(tl.int64)
        else:
            amount = count.to(tl.int64)
        tl.atomic_add(here + digit, amount, mask=amount > 0, sem="relaxed")
    if LAST:
        tl.store(ties + ((b * 2 + MASS) * DIGITS + digit) * PARTS + part, count)


@triton.jit
def noise_of(seed, position, index):
    """f32: see `noise.gumbel`."""
    word = tl.philox(seed, index, position, 0, 0)[0]
    return -tl.log(-tl.log(((word >> 9).to(tl.float32) + 0.5) * 2.0**-23))


@triton.jit
def draw_kernel(logits, best, where, sums, ties, score, token, temperature, top_k, top_p, min_p, seed, lengths, V,
                PARTS: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TOP_K: tl.constexpr,
                TOP_P: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Of each part of each row the largest sum of a kept logit and its noise, and its index; of greedy rows the best."""
    launch_dependents(PDL)
    wait(PDL)
    b = tl.program_id(0)
    part = tl.program_id(1)
    q = tl.arange(0, PP)
    t = tl.load(temperature + b)
    least = tl.load(min_p + b)
    s = tl.load(seed + b)
    position = tl.load(lengths + b)
    largest = tl.load(best + b * PARTS + part)
    drawn = tl.load(where + b * PARTS + part)
    top = tl.load(best + b * PARTS + q, mask=q < PARTS, other=-float("inf"))
    row = sums + b * 2 * LEVELS * WIDTH
    limit, equals, search = limit_of(row, tl.load(top_k + b), tl.load(top_p + b), V, TOP_K, TOP_P)
    top = tl.max(top, 0)
    nearest = distance_of(largest, top, t)
    if t > 0.0:
        largest = -float("inf")
    if (t > 0.0) & (nearest < REACH) & (key_of(nearest) <= limit):
        same = ties + ((b * 2 + search) * DIGITS + limit % DIGITS) * PARTS + q
        rank = tl.sum(tl.load(same, mask=q < tl.where(limit < END, part, 0), other=0), 0)  # of ties, in parts before
        for first in range(0, BLOCK, CHUNK):
            at = part * BLOCK + first + tl.arange(0, CHUNK)
            x = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=-float("inf"))
            distance = distance_of(x, top, t)
            key = key_of(distance)
            tie = ((at < V) & (key == limit)).to(tl.int32)
            kept = (key < limit) | ((tie == 1) & (rank + tl.cumsum(tie, 0) <= equals))
            kept &= (at < V) & (tl.exp(-distance) >= least)
            rank += tl.sum(tie, 0)
            value = tl.where(kept, noise_of(s, position, at) - distance, -float("inf"))
            value, index = tl.max(value, 0, return_indices=True)
            drawn = tl.where(value > largest, part * BLOCK + first + index, drawn)
            largest = tl.maximum(value, largest)
    tl.store(score + b * PARTS + part, largest)
    tl.store(token + b * PARTS + part, drawn)


class Found(NamedTuple):
    """What the search leaves: the likeliest of each part (`step.likeliest`), and sums and ties as in `search_kernel`."""

    best: Tensor
    where: Tensor
    finite: Tensor
    sums: Tensor
    ties: Tensor


def sizes(block: int, parts: int) -> dict[str, int]:
    """Launch arguments: parts of a row, their logits, how many of them at a time, and a warp for each 128 of those."""
    chunk = min(block, CHUNK)
    return {
        "PARTS": parts, "PP": triton.next_power_of_2(parts), "BLOCK": block, "CHUNK": chunk,
        "num_warps": max(1, chunk // 128),
    }  # fmt: skip


def search(logits: Tensor, sampling: SamplingBatch, *, block: int, pdl: bool) -> Found:
    """What top-k and top-p keep of each row, in `limit_of` the sums that are found."""
    rows, vocabulary = logits.shape
    sums = torch.empty(rows, 2, LEVELS.value, WIDTH.value, dtype=torch.int64, device=logits.device)
    best, where, finite = step.likeliest(logits, block, clear=sums, pdl=pdl)
    ties = where.new_empty(rows, 2, DIGITS.value, best.shape[1])
    for mass, used in enumerate((sampling.has_top_k, sampling.has_top_p)):
        for level in range(LEVELS.value if used else 0):
            search_kernel[best.shape](
                logits, best, sums, ties, sampling.temperature, sampling.top_k, sampling.top_p, vocabulary,
                (LEVELS.value - 1 - level) * BITS.value, MASS=mass, TOP_K=sampling.has_top_k, FIRST=level == 0,
                LAST=level == LEVELS.value - 1, **sizes(block, best.shape[1]), **options(pdl),
            )  # fmt: skip
    return Found(best, where, finite, sums, ties)


def draw(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, found: Found, *, block: int, pdl: bool) -> Tensor:
    """Tokens i32 [B]: the kept one of each row with the largest sum of logit and noise."""
    best, where, finite, sums, ties = found
    score, token = torch.empty_like(best), torch.empty_like(where)
    draw_kernel[best.shape](
        logits, best, where, sums, ties, score, token, sampling.temperature, sampling.top_k, sampling.top_p,
        sampling.min_p, sampling.seed, lengths, logits.shape[1], TOP_K=sampling.has_top_k, TOP_P=sampling.has_top_p,
        **sizes(block, best.shape[1]), **options(pdl),
    )  # fmt: skip
    return step.pick(score, token, finite, pdl=pdl)


def sample(logits: Tensor, sampling: SamplingBatch, lengths: Tensor, *, pdl: bool) -> Tensor:
    """As `reference.sample`."""
    if sampling.greedy:
        return step.argmax(logits, pdl=pdl)
    block = CHUNK if len(logits) <= FEW else 2 * CHUNK
    found = search(logits, sampling, block=block, pdl=pdl)
    return draw(logits, sampling, lengths, found, block=block, pdl=pdl)
