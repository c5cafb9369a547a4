"""Prefill: whole text prompts onto an empty KV pool, logits after the last token of each."""

from __future__ import annotations

import pytest
import torch

from benchmarks import figures, points
from benchmarks.checks import RELATIVE
from benchmarks.session import Case
from mllm import stages, state
from mllm.batch import pack
from mllm.kernels.reference import REFERENCE
from mllm.programs import make_programs
from mllm.segments import chunk


@pytest.mark.benchmark(group="prefill")
def test_prefill(case: Case, batch: int, input_len: int, padded: str) -> None:
    """`graph`: padded and recorded, as `generate` runs its batches on a GPU; `eager`: as it is, of any size."""
    session = case.session
    session.fits(batch, input_len)
    model, prompt = session.model, session.settings.prompt
    layouts = [points.lay_out(model, t) for t in points.text_tokens(model, batch, input_len, prompt)]
    box = {}
    box["pool"], table, rows = points.memory(model, batch, input_len)
    size = session.or_skip(points.prompt_size, model, table, batch * input_len, batch, 0, padded)
    chunks = [chunk(lay, row) for lay, row in zip(layouts, rows, strict=True)]
    tokens, programs = pack(table, chunks, device=model.device, size=size), make_programs(model)

    def call(pool):
        box["pool"], logits = programs.prefill(pool, tokens, None, padded=size is not None)
        return logits[:batch]

    work = figures.prefill(model.config.text, rows=batch, length=input_len, itemsize=model.dtype.itemsize)
    logits = case.time(call, lambda: ((box["pool"],), {}), work=work)

    # the same in two parts by the reference ops: the second part reads the first from the pool
    pool, cut, parts = state.clone(box["pool"]), input_len // 2, []
    for start, stop in ((0, cut), (cut, input_len)) if cut else ((0, input_len),):
        part = pack(table, [chunk(y, r, start, stop) for y, r in zip(layouts, rows, strict=True)],
                    device=model.device)  # fmt: skip
        pool, out = stages.prefill(model.weights, pool, part, config=model.config, ops=REFERENCE)
        table = stages.commit(table, rows, [stop - start] * batch)
        parts.append(out)
    assert points.relative(logits, parts[-1]) <= RELATIVE[model.dtype]
    assert torch.isfinite(logits).all()

    if case.seconds is not None:
        known = session.prefill_s.get((batch, input_len), case.seconds)
        session.prefill_s[batch, input_len] = min(known, case.seconds)
        # where one new token was asked for, the point ends here: decode has no row for it
        note = case.row if 1 in session.settings.output_len else case.note
        note(
            **figures.first_token(batch, input_len, case.seconds),
            captured=size is not None,
            cuda_graph=size is not None,
        )
    case.trace("prefill", f"bs={batch}-in={input_len}-{padded}", lambda: call(box["pool"]))
