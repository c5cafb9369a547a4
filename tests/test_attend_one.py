"""Decode attention of one row on Hopper against its definition.

pytest tests/test_attend_one.py --device cuda
"""

from __future__ import annotations

import math

import pytest
import torch
from attending import attended, error
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")


def turned(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """f64 x [n D], normalised and rotated."""
    x = F.rms_norm(x.double(), x.shape[-1:], norm.double(), 1e-6)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("listed", "page"), [(16, 16), (8, 64), (32, 64)])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (16, 8), (20, 4), (32, 8), (16, 2)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.49, 0.5, 0.51, 1.0])
def test_one_row_attends_to_what_is_before_it(
    share: float,
    heads: tuple[int, int],
    size: int,
    listed: int,
    page: int,
    dtype: torch.dtype,
    device: str,
    hopper: None,
) -> None:
    from mllm.kernels import attend_one
    from mllm.kernels.decode_plan import DecodePlan, split_for

    queries, kv = heads
    split = split_for(1, queries, kv, listed * page)
    if not attend_one.fits(split, queries // kv, size, listed * page):
        pytest.skip("left to `attend`")
    past = min(int(share * listed * page), listed * page - 1)
    generator = torch.Generator().manual_seed(past + size)
    qkv, q_norm, k_norm = (
        torch.randn(n, generator=generator).to(device, dtype) for n in ((queries + 2 * kv) * size, size, size)
    )
    pool = torch.randn(2, listed + 1, page, kv, size, generator=generator).to(device, dtype)
    pages = (1 + torch.randperm(listed, generator=generator).int())[None].to(device)
    places = (pages[0].long()[:, None] * page + torch.arange(page, device=device)).flatten()
    flat = pool.view(2, -1, kv, size)
    flat[:, places[past:]] = torch.nan
    before = flat.clone()
    angle = torch.randn(size // 2, generator=generator).to(device)
    slots = places[past : past + 1]
    plan = DecodePlan(
        cos=angle.cos()[None], sin=angle.sin()[None], slots=slots, pages=pages,
        lengths=torch.tensor([past + 1], dtype=torch.int32, device=device), workspace=None, exchange=None, split=split,
    )  # fmt: skip
    parts, sums, *_ = attend_one.attend_(qkv[None], q_norm, k_norm, plan, *pool, eps=1e-6, pdl=True)
    chunk = math.ceil(math.ceil(past / split.splits) / split.tile) * split.tile
    live = max(1, math.ceil(past / max(chunk, 1)))
    weights = (sums[:live].double() * math.log(2)).softmax(0).repeat_interleave(size, 1)
    got = (weights * parts[:live].double()).sum(0)
    q, k, v = qkv.view(-1, size).split((queries, kv, kv))
    q, k = turned(q, q_norm, angle.cos(), angle.sin()), turned(k, k_norm, angle.cos(), angle.sin())
    context = [
        torch.cat([held[places[:past]].double(), new[None].double()]).repeat_interleave(queries // kv, 1)
        for held, new in zip(before, (k, v), strict=True)
    ]
    want = attended(q[None], *context)[0]
    assert error(got, want) < 1e-2
    assert error(flat[0, slots[0]], k) < 1e-2
    assert torch.equal(flat[1, slots[0]], v)
    before[:, slots] = flat[:, slots]
    assert torch.equal(flat.view(torch.int16), before.view(torch.int16))  # and nothing else was written
