"""The mergers of an encoder: neighbouring patches to one feature of the decoder's width, after the last layer and at taps.

On Hopper they wait for the last layer and are made together: each alone is too small for the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.buckets import CAPTURED_PATCHES
from mllm.kernels import products, tall
from mllm.kernels.hopper import TYPES
from mllm.kernels.norm import Pending, Stream
from mllm.kernels.pdl import launch_dependents, options, wait
from mllm.kernels.reference_vision import EPS
from mllm.kernels.room import empty_groups
from mllm.weights import Merger, TapMerger, stacks_of

MATRICES = "up", "up_bias", "down", "down_bias"
"""Matrices of a merger that lie in stacks with those of the others."""


class Unmerged(NamedTuple):
    """A stream x [X Ev] that is yet to be merged."""

    x: Stream
    weights: Merger | TapMerger

    def made(self) -> Tensor:
        return merged(self.x, self.weights, pdl=True)


def merge(x: Stream | products.Unadded, weights: Merger | TapMerger, *, pdl: bool) -> tuple[Stream, Tensor | Unmerged]:
    """x [X Ev] and the features [M E] of it. In a chain they wait for those of other layers, where that keeps little in
    memory."""
    if isinstance(x, products.Unadded):
        x = x.made()
    total = x.x if isinstance(x, Pending) else x
    waits = pdl and total.dtype in TYPES and len(total) <= CAPTURED_PATCHES
    return x, Unmerged(x, weights) if waits else merged(x, weights, pdl=pdl)


def merged(x: Stream, weights: Merger | TapMerger, *, pdl: bool) -> Tensor:
    """The features [M E] of x [X Ev]."""
    y = normed([Unmerged(x, weights)], pdl=pdl)[0]
    y = products.linear(y, weights.up, weights.up_bias, gelu="none", pdl=pdl)  # exact, unlike the blocks'
    return products.linear(y, weights.down, weights.down_bias, pdl=pdl)


def features(parts: Sequence[Tensor | Unmerged], *, pdl: bool) -> Tensor:
    """What `merge` left of n streams, [n M E]."""
    waiting = [part for part in parts if isinstance(part, Unmerged)]
    alike = len({_form(part.x) for part in waiting}) == 1
    if alike and 1 < len(waiting) == len(parts) and (stacks := stacks_of([part.weights for part in waiting], MATRICES)):
        up, up_bias, down, down_bias = stacks.values()
        x = normed(waiting, pdl=pdl)
        y = tall.linears(x, up, up_bias, empty_groups(x, *x.shape), gelu="none", pdl=pdl)
        return tall.linears(y, down, down_bias, x.new_empty(*x.shape[:2], down.shape[1]), pdl=pdl)
    return torch.stack([merged(*part, pdl=pdl) if isinstance(part, Unmerged) else part for part in parts])


def _form(x: Stream) -> tuple[int, bool] | None:
    """What is to be added to a stream: in how many parts, and whether there is a bias."""
    return (len(x.parts), x.bias is not None) if isinstance(x, Pending) else None


@triton.jit
def _norm_joined(x, parts, shift, weight, bias, y, joined, m, M, E, eps, COUNT: tl.constexpr, CP: tl.constexpr,
                 EP: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Row m of y [M COUNT*E]: COUNT rows of x and what is to be added to them, each normalised, or all together."""
    n, e = tl.arange(0, CP)[:, None], tl.arange(0, EP)[None, :]
    inside = (n < COUNT) & (e < E)
    at = m * COUNT * E + n * E + e
    own = tl.where(joined != 0, n * E, 0) + e
    w = tl.load(weight + own, mask=inside, other=0.0)
    centre = tl.load(bias + own, mask=inside, other=0.0)
    if SHIFT:
        added = tl.load(shift + e, mask=e < E, other=0.0)
    wait(PDL)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        v += tl.load(parts + part * M * COUNT * E + at, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        v += added.to(tl.float32)
    if PARTS > 0:
        v = v.to(x.dtype.element_ty).to(tl.float32)  # as the stream goes on
    size = tl.where(joined != 0, COUNT * E, E)
    mean = tl.sum(v, 1) / size
    mean = tl.where(joined != 0, tl.sum(mean, 0), mean)[:, None]
    v = tl.where(inside, v - mean, 0.0)
    squares = tl.sum(v * v, 1) / size
    squares = tl.where(joined != 0, tl.sum(squares, 0), squares)[:, None]
    v = v * tl.rsqrt(squares + eps) * w.to(tl.float32) + centre.to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_joined_kernel(xs, parts, shifts, weights, biases, joined, y, M, apart, E, eps, N: tl.constexpr, COUNT: tl.constexpr,
                       CP: tl.constexpr, EP: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """y [N M COUNT*E], `apart` from each other, of N streams of M*COUNT rows, each by `_norm_joined`."""
    launch_dependents(PDL)
    m = tl.program_id(0).to(tl.int64)
    apart = apart.to(tl.int64)
    for i in tl.static_range(N):
        if tl.program_id(1) == i:
            _norm_joined(xs[i], parts[i], shifts[i], weights[i], biases[i], y + i * apart, joined[i], m, M, E, eps, COUNT,
                         CP, EP, PARTS, SHIFT, PDL)  # fmt: skip


def normed(waiting: Sequence[Unmerged], *, pdl: bool) -> Tensor:
    """The streams with their neighbours side by side, normalised: [n M Mv]."""
    pending = [w.x if isinstance(w.x, Pending) else Pending(w.x, w.x[None, :0]) for w in waiting]
    x, parts, shift = pending[0]
    width, joined = x.shape[1], waiting[0].weights.up.shape[1]
    rows, count = x.numel() // joined, joined // width
    y = empty_groups(x, len(waiting), rows, joined)
    norms = [w.weights.norm for w in waiting]
    norm_joined_kernel[(rows, len(waiting))](
        tuple(p.x for p in pending), tuple(p.parts for p in pending),
        tuple(p.x if p.bias is None else p.bias for p in pending), tuple(norms),
        tuple(w.weights.norm_bias for w in waiting), tuple(int(len(norm) == joined) for norm in norms), y, rows,
        y.stride(0), width, EPS, N=len(waiting), COUNT=count, CP=triton.next_power_of_2(count),
        EP=triton.next_power_of_2(width), PARTS=0 if parts.numel() == 0 else len(parts), SHIFT=shift is not None,
        num_warps=8, **options(pdl),
    )  # fmt: skip
    return y
