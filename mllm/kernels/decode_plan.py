"""What is computed once for a decode step: how its contexts are shared out, and what attention needs for that."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mllm.state import State, state, tensor


class Split(NamedTuple):
    """How a context is shared out: splits of it, tokens that a program loads at a time, warps, stages of its pipeline.

    With one stage the first tile is loaded before the wait, and held in registers; with none there is no other
    (`kernels/attend_one.py`).
    """

    splits: int
    tile: int
    warps: int
    stages: int


def split_for(rows: int, heads: int, kv_heads: int, tokens: int) -> Split:
    """What was fastest on an H200, and for a few rows on an H100, for rows of at most `tokens` tokens; the record is in
    `docs/performance.md`.

    One row is bound by latency: its splits' first tile is loaded before the wait, and what they leave, which grows with
    the number of heads, is read by every program that merges it. So are a few short ones. Long contexts and more rows are
    bound by bandwidth: many programs of one or two warps, which have hardly anybody to wait for.
    """
    if rows > 1:
        one_each = 128 // (rows * kv_heads)  # splits for which each multiprocessor has a program
        if one_each > 1 and rows * tokens <= 8192:
            return Split(_cut(max(2, min(one_each, tokens // 256))), 128, 8, 1)
        return Split(_cut(1024 // (rows * kv_heads)), 32, 1, 2)
    if tokens > 12288:
        return Split(64, 64, 2, 2)
    # a second tile of a split costs more than reading what twice as many splits leave
    most = 16 if heads <= 16 or tokens > 6144 else 8
    return Split(min(most, max(4, triton.next_power_of_2(triton.cdiv(tokens, 128)))), 128, 8, 1)


def _cut(wanted: int) -> int:
    """The power of two at or below `wanted`, from 1 to 32: a kernel is compiled for each."""
    return min(32, 1 << (max(wanted, 1).bit_length() - 1))


class SplitHeads(NamedTuple):
    """What the splits of one row's context left: their results [splits A], and log2 of their softmax sums [splits H].

    Those that its length [1], in tiles of so many tokens, has no work for have written nothing.
    """

    parts: Tensor
    sums: Tensor
    lengths: Tensor
    tile: int


@state
class Workspace(State):
    """For merging: the splits' results f32 [B K splits G D], their maxima and sums [B K splits G 2], and how many of
    them have arrived [B K], which is 0 between kernels, so that all layers share it."""

    partial: Tensor
    stats: Tensor
    arrived: Tensor = tensor("B K")


def workspace_for(
    split: Split, rows: int, heads: int, kv_heads: int, size: int, device: torch.device
) -> Workspace | None:
    """What merging needs; None where the splits are handed on, which are one row's, of heads that `merged` takes."""
    if rows == 1 and split.stages <= 1 and size & (size - 1) == 0:
        return None
    shape = rows, kv_heads, split.splits, heads // kv_heads
    return Workspace(
        partial=torch.empty(*shape, size, dtype=torch.float32, device=device),
        stats=torch.empty(*shape, 2, dtype=torch.float32, device=device),
        arrived=torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
    )


@state
class Exchange(State):
    """What the programs of `persistent` need for one step: words, all 0, and how they share the context out."""

    words: Tensor
    split: Split


@state
class DecodePlan(State):
    """Computed once per step: rotary tables f32 [B D/2] and the batch's bounds. Without a `workspace` the splits are
    handed on as `SplitHeads`. `exchange` is for `persistent`, and None where that can't do the step."""

    cos: Tensor
    sin: Tensor
    slots: Tensor = tensor("B")
    pages: Tensor = tensor("B N")
    lengths: Tensor = tensor("B")
    workspace: Workspace | None
    exchange: Exchange | None
    split: Split
