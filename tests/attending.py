"""Attention by its definition, and how far a kernel's is from it."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from mllm.state import map_leaves


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def single(tree: object) -> object:
    """Its numbers in float32."""
    return map_leaves(lambda t: t.float() if t.is_floating_point() else t, tree)


def attended(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """f64 [T A] of q [T H D], k and v [N H D]; `causal`: the queries are the last tokens, and see those before them."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[2] ** -0.5
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(hidden.to(scores.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).flatten(1)


def stand_out(q: Tensor, key: Tensor, above: float) -> None:
    """Have the scores of `key` [K D] be `above`, base 2, for every other query of q [T H D], and far below for the rest."""
    if above:
        q[..., 0] = torch.tensor([1.0, -1.0]).repeat(len(q))[: len(q), None]
        key.zero_()[:, 0] = above * q.shape[2] ** 0.5 * math.log(2)


def prompt_error(
    attend: functools.partial[Tensor], rows: list[tuple[int, int]], free: int, *, size: int, page: int,
    dtype: torch.dtype, device: str, above: float = 0.0,
) -> float:  # fmt: skip
    """The largest error of a row, whose keys and values lie in pages in any order, and beyond its end are no numbers.

    `above`: how much, base 2, the score of one key late in each row is above the others, or below them, by query.
    """
    from mllm.kernels import flash

    heads, kv_heads, listed = 4, 2, -(-max(length for _, length in rows) // page) + 1
    generator = torch.Generator().manual_seed(free)
    ends = list(itertools.accumulate([n for n, _ in rows], initial=0))
    q = torch.randn(ends[-1] + free, heads, size, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1 + len(rows) * listed, page, kv_heads, size, generator=generator).to(dtype)
    pages = 1 + torch.randperm(len(rows) * listed, generator=generator, dtype=torch.int32).view(-1, listed)
    for used, (_, length) in zip(pages, rows, strict=True):
        late = max(0, length - 20)
        stand_out(q, keys[used[late // page], late % page], above)
        spare = used[(length - 1) // page :].long()
        for pool in (keys, values):
            pool[spare[1:]] = torch.nan
            pool[spare[0], (length - 1) % page + 1 :] = torch.nan
    indptr, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, [n for _, n in rows]))
    scaled = (q.float() * size**-0.5 * flash.LOG2E).to(device, dtype)
    got = attend(scaled, keys.to(device), values.to(device), indptr, lengths, pages.to(device)).cpu()
    errors = []
    for a, used, (count, length) in zip(ends, pages, rows, strict=False):
        k, v = (x[used.long()].flatten(0, 1)[:length].repeat_interleave(2, 1) for x in (keys, values))
        errors.append(error(got[a : a + count], attended(q[a : a + count], k, v, causal=True)))
    return max(errors)
