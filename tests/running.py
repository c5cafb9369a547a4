"""The stages run by hand, for tests that look between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from attrs import define
from torch import Tensor

import mllm
from mllm import requests, stages
from mllm.batch import ForwardBatch, VisionTokens, decode_batch, pack
from mllm.cache import KVPool
from mllm.requests import Request
from mllm.sampling import Sampling
from mllm.segments import Segment, crop
from mllm.table import RequestTable


@define(eq=False)
class Running:
    """Prompts admitted to a table, one row each in the order given: `rows[i]` is that of `requests[i]`."""

    model: mllm.Model
    requests: list[Request]
    rows: tuple[int, ...]
    table: RequestTable
    pool: KVPool
    features: dict[int, VisionTokens]

    def prefill(self, parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Run tokens [start, stop) of prompt i for every (i, start, stop) in one batch: logits [n V] each."""
        segments = [
            Segment(request=self.requests[i], row=self.rows[i], start=start, stop=stop) for i, start, stop in parts
        ]
        batch = pack(self.table, [s.chunk() for s in segments], device=self.model.device, every=True)
        vision = crop(self.features, segments)
        config, ops = self.model.config, self.model.ops
        self.pool, logits = stages.prefill(self.model.weights, self.pool, batch, vision, config=config, ops=ops)
        counts = [stop - start for _, start, stop in parts]
        self.table = stages.commit(self.table, [s.row for s in segments], counts)
        return list(logits.split(counts))

    def decode_batch(self, tokens: Sequence[int], *, which: Sequence[int] | None = None, **more: Any) -> ForwardBatch:
        """The newest token of the prompts in `which` (None: all of them)."""
        which = range(len(self.rows)) if which is None else which
        settings = {"size": len(which), "listed": self.table.pages.shape[1], "device": self.model.device, **more}
        delta = [self.requests[i].layout.delta for i in which]
        return decode_batch(self.table, [self.rows[i] for i in which], tokens, delta, **settings)


def start(
    model: mllm.Model, prompts: Sequence[mllm.Prompt], *, new: int = 1, page_size: int = 4, spare: int = 0
) -> Running:
    """Prompts laid out, encoded and admitted, with room for `new` tokens each; `spare` pages and rows are nobody's."""
    made = [requests.make(model, p, index=i, new_tokens=new, sampling=Sampling()) for i, p in enumerate(prompts)]
    slots = [r.length + new for r in made]
    pages = sum(-(-n // page_size) for n in slots) + spare
    table = RequestTable.empty(rows=len(made) + spare, pages=pages, page_size=page_size)
    table, rows = stages.admit(table, slots)
    pool = KVPool.empty(model.config.text, pages=pages, page_size=page_size, device=model.device, dtype=model.dtype)
    features = {}
    for r in made:
        if r.prompt.images and model.config.vision and model.weights.vision:
            patches = requests.patch_batch(model, r)
            features[r.index] = stages.vit(model.weights.vision, patches, config=model.config.vision, ops=model.ops)
    return Running(model, made, rows, table, pool, features)


def in_chunks(model: mllm.Model, prompt: mllm.Prompt, cuts: Sequence[int], *, page_size: int = 4) -> Tensor:
    """Logits [n V] of a prompt that is prefilled in parts, cut before each index of `cuts`."""
    run = start(model, [prompt], page_size=page_size)
    bounds = [0, *sorted(set(cuts)), run.requests[0].length]
    return torch.cat([run.prefill([(0, a, b)])[0] for a, b in pairwise(bounds)])
