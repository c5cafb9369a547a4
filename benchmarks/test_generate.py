"""End to end: `mllm.generate` from prompts and pictures to tokens, preprocessing, admission and the loop included."""

from __future__ import annotations

import pytest
import torch

import mllm
from benchmarks import clock, points
from benchmarks.session import Case
from mllm.model import Model

INPUT_LEN = 64


def _prompts(case: Case, batch: int, kind: str, model: Model) -> list[mllm.Prompt]:
    s = case.session.settings
    length = s.input_len[0] if s.input_len else None
    if kind == "text":
        return [mllm.Prompt(tokens=t) for t in points.text_tokens(model, batch, length or INPUT_LEN, s.prompt)]
    case.session.needs_vision()
    picture, tokens = case.session.picture_prompt(length)
    return [mllm.Prompt(tokens=tokens, images=[picture]) for _ in range(batch)]


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.benchmark(group="generate")
def test_generate(case: Case, batch: int, output_len: int, kind: str) -> None:
    model = case.session.model
    prompts = _prompts(case, batch, kind, model)
    whole = mllm.generate(model, prompts[:1], max_new_tokens=1)[0].prompt_tokens
    case.session.fits(batch, whole, output_len)
    out = case.time(lambda: mllm.generate(model, prompts, max_new_tokens=output_len))
    assert all(c.finish_reason in ("stop", "length") and c.prompt_tokens == whole for c in out)
    if kind == "image":  # equal prompts, equal answers
        assert len({c.tokens for c in out}) == 1
    if model.dtype == torch.float32:  # in 16 bits the company may swap near ties
        assert out[-1].tokens == mllm.generate(model, prompts[-1:], max_new_tokens=output_len)[0].tokens
    made = sum(len(c.tokens) for c in out)
    if case.seconds is not None:
        first = clock.wall(lambda: mllm.generate(model, prompts, max_new_tokens=1), case.device)
        case.note(
            batch_size=batch, input_len=whole, output_len=output_len, output_tokens=made,
            first_token_ms=first * 1e3, total_latency=case.seconds,
            overall_throughput=(batch * whole + made) / case.seconds, output_throughput=made / case.seconds,
        )  # fmt: skip
