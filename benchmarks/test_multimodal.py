"""Multimodal prefill: the vision encoder and the prompt behind it, together. `vit` times the encoder alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import clock, figures, points
from benchmarks.checks import RELATIVE
from benchmarks.session import Case
from mllm import stages
from mllm.batch import VisionTokens, pack
from mllm.kernels.reference import REFERENCE
from mllm.programs import make_programs
from mllm.segments import chunk


@pytest.mark.benchmark(group="multimodal_prefill")
def test_multimodal_prefill(case: Case, batch: int, image_len: int, padded: str) -> None:
    session = case.session
    session.needs_vision()
    model = session.model
    vision, weights = model.config.vision, model.weights.vision
    assert vision is not None
    assert weights is not None
    session.fits(batch, image_len or 1)  # before a prompt of that length is made, whose own is looked at below
    picture, tokens = session.picture_prompt(image_len or None)
    layout = points.lay_out(model, tokens, picture)
    length, count = len(layout.tokens), layout.counts[0]
    session.fits(batch, length)
    box = {}
    box["pool"], table, rows = points.memory(model, batch, length)
    at = [row * length + layout.starts[0] + i for row in range(batch) for i in range(count)]
    size = session.or_skip(points.prompt_size, model, table, batch * length, batch, len(at), padded)
    patches = session.or_skip(points.patches_of, model, [picture] * batch, at, padded)
    chunks = [chunk(layout, row) for row in rows]
    packed, programs = pack(table, chunks, device=model.device, size=size), make_programs(model)

    def encode() -> VisionTokens:
        return programs.vit(patches, padded=size is not None).first(len(at))

    def call(pool):
        features = encode() if size is None else encode().padded(size.merged)
        box["pool"], logits = programs.prefill(pool, packed, features, padded=size is not None)
        return logits[:batch]

    def expected():
        exact = points.patches_of(model, [picture] * batch, at)
        features = stages.vit(weights, exact, config=vision, ops=REFERENCE)
        tokens = pack(table, chunks, device=model.device)
        _, logits = stages.prefill(model.weights, box["pool"], tokens, features, config=model.config, ops=REFERENCE)
        return logits

    item, grid = model.dtype.itemsize, layout.grids[0]
    work = figures.vit(vision, patches=(grid[0] * grid[1],) * batch, itemsize=item)
    work += figures.prefill(model.config.text, rows=batch, length=length, itemsize=item)
    logits = case.time(call, lambda: ((box["pool"],), {}), work=work)
    if case.seconds is not None:
        _note(case, encode, batch, length, count, captured=size is not None)
    case.trace("prefill", f"multimodal-bs={batch}-in={length}-image={count}-{padded}", lambda: call(box["pool"]))
    assert points.relative(logits, expected()) <= RELATIVE[model.dtype]
    assert points.relative(logits, logits[:1].expand_as(logits)) <= RELATIVE[model.dtype], "equal rows differ"


def _note(
    case: Case, encode: Callable[[], VisionTokens], batch: int, length: int, count: int, *, captured: bool
) -> None:
    """The row of this point; and the encoder alone, which is a part of it."""
    whole, alone = case.benchmark.stats.stats.median, min(clock.wall(encode, case.device) for _ in range(3))
    case.row(
        **figures.first_token(batch, length, whole), captured=captured, cuda_graph=captured,
        vit_prefill_ms=alone * 1e3, vit_prefill_tokens=batch * count, vit_prefill_throughput=batch * count / alone,
        multimodal_prefill_ms=whole * 1e3, multimodal_prefill_tokens=batch * length,
        multimodal_prefill_throughput=batch * length / whole,
    )  # fmt: skip
