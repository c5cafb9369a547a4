"""Multimodal prefill: the vision encoder and the prompt behind it, together. `vit` times the encoder alone."""

from __future__ import annotations

import pytest

from benchmarks import clock, figures, points
from benchmarks.checks import RELATIVE
from benchmarks.session import Case
from mllm import stages
from mllm.batch import VisionTokens, pack
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE
from mllm.segments import chunk


@pytest.mark.benchmark(group="multimodal_prefill")
def test_multimodal_prefill(case: Case, batch: int, image_len: int) -> None:
    session = case.session
    session.needs_vision()
    model = session.model
    vision, weights = model.config.vision, model.weights.vision
    assert vision is not None
    assert weights is not None
    picture, tokens = session.picture_prompt(image_len or None)
    layout = points.lay_out(model, tokens, picture)
    length, count = len(layout.tokens), layout.counts[0]
    session.fits(batch, length)
    box = {}
    box["pool"], table, rows = points.memory(model, batch, length)
    packed = pack(table, [chunk(layout, row) for row in rows], device=model.device)
    at = [row * length + layout.starts[0] + i for row in range(batch) for i in range(count)]
    patches = points.patches_of(model, [picture] * batch, at)

    def encode(ops: Ops) -> VisionTokens:
        return stages.vit(weights, patches, config=vision, ops=ops)

    def call(pool, ops=model.ops):
        box["pool"], logits = stages.prefill(model.weights, pool, packed, encode(ops), config=model.config, ops=ops)
        return logits

    item, grid = model.dtype.itemsize, layout.grids[0]
    work = figures.vit(vision, patches=(grid[0] * grid[1],) * batch, itemsize=item)
    work += figures.prefill(model.config.text, rows=batch, length=length, itemsize=item)
    logits = case.time(call, lambda: ((box["pool"],), {}), work=work)
    assert points.relative(logits, call(box["pool"], REFERENCE)) <= RELATIVE[model.dtype]
    assert points.relative(logits, logits[:1].expand_as(logits)) <= RELATIVE[model.dtype], "equal rows differ"

    if case.seconds is not None:
        alone = min(clock.wall(lambda: encode(model.ops), case.device) for _ in range(3))
        case.row(
            **figures.first_token(batch, length, case.seconds), cuda_graph=False,
            vit_prefill_ms=alone * 1e3, vit_prefill_tokens=batch * count,
            vit_prefill_throughput=batch * count / alone,
            multimodal_prefill_ms=case.seconds * 1e3, multimodal_prefill_tokens=batch * length,
            multimodal_prefill_throughput=batch * length / case.seconds,
        )  # fmt: skip
    name = f"multimodal-bs={batch}-in={length}-image={count}"
    case.trace("prefill", name, lambda: call(box["pool"]))
