"""What the embedded model answers: `pytest benchmarks -k signs --examples 500` repeats the table of its card.

With `--peer signs` transformers is asked the same, one question at a time, and in float32 every answer must be equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm
from benchmarks.models import EMBEDDED
from benchmarks.session import Case, Session
from mllm.signs import FOLDER, pictures

TOGETHER = 50  # questions in one call: their pictures' features are what takes memory
# Exact answers to expect of 500; a smaller sample may miss them by chance, which ALLOWANCE makes room for.
BARS = {"shapes": 0.95, "text": 0.90, "count": 0.95, "place": 0.95, "where": 0.95, "change": 0.90, "chat": 0.95}
ALLOWANCE = 0.15


@pytest.fixture(scope="module")
def reference(session: Session) -> Any:
    """The embedded model as transformers runs it; None unless `--peer` names it."""
    if EMBEDDED not in session.settings.peer:
        return None
    from mllm.signs.evaluate import Reference  # here: transformers takes seconds to import

    return Reference(FOLDER, session.settings.dtype, session.settings.device)


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.benchmark(group="signs")
def test_signs(case: Case, reference: Any, kind: str) -> None:
    model = case.session.model
    if model.name != EMBEDDED:
        pytest.skip(f"{model.name} is not the embedded model")
    count = case.session.settings.examples
    items = [pictures.held_out(kind, index) for index in range(count)]
    prompts = [mllm.prompt(model, pictures.messages(item)) for item in items]

    def answers() -> list[mllm.Completion]:
        parts = [prompts[at : at + TOGETHER] for at in range(0, count, TOGETHER)]
        return [done for part in parts for done in mllm.generate(model, part, max_new_tokens=96)]

    out = case.time(answers, rounds=1, warmup=0, device_rounds=0)
    texts = [done.text for done in out]
    accuracy = sum(text == item.answer for text, item in zip(texts, items, strict=True)) / count
    case.note(kind=kind, examples=count, accuracy=accuracy)
    assert accuracy >= BARS[kind] - (0 if count >= 500 else ALLOWANCE)
    if reference is not None:
        theirs = [reference.answer(item) for item in items]
        case.note(same_as_transformers=sum(a == b for a, b in zip(texts, theirs, strict=True)) / count)
        if model.dtype == torch.float32:  # 16 bits may swap near ties
            assert texts == theirs
